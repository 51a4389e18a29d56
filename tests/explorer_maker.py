"""Caches with texts of every kind, made with tiny models, and runs trained on them, for the tests of the explorer."""

import json
import random
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import clvq
import torch
from clvq.evaluation.serving import listen, local_names
from clvq.explorer.build import ExploreConfig, explore
from clvq.explorer.data_files import read_script
from clvq.explorer.folder import Site
from clvq.explorer.live import Live
from clvq.explorer.server import make_live
from clvq.pipeline.config import ExtractConfig
from clvq.pipeline.data import read_texts
from clvq.pipeline.forward import load_model
from clvq.pipeline.plan import make_plan
from clvq.pipeline.source import find_model
from clvq.pipeline.typed import read_typed
from clvq.trainer.config import with_overrides
from clvq.trainer.fit import fit
from clvq.trainer.methods import method_config

from . import tiny
from .study_maker import HOSTILE

LABELS = ("anger </script>", "joy & <b>")
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "was", "well", "known", "don't", "😀")
EVIDENCE = "evidence"
METHODS = (("km", "kmeans", "hidden.1"), ("sparse", "sae", "hidden.1"), ("upper", "kmeans", "hidden.2"))


@dataclass(frozen=True)
class Shown:
    """A cache, the model that made it, and runs by name."""

    cache: clvq.Cache
    model_folder: Path
    config: ExtractConfig
    model: Any
    runs: dict[str, Path]


def write_texts(folder: Path, *, texts: int = 80, seed: int = 0) -> Path:
    """The splits dev and train: plain texts and hostile ones, with labels, some unknown, and evidence in most."""
    generator = random.Random(seed)
    lines: dict[str, list[str]] = {"dev": [], "train": []}
    for number in range(texts):
        words = generator.choices(WORDS, k=generator.randint(2, 9))
        text = " ".join(words)
        evidence: Any = [words[0], " ".join(words[-2:])]
        if number % 5 == 2:
            odd = HOSTILE[number // 5 % len(HOSTILE)]
            text, evidence = f"{odd} {text}", odd[:40].strip() or None
        label = generator.choice([*LABELS, None])
        record = {"text": text, "label": label, EVIDENCE: evidence if isinstance(evidence, list) else [evidence or ""]}
        lines["dev" if number % 4 == 0 else "train"].append(json.dumps(record))
    folder.mkdir()
    for split, own in lines.items():
        (folder / f"{split}.jsonl").write_text("\n".join(own) + "\n", encoding="utf-8")
    return folder


def make_shown(
    folder: Path, *, family: str = "bert", methods: tuple[tuple[str, str, str], ...], texts: int = 80, **settings: Any
) -> Shown:
    """Extract and train.

    Parameters
    ----------
    methods
        Name, method and lower site of each run.
    settings
        Those of the extraction.
    """
    names = tuple(enumerate(LABELS))
    task = settings.setdefault("task", "classify")
    model_folder = tiny.make_model(
        folder / "model", family, **({"classes": 2, "id2label": names} if task == "classify" else {"continues": True})
    )
    source = find_model(str(model_folder))
    data = read_texts(str(write_texts(folder / "data", texts=texts)), keep_fields=(EVIDENCE,))
    settings = {"sites": ("hidden.1", "hidden.2", "hidden.3"), "max_length": 32, "batch_tokens": 256} | settings
    config = ExtractConfig(**settings)
    plan = make_plan(source, data, config)
    tiny.run(plan, folder / "cache")
    cache = clvq.Cache(folder / "cache")
    runs = {}
    for name, method, lower in methods:
        runs[name] = folder / name
        made = method_config(method, lower=lower, upper="hidden.3", codes=24, classes=2, held_out="dev", seed=1)
        if method == "sae":
            made = with_overrides(made, {"encoder.epochs": "2", "encoder.k": "4", "encoder.aux_k": "0"})
        fit(cache, made, runs[name], device=torch.device("cpu"))
    return Shown(cache, model_folder, config, load_model(source, config, device=torch.device("cpu")), runs)


class Served:
    """A cache with its site and the live part.

    Parameters
    ----------
    most
        Texts that can be opened.
    settings
        Of the extraction.
    """

    def __init__(self, folder: Path, *, most: int = 5_000, **settings: Any) -> None:
        self.shown = make_shown(folder, methods=METHODS, texts=60, **settings)
        self.folder = folder / "site"
        config = ExploreConfig(max_texts=most, rationale=EVIDENCE)
        explore(self.shown.cache, self.shown.runs, self.folder, config)
        self.site = Site.read(self.folder)
        self.live = self.make(self.shown.runs)
        self.port = 0

    def make(self, runs: dict[str, Path]) -> Live:
        config = self.shown.config
        return make_live(
            self.site, self.shown.cache, runs, self.shown.model,
            lambda model, text, sites: read_typed(model, config, text, sites),
        )  # fmt: skip

    @cached_property
    def texts(self) -> list[dict[str, Any]]:
        about = read_script(self.folder, "site")["texts"]
        return [
            text
            for start in range(0, about["count"], about["per_shard"])
            for text in read_script(self.folder, f"texts/{start // about['per_shard']:03d}")
        ]


@contextmanager
def serving(one: Served) -> Iterator[Served]:
    """The server in a thread, so that the model need not be loaded again; `port` says where."""
    import uvicorn
    from clvq.explorer.application import make_app

    with closing(listen("127.0.0.1", 0)) as listener:
        one.port = listener.getsockname()[1]
        names = local_names("127.0.0.1", one.port)
        app = make_app(one.site, one.live, hosts=names, origins={f"http://{name}" for name in names})
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, ws="none", loop="asyncio"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield one
        server.should_exit = True
        thread.join()
