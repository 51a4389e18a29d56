"""Settings of a judgement."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Protocol = Literal["rate", "pairs", "guess"]


class JudgeConfig(BaseModel):
    """What judges are asked, and how. All of it decides what they are sent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    protocol: Protocol = "rate"
    """`rate`: all concepts of an item at once; `pairs`: two by two; `guess`: the class, from one concept, as people."""
    orders: Annotated[int, Field(ge=1, le=24)] = 2
    """Presentations of an item in `rate`, each in another order."""
    reasons: bool = False
    """Whether a judge writes a sentence before it answers."""
    labels: bool = False
    """Whether a concept's shares of labels are shown."""
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    seed: int = 0
    """Orders; also sent along, for servers that heed it."""
    max_tokens: Annotated[int, Field(ge=16)] = 512
    """Of a reply."""
    attempts: Annotated[int, Field(ge=1, le=10)] = 3
    """Replies asked for until one is valid; each further one is told what was wrong."""


class CallConfig(BaseModel):
    """How calls are made. None of it changes what is asked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    timeout: Annotated[float, Field(gt=0)] = 120.0
    """Seconds that a call may take."""
    retries: Annotated[int, Field(ge=0, le=20)] = 6
    """Times that a call is made again after an error that may pass."""
    concurrency: Annotated[int, Field(ge=1, le=64)] = 4
    """Calls at a time, per judge."""
    first_wait: Annotated[float, Field(ge=0)] = 1.0
    """Seconds before the first retry; doubled each time, ±50 %, up to a minute, or as the server says."""
