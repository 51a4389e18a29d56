"""`clvq study items`: texts, the model's predictions, and for each method the concept of the salient word."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Bool
from pydantic import BaseModel, ConfigDict, Field

from ...cache.files import only_writer, sha256_of
from ...cache.reader import Cache
from ...errors import ConfigError
from ...pipeline.language_model import LanguageModel
from ...progress import SILENT, Progress
from ...trainer.run import Run
from ..partitions import choose_texts
from ..patched import read_clean
from ..rows import TextRows, rows_by_text
from ..saliency import stored_salient_rows
from .items import Item, Items, Key, KeyedItem, KeyedMethod, Sampling, key_path, read_items, read_key, write_items
from .sampling import Allocation, draw
from .views import Examples, Portrait, equal_views, portraits

_LETTERS = "bcdfghjkmnpqrstvwxz"
# Beyond what is shown: the item's own text, which is left out, may be among them.
_SPARE_SENTENCES = 3


class ItemConfig(BaseModel):
    """Settings of an item file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    items: Annotated[int, Field(ge=2)] = 100
    """Main items to draw; all texts where there are fewer."""
    training: Annotated[int, Field(ge=0)] = 3
    """Items to practise on, of other texts."""
    attention: Annotated[int, Field(ge=0)] = 3
    """Items that say how they want to be answered."""
    words: Annotated[int, Field(ge=1, le=50)] = 10
    """Words of a concept that are shown, at most."""
    sentences: Annotated[int, Field(ge=0, le=20)] = 5
    """Sentences of a concept that are shown, at most."""
    examples: Examples = "random"
    """Which sentences: any, or the most typical."""
    allocation: Allocation = "proportional"
    """Items by stratum of prediction and right or wrong: as many as their share, or equally many."""
    duplicate: bool = True
    """Whether the first run stands in for a second method too, as a control."""
    random: bool = True
    """Whether there is a method that shows the concept of another text, as a control."""
    saliency: Literal["gradient", "stored"] = "gradient"
    """By what the salient word is found: gradient × input, or what the cache holds."""
    split: tuple[str, ...] = ()
    """Splits to draw from; empty: the texts that the runs held out."""
    classes: tuple[str, ...] = ()
    """Names of the classes as shown; empty: those of the cache."""
    seed: int = 0
    """Draws, order, blind ids, sentences, controls."""


@dataclass(frozen=True)
class ItemsResult:
    """What was written."""

    path: Path
    key: Path
    digest: str
    """SHA-256 of the item file."""
    items: Items
    names: dict[str, KeyedMethod]
    """Blind id → the method; from the key."""


def make_items(
    cache: Cache,
    runs: Mapping[str, Path],
    out: Path,
    load: Callable[[], LanguageModel],
    config: ItemConfig,
    *,
    progress: Progress = SILENT,
    force: bool = False,
) -> ItemsResult:
    """Write the item file `out` and its key beside it.

    Parameters
    ----------
    runs
        Name → folder of each run; all of one lower site.
    load
        Loads the model that the cache was made with, with its head; called where saliency is by gradient.

    Raises
    ------
    ConfigError
        Where the settings do not fit the cache or the runs, or `out` is there with other contents and not `force`.
    RunMismatch
        Where a run was trained on another cache.
    """
    loaded = {name: Run.from_pretrained(path) for name, path in runs.items()}
    for run in loaded.values():
        run.check_cache(cache)
    site = _site(loaded)
    classes = _classes(cache, config)
    if out.suffix != ".json":
        raise ConfigError(f"--out {out}: an item file is JSON; give a name such as {out.with_suffix('.json')}")
    with only_writer(out.parent if out.parent.parts else Path()):
        texts, left_out = _population(cache, loaded, site, config)
        drawn = draw(_kinds(cache, texts), config.items, allocation=config.allocation, seed=config.seed)
        rest = np.setdiff1d(np.arange(len(texts)), drawn.texts)
        practice = np.random.default_rng([config.seed, 1]).permutation(rest)[: config.training].tolist()
        chosen = [texts[number] for number in [*drawn.texts, *practice]]
        if len(drawn.texts) < 2:
            raise ConfigError(
                f"{len(drawn.texts)} of the chosen texts of {cache.path} can be an item, and two are needed "
                f"(left out: {_listed(left_out)}): choose others with --split"
            )
        salient = _salient(cache, chosen, site, load, config, progress)
        maker = _Maker(cache, loaded, config, chosen, salient, main=len(drawn.texts), classes=len(classes))
        methods = maker.methods({name: sha256_of(path / "model.safetensors") for name, path in runs.items()})
        items, keyed = maker.items(methods, drawn.weights, progress)
        made = Items(
            classes=classes,
            methods=tuple(sorted(methods)),
            sampling=Sampling(
                seed=config.seed,
                allocation=config.allocation,
                population=len(texts),
                left_out=left_out,
                strata=drawn.strata,
            ),
            items=items,
        )
        key_of: dict[str, Any] = {
            "cache_id": cache.id, "site": site, "saliency": config.saliency, "methods": methods, "items": keyed,
        }  # fmt: skip
        return _write(out, made, key_of, force=force)


def _site(runs: Mapping[str, Run]) -> str:
    lowers = sorted({run.config.lower for run in runs.values()})
    if len(lowers) > 1:
        raise ConfigError(
            f"the runs have different lower sites ({', '.join(lowers)}), and an item shows one salient word: "
            "give runs of one lower site"
        )
    return lowers[0]


def _classes(cache: Cache, config: ItemConfig) -> tuple[str, ...]:
    if not cache.manifest.predictions:
        raise ConfigError(
            f"{cache.path} was extracted without predictions, which items are about: "
            "extract with --task classify or --task prompt"
        )
    held = cache.manifest.class_names or [str(number) for number in range(cache.manifest.classes or 0)]
    if config.classes and (len(config.classes) != len(held) or len(set(config.classes)) != len(held)):
        raise ConfigError(
            f"--classes names {', '.join(config.classes)}, and the model of {cache.path} tells {len(held)} classes "
            f"apart ({', '.join(held)}): give as many different names, in that order"
        )
    return config.classes or tuple(held)


def _population(
    cache: Cache, runs: Mapping[str, Run], site: str, config: ItemConfig
) -> tuple[list[TextRows], dict[str, int]]:
    """The texts that can be items, and how many cannot, by why."""
    # Refused here, before anything is computed, where the texts stayed behind.
    cache.read_column("char_start", np.zeros(0, dtype=np.int64))
    chosen = choose_texts(cache, runs, config.split)
    contents = cache.texts["text"]
    predictions = cache.texts["prediction"]
    texts = rows_by_text(cache, chosen)
    stored = stored_salient_rows(cache, texts, site) if config.saliency == "stored" else None
    kept: list[TextRows] = []
    seen: set[str] = set()
    left_out = {"without a row": int(chosen.sum()) - len(texts)}
    for place, rows in enumerate(texts):
        content = contents[rows.text].as_py()
        why = None
        if len(rows.ordinary()) == 0 or (stored is not None and stored[place] is None):
            why = "without a salient word"
        elif predictions[rows.text].as_py() is None:
            why = "without a prediction"
        elif content in seen:
            why = "the same as another"
        if why is None:
            seen.add(content)
            kept.append(rows)
        else:
            left_out[why] = left_out.get(why, 0) + 1
    return kept, {why: count for why, count in left_out.items() if count}


def _kinds(cache: Cache, texts: Sequence[TextRows]) -> list[tuple[int, bool | None]]:
    labels, predictions = cache.texts["label"], cache.texts["prediction"]
    kinds: list[tuple[int, bool | None]] = []
    for rows in texts:
        label, prediction = labels[rows.text].as_py(), predictions[rows.text].as_py()
        kinds.append((prediction, None if label is None else label == prediction))
    return kinds


def _salient(
    cache: Cache,
    texts: Sequence[TextRows],
    site: str,
    load: Callable[[], LanguageModel],
    config: ItemConfig,
    progress: Progress,
) -> list[int]:
    if config.saliency == "stored":
        found = stored_salient_rows(cache, texts, site)
    else:
        found = read_clean(cache, load(), texts, site=site, salient=None, progress=progress).salient
    return [row for row in found if row is not None]


def _listed(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {why}" for why, count in left_out.items()) or "none"


class _Maker:
    """Items of chosen texts, `main` main ones first."""

    def __init__(
        self,
        cache: Cache,
        runs: Mapping[str, Run],
        config: ItemConfig,
        texts: Sequence[TextRows],
        salient: Sequence[int],
        *,
        main: int,
        classes: int,
    ) -> None:
        self._cache, self._runs, self._config, self._texts = cache, runs, config, texts
        self._salient, self._main, self._classes = salient, main, classes
        self._row = np.array([rows.row[row] for rows, row in zip(texts, salient, strict=True)])
        self._generator = np.random.default_rng([config.seed, 2])

    def methods(self, weights: Mapping[str, str]) -> dict[str, KeyedMethod]:
        """Blind id → method: the runs, then the controls."""
        ids: list[str] = []
        while len(ids) < len(self._runs) + 2:
            new = "".join(self._generator.choice(list(_LETTERS), 4).tolist())
            ids += [] if new in ids else [new]
        found = {
            blind: KeyedMethod(
                role="run", name=name, method=run.config.method, run_seed=run.config.seed, run_sha256=weights[name]
            )
            for blind, (name, run) in zip(ids, self._runs.items(), strict=False)
        }
        first = next(iter(self._runs))
        if self._config.duplicate:
            found[ids[-2]] = KeyedMethod(role="duplicate", name=f"{first}, once more", of=ids[0])
        if self._config.random:
            found[ids[-1]] = KeyedMethod(role="random", name="concept of another text")
        if len(found) < 2:
            raise ConfigError("one run without controls has nothing to be compared with: give more runs, or a control")
        return found

    def items(
        self, methods: Mapping[str, KeyedMethod], weights: Sequence[float], progress: Progress
    ) -> tuple[tuple[Item, ...], dict[str, KeyedItem]]:
        """All items, and what stands behind those that are of a text."""
        shown = self._shown(methods)
        faces = self._portraits(shown, progress)
        count = len(self._texts)
        ids = [f"i{number:04d}" for number in self._generator.permutation(count + self._config.attention).tolist()]
        items: list[Item] = []
        keyed: dict[str, KeyedItem] = {}
        contents, labels = self._cache.texts["text"], self._cache.texts["label"]
        for place, rows in enumerate(self._texts):
            content = contents[rows.text].as_py()
            mine = {blind: faces[place_shown[place]] for blind, place_shown in shown.items()}
            start, end = (int(self._cache.column(name)[self._row[place]]) for name in ("char_start", "char_end"))
            items.append(
                Item(
                    id=ids[place],
                    kind="main" if place < self._main else "training",
                    text=content,
                    salient=(start, end),
                    prediction=int(self._cache.texts["prediction"][rows.text].as_py()),
                    weight=weights[place] if place < self._main else 1.0,
                    concepts=equal_views(mine, content, words=self._config.words, sentences=self._config.sentences),
                )
            )
            keyed[ids[place]] = KeyedItem(
                text_id=int(self._cache.texts["text_id"][rows.text].as_py()),
                label=labels[rows.text].as_py(),
                concepts={blind: place_shown[place][1] for blind, place_shown in shown.items()},
                drawn_from=next((shown[blind][place][0] for blind in shown if methods[blind].role == "random"), None),
            )
        for number in range(self._config.attention):
            items.append(
                Item(
                    id=ids[count + number],
                    kind="attention",
                    text="",
                    salient=None,
                    prediction=number % self._classes,
                    weight=1.0,
                    concepts={},
                    best=str(self._generator.choice(sorted(methods))),
                )
            )
        return tuple(sorted(items, key=lambda item: item.id)), keyed

    def _shown(self, methods: Mapping[str, KeyedMethod]) -> dict[str, list[tuple[str, int]]]:
        """Blind id → (run, concept) that it shows for each text."""
        vectors = self._cache.vectors(next(iter(self._runs.values())).config.lower, self._row)
        own = {name: run.assign(vectors).tolist() for name, run in self._runs.items()}
        names = list(self._runs)
        shown: dict[str, list[tuple[str, int]]] = {}
        for blind, method in methods.items():
            if method.role == "random":
                shown[blind] = self._of_others(own)
            else:
                name = method.name if method.role == "run" else names[0]
                shown[blind] = [(name, concept) for concept in own[name]]
        return shown

    def _of_others(self, own: Mapping[str, Sequence[int]]) -> list[tuple[str, int]]:
        """For each text the concept of another one by a run drawn at random; each text lends to one other.

        So the control shows the same concepts as the methods do, as often, but of the wrong texts.
        """
        found: list[tuple[str, int]] = []
        names = list(own)
        for texts in (range(self._main), range(self._main, len(self._texts))):
            # One cycle through all (Sattolo 1986): no text lends to itself.
            lends = list(texts)
            for place in range(len(lends) - 1, 0, -1):
                other = int(self._generator.integers(place))
                lends[place], lends[other] = lends[other], lends[place]
            for lender in lends:
                name = names[int(self._generator.integers(len(names)))]
                found.append((name, own[name][lender]))
        return found

    def _portraits(
        self, shown: Mapping[str, Sequence[tuple[str, int]]], progress: Progress
    ) -> dict[tuple[str, int], Portrait]:
        faces: dict[tuple[str, int], Portrait] = {}
        progress.begin("describe", len(self._runs), "runs")
        for name, run in self._runs.items():
            wanted = sorted({concept for pairs in shown.values() for owner, concept in pairs if owner == name})
            found = portraits(
                self._cache,
                run,
                wanted,
                self._trained(run),
                classes=self._classes,
                words=self._config.words,
                sentences=self._config.sentences + _SPARE_SENTENCES,
                examples=self._config.examples,
                seed=self._config.seed,
            )
            faces |= {(name, concept): portrait for concept, portrait in found.items()}
            progress.advance()
        return faces

    def _trained(self, run: Run) -> Bool[np.ndarray, " text"]:
        texts = self._cache.splits(run.config.split)
        held_out = self._cache.text_index[run.held_out_texts]
        texts[held_out[held_out >= 0]] = False
        return texts


def _write(out: Path, items: Items, key_of: Mapping[str, Any], *, force: bool) -> ItemsResult:
    if out.is_file() and not force:
        there, digest = read_items(out)
        if there == items:
            key = read_key(key_path(out), digest)
            return _result(out, items, key)
        raise ConfigError(
            f"{out} is there and was made with other settings or runs; answers may belong to it: "
            "give another --out, or --force to replace it"
        )
    return _result(out, items, write_items(out, items, key_of))


def _result(out: Path, items: Items, key: Key) -> ItemsResult:
    return ItemsResult(path=out, key=key_path(out), digest=key.items_sha256, items=items, names=dict(key.methods))
