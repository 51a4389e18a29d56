"""Saliency against human rationales: texts of known words, scikit-learn's average precision, chance over all orders."""

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from clvq import Cache
from clvq.cache.writer import CacheWriter
from clvq.cli import app
from clvq.errors import ConfigError
from clvq.evaluation.rationales import agreement, compare_rationales, expected_at_random
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from typer.testing import CliRunner

from .cache_maker import Known, known, without_waiting

no_waiting = pytest.fixture(without_waiting, scope="module", autouse=True)


def words_of(made: Known) -> list[list[str]]:
    """A word of four letters for each row, special ones included: what the columns of `known` say of the text."""
    return [[f"{chr(97 + text)}{row:03d}" for row in range(count)] for text, count in enumerate(made.counts.tolist())]


def evidence_of(made: Known) -> list[Any]:
    """Three words from the third one on, where a text has enough; of some texts nothing, all, or what is not there."""
    parts: list[Any] = [" ".join(words[3:6]) if len(words) > 8 else None for words in words_of(made)]
    whole = next(number for number, count in enumerate(made.counts) if count > 8)
    parts[whole] = " ".join(words_of(made)[whole])
    parts[next(number for number, part in enumerate(parts) if part and number != whole)] = "of another text"
    return parts


def write(made: Known, path: Path, *, evidence: list[Any], reverse: bool = False) -> Cache:
    """The cache with texts, and a kept field `evidence`."""
    texts = [" ".join(words) for words in words_of(made)]
    table = made.texts().set_column(2, "text", pa.array(texts))
    table = table.append_column("source_row", pa.array(range(len(texts)), pa.int64()))
    table = table.append_column("text_sha256", pa.array([hashlib.sha256(text.encode()).hexdigest() for text in texts]))
    with CacheWriter(path, made.extraction) as writer:
        for number in range(made.geometry.shards):
            writer.commit(made.shard(number))
        writer.finish(table.append_column("evidence", pa.array(evidence)), class_names=None, counts={})
    return Cache(path)


@pytest.fixture(scope="module")
def made() -> Known:
    return known(texts=20, longest=20, saliency=True, seed=3)


@pytest.fixture(scope="module")
def cache(made: Known, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return write(made, tmp_path_factory.mktemp("rationales") / "cache", evidence=evidence_of(made))


def by_hand(made: Known, score: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """The metrics of each text with a rationale, worked out from the words themselves."""
    found = []
    starts = np.cumsum(made.counts) - made.counts
    for text, part in enumerate(evidence_of(made)):
        words = words_of(made)[text]
        if not part or part not in " ".join(words) or part == " ".join(words):
            continue
        # Not the special rows, the first and the last one.
        rows = np.arange(starts[text] + 1, starts[text] + made.counts[text] - 1)
        scores = score(made.columns["saliency"][rows], made.columns["saliency_max"][rows]).astype(np.float64)
        inside = np.array([word in part.split() for word in words[1:-1]])
        chosen = np.argsort(-scores)[: inside.sum()]
        found.append(
            [inside[chosen].mean(), inside[np.argmax(scores)], average_precision_score(inside, scores)],
        )
    return np.array(found)


def test_each_score_is_judged_on_the_words_of_the_rationale(made: Known, cache: Cache) -> None:
    result = compare_rationales({"it": cache}, "evidence", seed=1)
    lines = {line.score: line for line in result.lines}
    assert list(lines) == ["random", "first rows", "saliency", "|saliency|", "saliency_max"]
    scores: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
        "first rows": lambda signed, largest: -np.arange(len(signed)),
        "saliency": lambda signed, largest: signed,
        "|saliency|": lambda signed, largest: np.abs(signed),
        "saliency_max": lambda signed, largest: largest,
    }
    for name, score in scores.items():
        wanted = by_hand(made, score)
        assert len(wanted) == result.texts > 5
        found = [estimate.value for estimate in lines[name].found.values()]
        np.testing.assert_allclose(found, wanted.mean(axis=0), rtol=1e-6)
        chance = [estimate.value for estimate in lines["random"].found.values()]
        over = lines[name].over_random
        assert over is not None
        np.testing.assert_allclose([part.value for part in over.values()], np.subtract(found, chance), atol=1e-12)
    first = lines["random"].found["f1"]
    assert first.low < first.value < first.high


def test_texts_without_a_usable_rationale_are_counted(made: Known, cache: Cache) -> None:
    result = compare_rationales({"it": cache}, "evidence")
    absent = evidence_of(made).count(None)
    assert absent > 2
    assert result.left_out == {
        "without a rationale": absent, "rationale not in the text": 1, "rationale is the whole text": 1,
    }  # fmt: skip
    assert result.texts == len(made.counts) - absent - 2


def test_of_a_split_only_its_texts_are_compared(made: Known, cache: Cache) -> None:
    parts = [compare_rationales({"it": cache}, "evidence", splits=[split]) for split in ("train", "dev")]
    whole = compare_rationales({"it": cache}, "evidence")
    assert sum(part.texts for part in parts) == whole.texts
    mean = sum(part.texts * part.lines[2].found["f1"].value for part in parts) / whole.texts
    assert mean == pytest.approx(whole.lines[2].found["f1"].value)


def test_a_rationale_may_be_several_parts_and_half_a_word_counts(made: Known, tmp_path: Path) -> None:
    text = int(np.argmax(made.counts))
    words = words_of(made)[text]
    # Two of four characters of the sixth word, one of the eighth.
    evidence: list[Any] = [None] * len(made.counts)
    evidence[text] = [f"{words[2]} {words[3]}", words[5][2:], words[7][-1:] + " " + words[8]]
    result = compare_rationales({"it": write(made, tmp_path / "cache", evidence=evidence)}, "evidence")
    assert result.texts == 1
    wanted = of_one(made, text, [2, 3, 5, 8])
    assert result.lines[2].found["average_precision"].value == pytest.approx(wanted)


def test_every_place_where_a_part_stands_is_marked(made: Known, tmp_path: Path) -> None:
    text = int(np.argmax(made.counts))
    evidence: list[Any] = [None] * len(made.counts)
    # Three of the four characters of each of the first ten words.
    evidence[text] = words_of(made)[text][0][:3]
    result = compare_rationales({"it": write(made, tmp_path / "cache", evidence=evidence)}, "evidence")
    wanted = of_one(made, text, list(range(10)))
    assert result.lines[2].found["average_precision"].value == pytest.approx(wanted)


def of_one(made: Known, text: int, words: list[int]) -> float:
    """Average precision of the signed saliency of one text whose rationale is these of its words."""
    first = int(np.cumsum(made.counts)[text] - made.counts[text])
    rows = np.arange(1, made.counts[text] - 1)
    return float(average_precision_score(np.isin(rows, words), made.columns["saliency"][first + rows]))


@given(
    st.lists(st.tuples(st.integers(-(10**6), 10**6), st.booleans()), min_size=2, max_size=30, unique_by=lambda p: p[0])
)
def test_average_precision_is_that_of_scikit_learn(rows: list[tuple[int, bool]]) -> None:
    scores, inside = np.array([row[0] for row in rows], dtype=np.float64), np.array([row[1] for row in rows])
    if inside.any():
        f1, top, precision = agreement(scores, inside)
        assert precision == pytest.approx(average_precision_score(inside, scores))
        best = {number for number, _ in sorted(enumerate(scores), key=lambda pair: -pair[1])[: inside.sum()]}
        assert f1 == pytest.approx(sum(inside[number] for number in best) / inside.sum())
        assert top == inside[np.argmax(scores)]


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (2, 1), (5, 1), (5, 3), (6, 6)])
def test_chance_is_the_mean_over_all_orders(rows: int, count: int) -> None:
    inside = np.arange(rows) < count
    orders = itertools.permutations(range(rows))
    every = [agreement(np.array(order, dtype=np.float64), inside) for order in orders]
    np.testing.assert_allclose(expected_at_random(rows, count), np.mean(every, axis=0))


def test_caches_are_put_side_by_side_text_by_text(made: Known, cache: Cache, tmp_path: Path) -> None:
    rows = len(made.columns["saliency"])
    other = np.random.default_rng(0).normal(size=rows).astype(np.float32)
    changed = replace(made, columns={**made.columns, "saliency": other})
    second = write(changed, tmp_path / "other", evidence=evidence_of(made))
    alone = [compare_rationales({"it": one}, "evidence").lines for one in (cache, second)]
    both = compare_rationales({"one": cache, "two": second}, "evidence").lines
    assert [line.found for line in both] == [line.found for lines in alone for line in lines]
    assert [line.cache for line in both] == ["one"] * 5 + ["two"] * 5
    for number, line in enumerate(both[5:]):
        assert line.over_first_cache is not None
        difference = line.found["f1"].value - both[number].found["f1"].value
        assert line.over_first_cache["f1"].value == pytest.approx(difference)
    # Their largest is the same, and so no text differs.
    assert both[9].over_first_cache is not None
    assert both[9].over_first_cache["top1"].high == 0
    assert both[7].over_first_cache is not None
    assert both[7].over_first_cache["average_precision"].low < 0 < both[7].over_first_cache["average_precision"].high


def test_what_cannot_be_compared_is_refused(made: Known, cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"keeps no field 'reason' of its texts .* extract with --keep-fields reason"):
        compare_rationales({"it": cache}, "reason")
    with pytest.raises(ConfigError, match="the field 'label' holds 0; a rationale is a part of the text"):
        compare_rationales({"it": cache}, "label")
    fewer = known(texts=19, longest=20, saliency=True, seed=3)
    other = write(fewer, tmp_path / "fewer", evidence=[None] * 19)
    with pytest.raises(ConfigError, match="b and a hold other texts"):
        compare_rationales({"a": cache, "b": other}, "evidence")
    without = write(known(texts=20, longest=20, seed=3), tmp_path / "without", evidence=evidence_of(made))
    with pytest.raises(ConfigError, match=r"holds no saliency; extract with `--task classify --saliency ig`"):
        compare_rationales({"it": without}, "evidence")


def test_the_command_prints_a_table_or_json(cache: Cache) -> None:
    shown = CliRunner().invoke(app, ["rationales", str(cache.path)])
    assert shown.exit_code == 0
    assert "saliency_max" in shown.stdout
    assert "1 rationale not in the text" in shown.stdout
    plain = CliRunner().invoke(app, ["rationales", str(cache.path), "--split", "dev", "--json"])
    read = json.loads(plain.stdout)
    assert read["texts"] == compare_rationales({"it": cache}, "evidence", splits=["dev"]).texts
    assert read["lines"][2]["score"] == "saliency"
    assert read["lines"][0]["over_random"] is None
