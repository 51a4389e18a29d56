"""Concepts against rationales: texts of known words and evidence, scikit-learn's average precision, odds by hand."""

from pathlib import Path

import numpy as np
import pytest
from clvq.errors import ConfigError
from clvq.evaluation.overlap import evidence, overlap
from clvq.evaluation.partitions import LABEL, WORD, Partition, Sides, read_sides
from clvq.evaluation.quality import QualityConfig, quality
from clvq.evaluation.rationales import expected_at_random, marked_rows
from clvq.trainer.run import Run
from sklearn.metrics import average_precision_score

from .cache_maker import without_waiting
from .worded import SPEAKING, Worded, make_worded, train

no_waiting = pytest.fixture(without_waiting, scope="module", autouse=True)


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> Worded:
    return make_worded(tmp_path_factory.mktemp("worded") / "cache")


@pytest.fixture(scope="module")
def run(worded: Worded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(worded.cache, tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def sides(worded: Worded, run: Path) -> Sides:
    return read_sides(worded.cache, {"run": Run.from_pretrained(run)}, worded.cache.splits(["dev"]), None)


def judged(worded: Worded, sides: Sides, *parts: Partition, seed: int = 0):
    dev = worded.cache.splits(["dev"])
    return overlap(worded.cache, dev, sides, parts, *marked_rows(worded.cache, dev, "evidence"), seed=seed)


def test_evidence_is_the_log_odds_of_a_class_over_those_of_all_rows() -> None:
    codes = np.array([0] * 10 + [1] * 10 + [2] * 5)
    labels = np.array([0] * 8 + [1] * 2 + [0] * 2 + [1] * 8 + [-1] * 5)
    found = evidence(codes, labels, concepts=4, classes=2)
    # Twenty rows with labels, half of either class; two rows of the prior are added to each concept's ten.
    wanted = np.log(9 / 3)
    np.testing.assert_allclose(found, [[wanted, -wanted], [-wanted, wanted], [0, 0], [0, 0]], atol=1e-12)


def test_evidence_is_relative_to_how_frequent_classes_are() -> None:
    labels = np.array([0] * 90 + [1] * 10)
    alike = evidence(np.arange(100) % 2, labels, concepts=2, classes=2)
    np.testing.assert_allclose(alike, 0, atol=0.1)
    three = evidence(np.arange(99) % 3, np.arange(99) % 3, concepts=3, classes=3)
    assert (three.argmax(axis=1) == np.arange(3)).all()
    assert np.isfinite(three).all()


def test_words_that_speak_for_the_class_find_the_rationale(worded: Worded, sides: Sides) -> None:
    words = Partition("mine", len(sides.names[WORD]), *(s.attributes[WORD] for s in (sides.reference, sides.evaluated)))
    result = judged(worded, sides, words)
    lines = {line.name: line for line in result.lines}
    assert list(lines) == ["mine", "word", "first rows", "random"]
    assert result.texts == 40
    assert result.left_out == {}
    for name in ("mine", "word"):
        for metric in ("f1", "top1", "average_precision"):
            assert lines[name].found[metric].value == pytest.approx(1)
    assert lines["mine"].over_word is not None
    assert lines["mine"].over_word["average_precision"].high == 0
    assert lines["mine"].first_run_over_this is None
    assert lines["random"].first_run_over_this is not None
    assert lines["random"].first_run_over_this["average_precision"].low > 0.4
    # The set of rows of one word is half of a rationale of two words, or all of it where they are the same.
    evaluated = [words for number, words in enumerate(worded.words) if number % 3 == 0]
    speaking = [[word for word in words if word in SPEAKING[0] + SPEAKING[1]] for words in evaluated]
    assert lines["word"].found["set_precision"].value == pytest.approx(1)
    recall = np.mean([1.0 if first == second else 0.5 for first, second in speaking])
    assert lines["word"].found["set_recall"].value == pytest.approx(recall)
    f1 = np.mean([1.0 if first == second else 2 / 3 for first, second in speaking])
    assert lines["word"].found["set_f1"].value == pytest.approx(f1)


def test_distinct_scores_are_judged_as_scikit_learn_does(worded: Worded, sides: Sides) -> None:
    # No two rows of a text have the same concept.
    generator = np.random.default_rng(0)
    reference = generator.integers(0, 50, len(sides.reference.place))
    evaluated = np.concatenate(
        [generator.permutation(50)[: (sides.evaluated.text == text).sum()] for text in np.unique(sides.evaluated.text)]
    )
    result = judged(worded, sides, Partition("it", 50, reference, evaluated))
    labels = sides.reference.attributes[LABEL]
    table = evidence(reference, labels, concepts=50, classes=2)
    # Concepts of equal odds are tied: they are left to the seeds, within a tolerance.
    wanted = []
    for number, text in enumerate(np.unique(sides.evaluated.text)):
        mine = sides.evaluated.text == text
        words = worded.words[3 * number]
        inside = np.array([word in SPEAKING[0] + SPEAKING[1] for word in words])
        scores = table[evaluated[mine], worded.labels[3 * number]]
        wanted.append(average_precision_score(inside, scores))
    assert result.lines[0].found["average_precision"].value == pytest.approx(np.mean(wanted), abs=0.03)


def test_rows_that_are_all_tied_are_as_good_as_chance(worded: Worded, sides: Sides) -> None:
    one = Partition(
        "one", 1, *(np.zeros(len(side.place), dtype=np.int64) for side in (sides.reference, sides.evaluated))
    )
    line = judged(worded, sides, one).lines[0]
    lengths = [len(words) for number, words in enumerate(worded.words) if number % 3 == 0]
    chance = np.mean([expected_at_random(length, 2) for length in lengths], axis=0)
    found = [line.found[metric].value for metric in ("f1", "top1", "average_precision")]
    np.testing.assert_allclose(found, chance, atol=0.07)
    assert line.found["set_recall"].value == 1
    assert line.found["set_precision"].value == pytest.approx(np.mean([2 / length for length in lengths]))


def test_a_run_is_compared_with_words_and_the_first_run_with_the_others(
    worded: Worded, run: Path, tmp_path: Path
) -> None:
    second = train(worded.cache, tmp_path / "second", seed=1, codes=4)
    config = QualityConfig(rationale="evidence")
    found = quality(worded.cache, {"a": run, "b": second}, tmp_path / "out", config).overlap
    assert found is not None
    a, b, word = found.lines[:3]
    assert [line.name for line in found.lines] == ["a", "b", "word", "first rows", "random"]
    assert a.over_word is not None
    assert b.first_run_over_this is not None
    gap = a.found["f1"].value - word.found["f1"].value
    assert a.over_word["f1"].value == pytest.approx(gap)
    assert b.first_run_over_this["f1"].value == pytest.approx(a.found["f1"].value - b.found["f1"].value)
    again = quality(worded.cache, {"a": run, "b": second}, tmp_path / "out", config).overlap
    assert again == found


def test_what_cannot_be_compared_with_people_is_refused(worded: Worded, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"keeps no field 'reason' of its texts .* extract with --keep-fields reason"):
        quality(worded.cache, {"a": run}, tmp_path / "a", QualityConfig(rationale="reason"))
    bare = make_worded(tmp_path / "bare", predictions=False)
    other = train(bare.cache, tmp_path / "run")
    with pytest.raises(ConfigError, match="was extracted without predictions, by which --rationale picks the class"):
        quality(bare.cache, {"a": other}, tmp_path / "b", QualityConfig(rationale="evidence"))
    with pytest.raises(ConfigError, match="no text has a rationale that is a part of it"):
        quality(worded.cache, {"a": run}, tmp_path / "c", QualityConfig(rationale="text"))
