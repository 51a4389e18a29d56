"""The site's data: scripts that hand a name and a value to the page, so that they load from a folder without a server.

A page may not read files beside it (`file://`), but it may load scripts.
"""

import json
import math
from pathlib import Path
from typing import Any

from ..errors import DataError, DataNotFound
from ..evaluation.study.pages import safe_json

DATA = "data"
_DIGITS = 4
_BEGIN, _END = "clvq.receive(", ");\n"


def script(name: str, value: Any) -> bytes:
    """The script that hands `value` to the page under its name; no sign in it can end the script."""
    return f"{_BEGIN}{safe_json(name)},{safe_json(value)}{_END}".encode("ascii")


def read_script(site: Path, name: str) -> Any:
    """The value that a site's script holds.

    Raises
    ------
    DataNotFound, DataError
    """
    file = site / DATA / f"{name}.js"
    try:
        text = file.read_text(encoding="ascii")
    except FileNotFoundError as error:
        raise DataNotFound(f"{site} is no site of `clvq explore`: it has no {DATA}/{name}.js") from error
    except ValueError as error:
        raise DataError(f"{file} is damaged: it is not ASCII; build the site again") from error
    begin = f"{_BEGIN}{safe_json(name)},"
    if not (text.startswith(begin) and text.endswith(_END)):
        raise DataError(f"{file} is damaged: it does not hand {name!r} to the page; build the site again")
    try:
        return json.loads(text[len(begin) : -len(_END)])
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is damaged: {error}; build the site again") from error


def rounded(value: Any) -> Any:
    """Numbers to four significant digits, arrays as lists; what is no finite number is null."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(inner) for inner in value]
    if hasattr(value, "tolist"):
        return rounded(value.tolist())
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        short = float(f"{value:.{_DIGITS}g}")
        return int(short) if short == int(short) else short
    return value
