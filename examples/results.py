"""Every study that there are folders for: `make results MODELS=… DATA=… OUT=…`.

A data set is the folder in DATA whose name ends with movies, jigsaw or ag_news; its classifiers are the folders in
MODELS whose names end alike. A decoder is asked about every data set. A study that fails stops no other one; all other
options go to each study. `OUT/results.md` shows the first table of each.
"""

import argparse
import importlib.util
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from study_tables import write_overview

LOG = logging.getLogger("study")

SETS = ("movies", "jigsaw", "ag_news")
_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Found:
    """A study that there are folders for."""

    kind: str
    data: Path
    model: Path
    decoder: bool

    @property
    def name(self) -> str:
        """Of its folder in OUT."""
        return f"{self.kind}-{self.model.stem if self.decoder else self.model.name}"


def find(models: Path, data: Path, decoders: Sequence[Path] = ()) -> list[Found]:
    """The studies that there are folders for, classifiers first."""
    found: list[Found] = []
    for kind in SETS:
        for texts in _ending(data, kind):
            found += [Found(kind, texts, model, False) for model in _ending(models, kind)]
    for kind in SETS:
        for texts in _ending(data, kind):
            found += [Found(kind, texts, model, True) for model in decoders]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all of them.

    Returns
    -------
    0 where all cells of all are done, 1 where some failed; stopped, 128 and the signal's number.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", required=True, type=Path, help="folder with folders of classifiers")
    parser.add_argument("--data", required=True, type=Path, help="folder with folders of texts")
    parser.add_argument("--out", required=True, type=Path, help="folder for a folder of each study")
    parser.add_argument("--decoder", type=Path, action="append", default=[], help="a decoder's folder or GGUF file")
    given, others = parser.parse_known_args(arguments)
    found = find(given.models, given.data, given.decoder)
    if not found:
        LOG.error(
            "error: no folder in %s and %s ends with the same of %s: see --models and --data",
            given.models,
            given.data,
            ", ".join(SETS),
        )
        return 1
    failed = 0
    for one in found:
        LOG.info("study %s", one.name)
        own = ["--decoder"] if one.decoder else []
        own += ["--model", str(one.model), "--data", str(one.data), "--out", str(given.out / one.name), *others]
        code: int = _script(one.kind).main(own)
        if code >= 128:
            return code
        failed += code != 0
    write_overview(given.out, [one.name for one in found])
    LOG.info(
        "%d of %d studies are complete; an overview is in %s",
        len(found) - failed,
        len(found),
        given.out / "results.md",
    )
    return 1 if failed else 0


def _ending(folder: Path, kind: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"*{kind}") if path.is_dir())


def _script(kind: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"{kind}_run", _HERE / kind / "run.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(_HERE / kind / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())
