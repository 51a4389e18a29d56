"""Texts with labels, from files of every kind and from the Hub; and what is said where that fails."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clvq.errors import ClvqError, ConfigError, DataError, DataNotFound
from clvq.pipeline.data import read_texts

TEXTS = ['plain, with "quotes"', "two\nlines\r\nand a tab\t", " spaces  é 中文 👩\u200d⚕️\u2028\x85 ", ""]
LABELS = [1, 0, 1, 0]


def jsonl(path: Path, **columns: list[Any]) -> Path:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_texts_and_labels_come_out_as_they_were_written(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"dev.{kind}"
    if kind == "jsonl":
        jsonl(path, text=TEXTS, label=LABELS)
    elif kind == "parquet":
        pq.write_table(pa.table({"text": TEXTS, "label": LABELS}), path)
    else:
        quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
        lines = "".join(f"{text},{label}\n" for text, label in zip(quoted, LABELS, strict=True))
        write(path, "\ufefftext,label\n" + lines)
    texts = read_texts(str(path))
    assert texts.text == TEXTS
    assert texts.label == LABELS
    assert texts.class_names == ["0", "1"]
    assert texts.split == ["dev"] * 4
    assert texts.source_row == [0, 1, 2, 3]


def test_a_text_file_has_one_text_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "all.txt", "one\r\n\ntwo \u2028 still two\nthree")
    texts = read_texts(str(path))
    assert texts.text == ["one", "", "two \u2028 still two", "three"]
    assert texts.label == [None] * 4
    assert texts.class_names is None


def test_a_csv_text_may_be_longer_than_a_block_and_digits_are_text(tmp_path: Path) -> None:
    long = "x\n" * 1_000_000
    assert read_texts(str(write(tmp_path / "a.csv", f'text\n007\n"{long}"\n'))).text == ["007", long]


def test_a_folder_gives_its_splits_in_the_order_asked_for(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", text=["a", "b"])
    jsonl(tmp_path / "dev.jsonl", text=["c"])
    write(tmp_path / ".hidden.jsonl", "no")
    (tmp_path / "folder.jsonl").mkdir()
    assert read_texts(str(tmp_path)).split == ["dev", "train", "train"]
    both = read_texts(str(tmp_path), splits=["train", "dev"])
    assert both.text == ["a", "b", "c"]
    assert both.source_row == [0, 1, 0]
    assert read_texts(str(tmp_path), splits=["dev"]).text == ["c"]


def test_with_named_splits_other_kinds_of_file_do_not_matter(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", text=["a"])
    write(tmp_path / "notes.txt", b"\xff\xff")
    write(tmp_path / "dev.csv", "text\nb\n")
    assert read_texts(str(tmp_path), splits=["dev", "train"]).text == ["b", "a"]


def test_parquet_columns_come_from_the_file_and_not_from_its_path(tmp_path: Path) -> None:
    folder = tmp_path / "label=7"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["a"]}), folder / "x.parquet")
    assert read_texts(str(folder / "x.parquet")).label == [None]


@pytest.mark.parametrize(
    ("given", "numbers", "names"),
    [
        (["pos", "neg", None, "pos"], [1, 0, None, 1], ["neg", "pos"]),
        ([2, 0, None, -1], [2, 0, None, None], ["0", "1", "2"]),
        (["2", "0", "", "-1"], [2, 0, None, None], ["0", "1", "2"]),
        ([True, False, True, None], [1, 0, 1, None], ["0", "1"]),
        ([1, "0", " 1", None], [1, 0, 1, None], ["0", "1"]),
        (["--1", "b", "b", "--1"], [0, 1, 1, 0], ["--1", "b"]),
        ([None, None, None, ""], [None] * 4, None),
    ],
)
def test_labels_become_numbers(
    given: list[Any], numbers: list[int | None], names: list[str] | None, tmp_path: Path
) -> None:
    path = jsonl(tmp_path / "a.jsonl", text=["a", "b", "c", "d"], gold=given)
    texts = read_texts(str(path), label_field="gold")
    assert texts.label == numbers
    assert texts.class_names == names


def test_labels_are_numbered_over_all_splits(tmp_path: Path) -> None:
    jsonl(tmp_path / "dev.jsonl", text=["a"], label=["b"])
    jsonl(tmp_path / "train.jsonl", text=["a", "b"], label=["c", "a"])
    texts = read_texts(str(tmp_path))
    assert texts.label == [1, 2, 0]
    assert texts.class_names == ["a", "b", "c"]


def test_a_sample_is_seeded_and_keeps_the_order_of_the_data(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", text=[str(i) for i in range(100)], label=list(range(100)))
    sample = read_texts(str(path), max_texts=10, seed=3)
    assert sample.source_row == sorted(set(sample.source_row))
    assert len(sample) == 10
    assert [int(text) for text in sample.text] == sample.source_row == sample.label
    assert read_texts(str(path), max_texts=10, seed=3).source_row == sample.source_row
    assert read_texts(str(path), max_texts=10, seed=4).source_row != sample.source_row
    assert len(read_texts(str(path), max_texts=1000)) == 100


def test_kept_fields_stay_what_they_are_or_become_json(tmp_path: Path) -> None:
    fields: dict[str, list[Any]] = {
        "doc": ["x", None],
        "evidence": [[[0, 3], [5, 9]], []],
        "mixed": [1, "é"],
        "huge": [2**80, 1],
        "hollow": [{}, {}],
        "half": ["\ud800", "x"],
    }
    path = jsonl(tmp_path / "a.jsonl", text=["a", "b"], **fields)
    kept = read_texts(str(path), keep_fields=list(fields)).kept
    pq.write_table(pa.table(kept), pa.BufferOutputStream())
    as_json = {"mixed", "huge", "hollow", "half"}
    for name, values in fields.items():
        assert kept[name].to_pylist() == ([json.dumps(value) for value in values] if name in as_json else values)


def test_the_identity_follows_the_bytes_and_not_the_place(tmp_path: Path) -> None:
    for folder in ("one", "two", "three"):
        (tmp_path / folder).mkdir()
    first = jsonl(tmp_path / "one" / "a.jsonl", text=["a"])
    second = jsonl(tmp_path / "two" / "a.jsonl", text=["a"])
    other = jsonl(tmp_path / "three" / "a.jsonl", text=["b"])
    assert read_texts(str(first)).identity == read_texts(str(second)).identity
    assert read_texts(str(first)).identity != read_texts(str(other)).identity
    assert str(tmp_path) not in json.dumps(read_texts(str(first)).identity)


MISTAKES: list[tuple[dict[str, str | bytes], dict[str, Any], type[ClvqError], str]] = [
    ({}, {"data": "nothing.jsonl"}, DataNotFound, "nothing.jsonl does not exist: give a file or folder, or the name"),
    ({}, {"data": "./nothing"}, DataNotFound, "./nothing does not exist: give a file or folder, or the name of a data"),
    ({}, {}, DataNotFound, "FOLDER holds no .jsonl, .csv, .parquet, .txt file"),
    ({"a.json": "[]"}, {"data": "a.json"}, DataError, "a.json is not one of .jsonl, .csv, .parquet, .txt"),
    ({"a.jsonl": ""}, {"data": "a.jsonl"}, DataError, "a.jsonl holds no texts"),
    ({"a.jsonl": "\n \n"}, {"data": "a.jsonl"}, DataError, "a.jsonl holds no texts"),
    ({"a.txt": ""}, {"data": "a.txt"}, DataError, "a.txt holds no texts"),
    ({"a.csv": " \n"}, {"data": "a.csv"}, DataError, "a.csv holds no texts"),
    ({"a.csv": "text,label\n"}, {"data": "a.csv"}, DataError, "a.csv holds no texts"),
    (
        {"a.jsonl": '{"text": "a"}\n{"text": '},
        {"data": "a.jsonl"},
        DataError,
        "line 2 of a.jsonl is not JSON: Expecting",
    ),
    ({"a.jsonl": "[" * 100_000}, {"data": "a.jsonl"}, DataError, "line 1 of a.jsonl is not JSON: maximum recursion"),
    ({"a.jsonl": '["a"]'}, {"data": "a.jsonl"}, DataError, "line 1 of a.jsonl is not a JSON object, but list"),
    (
        {"a.jsonl": '{"text": "a"}\n\n{"text": "b", "label": 1}'},
        {"data": "a.jsonl"},
        DataError,
        "line 3 of a.jsonl differs from line 1 in the field 'label': give all lines the same",
    ),
    (
        {"a.jsonl": '{"review": "a", "label": 1}'},
        {"data": "a.jsonl"},
        DataError,
        "a.jsonl has no field 'text'; it has 'review', 'label': see --text-field, --label-field and --keep-fields",
    ),
    (
        {"a.jsonl": '{"text": "a"}'},
        {"data": "a.jsonl", "label_field": "gold"},
        DataError,
        "a.jsonl has no field 'gold'",
    ),
    (
        {"a.jsonl": '{"text": "a"}'},
        {"data": "a.jsonl", "keep_fields": ["doc"]},
        DataError,
        "a.jsonl has no field 'doc'",
    ),
    (
        {"a.jsonl": '{"text": "a"}\n{"text": 3}'},
        {"data": "a.jsonl"},
        DataError,
        "row 1 of a.jsonl: field 'text' is int, not text; see --text-field",
    ),
    (
        {"a.jsonl": '{"text": "a\\ud800b"}'},
        {"data": "a.jsonl"},
        DataError,
        "row 0 of a.jsonl: field 'text' holds half of a surrogate pair at character 1, which is no text: repair",
    ),
    (
        {"a.jsonl": '{"text": "a", "label": 0.5}'},
        {"data": "a.jsonl"},
        DataError,
        "labels must be whole numbers or names; found 0.5; see --label-field",
    ),
    (
        {"a.jsonl": '{"text": "a", "label": 123456}'},
        {"data": "a.jsonl"},
        DataError,
        "labels reach 123,456: a classification is expected; see --label-field",
    ),
    ({"a.txt": b"caf\xe9"}, {"data": "a.txt"}, DataError, "a.txt is not UTF-8 (byte 3): save it as UTF-8"),
    ({"a.jsonl": b'{"text": "\xff"}'}, {"data": "a.jsonl"}, DataError, "a.jsonl is not UTF-8 (byte 10): save it as"),
    ({"a.csv": b"text\ncaf\xe9\n"}, {"data": "a.csv"}, DataError, "a.csv cannot be read as CSV: 'utf-8' codec can't"),
    ({"a.csv": "text,label\nb\n"}, {"data": "a.csv"}, DataError, "a.csv cannot be read as CSV: CSV parse error: Exp"),
    ({"a.csv": "text,text\na,b\n"}, {"data": "a.csv"}, DataError, "a.csv has several columns named 'text': rename all"),
    ({"a.parquet": "nonsense"}, {"data": "a.parquet"}, DataError, "a.parquet cannot be read as Parquet: Parquet magic"),
    (
        {"a.jsonl": "{}", "b.csv": "text\n"},
        {},
        DataError,
        "FOLDER holds files of several kinds (a.jsonl, b.csv): name the splits to read with --split",
    ),
    (
        {"a.jsonl": "{}", "a.csv": "text\n"},
        {"splits": ["a"]},
        DataError,
        "FOLDER has several files for the split 'a' (a.csv, a.jsonl): keep one",
    ),
    (
        {"a.jsonl": "{}"},
        {"splits": ["a", "b"]},
        DataNotFound,
        "FOLDER has no file for the split 'b' (such as b.jsonl)",
    ),
    ({"a.txt": "x"}, {"data": "a.txt", "splits": ["b"]}, DataNotFound, "a.txt is the split 'a'; --split asks for b"),
    (
        {"a.jsonl": '{"text": "a", "split": 1}'},
        {"data": "a.jsonl", "keep_fields": ["split"]},
        ConfigError,
        "--keep-fields split: the cache has a column of that name; rename the field",
    ),
    ({"a.txt": "x"}, {"data": "a.txt", "max_texts": 0}, ConfigError, "--max-texts is 0; it must be at least 1"),
]


@pytest.mark.parametrize(("files", "arguments", "kind", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_named(
    files: dict[str, str | bytes],
    arguments: dict[str, Any],
    kind: type[ClvqError],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        write(tmp_path / name, content)
    arguments = dict(arguments)
    data = arguments.pop("data", str(tmp_path))
    with pytest.raises(kind) as caught:
        read_texts(data, **arguments)
    said = str(caught.value).replace(str(tmp_path), "FOLDER")
    assert said.startswith(message)
    assert "\n" not in said


def test_a_hub_name_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataNotFound) as caught:
        read_texts("imdb-of-nobody")
    said = str(caught.value)
    assert said.startswith("'imdb-of-nobody' is no local file or folder, and could not be had from the Hub: Offline")
    assert "\n" not in said


def test_a_hub_data_set_is_read_at_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def part(texts: list[str], labels: list[int]) -> datasets.Dataset:
        features = datasets.Features(
            {
                "text": datasets.Value("string"),
                "label": datasets.ClassLabel(names=["wrong", "names", "here"]),
                "tone": datasets.ClassLabel(names=["neg", "pos"]),
            }
        )
        return datasets.Dataset.from_dict({"text": texts, "label": [2] * len(texts), "tone": labels}, features=features)

    asked = []

    def load(name: str, subset: str | None, *, revision: str) -> datasets.DatasetDict:
        asked.append((name, subset, revision))
        return datasets.DatasetDict({"train": part(["a", "b"], [1, 0]), "test": part(["c"], [-1])})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name: SimpleNamespace(sha="c0ffee"))
    texts = read_texts("someone/films", subset="plain", label_field="tone")
    assert asked == [("someone/films", "plain", "c0ffee")]
    assert texts.text == ["a", "b", "c"]
    assert texts.split == ["train", "train", "test"]
    assert texts.label == [1, 0, None]
    assert texts.class_names == ["neg", "pos"]
    assert texts.identity["commit"] == "c0ffee"
    message = "the data set someone/films has no split 'dev'; it has train, test"
    with pytest.raises(DataNotFound, match=f"^{re.escape(message)}$"):
        read_texts("someone/films", splits=["dev"])
