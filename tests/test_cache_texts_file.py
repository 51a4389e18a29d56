"""`texts.parquet`: what is written is read, and what a stranger may have made is refused before it is decoded."""

import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clvq.cache.parquet_pages import memory
from clvq.cache.texts_file import read_texts_table, texts_parquet
from clvq.errors import CacheCorrupt
from hypothesis import given, settings
from hypothesis import strategies as st

from .cache_maker import Known, known

MADE = known(texts=50)
TABLE = MADE.texts().add_column(4, "prediction", pa.nulls(50, pa.int32()))


def written(table: pa.Table, **settings: Any) -> bytes:
    """Parquet as someone else may write it."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **{"compression": "zstd", "store_schema": False, **settings})
    return bytes(sink.getvalue())


def read(data: bytes, made: Known = MADE) -> pa.Table:
    return read_texts_table(data, made.geometry, name="a/texts.parquet")


def refusal(data: bytes) -> str:
    with pytest.raises(CacheCorrupt) as caught:
        read(data)
    text = str(caught.value)
    assert text.startswith("a/texts.parquet cannot be read (")
    assert text.endswith("); get a whole copy of it")
    assert len(text) < 400
    return text.removeprefix("a/texts.parquet cannot be read (").removesuffix("); get a whole copy of it")


def with_column(name: str, values: object) -> pa.Table:
    return TABLE.set_column(TABLE.schema.get_field_index(name), name, pa.array(values))


def changed(name: str, place: int, value: int) -> pa.Table:
    values = np.asarray(TABLE[name]).copy()
    values[place] = value
    return with_column(name, values)


def test_what_is_written_is_read() -> None:
    kept = [[{"from": number, "what": "é" * number}] * (number % 3) for number in range(50)]
    table = TABLE.append_column("evidence", pa.array(kept)).append_column("score", pa.array([0.5, None] * 25))
    assert read(texts_parquet(table)) == table


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dictionary": False}, {"data_page_version": "2.0"}, {"compression": "none"}, {"row_group_size": 7},
     {"data_page_size": 64}, {"write_page_checksum": True}, {"write_page_index": True}],
)  # fmt: skip
def test_another_way_of_writing_the_same_table_is_read(settings: dict[str, Any]) -> None:
    assert read(written(TABLE, **settings)) == TABLE


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 1000),
    st.integers(0, 60),
    st.sampled_from([False, ["split"], True]),
    st.sampled_from(["1.0", "2.0"]),
    st.integers(50, 5000),
)
def test_a_table_takes_no_more_memory_than_its_pages_say(
    rows: int, length: int, dictionary: bool | list[str], version: str, group: int
) -> None:
    generator = np.random.default_rng(rows + length)
    table = pa.table(
        {
            "number": generator.integers(0, 9, rows),
            "split": generator.choice(["train", "dev"], rows),
            "text": ["x" * size for size in generator.integers(0, length + 1, rows)],
            "list": [["y" * length] * size for size in generator.integers(0, 4, rows)],
        }
    )
    file = written(table, use_dictionary=dictionary, data_page_version=version, row_group_size=group)
    assert memory(file) >= pq.read_table(pa.BufferReader(file), use_threads=False).nbytes


def test_our_own_tables_take_memory_in_proportion_to_their_values() -> None:
    rows = 50_000
    table = pa.table({"split": ["train"] * rows, "text": [f"text number {number} " * 20 for number in range(rows)]})
    assert memory(texts_parquet(table)) < 3 * table.nbytes


BOMBS: dict[str, Callable[[], bytes]] = {
    # 10 TB of one string, by number.
    "dictionary": lambda: written(
        TABLE.append_column(
            "x", pa.DictionaryArray.from_arrays(pa.array(np.zeros(50, np.int32)), pa.array(["x" * 10**7]))
        ),
        dictionary_pagesize_limit=1 << 30,
    ),
    "nested dictionary": lambda: written(
        TABLE.append_column("x", pa.array([["x" * 10**6, *[""] * 20]] * 50)), dictionary_pagesize_limit=1 << 30
    ),
    "zstd": lambda: written(
        TABLE.append_column("x", pa.array(["x" * (20 << 20), *[""] * 49])),
        use_dictionary=False,
        write_statistics=False,
    ),
    "rows": lambda: written(pa.table({name: pa.nulls(2 * 10**6, pa.int32()) for name in "abc"})),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_that_would_take_much_memory_is_refused_before_it_is_decoded(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = BOMBS[kind]()
    assert len(data) < 200_000

    def decoded(*_: object, **__: object) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(pq.ParquetFile, "read", decoded)
    monkeypatch.setattr("clvq.cache.texts_file._FREE_BYTES", 16 << 20)
    words = refusal(data)
    assert words.startswith(f"its {len(data):,} bytes would take ")
    assert int(words.split()[-3].replace(",", "")) > 16 << 20


def test_an_encoding_that_repeats_what_came_before_is_refused() -> None:
    table = TABLE.append_column("x", pa.array(["x" * 1000] * 50))
    data = written(table, use_dictionary=False, column_encoding={"x": "DELTA_BYTE_ARRAY"})
    assert refusal(data) == "a page has 50 values in the encoding 7"


def test_a_file_with_a_schema_of_its_own_or_by_another_writer_is_refused() -> None:
    assert refusal(written(TABLE, store_schema=True)) == "it was not written by clvq"
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, TABLE.schema, store_schema=False) as writer:
        writer.write_table(TABLE)
        writer.add_key_value_metadata({"a": "b"})
    assert refusal(bytes(sink.getvalue())) == "it was not written by clvq"
    other = written(TABLE)
    assert other.count(b"parquet-cpp-arrow") == 1
    assert refusal(other.replace(b"parquet-cpp-arrow", b"parquet-mr-arrows")) == "it was not written by clvq"


def test_a_schema_of_many_or_deep_columns_is_refused() -> None:
    wide = TABLE
    for number in range(1000):
        wide = wide.append_column(str(number), pa.nulls(50, pa.int32()))
    assert refusal(written(wide)) == "it has too many columns"
    kind = pa.int32()
    for _ in range(1200):
        kind = pa.struct([("a", kind)])
    assert refusal(written(TABLE.append_column("deep", pa.nulls(50, kind)))) == "it has too many columns"


def test_what_is_not_parquet_is_refused() -> None:
    data = texts_parquet(TABLE)
    for other in (
        b"",
        b"PAR1",
        b"PAR1PAR1PAR1",
        b"x" * 1000,
        data[:-1],
        data[4:],
        b"PAR1" + data,
        data[: len(data) // 2],
    ):
        refusal(other)
    assert refusal(data[:-8] + (2**31).to_bytes(4, "little") + b"PAR1") == "its footer has 2147483648 bytes"
    assert refusal(data[:-8] + (2**20).to_bytes(4, "little") + b"PAR1") == "its footer has 1048576 bytes"


@pytest.mark.parametrize("name", ["text_id", "split", "label", "prediction", "first_row", "row_count"])
def test_a_missing_doubled_or_mistyped_column_is_named(name: str) -> None:
    assert refusal(texts_parquet(TABLE.drop_columns(name))).startswith(f"its column {name} is missing instead of ")
    assert refusal(texts_parquet(with_column(name, [1.5] * 50))).startswith(f"its column {name} is double instead of ")
    assert refusal(texts_parquet(TABLE.append_column(name, TABLE[name]))) == "it has two columns of one name"


@pytest.mark.parametrize("name", ["text_id", "split", "first_row", "row_count"])
def test_a_gap_where_none_may_be_is_named(name: str) -> None:
    values = [None, *TABLE[name].to_pylist()[1:]]
    gap = TABLE.set_column(TABLE.schema.get_field_index(name), name, pa.array(values, TABLE.schema.field(name).type))
    assert refusal(texts_parquet(gap)) == f"its column {name} has gaps"


def test_another_number_of_texts_or_of_rows_is_named() -> None:
    rows = MADE.geometry.rows
    assert refusal(texts_parquet(TABLE[:49])) == "it has 49 texts, and the manifest counts 50"
    place = int(np.argmax(np.asarray(TABLE["row_count"]) > 1))
    fewer = changed("row_count", place, TABLE["row_count"][place].as_py() - 1)
    assert refusal(texts_parquet(fewer)) == f"its texts have {rows - 1} rows, and the manifest counts {rows}"


def test_ids_out_of_order_or_off_the_axis_are_refused() -> None:
    ids = np.asarray(TABLE["text_id"])
    for table in (
        changed("text_id", 0, -1),
        changed("text_id", 49, MADE.geometry.text_places),
        changed("text_id", 49, 2**62),
        changed("text_id", 3, int(ids[2])),
        with_column("text_id", ids[::-1].copy()),
    ):
        assert refusal(texts_parquet(table)) == "its text ids do not ascend within the text axis"


def test_rows_off_the_axis_outside_the_shard_or_shared_are_refused() -> None:
    first, count, shard = np.asarray(TABLE["first_row"]), np.asarray(TABLE["row_count"]), MADE.geometry.shard_rows
    for table, words in (
        (changed("first_row", 0, -1), "a text has no place on the row axis"),
        (changed("row_count", 0, -1), "a text has no place on the row axis"),
        (changed("row_count", 0, 2**62), "a text has no place on the row axis"),
        (changed("row_count", 0, shard + 1), "a text has no place on the row axis"),
        (changed("first_row", 0, 2**62), "the rows of a text lie outside its shard"),
        (changed("first_row", 0, shard), "the rows of a text lie outside its shard"),
        (changed("first_row", 1, int(first[0])), "the rows of two texts overlap"),
        (changed("row_count", 0, int(count[0]) + 1), "the rows of two texts overlap"),
    ):
        assert refusal(texts_parquet(table)) == words


def test_bytes_that_are_not_utf8_are_refused() -> None:
    data = texts_parquet(TABLE.set_column(2, "text", pa.array([b"\xff\xfe"] * 50, pa.binary()).view(pa.string())))
    assert "UTF8" in refusal(data)


@pytest.mark.soak
def test_a_file_changed_anywhere_is_refused_or_read_and_never_brings_the_process_down(
    tmp_path: Path, soak: bool, tell: Callable[[str], None]
) -> None:
    (tmp_path / "texts.parquet").write_bytes(texts_parquet(TABLE))
    tries = 20_000 if soak else 500
    # In a process of its own: what would bring it down would end these tests too.
    ended = subprocess.run(
        [sys.executable, "-c", CHANGING, tmp_path / "texts.parquet", str(tries)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")
    refused, within = map(int, ended.stdout.split())
    assert refused > tries / 2
    assert within < 500 << 10
    tell(f"{tries} files of texts changed at random: {refused} refused, the others read; no crash")


CHANGING = """
import random, sys
from cache_maker import known
from clvq.cache.texts_file import read_texts_table
from clvq.errors import CacheCorrupt

def resident(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

made, draw, refused = known(texts=50), random.Random(0), 0
original = open(sys.argv[1], "rb").read()
before = resident("VmRSS")
for _ in range(int(sys.argv[2])):
    data = bytearray(original)
    for _ in range(draw.choice([1, 1, 2, 5, 20])):
        # The footer and the pages' headers are where it hurts.
        place = draw.randrange(len(data)) if draw.random() < 0.5 else draw.randrange(len(data) * 2 // 3, len(data))
        data[place] = draw.choice([data[place] ^ 1 << draw.randrange(8), 0, 255, draw.randrange(256)])
    try:
        read_texts_table(bytes(data), made.geometry, name="x")
    except CacheCorrupt:
        refused += 1
print(refused, resident("VmHWM") - before)
"""


def test_arbitrary_bytes_are_refused() -> None:
    draw = random.Random(0)
    for size in range(300):
        inner = draw.randbytes(size)
        refusal(b"PAR1" + inner + draw.randrange(size + 1).to_bytes(4, "little") + b"PAR1")
        with suppress(CacheCorrupt):
            raise AssertionError(read(inner))
