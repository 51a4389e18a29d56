"""What a judge's reply says, or why it says nothing. No server's promise to keep to a schema is believed."""

import json
import re
from typing import Any

_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)


class InvalidReply(ValueError):
    """A reply that does not answer the question; the message tells the judge why."""


def parse(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The first JSON object in a reply, with exactly the fields of the schema and values that it lists.

    Code fences, thoughts in `<think>` and words around the object are overlooked; nothing inside it is.

    Raises
    ------
    InvalidReply
    """
    fields = schema["properties"]
    plain = _first_object(_THOUGHT.sub("", text))
    missing = [name for name in fields if name not in plain]
    if missing:
        raise InvalidReply(f"the field {missing[0]!r} is missing")
    unknown = [name for name in plain if name not in fields]
    if unknown:
        raise InvalidReply(f"there is a field {unknown[0][:40]!r} that was not asked for")
    return {name: _value(name, plain[name], field) for name, field in fields.items()}


def _first_object(text: str) -> dict[str, Any]:
    start = text.find("{")
    if start < 0:
        raise InvalidReply("there is no JSON object in it")
    try:
        plain, _ = json.JSONDecoder(object_pairs_hook=_once).raw_decode(text[start:])
    except InvalidReply:
        raise
    except (ValueError, RecursionError) as error:
        raise InvalidReply("what looks like a JSON object cannot be read as one") from error
    if not isinstance(plain, dict):
        raise InvalidReply("there is no JSON object in it")
    return plain


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise InvalidReply("a field is there twice")
    return dict(pairs)


def _value(name: str, value: Any, field: dict[str, Any]) -> Any:
    if "enum" not in field:
        if not isinstance(value, str):
            raise InvalidReply(f"the field {name!r} is no text")
        return value
    if field["type"] == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or value not in field["enum"]:
        shown = json.dumps(value, ensure_ascii=False)[:40]
        raise InvalidReply(f"the field {name!r} is {shown} instead of one of {field['enum']}")
    return value
