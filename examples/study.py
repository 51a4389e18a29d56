"""One study: a model, a data set and a pair of sites; every method and seed trained, ablated and measured.

    python examples/study.py --model MODEL --data DATA --lower 8 --upper 12 --out OUT

Everything is done by `clvq` commands, each a cell in a process of its own. Run the same command again to go on: cells
that are done are skipped, failed ones tried again. `OUT/results.md` and `OUT/results.json` hold the tables.
"""

import argparse
import hashlib
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from clvq.errors import ClvqError
from study_cells import LOG, Cell, NotToRunError, read_record, run_cells, write_json
from study_methods import METHODS, Budget, Cost, Method, budget, pilot_cost
from study_tables import write_tables

EVALUATIONS: Mapping[str, Sequence[str]] = {
    # As published: a probe on one vector per text, and an uncentred projection.
    "published": ("--read-out", "probe", "--removal", "projection", "--rows-changed", "salient"),
    "quality": (),
}
"""Name → options of `clvq ablate` for the runs of each method; `quality` is a command of its own."""
# The model itself, and what is left when the common mean is not removed too.
_MODEL = ("--read-out", "model", "--removal", "centred", "--controls", "matched code,same label")
TOGETHER: Mapping[str, Sequence[str]] = {
    "salient": (*_MODEL, "--rows-changed", "salient"),
    # Methods and codes of other texts remove other norms: what own codes do on the way there.
    "all": (*_MODEL, "--rows-changed", "all", "--strengths", "0.4,0.55,0.7,0.85,1", "--curves", "own"),
}
"""Name → options for the runs of all methods together, whose differences are then paired by text."""


@dataclass(frozen=True)
class Study:
    """Everything that a study is told; the options of the command."""

    model: str
    data: str
    out: Path
    lower: str
    upper: str
    train_split: str = "train"
    eval_split: str = "dev"
    texts: int = 4000
    eval_texts: int | None = None
    rationale: str | None = None
    text_field: str = "text"
    label_field: str | None = None
    subset: str | None = None
    rows: str = "token"
    max_length: int | None = None
    dtype: str | None = None
    prompt: Path | None = None
    answers: str | None = None
    chat: bool = False
    methods: tuple[str, ...] = tuple(METHODS)
    evaluations: tuple[str, ...] = (*EVALUATIONS, *TOGETHER)
    seeds: int = 3
    seed: int = 42
    codes: int = 400
    latents: int = 4096
    agglomerative_rows: int = 20_000
    precision: str = "float32"
    at_most_epochs: int = 20
    at_most_cpu_minutes: float = 10.0
    threads: int = 1
    jobs: int = 2
    force: bool = False

    def run_names(self, method: str) -> list[str]:
        """The names of a method's runs, one for each seed."""
        return [f"{method}-seed={self.seed + number}" for number in range(self.seeds)]


_HELP = {
    "model": "folder, GGUF file or Hub name of the model",
    "data": "file, folder or Hub name of the texts, with the two splits",
    "out": "folder of the study",
    "lower": "site that concepts live at",
    "upper": "site that they are mapped to",
    "train_split": "split to train on",
    "eval_split": "split to measure and ablate on; also where the runs measure their held-out loss",
    "texts": "training texts, a seeded sample where there are more",
    "eval_texts": "texts to measure and ablate on, sampled too; else the whole split",
    "rationale": "field with the human rationale of each text, such as evidence",
    "text_field": "field with the text",
    "label_field": "field with the label; 'label' where there is one",
    "subset": "configuration of a Hub data set",
    "rows": "what a row is: token or word",
    "max_length": "tokens at which texts are cut; else the model's window",
    "dtype": "type that the model computes in, such as bfloat16; else its own",
    "prompt": "file with a prompt, for a decoder without a head; {text} stands for the text",
    "answers": "what the prompted model chooses from, such as negative=terrible,positive=great",
    "chat": "use the model's chat template around the prompt",
    "methods": "methods, with commas between",
    "evaluations": "evaluations, with commas between",
    "seeds": "seeds of each method",
    "seed": "the first of them",
    "codes": "concepts of the methods with codes, and components of pca",
    "latents": "latents of the sparse autoencoders",
    "agglomerative_rows": "rows that are clustered by agglomerative; memory grows with the square",
    "precision": "of the products of networks: float32, or bfloat16, faster where the processor has units for it",
    "at_most_epochs": "limit of a fit",
    "at_most_cpu_minutes": "limit of a fit: a pilot of one epoch says how many epochs fit in",
    "threads": "threads of each process",
    "jobs": "processes side by side",
    "force": "replace a cache and runs that other settings made",
}


def main(
    arguments: Sequence[str] | None = None,
    *,
    about: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    decoder: Mapping[str, Any] | None = None,
) -> int:
    """Run a study from the command line.

    Parameters
    ----------
    arguments
        Those of the command; else what it was given.
    about
        What `--help` says.
    defaults
        Options that need not be given, by their names in `Study`.
    decoder
        Those that `--decoder` adds or changes; without it there is no such option.

    Returns
    -------
    0 where all cells are done, 1 where some failed; stopped, 128 and the signal's number.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    study = _parse(arguments, about or __doc__ or "", defaults or {}, decoder)
    try:
        return run_study(study)
    except ClvqError as error:
        LOG.error("error: %s", error)
        return 1
    except _Stopped as stopped:
        LOG.error("stopped; what is finished is kept: run the same command again to go on")
        return 128 + stopped.number


def run_study(study: Study) -> int:
    """Run all cells and write the tables; 0 where all are done, else 1."""
    with _signals() as check:
        study.out.mkdir(parents=True, exist_ok=True)
        texts = _take_texts(study)
        write_json(study.out / "study.json", _plain(study))
        cells = cells_of(study, texts)
        records = run_cells(cells, study.out, jobs=study.jobs, threads=study.threads, check=check)
    write_tables(study.out)
    bad = [record for record in records.values() if record.state != "done"]
    LOG.info("%d of %d cells are done; the tables are in %s", len(records) - len(bad), len(records), study.out)
    return 1 if bad else 0


def cells_of(study: Study, texts: str) -> list[Cell]:
    """All cells, each before those that need it.

    Parameters
    ----------
    texts
        Hash of the texts, on which everything depends.
    """
    extract = Cell("extract", partial(_extract, study), Path("cache/manifest.json"), salt=texts)
    cells = [extract]
    for name in study.methods:
        method = METHODS[name]
        needs: tuple[str, ...] = ("extract",)
        if method.epochs is not None:
            pilot = Cell(f"pilot/{name}", partial(_pilot, study, name), _model("pilots", name), needs)
            cells.append(pilot)
            needs = (*needs, pilot.name)
        runs = [
            Cell(f"train/{run}", partial(_train, study, name, run, study.seed + number), _model("runs", run), needs)
            for number, run in enumerate(study.run_names(name))
        ]
        cells += runs
    # The longest first.
    needs = tuple(f"train/{run}" for name in study.methods for run in study.run_names(name))
    for evaluation in [one for one in study.evaluations if one in TOGETHER]:
        folder = Path("ablations", evaluation)
        cells.append(Cell(str(folder), partial(_together, study, evaluation, folder), folder / "ablation.json", needs))
    for name in study.methods:
        needs = tuple(f"train/{run}" for run in study.run_names(name))
        for evaluation in [one for one in study.evaluations if one in EVALUATIONS]:
            folder = _evaluation(name, evaluation)
            file = "quality.json" if evaluation == "quality" else "ablation.json"
            command = partial(_evaluate, study, name, evaluation, folder)
            cells.append(Cell(str(folder), command, folder / file, needs))
    return cells


class _Stopped(Exception):
    """A signal came."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def _signals() -> Iterator[Callable[[], None]]:
    """A function that raises `_Stopped` once Ctrl-C or SIGTERM came; in between nothing is torn apart."""
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }

    def check() -> None:
        if came:
            raise _Stopped(came[0])

    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _model(kind: str, name: str) -> Path:
    return Path(kind, name, "model.safetensors")


def _evaluation(method: str, evaluation: str) -> Path:
    return Path("quality", method) if evaluation == "quality" else Path("ablations", method, evaluation)


def _extract(study: Study) -> list[str]:
    command = ["extract", _at(study.model), "texts", "--sites", f"{study.lower},{study.upper}", "--out", "cache"]
    command += ["--split", f"{study.train_split},{study.eval_split}", "--train-split", study.train_split]
    command += ["--rows", study.rows, "--threads", str(study.threads)]
    command += [] if study.max_length is None else ["--max-length", str(study.max_length)]
    command += [] if study.dtype is None else ["--dtype", study.dtype]
    command += [] if study.rationale is None else ["--keep-fields", study.rationale]
    if study.prompt is None:
        command += ["--task", "classify"]
    else:
        command += ["--task", "prompt", "--prompt", _at(str(study.prompt)), "--answers", study.answers or ""]
        command += ["--chat" if study.chat else "--no-chat"]
    return command + _force(study)


def _base(study: Study, name: str) -> list[str]:
    """What all trainings of a method have in common."""
    _require(study, "extract", Path("cache/manifest.json"))
    method = METHODS[name]
    command = ["train", "cache", "--lower", study.lower, "--upper", study.upper, *method.options]
    command += ["--split", study.train_split, "--held-out", study.eval_split, "--threads", str(study.threads)]
    if method.size is not None:
        command += ["--codes", str(getattr(study, method.size))]
    if method.epochs is not None:
        command += ["--set", f"fit.precision={study.precision}"]
    if name == "agglomerative":
        command += ["--set", f"rows={study.agglomerative_rows}"]
    return command + _force(study)


def _pilot(study: Study, name: str) -> list[str]:
    one = [word for setting in METHODS[name].epochs or {} for word in ("--set", f"{setting}=1")]
    return [*_base(study, name), *one, "--seed", str(study.seed), "--out", f"pilots/{name}"]


def _train(study: Study, name: str, run: str, seed: int) -> list[str]:
    command, method = _base(study, name), METHODS[name]
    if method.epochs is not None:
        _require(study, f"pilot/{name}", _model("pilots", name))
        for setting, count in _budget(study, name, method).epochs.items():
            command += ["--set", f"{setting}={count}"]
    return [*command, "--seed", str(seed), "--out", f"runs/{run}"]


def _budget(study: Study, name: str, method: Method) -> Budget:
    """The epochs of a method. What its pilot took is written down once, so that the same runs are trained again."""
    measured, file = study.out / "budgets" / f"{name}.cost.json", study.out / "budgets" / f"{name}.json"
    if not measured.is_file():
        record = read_record(study.out, f"pilot/{name}")
        if record is None:
            raise NotToRunError(f"the record of pilot/{name} is missing")
        cost = pilot_cost(
            method,
            study.out / "pilots" / name,
            cpu_seconds=record.cpu_seconds,
            wall_seconds=record.wall_seconds,
        )
        write_json(measured, asdict(cost))
    cost = Cost(**json.loads(measured.read_text(encoding="utf-8")))
    found = budget(method, cost, epochs=study.at_most_epochs, cpu_seconds=60 * study.at_most_cpu_minutes)
    write_json(file, asdict(found))
    return found


def _evaluate(study: Study, name: str, evaluation: str, folder: Path) -> list[str]:
    command = _of_runs(study, [name], folder)
    if evaluation == "quality":
        return ["quality", *command, *([] if study.rationale is None else ["--rationale", study.rationale])]
    options = list(EVALUATIONS[evaluation])
    if METHODS[name].has_latents:
        # The second is what the paper's revision does to autoencoders.
        options[options.index("projection")] = "projection,subspace"
    return ["ablate", *command, "--model", _at(study.model), *options]


def _together(study: Study, evaluation: str, folder: Path) -> list[str]:
    return ["ablate", *_of_runs(study, study.methods, folder), "--model", _at(study.model), *TOGETHER[evaluation]]


def _of_runs(study: Study, methods: Sequence[str], folder: Path) -> list[str]:
    """What a command on all finished runs of the methods is told."""
    runs = [run for name in methods for run in study.run_names(name)]
    finished = [f"runs/{run}" for run in runs if _finished(study, f"train/{run}", _model("runs", run))]
    if not finished:
        raise NotToRunError(f"no run of {', '.join(methods)} is finished")
    # What stands there follows from the runs: with a run more it is made anew.
    return ["cache", *finished, "--out", str(folder), "--split", study.eval_split, "--force"]


def _finished(study: Study, cell: str, made: Path) -> bool:
    record = read_record(study.out, cell)
    return record is not None and record.state == "done" and (study.out / made).is_file()


def _require(study: Study, cell: str, made: Path) -> None:
    if not _finished(study, cell, made):
        raise NotToRunError(f"{cell} is not done")


def _force(study: Study) -> list[str]:
    return ["--force"] if study.force else []


def _at(place: str) -> str:
    """A path as it is seen from anywhere; a Hub name as it is."""
    path = Path(place).expanduser()
    return str(path.resolve()) if path.exists() else place


def _take_texts(study: Study) -> str:
    """Write the texts of both splits into `texts/`, and give their hash."""
    from clvq.pipeline.data import read_texts

    wanted = {name: getattr(study, name) for name in ("texts", "eval_texts", "train_split", "eval_split", "rationale")}
    wanted |= {"data": _at(study.data), "subset": study.subset, "fields": [study.text_field, study.label_field]}
    file = study.out / "texts.json"
    if file.is_file():
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored["wanted"] == wanted:
            return str(stored["hash"])
    counts: dict[str, int] = {}
    identities: list[Any] = []
    for split, most in ((study.train_split, study.texts), (study.eval_split, study.eval_texts)):
        found = read_texts(
            study.data,
            splits=[split],
            text_field=study.text_field,
            label_field=study.label_field,
            keep_fields=[] if study.rationale is None else [study.rationale],
            max_texts=most,
            subset=study.subset,
        )
        kept = {name: values.to_pylist() for name, values in found.kept.items()}
        lines = []
        for place in range(len(found)):
            number, names = found.label[place], found.class_names
            label = names[number] if found.labels_are_names and names and number is not None else number
            own = {name: values[place] for name, values in kept.items()}
            record = {"text": found.text[place], "label": label, **own}
            lines.append(json.dumps(record, ensure_ascii=False))
        target = study.out / "texts" / f"{split}.jsonl"
        target.parent.mkdir(exist_ok=True)
        target.write_text("\n".join(lines) + "\n", encoding="utf-8")
        counts[split] = len(found)
        identities.append(found.identity)
    digest = _hash(study.out / "texts", [study.train_split, study.eval_split])
    write_json(file, {"wanted": wanted, "hash": digest, "counts": counts, "identity": identities})
    return digest


def _hash(folder: Path, splits: Sequence[str]) -> str:
    whole = hashlib.sha256()
    for split in splits:
        whole.update((folder / f"{split}.jsonl").read_bytes())
    return whole.hexdigest()


def _plain(study: Study) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(study).items()}


def _parse(
    arguments: Sequence[str] | None, about: str, defaults: Mapping[str, Any], decoder: Mapping[str, Any] | None
) -> Study:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if decoder is not None:
        flag = argparse.ArgumentParser(add_help=False)
        flag.add_argument("--decoder", action="store_true")
        chosen, arguments = flag.parse_known_args(arguments)
        defaults = {**defaults, **(decoder if chosen.decoder else {})}
        parser.add_argument("--decoder", action="store_true", help="the model is a decoder, which a prompt asks")
    for field in fields(Study):
        default = defaults.get(field.name, field.default)
        options: dict[str, Any] = {"required": True} if default is MISSING else {"default": default}
        if field.type is bool:
            options["action"] = "store_true"
        else:
            options["type"] = _READ.get(field.type, str)
        known = default is MISSING or default is None or field.type is bool
        shown = ",".join(default) if isinstance(default, tuple) else default
        text = _HELP[field.name] if known else f"{_HELP[field.name]} [{shown}]"
        parser.add_argument(f"--{field.name.replace('_', '-')}", help=text.replace("%", "%%"), **options)
    study = Study(**{name: value for name, value in vars(parser.parse_args(arguments)).items() if name != "decoder"})
    for what, given, known_names in (
        ("method", study.methods, METHODS),
        ("evaluation", study.evaluations, (*EVALUATIONS, *TOGETHER)),
    ):
        strange = [name for name in given if name not in known_names]
        if strange:
            parser.error(f"there is no {what} {strange[0]!r}: use some of {', '.join(known_names)}")
    for name in ("texts", "seeds", "jobs", "threads", "at_most_epochs"):
        if getattr(study, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(study, name)}; it must be at least 1")
    if (study.prompt is None) != (study.answers is None):
        parser.error("--prompt and --answers belong together: give both or neither")
    return study


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


_READ: Mapping[Any, Callable[[str], Any]] = {
    Path: Path,
    Path | None: Path,
    str | None: lambda text: text or None,
    int: int,
    int | None: int,
    float: float,
    tuple[str, ...]: _names,
}


if __name__ == "__main__":
    sys.exit(main())
