"""Where a block's attention and feed-forward part begin and end: found by watching the block, never by names.

A block is run on a few tokens, and again with the first position of one text changed. Linear maps whose input at that
text's last position changes come after attention: the first of them is attention's output projection, and those called
after it are the feed-forward part. What is found is then proved by intervention on the loaded block.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

TEXTS, TOKENS = 2, 5
"""Shape of the token ids that a block is to be watched on."""
# Where a block does not repeat itself exactly, as on some devices: how much more than that is a difference.
_SLACK = 16


@dataclass(frozen=True)
class Parts:
    """The linear maps of a block at which its sites lie. Where there are none, the reason."""

    attn_out: nn.Module | str
    mlp: tuple[nn.Module, nn.Module] | str
    """The first linear map of the feed-forward part, and its last."""
    maps: str
    """All linear maps in the order in which they are called, with their widths."""


def find_parts(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, width: int) -> Parts:
    """Find attention's output projection and the ends of the feed-forward part.

    Parameters
    ----------
    args, kwargs
        What the model gives the block for `TEXTS` texts of `TOKENS` tokens without padding.
    width
        Channels of the model's hidden states.
    """
    watched = _Watched(block, args, kwargs, width)
    maps = ", ".join(str(call) for call in watched.calls) or "none"
    after = watched.after_mixing()
    if after is None:
        reason = "nothing in the block brings positions together before a linear map"
        return Parts(reason, reason, maps)
    return Parts(_attention(watched, after), _feed_forward(watched, after), maps)


def block_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among what a block is given."""
    state: Tensor = args[0] if args else kwargs["hidden_states"]
    return state


def with_input(args: tuple[Any, ...], kwargs: dict[str, Any], state: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same with other hidden states."""
    return ((state, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": state})


def map_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What a linear map is given; `None` where that is no tensor of real numbers."""
    given = args[0] if args else next(iter(kwargs.values()), None)
    return given if isinstance(given, Tensor) and given.is_floating_point() else None


@dataclass(frozen=True)
class _Call:
    """One call of a linear map."""

    name: str
    module: nn.Module
    given: Tensor
    gave: Tensor | None
    """`None` where it is more than one tensor, as routers give."""

    def __str__(self) -> str:
        return f"{self.name} {self.given.shape[-1]}→{'?' if self.gave is None else self.gave.shape[-1]}"


@dataclass(frozen=True)
class _Change:
    """What to do to the linear maps while a block runs."""

    given: Mapping[nn.Module, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """Changes to what they are given."""
    gives: Mapping[nn.Module, Tensor] = field(default_factory=dict)
    """What they give, whatever they compute."""


class _Watched:
    """A block that can be run again and again on the same input."""

    def __init__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], width: int) -> None:
        self._block, self._args, self._kwargs = block, args, kwargs
        self._maps = {
            name: module
            for name, module in block.named_modules()
            if isinstance(weight := getattr(module, "weight", None), Tensor)
            and weight.ndim == 2
            and not any(module.children())
        }
        self.width = width
        self.input = block_input(args, kwargs).clone()
        self._generator = torch.Generator().manual_seed(0)
        self.calls, self.output = self.run()
        _, again = self.run()
        self._unsteady = _SLACK * _distance(self.output, again)

    def run(self, state: Tensor | None = None, change: _Change | None = None) -> tuple[list[_Call], Tensor]:
        """The calls of the linear maps, in order, and the block's output."""
        change = change or _Change()
        calls: list[_Call] = []

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = map_input(args, kwargs)
            if given is None or module not in change.given:
                return None
            changed = change.given[module](given)
            return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): changed})

        def after(name: str) -> Callable[..., Any]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], gave: Any) -> Any:
                given = map_input(args, kwargs)
                if given is not None:
                    # Blocks may add to a tensor in place.
                    calls.append(_Call(name, module, given.clone(), gave.clone() if torch.is_tensor(gave) else None))
                held = change.gives.get(module)
                return None if held is None else held.clone()

            return hook

        handles = []
        for name, module in self._maps.items():
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after(name), with_kwargs=True))
        try:
            start = self.input.clone() if state is None else state
            args, kwargs = with_input(self._args, self._kwargs, start)
            output = self._block(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return calls, output[0] if isinstance(output, tuple) else output

    def noise_like(self, given: Tensor) -> Tensor:
        """Noise as large as a tensor's values."""
        noise = torch.randn(given.shape, generator=self._generator).to(given.device)
        return (noise * given.float().std()).to(given.dtype)

    def after_mixing(self) -> int | None:
        """Number of the first call whose input at a text's last position follows from its first position."""
        changed = self.input.clone()
        changed[-1, 0] = self.noise_like(changed[-1])[0]
        calls, _ = self.run(changed)
        for number, (before, after) in enumerate(zip(self.calls, calls, strict=False)):
            if before.name != after.name:
                return None
            # Flattened or not, the last row is the last position of the last text, and the first half the other text.
            old, new = (call.given.reshape(-1, call.given.shape[-1]) for call in (before, after))
            if not torch.equal(old[-1], new[-1]):
                half = len(old) // TEXTS
                return number if torch.equal(old[:half], new[:half]) else None
        return None

    def spans(self, values: Tensor | None) -> bool:
        """Whether there is one vector of the model's width for each position, text by text."""
        return values is not None and values.shape[-1] == self.width and values.numel() == self.input.numel()

    def repeats(self, output: Tensor, other: Tensor) -> bool:
        """Whether two outputs differ by no more than the block does from itself."""
        return output.shape == other.shape and _distance(output, other) <= self._unsteady

    def hides(self, calls: list[_Call], last: _Call) -> bool:
        """Whether these maps act on the block's output through what `last` gives, and in no other way."""
        noisy = {call.module: self.noise_like for call in calls}
        held = {} if last.gave is None else {last.module: last.gave}
        _, output = self.run(change=_Change(noisy, held))
        return self.repeats(output, self.output)

    def follows(self, part: list[_Call]) -> bool:
        """Whether what a part's last map gives follows from what its first is given, whatever the block is given."""
        first, last = part[0], part[-1]
        shared = [call for call in part if _same(call.given, first.given)]
        fixed = {call.module: lambda _: first.given.clone() for call in shared}
        calls, _ = self.run(self.noise_like(self.input), _Change(fixed))
        gave = [call.gave for call in calls if call.module is last.module]
        return len(gave) == 1 and gave[0] is not None and last.gave is not None and self.repeats(gave[0], last.gave)


def _attention(watched: _Watched, after: int) -> nn.Module | str:
    out = watched.calls[after]
    if not watched.spans(out.gave):
        return f"{out.name}, the first linear map after attention, does not give {watched.width} channels a position"
    if any(call.module is out.module for call in watched.calls[:after] + watched.calls[after + 1 :]):
        return f"{out.name}, the first linear map after attention, is called more than once"
    if not watched.hides(watched.calls[: after + 1], out):
        return (
            f"with what {out.name} gives held fixed, the linear maps before it still change the block's output: "
            "a part of attention goes round it"
        )
    return out.module


def _feed_forward(watched: _Watched, after: int) -> tuple[nn.Module, nn.Module] | str:
    calls = watched.calls[after + 1 :]
    if len(calls) < 2:
        alone = f"{calls[0].name} is the only linear map" if calls else "no linear map is"
        return f"{alone} called after attention: the feed-forward part cannot be told, as in a mixture of experts"
    first, last = calls[0], calls[-1]
    if not watched.hides(calls, last):
        return (
            f"with what {last.name} gives held fixed, the other linear maps of its feed-forward part still change the "
            "block's output: a part goes round it, as in a mixture of experts"
        )
    if not watched.spans(first.given):
        return f"{first.name}, its first linear map, is not given {watched.width} channels a position"
    if not watched.spans(last.gave):
        return f"{last.name}, its last linear map, does not give {watched.width} channels a position"
    if any(sum(call.module is end.module for call in watched.calls) > 1 for end in (first, last)):
        return f"{first.name} or {last.name}, its first and last linear map, is called more than once"
    if not watched.follows(calls):
        return f"what {last.name} gives does not follow from what {first.name} is given alone"
    return first.module, last.module


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _distance(one: Float[Tensor, "..."], other: Float[Tensor, "..."]) -> float:
    # What overflows in both is no difference.
    alike = (one == other) | (one.isnan() & other.isnan())
    return float((one.float() - other.float()).abs().nan_to_num(torch.inf).masked_fill(alike, 0).max())
