"""The folder of an ablation: `ablation.json` with all tables, `texts.parquet` with every text under every condition."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..cache.files import write_file
from ..cache.layout import to_json
from .bootstrap import RESAMPLES
from .outcome import Condition, Outcome
from .results import plain
from .significance import FLIPS

RESULT = "ablation.json"
PER_TEXT = "texts.parquet"


def write(
    out: Path,
    settings: dict[str, Any],
    provenance: dict[str, Any],
    result: Any,
    table: pa.Table,
) -> None:
    """Write both files; `result` is a dataclass with the field `path`, which is not written."""
    # The old result first: killed in between, it would stand beside the new texts.
    (out / RESULT).unlink(missing_ok=True)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    write_file(out / PER_TEXT, sink.getvalue())
    figures = {name: value for name, value in asdict(result).items() if name != "path"}
    head = {"settings": settings, "provenance": provenance, "bootstrap_resamples": RESAMPLES, "sign_flips": FLIPS}
    write_file(out / RESULT, to_json({**head, **plain(figures)}))


def table_of(
    outcomes: Mapping[tuple[str, Condition], Outcome],
    texts: Mapping[str, Any],
    concepts: Mapping[str, Sequence[int]],
) -> pa.Table:
    """Every text under every condition.

    Parameters
    ----------
    outcomes
        By read-out and condition.
    texts
        Columns that describe the texts.
    concepts
        The concept removed from each text, by run; −1 where it is none or several.
    """
    tables = []
    for (read_out, key), outcome in outcomes.items():
        count = len(outcome.flipped)
        tables.append(
            pa.table(
                {
                    "run": [key.run] * count,
                    "read_out": [read_out] * count,
                    "removal": pa.array([key.removal] * count, pa.string()),
                    "removed": [key.subject] * count,
                    "strength": np.full(count, key.strength),
                    **texts,
                    "concept": pa.array(concepts.get(key.run, [-1] * count), pa.int32()),
                    **{name: getattr(outcome, name) for name in Outcome.__dataclass_fields__ if name != "prediction"},
                    # A whole number, or null where the text was not asked about.
                    "prediction": pa.array(outcome.prediction, from_pandas=True).cast(pa.int32()),
                }
            )
        )
    return pa.concat_tables(tables)
