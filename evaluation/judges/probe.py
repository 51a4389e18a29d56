"""What an endpoint can do, found out before it is asked anything that counts.

Servers accept `response_format` and ignore it. So each way is tried on a request whose natural answer breaks the form.
"""

from collections.abc import Callable
from typing import Any, Literal

from ...cache.frozen import Frozen, Text
from .config import JudgeConfig
from .endpoint import Refused, Reply, adapted, changed_body
from .replies import InvalidReply, parse

Found = Literal["kept", "ignored", "refused", "not tried"]
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"side": {"type": "string", "enum": ["left", "right"]}},
    "required": ["side"],
    "additionalProperties": False,
}
_GREETING = [{"role": "user", "content": "Say hello to Marie in one short French sentence."}]
_TOKENS = 64


class Capabilities(Frozen):
    """What a judge's server was found to do."""

    json_schema: Found
    """Whether replies keep to a JSON schema that is asked for."""
    json_object: Found
    """Whether replies are JSON objects where those are asked for."""
    changed: dict[str, str | None]
    """Parameters that it refuses: left out (`None`), or sent by another name."""
    usage: bool
    """Whether it says how many tokens a call took."""
    model: Text | None
    """What it calls the model."""

    @property
    def response_format(self) -> Literal["json_schema", "json_object"] | None:
        """The strictest form that is kept."""
        if self.json_schema == "kept":
            return "json_schema"
        return "json_object" if self.json_object == "kept" else None


def probe(model: str, config: JudgeConfig, ask: Callable[[dict[str, Any]], Reply]) -> Capabilities:
    """Try the endpoint with at most three short calls, more where it refuses parameters.

    Raises
    ------
    Refused, NoAnswer, Stopped
        Where even a plain call fails.
    RemoteDenied, RemoteNotFound
    """
    body = {
        "model": model,
        "messages": _GREETING,
        "temperature": config.temperature,
        "seed": config.seed,
        "max_tokens": _TOKENS,
    }
    reply, changed = adapted(body, ask)
    body = changed_body(body, changed)
    schema = _try(body, "json_schema", ask, lambda text: parse(text, _SCHEMA) is not None and text.strip()[0] == "{")
    plain: Found = "not tried"
    if schema != "kept":
        plain = _try(body, "json_object", ask, lambda text: text.strip()[0] == "{" and _is_object(text))
    return Capabilities(
        json_schema=schema, json_object=plain, changed=changed, usage=reply.prompt_tokens is not None, model=reply.model
    )


def response_format(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The request's field that asks for a form."""
    if kind == "json_object":
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def _try(body: dict[str, Any], kind: str, ask: Callable[[dict[str, Any]], Reply], kept: Callable[[str], bool]) -> Found:
    if kind == "json_object":
        # Servers that know the form demand that the request speaks of JSON.
        body = {**body, "messages": [{"role": "system", "content": "Answers may be JSON."}, *body["messages"]]}
    try:
        reply = ask({**body, "response_format": response_format(kind, _SCHEMA)})
    except Refused:
        return "refused"
    try:
        return "kept" if reply.text.strip() and kept(reply.text) else "ignored"
    except InvalidReply:
        return "ignored"


def _is_object(text: str) -> bool:
    """Whether a text begins as a JSON object; its end may have been cut off with the tokens."""
    inside = text.strip()[1:].lstrip()
    return inside[:1] in ('"', "}")
