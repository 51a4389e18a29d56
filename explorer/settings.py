"""Settings of an explorer."""

from typing import Annotated

from pydantic import Field

from ..cache.frozen import Frozen, Text


class ExploreConfig(Frozen):
    """What is shown, and how much of it."""

    title: Text | None = None
    """Of the pages; by the model's name where it is not given."""
    max_texts: Annotated[int, Field(ge=0, le=1_000_000)] = 5_000
    """Texts that can be opened: those that the runs held out first, then those with sentences of concepts."""
    sentences: Annotated[int, Field(ge=0, le=100)] = 6
    """Sentences of a concept that are typical, and as many drawn at random, at most."""
    words: Annotated[int, Field(ge=1, le=1_000)] = 30
    """Words of a concept, at most."""
    rationale: Text | None = None
    """Kept field of the cache that says which parts of a text its label rests on for people."""
    seed: int = 0
    """Of the map's layout and of the sentences and texts that are drawn."""
