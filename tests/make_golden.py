"""Makes the golden caches in `tests/golden/`: caches of this format version, and what reading them must give.

    .venv/bin/python tests/make_golden.py

A version that was released keeps its files for ever, so that later code goes on reading them; another version of the
format gets files of its own. What is expected is worked out here from the values, by other code than the cache's.
"""

import base64
import io
import json
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from cache_maker import CLASSES, EVERY_ENCODING, FEW_COLUMNS, Known, contents, known
from clvq.cache.layout import Encoding, read_manifest
from clvq.cache.writer import CacheWriter

GOLDEN = Path(__file__).with_name("golden")
VERSION = "v1"


def _whole() -> tuple[Known, pa.Table]:
    """All encodings, predictions that could not be made, rows of zeros, outliers, text of many alphabets."""
    made = known(texts=10, longest=24, widths=EVERY_ENCODING, chunk_rows=32, seed=7)
    for values in made.vectors.values():
        values[3] = 0
        values[5, 0] = 27_000
        values[6, 1] = -1e-40
        values[7] = [-0.0, *values[7, 1:]]
    assert made.logits is not None
    made.logits[4] = np.nan
    texts = made.texts()
    words = ["", "naïve", "日本語", "عربى", "a\nb", "\U0001f600", "e\u0301", "|`*", "'\"\\", "x" * 100]
    return made, (
        texts.set_column(2, "text", pa.array(words))
        .set_column(3, "label", pa.array([None if number == 2 else number % 3 for number in range(10)], pa.int32()))
        .append_column("evidence", pa.array([[{"start": number, "end": 9}] * (number % 3) for number in range(10)]))
        .append_column("score", pa.array([0.5, None] * 5))
    )


def _few() -> tuple[Known, pa.Table]:
    """No predictions, no texts and none of the columns that spell them; made from another cache."""
    made = known(
        texts=10, longest=24, widths={"mlp_out.3": (3, "int8"), "hidden.12": (2, "bf16")}, columns=FEW_COLUMNS,
        predictions=False, seed=8,
    )  # fmt: skip
    made = replace(made, extraction=replace(made.extraction, parent="0123456789abcdef" * 4))
    return made, made.texts().drop_columns("text")


def _saliency() -> tuple[Known, pa.Table]:
    """Saliency by integrated gradients, and a text that the model could not be run on."""
    made = known(texts=10, longest=24, widths={"hidden.8": (3, "bf16")}, saliency=True, seed=9)
    settings = {"saliency": "ig", "saliency_site": "hidden.8", "saliency_steps": 50, "saliency_baseline": "pad"}
    assert made.logits is not None
    assert made.convergence is not None
    made.logits[2], made.convergence[2] = np.nan, np.nan
    return made.with_identity(settings=settings), made.texts()


def _read_back(values: np.ndarray, encoding: Encoding, scale: np.ndarray | None) -> np.ndarray:
    """What is read where these values were stored, as the page on the format has it."""
    if encoding == "int8":
        assert scale is not None
        ratio = values / scale
        row = np.abs(ratio).max(1, keepdims=True) / np.float32(127)
        steps = np.rint(np.divide(ratio, row, out=np.zeros_like(ratio), where=row > 0))
        # No zero of int8 is negative.
        return steps.astype(np.int8) * row * scale
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[encoding]
    return torch.from_numpy(values).to(kind).float().numpy()


def _write(made: Known, texts: pa.Table, path: Path) -> None:
    with CacheWriter(path, made.extraction) as writer:
        writer.fix_scales(lambda: made.scales)
        for number in range(made.geometry.shards):
            writer.commit(made.shard(number))
        writer.finish(texts, class_names=CLASSES, counts={"texts": len(texts), "truncated": 0})


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()


def _expected(made: Known, texts: pa.Table, path: Path) -> dict[str, Any]:
    scales = made.scales
    return {
        "id": read_manifest(path)[1],
        "places": made.places.tolist(),
        "vectors": {
            name: _packed(_read_back(values, made.extraction.sites[name].encoding, scales.get(name)))
            for name, values in made.vectors.items()
        },
        "columns": {name: values.tolist() for name, values in made.columns.items()},
        "logits": None if made.logits is None else _packed(made.logits),
        "predictions": None
        if made.logits is None
        else [None if np.isnan(row).any() else int(row.argmax()) for row in made.logits],
        "convergence": None if made.convergence is None else _packed(made.convergence),
        "texts": texts.to_pylist(),
        "splits": {name: made.splits.count(name) for name in sorted(set(made.splits))},
    }


def _archive(files: dict[str, bytes]) -> bytes:
    """A zip file whose bytes depend on those of the files alone."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return sink.getvalue()


def main() -> None:
    """Write the archives and `expected.json`."""
    GOLDEN.mkdir(exist_ok=True)
    expected = {}
    for name, (made, texts) in {"whole": _whole(), "few": _few(), "saliency": _saliency()}.items():
        with tempfile.TemporaryDirectory() as folder:
            _write(made, texts, Path(folder) / "cache")
            expected[name] = _expected(made, texts, Path(folder) / "cache")
            (GOLDEN / f"{VERSION}-{name}.zip").write_bytes(_archive(contents(Path(folder) / "cache")))
    text = json.dumps(expected, ensure_ascii=False)
    (GOLDEN / f"{VERSION}-expected.json").write_text(text + "\n", encoding="utf-8")
    for file in sorted(GOLDEN.iterdir()):
        sys.stdout.write(f"{file.name}: {file.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main()
