"""A language model whose hidden states can be read, and replaced, at any site. Unmodified weights, any architecture.

`hidden.l` is transformers' `hidden_states[l]`: what block `l` is given, and for the last one what the base model
returns. `mlp_in.l`, `mlp_out.l` and `attn_out.l` lie in block `l`; see `structure`. Everything is found by structure,
and when a model is loaded its hidden states are compared with transformers' own on a few tokens: a model whose
structure was misread is refused, not misreported.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from ..attention import without_cudnn_attention
from ..errors import ConfigError, ModelError
from .loading import DTYPES, DTypeName, Task, load_weights, loading_quietly
from .source import ModelSource
from .structure import TEXTS, TOKENS, Parts, block_input, find_parts, map_input, with_input

__all__ = ["DTypeName", "LanguageModel", "Task", "loading_quietly"]


class _Enough(Exception):
    """Ends a forward pass when everything wanted was seen."""


class LanguageModel:
    """A loaded model.

    Parameters
    ----------
    source
        Where the model is. Of an encoder-decoder, the encoder is read.
    task
        `classify` loads the classification head too, `prompt` the language-model head.
    dtype
        Type of weights and computation.
    device
        Where it runs.
    answers
        For `prompt`: ids of the tokens whose logits are wanted.

    Raises
    ------
    ModelError
        Where weights are missing, the head is absent or not of the kind, or the blocks cannot be found.
    ConfigError
        Where the answers are missing, or no tokens of the model.
    """

    def __init__(
        self,
        source: ModelSource,
        *,
        task: Task,
        dtype: DTypeName,
        device: torch.device,
        answers: Sequence[int] = (),
    ) -> None:
        _check_answers(source, task, answers)
        self.source = source
        self.task = task
        self.device = device
        self.model = load_weights(source, task=task, dtype=DTYPES[dtype]).to(device).eval().requires_grad_(False)
        self._answers = torch.tensor(answers, dtype=torch.int64, device=device)
        self._base: nn.Module = getattr(self.model, self.model.base_model_prefix, self.model)
        self._blocks, self._around = _find_blocks(self._base, source)
        self._parts: dict[int, Parts] = {}
        self._tuple_length: int | None = None
        self._check_sites()

    @property
    def depth(self) -> int:
        """Transformer blocks."""
        return len(self._blocks)

    def pad(self, ids: Sequence[Sequence[int]]) -> tuple[Int64[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
        """Token ids side by side, padded at the end, and where they are real."""
        longest = max(map(len, ids))
        padded = torch.full((len(ids), longest), self.pad_id, dtype=torch.int64)
        mask = torch.zeros((len(ids), longest), dtype=torch.bool)
        for number, row in enumerate(ids):
            padded[number, : len(row)] = torch.as_tensor(row)
            mask[number, : len(row)] = True
        return padded.to(self.device, non_blocking=True), mask.to(self.device, non_blocking=True)

    @property
    def pad_id(self) -> int:
        """The token that texts are padded with; 0 where the model has none."""
        # The configuration's, not the tokenizer's: by it classifiers built on decoders find a text's last token.
        pad = self.source.text_config.pad_token_id
        return 0 if pad is None else int(pad)

    def read(
        self,
        ids: Int64[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"],
        sites: Sequence[str],
        *,
        logits: bool = False,
    ) -> tuple[dict[str, Float[Tensor, "batch seq d"]], Float[Tensor, "batch class"] | None]:
        """Vectors at the sites, and the logits of the classes or answers where wanted.

        The forward pass ends when the last of the sites was seen, unless the logits are wanted.

        Parameters
        ----------
        sites
            Full names, such as `hidden.8` or `mlp_in.3`; see `ModelSource.sites`.

        Raises
        ------
        ModelError
            Where a site is not to be found in the model's blocks.
        ConfigError
            Where logits are wanted of a model without a head.
        """
        if logits:
            self._require_head()
        states, found = self._read(ids, mask, sites, logits=logits)
        for site, state in states.items():
            if state.shape[-1] != self.source.width:
                raise ModelError(
                    f"{site} of {self.source.name} has {state.shape[-1]} channels where its other sites have "
                    f"{self.source.width}: leave it out"
                )
        return states, found

    def _read(
        self, ids: Tensor, mask: Tensor, sites: Sequence[str], *, logits: bool = False
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        states: dict[str, Tensor] = {}

        def keep(site: str, state: Tensor) -> None:
            states[site] = state
            if len(states) == len(sites) and not logits:
                raise _Enough

        with ExitStack() as hooks:
            for handle in self._hooks(sites, keep, shape=(*ids.shape, self.source.width)):
                hooks.callback(handle.remove)
            with suppress(_Enough):
                if logits:
                    return states, self._logits(ids, mask)
                self._forward(ids, mask)
        return states, None

    def _hooks(self, sites: Sequence[str], keep: Callable[[str, Tensor], None], *, shape: tuple[int, ...]) -> list[Any]:
        """Hooks that call `keep` with each site's vectors."""

        def given(site: str) -> Callable[..., None]:
            return lambda block, args, kwargs: keep(site, block_input(args, kwargs))

        def returned(site: str) -> Callable[..., None]:
            return lambda base, args, output: keep(site, _first(output))

        def map_given(site: str) -> Callable[..., None]:
            return lambda module, args, kwargs: keep(site, unflattened(map_input(args, kwargs)))

        def map_gave(site: str) -> Callable[..., None]:
            return lambda module, args, output: keep(site, unflattened(output))

        def unflattened(values: Any) -> Tensor:
            # Some blocks lay texts end to end for their feed-forward part; some add to its output in place.
            state: Tensor = values.clone().reshape(shape)
            return state

        inside = {site: self._module(site) for site in self._inside(sites)}
        handles = []
        for site in sites:
            kind, number = _split(site)
            if kind == "mlp_in":
                handles.append(inside[site].register_forward_pre_hook(map_given(site), with_kwargs=True))
            elif kind != "hidden":
                handles.append(inside[site].register_forward_hook(map_gave(site)))
            elif number == self.depth:
                handles.append(self._base.register_forward_hook(returned(site)))
            else:
                handles.append(self._blocks[number].register_forward_pre_hook(given(site), with_kwargs=True))
        return handles

    def _inside(self, sites: Sequence[str]) -> list[str]:
        """The sites that lie inside blocks, whose structure is known afterwards."""
        inside = [site for site in sites if _split(site)[0] != "hidden"]
        unknown = {_split(site)[1] for site in inside} - self._parts.keys()
        if unknown:
            self._find_parts(unknown)
        return inside

    def _module(self, site: str) -> nn.Module:
        kind, number = _split(site)
        parts = self._parts[number]
        found = parts.attn_out if kind == "attn_out" else parts.mlp
        if isinstance(found, str):
            raise ModelError(
                f"{site} of {self.source.name} ({self.source.config.model_type}) cannot be read: {found}. "
                f"Linear maps of block {number}, as they are called: {parts.maps}. "
                f"hidden.0 … hidden.{self.depth} can be read"
            )
        return found[0 if kind == "mlp_in" else 1] if isinstance(found, tuple) else found

    @torch.no_grad()
    def _find_parts(self, numbers: Collection[int]) -> None:
        given: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def keep(number: int) -> Callable[..., None]:
            def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                given[number] = args, kwargs
                if len(given) == len(numbers):
                    raise _Enough

            return hook

        with ExitStack() as hooks:
            for number in numbers:
                hook = self._blocks[number].register_forward_pre_hook(keep(number), with_kwargs=True)
                hooks.callback(hook.remove)
            with suppress(_Enough):
                self._forward(*self._few_tokens(TEXTS, TOKENS))
        for number, (args, kwargs) in given.items():
            self._parts[number] = find_parts(self._blocks[number], args, kwargs, width=self.source.width)

    def logits_from(
        self,
        site: str,
        hidden: Float[Tensor, "batch seq d"],
        ids: Int64[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch class"]:
        """Logits of the model with the hidden states at `site` replaced; blocks below the site do not run.

        Differentiable in `hidden`.

        Raises
        ------
        ConfigError
            Where the model has no head, or the site is none that a block is given.
        """
        self._require_head()
        kind, number = _split(site)
        if kind != "hidden":
            raise ConfigError(f"{site} cannot be changed; sites that can be are hidden.0 … hidden.{self.depth - 1}")
        if number >= self.depth:
            raise ConfigError(f"no block lies above {site}; the last site that can be changed is the one below")

        def replace(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            return with_input(args, kwargs, hidden)

        with self._skipped(number):
            handle = self._blocks[number].register_forward_pre_hook(replace, with_kwargs=True)
            try:
                with without_cudnn_attention():
                    return self._logits(ids, mask)
            finally:
                handle.remove()

    def _require_head(self) -> None:
        if self.task == "none":
            raise ConfigError("the model was loaded without a head: load it with the task classify or prompt")

    @contextmanager
    def _skipped(self, below: int) -> Iterator[None]:
        """Let the blocks below a site hand their input on; the model itself still makes masks and positions."""

        def hand_on(*args: Any, **kwargs: Any) -> Any:
            state = block_input(args, kwargs)
            return state if self._tuple_length is None else (state, *[None] * (self._tuple_length - 1))

        for block in self._blocks[:below]:
            # An attribute of the instance hides the class's method, and nothing else of the block.
            block.forward = hand_on
        try:
            yield
        finally:
            for block in self._blocks[:below]:
                del block.forward

    def _forward(self, ids: Tensor, mask: Tensor, **settings: Any) -> Any:
        # Decoders fill a key-value cache unless told not to.
        if hasattr(self.source.text_config, "use_cache") and not self.source.encoder_decoder:
            settings["use_cache"] = False
        return self.model(input_ids=ids, attention_mask=mask.to(torch.int64), **settings)

    def _logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        if self.task == "classify":
            logits: Tensor = self._forward(ids, mask).logits
            return logits
        last = (mask.sum(dim=1) - 1).clamp_min(0)

        def last_alone(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            # All positions times the vocabulary would not fit into memory.
            return args[0][torch.arange(len(last), device=last.device), last][:, None], *args[1:]

        handle = self.model.get_output_embeddings().register_forward_pre_hook(last_alone)
        try:
            answers: Tensor = self._forward(ids, mask).logits[:, 0, self._answers]
        finally:
            handle.remove()
        return answers

    def _few_tokens(self, texts: int, tokens: int) -> tuple[Tensor, Tensor]:
        ids = torch.arange(3, 3 + texts * tokens, device=self.device).reshape(texts, tokens)
        return ids % self.source.text_config.vocab_size, torch.ones_like(ids, dtype=torch.bool)

    @torch.inference_mode()
    def _check_sites(self) -> None:
        ids, mask = self._few_tokens(1, 6)
        called: list[nn.Module] = []

        def note_length(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._tuple_length = len(output) if isinstance(output, tuple) else None

        def note_call(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            called.append(module)

        with ExitStack() as hooks:
            hooks.callback(self._blocks[0].register_forward_hook(note_length).remove)
            for module in self._around:
                hooks.callback(module.register_forward_hook(note_call).remove)
            try:
                theirs = self._forward(ids, mask, output_hidden_states=True)
            except Exception as error:  # of a model that takes something else than token ids, any kind
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ModelError(_misread(self.source, f"it does not run on token ids alone ({reason})")) from error
        # Some heads call not the base model, but the stack in it.
        self._base = next((module for module in self._around if module in called), self._base)
        sites = [f"hidden.{number}" for number in range(self.depth + 1)]
        try:
            states, _ = self._read(ids, mask, sites)
        except (KeyError, StopIteration) as error:
            raise ModelError(_misread(self.source, "its blocks are not called with hidden states")) from error
        if theirs.hidden_states is None or not len(theirs.hidden_states) == len(sites) == len(states):
            raise ModelError(_misread(self.source, "transformers gives another number of hidden states"))
        for number, (site, expected) in enumerate(zip(sites, theirs.hidden_states, strict=True)):
            if not _alike(states[site], expected):
                raise ModelError(_misread(self.source, f"{site} differs from transformers' hidden_states[{number}]"))
        if self.task != "prompt":
            return
        ours, expected = self._logits(ids, mask), theirs.logits[:, -1, self._answers]
        # The head's sums over one position may be rounded otherwise than those over many.
        rounding = 4 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
        if not _alike(ours, expected, rounding=rounding):
            raise ModelError(_misread(self.source, "its logits are not those of its head at the last position"))


def _check_answers(source: ModelSource, task: Task, answers: Sequence[int]) -> None:
    if (task == "prompt") != bool(answers):
        raise ConfigError("the task prompt needs the tokens of its answers, and no other task has any")
    beyond = [answer for answer in answers if not 0 <= answer < source.text_config.vocab_size]
    if beyond:
        raise ConfigError(
            f"token {beyond[0]} is no answer: {source.name} has the tokens 0 … {source.text_config.vocab_size - 1}"
        )


def _split(site: str) -> tuple[str, int]:
    kind, number = site.rsplit(".", 1)
    return kind, int(number)


def _find_blocks(base: nn.Module, source: ModelSource) -> tuple[nn.ModuleList, list[nn.Module]]:
    """The stack of blocks, and the modules around it from the outermost on."""
    stacks = {name: part for name, part in base.named_modules() if isinstance(part, nn.ModuleList)}
    for name, part in stacks.items():
        if len(part) == source.depth:
            path = name.split(".")
            return part, [base.get_submodule(".".join(path[:length])) for length in range(len(path))]
    there = ", ".join(f"{name} ({len(part)})" for name, part in stacks.items()) or "no list of modules"
    raise ModelError(_misread(source, f"no stack of {source.depth} blocks was found; there is {there}"))


def _alike(ours: Tensor, theirs: Tensor, *, rounding: float = 0.0) -> bool:
    # A model that overflows is not misread; the values are judged where they are stored.
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 + rounding, equal_nan=True)


def _misread(source: ModelSource, reason: str) -> str:
    kind = source.config.model_type
    return f"the layers of {source.name} ({kind}) cannot be read: {reason}; this architecture is not supported"


def _first(output: Any) -> Tensor:
    state: Tensor = output[0] if isinstance(output, tuple) else output.last_hidden_state
    return state
