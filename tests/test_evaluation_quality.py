"""Concepts against words, tags and labels: scikit-learn, scipy, enumeration, and codebooks whose worth is known."""

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from clvq.cli import app
from clvq.errors import ConfigError, MissingExtra, ResumeMismatch
from clvq.evaluation.attributes import agreement_figures
from clvq.evaluation.bootstrap import estimate
from clvq.evaluation.coherence import Coherence, coherence
from clvq.evaluation.information import (
    adjusted_information,
    effective_number,
    effective_numbers,
    expected_terms,
    information_within,
    most_frequent,
    pairs_of,
    purity,
)
from clvq.evaluation.intervals import groups_of, jackknife, share_estimates
from clvq.evaluation.partitions import LABEL, TAG, WORD, Partition, Sides, read_sides, word_types
from clvq.evaluation.quality import QualityConfig, QualityResult, quality
from clvq.evaluation.tagging import Tagger, load_tagger, tag_rows
from clvq.progress import SILENT
from clvq.trainer.run import Run
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap as scipy_bootstrap
from scipy.stats import hypergeom
from scipy.stats import t as student
from sklearn.metrics import adjusted_mutual_info_score, mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from typer.testing import CliRunner

from .cache_maker import without_waiting
from .worded import LOWER, UPPER, Worded, make_worded, train

no_waiting = pytest.fixture(without_waiting, scope="module", autouse=True)


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> Worded:
    return make_worded(tmp_path_factory.mktemp("worded") / "cache")


@pytest.fixture(scope="module")
def run(worded: Worded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(worded.cache, tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def tagger() -> Tagger:
    return load_tagger()


@pytest.fixture(scope="module")
def sides(worded: Worded, run: Path, tagger: Tagger) -> Sides:
    return read_sides(worded.cache, {"run": Run.from_pretrained(run)}, worded.cache.splits(["dev"]), tagger)


labelled = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=60)


@given(labelled)
def test_adjusted_information_and_purity_are_those_of_scikit_learn(rows: list[tuple[int, int]]) -> None:
    first, second = np.array(rows, dtype=np.int64).T
    pairs = pairs_of(first, second)
    distinct = len(rows) > 1 and len(np.unique(first)) == len(np.unique(second)) == len(rows)
    wanted = 1 if distinct else adjusted_mutual_info_score(first, second)
    assert adjusted_information(pairs) == pytest.approx(wanted, abs=1e-6)
    counts = contingency_matrix(first, second)
    assert purity(pairs) == pytest.approx(counts.max(axis=1).sum() / counts.sum())
    found = most_frequent(pairs, 8)
    for number, value in enumerate(np.unique(first).tolist()):
        assert found[value] == np.unique(second)[counts[number].argmax()]
    assert (found[np.setdiff1d(np.arange(8), first)] == -1).all()


def test_information_of_many_rows_is_adjusted_as_scikit_learn_does() -> None:
    generator = np.random.default_rng(0)
    first = generator.zipf(1.5, 5_000) % 700
    second = (first + generator.integers(0, 9, 5_000)) % 40
    wanted = adjusted_mutual_info_score(first, second)
    assert adjusted_information(pairs_of(first, second)) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(("a", "b", "n"), [(3, 4, 10), (1, 1, 1), (7, 5, 8), (2, 30, 40)])
def test_what_a_cell_adds_by_chance_is_the_mean_over_the_hypergeometric_distribution(a: int, b: int, n: int) -> None:
    k = np.arange(1, min(a, b) + 1)
    wanted = (k / n * np.log(n * k / (a * b)) * hypergeom.pmf(k, n, a, b)).sum()
    assert expected_terms(*(np.array([value]) for value in (a, b, n)))[0] == pytest.approx(wanted)


def test_information_beyond_a_word_is_adjusted_by_the_mean_over_all_shuffles() -> None:
    given_, second = np.array([0, 0, 0, 1, 1, 1, 1]), np.array([0, 1, 1, 0, 0, 1, 2])
    first = np.array([5, 5, 2, 2, 2, 5, 7])

    def conditional(first: Sequence[int]) -> float:
        parts = [given_ == value for value in (0, 1)]
        nats = [part.mean() * mutual_info_score(np.array(first)[part], second[part]) for part in parts]
        return float(sum(nats) / np.log(2))

    found, by_chance = information_within(given_, first, second)
    assert found == pytest.approx(conditional(first.tolist()))
    orders = itertools.product(itertools.permutations(first[:3]), itertools.permutations(first[3:]))
    assert by_chance == pytest.approx(np.mean([conditional([*one, *two]) for one, two in orders]))


def test_the_effective_number_of_words_counts_equal_words_and_gives_each_concept_its_own() -> None:
    pairs = pairs_of(np.array([0, 0, 0, 0, 2, 2]), np.array([0, 1, 2, 3, 4, 4]))
    np.testing.assert_allclose(effective_numbers(pairs, 4), [4, np.nan, 1, np.nan])
    assert effective_number(pairs) == pytest.approx(4 ** (4 / 6))


def test_shares_of_rows_are_means_where_every_text_has_one_row() -> None:
    hits = np.random.default_rng(1).integers(0, 2, 80).astype(np.float64)
    (found,) = share_estimates(hits[:, None], np.ones((80, 1)), seed=3)
    wanted = estimate(hits, seed=3)
    assert found.value == pytest.approx(wanted.value)
    assert (found.low, found.high) == (pytest.approx(wanted.low, abs=0.02), pytest.approx(wanted.high, abs=0.02))


def test_the_interval_of_a_share_is_scipys_bootstrap_of_whole_texts() -> None:
    generator = np.random.default_rng(2)
    wholes = generator.integers(1, 30, 120).astype(np.float64)
    parts = np.floor(wholes * generator.random(120))
    (found,) = share_estimates(parts[:, None], wholes[:, None], seed=0)
    wanted = scipy_bootstrap(
        (parts, wholes),
        lambda part, whole, axis: part.sum(axis=axis) / whole.sum(axis=axis),
        paired=True, method="percentile", vectorized=True, n_resamples=4_000, rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    assert found.value == pytest.approx(parts.sum() / wholes.sum())
    width = wanted.high - wanted.low
    assert (found.low, found.high) == (
        pytest.approx(wanted.low, abs=width / 10), pytest.approx(wanted.high, abs=width / 10),
    )  # fmt: skip


def test_a_share_of_nothing_is_not_a_number() -> None:
    (found,) = share_estimates(np.zeros((3, 1)), np.zeros((3, 1)), seed=0)
    assert np.isnan([found.value, found.low, found.high]).all()


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(4).normal(size=25)
    (found,) = jackknife(lambda kept: np.array([values[kept].mean()]), np.arange(25)[:, None])
    half = student.ppf(0.975, 24) * values.std(ddof=1) / 5
    assert (found.value, found.low, found.high) == (
        pytest.approx(values.mean()), pytest.approx(values.mean() - half), pytest.approx(values.mean() + half),
    )  # fmt: skip


def test_groups_of_texts_are_of_like_size() -> None:
    sizes = np.bincount(groups_of(107, seed=0))
    assert (len(sizes), set(sizes.tolist())) == (20, {5, 6})
    assert len(np.unique(groups_of(3, seed=0))) == 3


def test_rows_have_the_tag_of_their_word_whatever_part_of_it_they_are(tagger: Tagger) -> None:
    text = "The acting is really bad ... they don't like it $ "
    spans = {"The": "DET", "act": "NOUN", "ing": "NOUN", "real": "ADV", "bad": "ADJ", "..": "PUNCT", "they": "PRON",
             "$": "SYM"}  # fmt: skip
    starts = np.array([text.index(part) for part in spans] + [4, len(text) - 1])
    ends = np.append(starts[:-2] + [len(part) for part in spans], [4, len(text)])
    assert tag_rows(tagger, text, starts, ends) == [*spans.values(), None, None]
    assert tag_rows(tagger, "", np.array([0]), np.array([0])) == [None]


def test_words_are_told_without_case_and_texts_have_their_labels(worded: Worded, sides: Sides) -> None:
    said = [sides.names[WORD][word] for word in sides.evaluated.attributes[WORD]]
    assert said == [word for number, words in enumerate(worded.words) if number % 3 == 0 for word in words]
    labels = [label for n, label in enumerate(worded.labels) if n % 3 == 0 for _ in worded.words[n]]
    assert sides.evaluated.attributes[LABEL].tolist() == labels
    of_word = dict(zip(said, (sides.names[TAG][tag] for tag in sides.evaluated.attributes[TAG]), strict=True))
    assert (of_word["the"], of_word["film"], of_word["and"]) == ("DET", "NOUN", "CCONJ")
    assert sides.trained_texts == 0


def test_a_codebook_of_words_is_seen_as_such(sides: Sides) -> None:
    part = word_types(sides, len(sides.names[WORD]) + 1)
    figures = agreement_figures(sides, part, seed=0)
    for name in ("word purity", "word purity within", "word coverage", "word ami", "words per concept"):
        assert [figures[name].value, figures[name].low, figures[name].high] == pytest.approx([1.0] * 3), name
    assert figures["label beyond word"].value == pytest.approx(0, abs=1e-12)


def test_a_codebook_of_labels_tells_all_that_words_leave_open(sides: Sides) -> None:
    part = Partition("labels", 2, sides.reference.attributes[LABEL], sides.evaluated.attributes[LABEL])
    figures = agreement_figures(sides, part, seed=0)
    assert figures["label purity"].value == figures["label ami"].value == pytest.approx(1)
    assert figures["label beyond word"].low > 0.3
    assert figures["label beyond word by chance"].value < 0.1


def test_purity_counts_what_training_rows_said_so_that_many_codes_do_not_raise_it(sides: Sides) -> None:
    generator = np.random.default_rng(0)
    many = [generator.integers(0, 600, len(rows.place)) for rows in (sides.reference, sides.evaluated)]
    figures = agreement_figures(sides, Partition("many", 600, *many), seed=0)
    assert figures["word purity within"].value > 0.7
    assert figures["word purity"].value < 0.2
    assert figures["word ami"].low < 0 < figures["word ami"].high


def test_rows_without_a_label_count_in_no_figure_of_labels(sides: Sides) -> None:
    evaluated = sides.evaluated
    labels = np.where(evaluated.text % 2, evaluated.attributes[LABEL], -1)
    mixed = replace(sides, evaluated=replace(evaluated, attributes={**evaluated.attributes, LABEL: labels}))
    part = word_types(sides, 8)
    figures = agreement_figures(mixed, part, seed=0)
    known = labels >= 0
    main = [np.bincount(sides.reference.attributes[LABEL][part.reference == concept]).argmax() for concept in range(8)]
    wanted = (np.array(main)[part.evaluated] == labels)[known].mean()
    assert figures["label purity"].value == pytest.approx(wanted)
    assert figures["label ami"].value == pytest.approx(
        adjusted_mutual_info_score(labels[known], part.evaluated[known]), abs=1e-9
    )


def test_texts_without_any_label_leave_the_figures_of_labels_open(sides: Sides) -> None:
    without = [
        replace(rows, attributes={**rows.attributes, LABEL: np.full(len(rows.place), -1)})
        for rows in (sides.reference, sides.evaluated)
    ]
    bare = Sides(*without, names={**sides.names, LABEL: []}, trained_texts=0)
    figures = agreement_figures(bare, word_types(sides, 8), seed=0)
    for name, found in figures.items():
        assert np.isnan(found.value) == name.startswith("label"), name


@pytest.mark.parametrize("site", [LOWER, UPPER])
def test_coherence_is_what_plain_loops_find(worded: Worded, sides: Sides, site: str) -> None:
    cache = worded.cache
    generator = np.random.default_rng(1)
    # Concepts of several words each; concept 5 has no training rows.
    table = generator.integers(0, 5, len(sides.names[WORD]))
    codes = [table[rows.attributes[WORD]] for rows in (sides.reference, sides.evaluated)]
    codes[1] = np.where(generator.random(len(codes[1])) < 0.1, 5, codes[1])
    (found,) = coherence(cache, sides, [Partition("it", 6, *codes)], [site], seed=0, progress=SILENT)[site]
    train_rows, rows = (cache.vectors(site, part.place).astype(float) for part in (sides.reference, sides.evaluated))
    means = np.array([train_rows[codes[0] == c].mean(axis=0) if c < 5 else train_rows.mean(axis=0) for c in range(6)])
    error = np.square(rows - means[codes[1]]).sum()
    assert found.r2.value == pytest.approx(1 - error / np.square(rows - rows.mean(axis=0)).sum())
    units = rows - train_rows.mean(axis=0)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    cosines = units @ units.T
    word, text = sides.evaluated.attributes[WORD], sides.evaluated.text
    fits = (word[:, None] != word) & (text[:, None] != text)
    alike = codes[1][:, None] == codes[1]
    # Each row with its mean over all partners that fit.
    gains = [
        cosines[row, fits[row] & alike[row]].mean() - cosines[row, fits[row] & ~alike[row]].mean()
        for row in range(len(rows))
        if (fits[row] & alike[row]).any()
    ]
    assert found.closeness.value == pytest.approx(np.mean(gains), abs=0.15)
    assert found.closeness.low < np.mean(gains) < found.closeness.high


def test_concepts_of_labels_are_alike_at_the_upper_site_and_not_at_the_lower(worded: Worded, sides: Sides) -> None:
    part = Partition("labels", 2, sides.reference.attributes[LABEL], sides.evaluated.attributes[LABEL])
    found = coherence(worded.cache, sides, [part], [LOWER, UPPER], seed=0, progress=SILENT)
    lower, upper = (found[site][0] for site in (LOWER, UPPER))
    assert isinstance(upper, Coherence)
    assert upper.r2.low > 0.95
    assert lower.r2.high < 0.1
    assert upper.closeness.low > 1.5
    assert abs(lower.closeness.value) < 0.3


def measure(worded: Worded, runs: dict[str, Path], out: Path, tagger: Tagger | None = None, **settings: object):
    return quality(worded.cache, runs, out, QualityConfig.model_validate(settings), tagger=tagger)


def test_runs_stand_beside_baselines_and_the_files_say_what_was_measured(
    worded: Worded, run: Path, tagger: Tagger, tmp_path: Path
) -> None:
    result = measure(worded, {"run": run}, tmp_path / "out", tagger)
    assert [line.name for line in result.lines] == ["run", "one concept", "shuffled (12)", "word types (12)"]
    assert (result.lines[0].method, result.lines[0].seed) == ("clvq-vae", 0)
    assert result.texts == 40
    assert result.sites == [LOWER, UPPER]
    figures = result.lines[0].figures
    assert {f"{a} {b}" for a in (WORD, TAG, LABEL) for b in ("purity", "purity within", "coverage", "ami")} <= set(
        figures
    )
    assert {f"{a} {b}" for a in ("r2", "closeness") for b in (LOWER, UPPER)} <= set(figures)
    stored = json.loads((tmp_path / "out" / "quality.json").read_bytes())
    assert stored["settings"]["cache_id"] == worded.cache.id
    assert stored["settings"]["tagger"] == tagger.name
    assert len(stored["settings"]["runs"]["run"]["sha256"]) == 64
    assert stored["lines"][1]["figures"][f"closeness {LOWER}"]["value"] is None
    table = pq.read_table(tmp_path / "out" / "concepts.parquet").to_pylist()
    assert [row["concept"] for row in table] == list(range(12))
    assert sum(row["rows"] for row in table) == result.rows
    hits = sum(row["rows"] * row["word_purity"] for row in table if row["rows"])
    assert hits / result.rows == pytest.approx(figures["word purity"].value)


def test_the_explained_variance_is_what_the_run_reports_of_its_own_code(
    worded: Worded, run: Path, tmp_path: Path
) -> None:
    result = measure(worded, {"run": run}, tmp_path / "out")
    loaded = Run.from_pretrained(run)
    rows = worded.cache.rows_of(worded.cache.splits(["dev"]), special="none")
    upper = worded.cache.vectors(UPPER, rows).astype(float)
    train_rows = worded.cache.rows_of(worded.cache.splits(["train"]), special="none")
    codes = loaded.assign(worded.cache.vectors(LOWER, train_rows))
    means = worded.cache.vectors(UPPER, train_rows).astype(float)
    table = np.array([means[codes == c].mean(axis=0) if (codes == c).any() else means.mean(axis=0) for c in range(12)])
    error = np.square(upper - table[loaded.assign(worded.cache.vectors(LOWER, rows))]).sum()
    wanted = 1 - error / np.square(upper - upper.mean(axis=0)).sum()
    assert result.lines[0].figures[f"r2 {UPPER}"].value == pytest.approx(wanted)


def test_runs_that_differ_in_their_seed_are_averaged(worded: Worded, run: Path, tmp_path: Path) -> None:
    second = train(worded.cache, tmp_path / "second", seed=1)
    fewer = train(worded.cache, tmp_path / "fewer", codes=5)
    result = measure(worded, {"run": run, "second": second, "fewer": fewer}, tmp_path / "out")
    assert [group.runs for group in result.seeds] == [["run", "second"]]
    values = [line.figures["word ami"].value for line in result.lines[:2]]
    mean = result.seeds[0].figures["word ami"]
    assert (mean.mean, mean.seeds) == (pytest.approx(np.mean(values)), 2)
    names = [line.name for line in result.lines[3:]]
    assert names == ["one concept", "shuffled (5)", "word types (5)", "shuffled (12)", "word types (12)"]


def same(one: QualityResult, two: QualityResult) -> bool:
    # As JSON, since NaN is unlike itself.
    first, second = (json.dumps(asdict(result), sort_keys=True, default=str) for result in (one, two))
    return first == second


def test_the_same_again_is_read_back_and_another_is_refused(worded: Worded, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = measure(worded, {"run": run}, out)
    before = (out / "quality.json").stat().st_mtime_ns
    assert same(measure(worded, {"run": run}, out), first)
    assert (out / "quality.json").stat().st_mtime_ns == before
    with pytest.raises(ResumeMismatch, match=r"quality results with other settings \(config.seed: 0 there, 3 now\)"):
        measure(worded, {"run": run}, out, seed=3)
    forced = quality(worded.cache, {"run": run}, out, QualityConfig(seed=3), force=True)
    assert same(measure(worded, {"run": run}, out, seed=3), forced)
    (out / "quality.json").write_text('{"settings')
    with pytest.raises(ConfigError, match=r"quality.json is damaged: give another --out, or --force"):
        measure(worded, {"run": run}, out)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not empty and holds no quality \(it holds 'thesis.tex'\)"):
        measure(worded, {"run": run}, tmp_path / "other")


def test_what_cannot_be_measured_is_refused(worded: Worded, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there are no training rows in .*: choose|there are no training rows"):
        measure(worded, {"run": run}, tmp_path / "a", split=("train", "dev"))
    with pytest.raises(ConfigError, match="holds no split 'test'"):
        measure(worded, {"run": run}, tmp_path / "b", split=("test",))
    with pytest.raises(ConfigError, match="a run is called 'word', as a baseline is: rename its folder"):
        measure(worded, {"word": run}, tmp_path / "c")


def test_without_the_tagger_there_are_no_parts_of_speech_and_it_is_said_how_to_get_them(
    worded: Worded, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "denckring_en_pos", None)
    with pytest.raises(MissingExtra, match=r"pip install 'clvq\[pos\]'"):
        load_tagger()
    asked = ["quality", str(worded.cache.path), str(run), "--out", str(tmp_path / "out")]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0, shown.output
    assert "without parts of speech: parts of speech need the package denckring-en-pos" in shown.stderr
    assert "POS" not in shown.stdout
    assert isinstance(CliRunner().invoke(app, [*asked, "--pos"]).exception, MissingExtra)


def test_the_command_prints_tables_or_json(worded: Worded, run: Path, tmp_path: Path) -> None:
    asked = ["quality", str(worded.cache.path), str(run), "--out", str(tmp_path / "out"), "--rationale", "evidence"]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0, shown.output
    for part in ("POS AMI", f"closeness {UPPER}", "word types (12)", "first rows", "rationales of 40 texts"):
        assert part in shown.stdout
    plain = json.loads(CliRunner().invoke(app, [*asked, "--json"]).stdout)
    assert plain["texts"] == 40
    assert plain["overlap"]["lines"][0]["name"] == "run"
    trained = CliRunner().invoke(app, [*asked[:-2], "--split", "train", "--force"])
    assert isinstance(trained.exception, ConfigError)
