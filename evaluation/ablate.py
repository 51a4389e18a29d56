"""`clvq ablate`: what happens to predictions when a text's concept is taken out, next to controls of the same size."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool
from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..cache.files import only_writer, sha256_of
from ..cache.reader import Cache
from ..errors import ConfigError
from ..pipeline.language_model import LanguageModel
from ..progress import SILENT, Progress
from ..trainer.run import Run
from .ablation_folder import PER_TEXT, RESULT, table_of, write
from .concept_removal import ConceptEffect, by_total_effect, concept_effects, remove_each_concept
from .controls import CONTROLS, OWN, Control
from .outcome import Condition, Outcome
from .patched import CleanTexts, Forwards, read_clean
from .probed import probed_texts, read_out_probe
from .readouts import Asked, Removals, labels_of, read_out_model
from .removal import Removal
from .results import ABLATION_VERSION, stored_result
from .rows import RowsChanged, TextRows, changed_rows, rows_by_text
from .saliency import stored_salient_rows
from .tables import Contrast, Curve, GroupLine, Line, ReadOut, Tables, common_texts, seed_groups, tabulate


class AblateConfig(BaseModel):
    """Settings of an ablation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    read_outs: Annotated[tuple[ReadOut, ...], Field(min_length=1)] = ("model", "probe")
    """Who is asked after the removal."""
    removals: Annotated[tuple[Removal, ...], Field(min_length=1)] = ("projection", "centred")
    """How a concept is taken out."""
    controls: tuple[Control, ...] = CONTROLS
    """What the own code is compared with."""
    strengths: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)] = (1.0,)
    """Shares of the displacement that are taken away."""
    curves: Literal["all", "own"] = "all"
    """What is removed at the weaker strengths too: all, or all but controls."""
    rows_changed: RowsChanged = "salient"
    """Which rows lose their concept."""
    saliency: Literal["gradient", "stored"] = "gradient"
    """By what the salient row is found: gradient × input, or what the cache holds."""
    subspace_k: Annotated[int | None, Field(ge=1)] = None
    """Strongest active latents of a row that `subspace` removes; all without it."""
    concepts: bool = False
    """Also remove each concept by itself, everywhere, by the model read-out."""
    min_texts: Annotated[int, Field(ge=2)] = 5
    """Texts that a concept must be removed from to have an interval and a test."""
    split: tuple[str, ...] = ()
    """Splits to evaluate; empty: the texts that the runs held out."""
    max_texts: int | None = None
    """Evaluate a seeded sample of so many texts."""
    seed: int = 0
    """Controls, folds, bootstrap and tests."""

    @field_validator("removals", "controls", "read_outs", "strengths")
    @classmethod
    def _once(cls, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(given))


@dataclass(frozen=True)
class LeftOut:
    """A run that a removal cannot be done for."""

    run: str
    removal: Removal
    why: str


@dataclass(frozen=True)
class AblateResult:
    """What an ablation found."""

    path: Path
    texts: int
    trained_texts: int
    """Evaluated texts that a run was trained on; should be 0."""
    lines: list[Line]
    groups: list[GroupLine]
    contrasts: list[Contrast]
    curves: list[Curve]
    concepts: list[ConceptEffect]
    """Largest total effect first; by the first read-out, or by the model where each was removed by itself, and by the
    last removal asked for that takes concepts out."""
    left_out: list[LeftOut]
    forwards: Forwards
    """Texts that were to be run through the model's upper blocks, and those that were: the others were equal."""
    self_check: float | None
    """Largest change of a probability when the model is run again with nothing removed; `None` without the model."""


def ablate(
    cache: Cache,
    runs: dict[str, Path],
    out: Path,
    load: Callable[[], LanguageModel],
    config: AblateConfig,
    *,
    progress: Progress = SILENT,
    force: bool = False,
) -> AblateResult:
    """Remove concepts and measure; write `ablation.json` and `texts.parquet` into `out`.

    Parameters
    ----------
    runs
        Name → folder of each run to evaluate; all of one lower site.
    load
        Loads the model that the cache was made with, with its head; called only where it is needed.

    Raises
    ------
    ConfigError
        Where the settings do not fit the cache or the runs.
    RunMismatch
        Where a run was trained on another cache.
    ResumeMismatch
        Where `out` holds results of other settings.
    """
    loaded = {name: Run.from_pretrained(path) for name, path in runs.items()}
    for run in loaded.values():
        run.check_cache(cache)
    lowers = sorted({run.config.lower for run in loaded.values()})
    if len(lowers) > 1:
        raise ConfigError(f"the runs have different lower sites ({', '.join(lowers)}): ablate them one by one")
    asks_salient = config.rows_changed == "salient"
    needs_model = "model" in config.read_outs or (asks_salient and config.saliency == "gradient")
    if (needs_model or asks_salient) and not cache.manifest.predictions:
        raise ConfigError(
            f"{cache.path} was extracted without predictions, which the model read-out and salient rows need: "
            "extract with --task classify or prompt, or use --read-out probe --rows-changed cls"
        )
    if config.concepts and "model" not in config.read_outs:
        raise ConfigError("each concept by itself is removed by the model read-out alone: add model to --read-out")
    weights = {name: sha256_of(path / "model.safetensors") for name, path in sorted(runs.items())}
    settings = {
        "version": ABLATION_VERSION,
        "cache_id": cache.id,
        "runs": weights,
        "config": config.model_dump(mode="json"),
    }
    with only_writer(out):
        before = stored_result(AblateResult, out / RESULT, settings, what="ablation", beside=(PER_TEXT,), force=force)
        if before is not None:
            return before
        return _ablate(cache, loaded, weights, out, load, config, settings, needs_model=needs_model, progress=progress)


def _ablate(
    cache: Cache,
    runs: dict[str, Run],
    weights: dict[str, str],
    out: Path,
    load: Callable[[], LanguageModel],
    config: AblateConfig,
    settings: dict[str, Any],
    *,
    needs_model: bool,
    progress: Progress,
) -> AblateResult:
    site = next(iter(runs.values())).config.lower
    texts = rows_by_text(cache, choose_texts(cache, runs, config))
    # Before the model is loaded: what follows may take hours.
    _check_rows(cache, runs, texts, config)
    removals, left_out = removals_of(runs, config.removals, config.rows_changed)
    cls_vectors = _cls_tells(cache, site, texts)
    probe = "probe" in config.read_outs
    probed = probed_texts(cache, texts, config.rows_changed, cls_vectors=cls_vectors) if probe else []
    asked = [asked_of(cache, name, run, texts, removals[name], config) for name, run in runs.items()]
    plan = Removals(
        removals=removals,
        controls=config.controls,
        strengths=tuple(sorted(config.strengths)),
        curves=config.curves,
        seed=config.seed,
    )
    salient = stored_salient_rows(cache, texts, site) if config.saliency == "stored" else None
    found = _Found()
    if needs_model:
        model = load()
        clean = read_clean(cache, model, texts, site=site, salient=salient, progress=progress)
        salient = clean.salient
        if "model" in config.read_outs:
            changed = {
                name: [
                    changed_rows(rows, number, config.rows_changed, run.config.special)
                    for rows, number in zip(texts, salient, strict=True)
                ]
                for name, run in runs.items()
            }
            found.clean["model"], outcomes, found.self_check = read_out_model(
                cache, model, clean, asked, texts, changed, plan,
                site=site, forwards=found.forwards, progress=progress,
            )  # fmt: skip
            found.add("model", outcomes)
            if config.concepts:
                found.concepts = _each_concept(model, clean, asked, texts, found, removals, config, progress)
    rows = salient or [None] * len(texts)
    if config.rows_changed == "cls":
        rows = [text.first_special() for text in texts]
    if probe:
        found.clean["probe"], outcomes = read_out_probe(
            cache, asked, texts, probed, rows, plan, cls_vectors=cls_vectors, progress=progress
        )
        found.add("probe", outcomes)
    removed = _removed_concepts(asked, texts, rows, config)
    labels = labels_of(cache, texts)
    tables = Tables()
    for read_out in config.read_outs:
        made = tabulate(
            read_out, found.clean[read_out], found.of(read_out), labels, seed_groups(runs), seed=config.seed
        )
        for name in ("lines", "groups", "contrasts", "curves"):
            getattr(tables, name).extend(getattr(made, name))
    result = AblateResult(
        path=out,
        texts=len(texts),
        trained_texts=_trained_texts(cache, runs, texts),
        lines=tables.lines,
        groups=tables.groups,
        contrasts=tables.contrasts,
        curves=tables.curves,
        concepts=_salient_concepts(removed, removals, found, config) if found.concepts is None else found.concepts,
        left_out=left_out,
        forwards=found.forwards,
        self_check=found.self_check,
    )
    described = {
        "text_id": np.asarray(cache.texts["text_id"])[[rows.text for rows in texts]],
        "label": pa.array([None if np.isnan(label) else int(label) for label in labels], pa.int64()),
    }
    provenance = {
        "clvq": version("clvq"),
        "cache_id": cache.id,
        "model": cache.manifest.identity["model"],
        "runs": {
            name: {"method": run.config.method, "seed": run.config.seed, "sha256": weights[name]}
            for name, run in sorted(runs.items())
        },
    }
    write(out, settings, provenance, result, table_of(found.outcomes, described, removed))
    return result


class _Found:
    """What the read-outs have found so far."""

    def __init__(self) -> None:
        self.clean: dict[ReadOut, Outcome] = {}
        self.outcomes: dict[tuple[str, Condition], Outcome] = {}
        self.forwards = Forwards()
        self.self_check: float | None = None
        self.concepts: list[ConceptEffect] | None = None

    def add(self, read_out: ReadOut, outcomes: Mapping[Condition, Outcome]) -> None:
        """The outcomes of a read-out; a removal that is the same for all runs carries the name of none."""
        alone = len({key.run for key in outcomes if key.removal == "mean"}) == 1
        for key, outcome in outcomes.items():
            nameless = alone and key.removal == "mean"
            self.outcomes[read_out, key._replace(run="") if nameless else key] = outcome

    def of(self, read_out: ReadOut) -> dict[Condition, Outcome]:
        """The outcomes of one read-out."""
        return {key: outcome for (kind, key), outcome in self.outcomes.items() if kind == read_out}


def removals_of(
    runs: Mapping[str, Run], removals: Sequence[Removal], rows_changed: RowsChanged
) -> tuple[dict[str, tuple[Removal, ...]], list[LeftOut]]:
    """The removals that are done for each run, and those that cannot be.

    `mean` asks for no concept: it is done once for all runs with the same mean and the same rows to change.

    Raises
    ------
    ConfigError
        Where no run has any of the removals.
    """
    done: dict[str, tuple[Removal, ...]] = {}
    left_out = []
    means: set[tuple[bytes, str]] = set()
    for name, run in runs.items():
        mine: list[Removal] = []
        for removal in removals:
            mean = (run.lower_mean.tobytes(), run.config.special if rows_changed == "all" else "")
            if removal == "mean" and mean in means:
                continue
            if removal == "subspace" and not run.has_latents:
                left_out.append(LeftOut(name, removal, f"{run.config.method} has no latents to span a subspace"))
                continue
            if removal == "mean":
                means.add(mean)
            mine.append(removal)
        done[name] = tuple(mine)
    if not any(done.values()):
        raise ConfigError(
            f"none of the runs ({', '.join(runs)}) has latents, which the removal subspace takes out: "
            "add a run of the method sae or cross-sae, or use another --removal"
        )
    return done, left_out


def asked_of(
    cache: Cache, name: str, run: Run, texts: Sequence[TextRows], removals: Sequence[Removal], config: AblateConfig
) -> Asked:
    """The run with the concepts of all rows of the texts."""
    rows = np.concatenate([part.row for part in texts])
    cuts = np.cumsum([len(part.row) for part in texts])[:-1]
    codes, active = [], []
    for _, vectors in cache.blocks([run.config.lower], rows):
        codes.append(run.assign(vectors[run.config.lower]))
        if "subspace" in removals:
            active.append(run.active(vectors[run.config.lower])[:, : config.subspace_k])
    return Asked(
        name=name,
        run=run,
        codes=np.split(np.concatenate(codes), cuts),
        active=np.split(np.concatenate(active), cuts) if active else None,
    )


def _each_concept(
    model: LanguageModel,
    clean: CleanTexts,
    asked: Sequence[Asked],
    texts: Sequence[TextRows],
    found: _Found,
    removals: Mapping[str, Sequence[Removal]],
    config: AblateConfig,
    progress: Progress,
) -> list[ConceptEffect]:
    effects = []
    part = np.ones(len(texts), dtype=bool)
    for one in asked:
        removal = _last_of_concepts(removals[one.name])
        if removal is not None:
            pairs = remove_each_concept(
                model, clean, one, texts, removal,
                site=one.run.config.lower, seed=config.seed, forwards=found.forwards, progress=progress,
            )  # fmt: skip
            effects += concept_effects(one.name, removal, pairs, part, min_texts=config.min_texts, seed=config.seed)
    return by_total_effect(effects)


def _last_of_concepts(removals: Sequence[Removal]) -> Removal | None:
    """The last removal that takes concepts out."""
    return next((removal for removal in reversed(removals) if removal != "mean"), None)


def choose_texts(cache: Cache, runs: Mapping[str, Run], config: AblateConfig) -> Bool[np.ndarray, " text"]:
    """The texts to evaluate.

    Raises
    ------
    ConfigError
        Where no split is named and the runs held out different texts.
    """
    if config.split:
        chosen = cache.splits(config.split)
    else:
        held_out = {tuple(run.held_out_texts.tolist()) for run in runs.values()}
        if len(held_out) > 1:
            raise ConfigError("the runs held out different texts: name the split to evaluate with --split")
        chosen = np.zeros(len(cache.texts), dtype=bool)
        chosen[cache.text_index[np.array(held_out.pop(), dtype=np.int64)]] = True
    if config.max_texts is not None and chosen.sum() > config.max_texts:
        numbers = np.random.default_rng([config.seed, 1]).permutation(np.flatnonzero(chosen))[: config.max_texts]
        chosen = np.zeros_like(chosen)
        chosen[numbers] = True
    return chosen


def _check_rows(cache: Cache, runs: Mapping[str, Run], texts: Sequence[TextRows], config: AblateConfig) -> None:
    """Make sure that there is something to remove."""
    if not texts:
        raise ConfigError(f"none of the chosen texts has a row in {cache.path}: choose others with --split")
    for name, run in runs.items():
        if not any(
            len(changed_rows(rows, next(iter(rows.ordinary().tolist()), None), config.rows_changed, run.config.special))
            for rows in texts
        ):
            raise ConfigError(
                f"no text has a row to change for the run {name} with --rows-changed {config.rows_changed}"
                + ("; the tokenizer adds no leading special token" if config.rows_changed == "cls" else "")
            )


def _trained_texts(cache: Cache, runs: Mapping[str, Run], texts: Sequence[TextRows]) -> int:
    ids, splits = np.asarray(cache.texts["text_id"]), cache.texts["split"].to_pylist()
    trained: set[int] = set()
    for run in runs.values():
        held_out = set(run.held_out_texts.tolist())
        trained |= {
            rows.text for rows in texts if splits[rows.text] in run.config.split and ids[rows.text] not in held_out
        }
    return len(trained)


def _cls_tells(cache: Cache, site: str, texts: Sequence[TextRows]) -> bool:
    """Whether the leading special rows differ between texts: a CLS that has seen the text, not a decoder's BOS."""
    firsts = [rows.row[first] for rows in texts[:32] if (first := rows.first_special()) is not None]
    if len(firsts) < min(len(texts), 32):
        return False
    vectors = cache.vectors(site, np.array(firsts))
    spread = np.linalg.norm(vectors - vectors.mean(axis=0), axis=1).max()
    # A BOS differs only by the rounding of other batches and of the encoding.
    return bool(spread > 0.02 * np.linalg.norm(vectors, axis=1).mean())


def _removed_concepts(
    asked: Sequence[Asked], texts: Sequence[TextRows], rows: Sequence[int | None], config: AblateConfig
) -> dict[str, list[int]]:
    """The concept removed from each text; −1 where it is none or several."""
    alone = config.rows_changed != "all"
    return {
        one.name: [int(one.codes[number][row]) if alone and row is not None else -1 for number, row in enumerate(rows)]
        for one in asked
    }


def _salient_concepts(
    removed: Mapping[str, Sequence[int]],
    removals: Mapping[str, Sequence[Removal]],
    found: _Found,
    config: AblateConfig,
) -> list[ConceptEffect]:
    """Effects by the concept of the row that lost it."""
    outcomes = found.of(config.read_outs[0])
    part = common_texts(outcomes)
    effects = []
    for run, concepts in removed.items():
        removal = _last_of_concepts(removals[run])
        if removal is None:
            continue
        outcome = outcomes[Condition(run, removal, OWN, max(config.strengths))]
        kinds = np.where(part, concepts, -1)
        for concept in np.unique(kinds[kinds >= 0]).tolist():
            mine = kinds == concept
            effects.append(
                ConceptEffect(
                    run=run,
                    concept=concept,
                    texts=int(mine.sum()),
                    probability_lost=float(outcome.probability_lost[mine].mean()),
                    flipped=float(outcome.flipped[mine].mean()),
                )
            )
    return by_total_effect(effects)
