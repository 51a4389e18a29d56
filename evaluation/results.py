"""Results that stand in a folder: read back where the settings are the same, refused where they are not."""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from ..cache.layout import differences
from ..errors import ConfigError, ResumeMismatch
from .bootstrap import Estimate

Result = TypeVar("Result")

# Of the files that hold results; a report reads these alone.
ABLATION_VERSION = 3
QUALITY_VERSION = 1


def stored_result(
    kind: type[Result],
    file: Path,
    settings: Mapping[str, Any],
    *,
    what: str,
    beside: Collection[str] = (),
    force: bool = False,
) -> Result | None:
    """The result in a JSON file, where it has equal `settings`; `None` where there is none, or `force` lets it go.

    Parameters
    ----------
    kind
        A dataclass whose field `path` is the file's folder and whose other fields stand in the file, as `plain` wrote
        them. What is null in an estimate there is NaN again.
    what
        What messages call the result.
    beside
        Other files of the folder that belong to the result.

    Raises
    ------
    ResumeMismatch
        Where the settings differ; the message names how.
    ConfigError
        Where the folder holds something else, or a damaged result.
    """
    out = file.parent
    if not file.is_file():
        strange = sorted(
            entry.name for entry in out.iterdir() if entry.name not in beside and not entry.name.endswith(".aside")
        )
        if strange and not force:
            raise ConfigError(f"{out} is not empty and holds no {what} (it holds {strange[0]!r}): give another --out")
        return None
    try:
        found = json.loads(file.read_bytes())
        lines = differences(found["settings"], json.loads(json.dumps(settings)))
        if not lines:
            names = [field.name for field in fields(kind) if field.name != "path"]  # type: ignore[arg-type]
            return TypeAdapter(kind).validate_python({"path": out} | {name: _with_nan(found[name]) for name in names})
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if not force:
            raise ConfigError(f"{file} is damaged: give another --out, or --force to replace it") from error
        return None
    if not force:
        raise ResumeMismatch(
            f"{out} holds {what} results with other settings ({'; '.join(lines[:6])}): give another --out, or --force"
        )
    return None


def plain(value: Any) -> Any:
    """A value as JSON knows it: what could not be measured is null, a path its text."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and math.isnan(value) else value


def _with_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_nan(inner) for inner in value]
    if isinstance(value, dict):
        is_estimate = value.keys() == set(Estimate.__dataclass_fields__)
        return {key: math.nan if is_estimate and inner is None else _with_nan(inner) for key, inner in value.items()}
    return value
