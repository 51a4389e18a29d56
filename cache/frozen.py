"""Models of JSON that strangers may have written: an error costs as little memory as what is right."""

from collections.abc import Callable
from itertools import islice
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WrapValidator, model_validator

# NumPy holds no larger ones.
_LARGEST = 2**63 - 1


def _writable(text: str) -> str:
    text.encode()
    return text


# JSON can name halves of characters, which nothing can write: encoding them is an error.
Text = Annotated[str, AfterValidator(_writable)]
# Entries that are looked at together.
_PART = 256
Count = Annotated[int, Field(ge=0, le=_LARGEST)]
Positive = Annotated[int, Field(ge=1, le=_LARGEST)]


class Frozen(BaseModel):
    """A model that never changes, without unknown fields and with finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        # Each unknown field would be one more error to be kept.
        if isinstance(value, dict) and len(value) > 2 * len(cls.model_fields):
            raise ValueError(f"{len(value):,} fields instead of {len(cls.model_fields)}")
        return value


def _in_parts(value: Any, validate: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict) and value:
        entries = iter(value.items())
        parts = iter(lambda: dict(islice(entries, _PART)), {})
        return {name: entry for part in parts for name, entry in validate(part).items()}
    if isinstance(value, list) and value:
        return [item for start in range(0, len(value), _PART) for item in validate(value[start : start + _PART])]
    return validate(value)


# Of lists and maps: after some errors in one of a million entries, the rest is not looked at.
SOON_REFUSED = WrapValidator(_in_parts)
