"""`clvq ablate`: what happens to predictions when a text's concept is taken out, next to controls of the same size."""

import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from ..cache.files import only_writer, sha256_of, write_file
from ..cache.layout import differences, to_json
from ..cache.reader import Cache
from ..errors import ConfigError, ResumeMismatch
from ..pipeline.language_model import LanguageModel
from ..progress import SILENT, Progress
from ..trainer.run import Run
from .bootstrap import RESAMPLES, Estimate, estimate
from .readouts import Asked, Condition, Outcome, probed_texts, read_out_model, read_out_probe
from .removal import REMOVALS, SUBJECTS, Removal
from .rows import RowsChanged, TextRows, changed_rows, rows_by_text
from .saliency import stored_salient_rows

ReadOut = Literal["model", "probe"]
RESULT = "ablation.json"
PER_TEXT = "texts.parquet"
_VERSION = 1


class AblateConfig(BaseModel):
    """Settings of an ablation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    read_outs: Annotated[tuple[ReadOut, ...], Field(min_length=1)] = ("model", "probe")
    """Who is asked after the removal."""
    removals: Annotated[tuple[Removal, ...], Field(min_length=1)] = REMOVALS
    """How a direction is taken out."""
    rows_changed: RowsChanged = "salient"
    """Which rows lose their concept."""
    saliency: Literal["gradient", "stored"] = "gradient"
    """By what the salient row is found: gradient × input, or what the cache holds."""
    split: tuple[str, ...] = ()
    """Splits to evaluate; empty: the texts that the runs held out."""
    max_texts: int | None = None
    """Evaluate a seeded sample of so many texts."""
    seed: int = 0
    """Controls, folds and bootstrap."""


@dataclass(frozen=True)
class Line:
    """One line of the table: one condition, with estimates over the texts that take part in all of its read-out."""

    run: str
    read_out: ReadOut
    removal: Removal | None
    removed: str
    texts: int
    accuracy: Estimate
    drop: Estimate
    """Accuracy lost against the unchanged vectors."""
    flipped: Estimate
    probability_lost: Estimate
    norm_removed: Estimate
    own_minus_this: Estimate | None
    """For controls: probability lost by removing the own code, less that lost here; paired by text."""


@dataclass(frozen=True)
class ConceptEffect:
    """What removing one concept did to the texts whose salient row belongs to it."""

    run: str
    concept: int
    texts: int
    probability_lost: float
    flipped: float


@dataclass(frozen=True)
class AblateResult:
    """What an ablation found."""

    path: Path
    texts: int
    trained_texts: int
    """Evaluated texts that a run was trained on; should be 0."""
    lines: list[Line]
    concepts: list[ConceptEffect]
    """Largest total effect first; by the first read-out and the last removal asked for."""


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
    settings = {
        "version": _VERSION,
        "cache_id": cache.id,
        "runs": {name: sha256_of(path / "model.safetensors") for name, path in sorted(runs.items())},
        "config": config.model_dump(mode="json"),
    }
    with only_writer(out):
        before = _stored(out, settings, force=force)
        if before is not None:
            return before
        chosen = _choose_texts(cache, loaded, config)
        texts = rows_by_text(cache, chosen)
        # Before the model is loaded: what follows may take hours.
        _check_rows(cache, loaded, texts, config)
        cls_vectors = _cls_tells(cache, lowers[0], texts)
        probed = (
            probed_texts(cache, texts, config.rows_changed, cls_vectors=cls_vectors)
            if "probe" in config.read_outs
            else []
        )
        asked = [Asked(name=name, run=run, codes=_codes(cache, run, texts)) for name, run in loaded.items()]
        stored = stored_salient_rows(cache, texts, lowers[0]) if config.saliency == "stored" else None
        clean: dict[ReadOut, Outcome] = {}
        outcomes: dict[tuple[ReadOut, Condition], Outcome] = {}
        salient = stored or [None] * len(texts)
        if needs_model:
            reading = read_out_model(
                cache,
                load(),
                asked if "model" in config.read_outs else [],
                texts,
                site=lowers[0],
                removals=config.removals,
                rows_changed=config.rows_changed,
                salient=stored,
                seed=config.seed,
                progress=progress,
            )
            salient = reading.salient
            if "model" in config.read_outs:
                clean["model"] = reading.clean
                outcomes.update({("model", key): value for key, value in reading.outcomes.items()})
        if "probe" in config.read_outs:
            clean["probe"], answers = read_out_probe(
                cache,
                asked,
                texts,
                probed,
                salient if config.rows_changed == "salient" else [rows.first_special() for rows in texts],
                removals=config.removals,
                cls_vectors=cls_vectors,
                seed=config.seed,
                progress=progress,
            )
            outcomes.update({("probe", key): value for key, value in answers.items()})
        removed = _removed_concepts(asked, texts, salient, config)
        result = AblateResult(
            path=out,
            texts=len(texts),
            trained_texts=_trained_texts(cache, loaded, texts),
            lines=_lines(clean, outcomes, config),
            concepts=_concept_effects(removed, outcomes, config),
        )
        _write(out, cache, texts, settings, result, outcomes, removed)
    return result


def _choose_texts(cache: Cache, runs: dict[str, Run], config: AblateConfig) -> Bool[np.ndarray, " text"]:
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


def _check_rows(cache: Cache, runs: dict[str, Run], texts: Sequence[TextRows], config: AblateConfig) -> None:
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


def _trained_texts(cache: Cache, runs: dict[str, Run], texts: Sequence[TextRows]) -> int:
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


def _codes(cache: Cache, run: Run, texts: Sequence[TextRows]) -> list[Any]:
    rows = np.concatenate([part.row for part in texts])
    codes = np.concatenate(
        [run.assign(vectors[run.config.lower]) for _, vectors in cache.blocks([run.config.lower], rows)]
    )
    return np.split(codes, np.cumsum([len(part.row) for part in texts])[:-1])


def _removed_concepts(
    asked: Sequence[Asked], texts: Sequence[TextRows], salient: Sequence[int | None], config: AblateConfig
) -> dict[str, list[int]]:
    """The concept removed from each text; −1 where it is none or several."""
    result = {}
    for one in asked:
        concepts = []
        for number, rows in enumerate(texts):
            row = {"salient": salient[number], "cls": rows.first_special(), "all": None}[config.rows_changed]
            concepts.append(-1 if row is None else int(one.codes[number][row]))
        result[one.name] = concepts
    return result


def _lines(
    clean: dict[ReadOut, Outcome], outcomes: dict[tuple[ReadOut, Condition], Outcome], config: AblateConfig
) -> list[Line]:
    lines = []
    for read_out in config.read_outs:
        part = np.logical_and.reduce(
            [np.isfinite(outcome.flipped) for (kind, _), outcome in outcomes.items() if kind == read_out]
        )
        base = clean[read_out].only(part)
        lines.append(_line("", read_out, None, "nothing", base, base, None, config))
        for (kind, (run, removal, subject)), outcome in outcomes.items():
            if kind == read_out:
                own = outcomes[kind, (run, removal, SUBJECTS[0])].only(part) if subject != SUBJECTS[0] else None
                lines.append(_line(run, read_out, removal, subject, outcome.only(part), base, own, config))
    return lines


def _line(
    run: str,
    read_out: ReadOut,
    removal: Removal | None,
    removed: str,
    outcome: Outcome,
    base: Outcome,
    own: Outcome | None,
    config: AblateConfig,
) -> Line:
    def over_texts(values: Any) -> Estimate:
        return estimate(values, seed=config.seed)

    return Line(
        run=run,
        read_out=read_out,
        removal=removal,
        removed=removed,
        texts=int(np.isfinite(outcome.flipped).sum()),
        accuracy=over_texts(outcome.correct),
        drop=over_texts(base.correct - outcome.correct),
        flipped=over_texts(outcome.flipped),
        probability_lost=over_texts(outcome.probability_lost),
        norm_removed=over_texts(outcome.norm_removed),
        own_minus_this=None if own is None else over_texts(own.probability_lost - outcome.probability_lost),
    )


def _concept_effects(
    removed: dict[str, list[int]], outcomes: dict[tuple[ReadOut, Condition], Outcome], config: AblateConfig
) -> list[ConceptEffect]:
    effects = []
    for run, concepts in removed.items():
        outcome = outcomes[config.read_outs[0], (run, config.removals[-1], SUBJECTS[0])]
        kinds = np.where(np.isfinite(outcome.flipped), concepts, -1)
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
    return sorted(effects, key=lambda effect: -effect.texts * effect.probability_lost)


def _write(
    out: Path,
    cache: Cache,
    texts: Sequence[TextRows],
    settings: dict[str, Any],
    result: AblateResult,
    outcomes: dict[tuple[ReadOut, Condition], Outcome],
    removed: dict[str, list[int]],
) -> None:
    ids = np.asarray(cache.texts["text_id"])[[rows.text for rows in texts]]
    tables = []
    for (read_out, (run, removal, subject)), outcome in outcomes.items():
        count = len(texts)
        columns: dict[str, Any] = {
            "run": [run] * count,
            "read_out": [read_out] * count,
            "removal": [removal] * count,
            "removed": [subject] * count,
            "text_id": ids,
            "concept": pa.array(removed[run], pa.int32()),
            **{name: getattr(outcome, name) for name in Outcome.__dataclass_fields__},
        }
        tables.append(pa.table(columns))
    # The old result first: killed in between, it would stand beside the new texts.
    (out / RESULT).unlink(missing_ok=True)
    sink = io.BytesIO()
    pq.write_table(pa.concat_tables(tables), sink, compression="zstd")
    write_file(out / PER_TEXT, sink.getvalue())
    plain = {"settings": settings, "bootstrap_resamples": RESAMPLES, **_plain(asdict(result))}
    del plain["path"]
    write_file(out / RESULT, to_json(plain))


def _plain(value: Any) -> Any:
    """JSON knows no NaN: what could not be measured is null."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and math.isnan(value) else value


def _stored(out: Path, settings: dict[str, Any], *, force: bool) -> AblateResult | None:
    """The result that stands in `out`, where its settings match."""
    file = out / RESULT
    if not file.is_file():
        strange = sorted(
            entry.name for entry in out.iterdir() if entry.name != PER_TEXT and not entry.name.endswith(".aside")
        )
        if strange and not force:
            raise ConfigError(f"{out} is not empty and holds no ablation (it holds {strange[0]!r}): give another --out")
        return None
    try:
        plain = json.loads(file.read_bytes())
        lines = differences(plain["settings"], json.loads(json.dumps(settings)))
        kept = {name: _with_nan(plain[name]) for name in ("texts", "trained_texts", "lines", "concepts")}
        if not lines:
            return TypeAdapter(AblateResult).validate_python({"path": out, **kept})
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if not force:
            raise ConfigError(f"{file} is damaged: give another --out, or --force to replace it") from error
        return None
    if not force:
        raise ResumeMismatch(
            f"{out} holds an ablation with other settings ({'; '.join(lines[:6])}): give another --out, or --force"
        )
    return None


def _with_nan(value: Any) -> Any:
    """What `_plain` wrote as null inside an estimate, as NaN again."""
    if isinstance(value, list):
        return [_with_nan(inner) for inner in value]
    if isinstance(value, dict):
        estimate_keys = value.keys() == set(Estimate.__dataclass_fields__)
        return {key: math.nan if estimate_keys and inner is None else _with_nan(inner) for key, inner in value.items()}
    return value
