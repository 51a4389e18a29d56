"""A language model whose hidden states can be read, and replaced, at any site. Unmodified weights, any architecture.

`hidden.l` is transformers' `hidden_states[l]`: what block `l` is given, and for the last one what the base model
returns. Blocks are found by structure, and when a model is loaded its sites are compared with transformers' own hidden
states on a few tokens: a model whose structure was misread is refused, not misreported.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from ..errors import ConfigError, ModelError
from .source import ModelSource

Task = Literal["none", "classify"]
DTypeName = Literal["float32", "bfloat16", "float16"]

DTYPES: dict[DTypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class _Enough(Exception):
    """Ends a forward pass at the last block that is needed."""


class LanguageModel:
    """A loaded model.

    Parameters
    ----------
    source
        Where the model is.
    task
        `classify` loads the classification head too.
    dtype
        Type of weights and computation.
    device
        Where it runs.

    Raises
    ------
    ModelError
        Where weights are missing, the head is absent or no single-label classifier, or the blocks cannot be found.
    """

    def __init__(self, source: ModelSource, *, task: Task, dtype: DTypeName, device: torch.device) -> None:
        self.source = source
        self.task = task
        self.device = device
        self.model = _load(source, task=task, dtype=DTYPES[dtype]).to(device).eval().requires_grad_(False)
        base = getattr(self.model, self.model.base_model_prefix, self.model)
        self._base: nn.Module = base
        self._blocks = _find_blocks(base, source)
        self._tuple_length: int | None = None
        self._check_sites()

    @property
    def depth(self) -> int:
        """Transformer blocks."""
        return len(self._blocks)

    def pad(self, ids: Sequence[Sequence[int]]) -> tuple[Int64[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
        """Token ids side by side, padded at the end, and where they are real."""
        longest = max(map(len, ids))
        padded = torch.full((len(ids), longest), self._pad_id(), dtype=torch.int64)
        mask = torch.zeros((len(ids), longest), dtype=torch.bool)
        for number, row in enumerate(ids):
            padded[number, : len(row)] = torch.as_tensor(row)
            mask[number, : len(row)] = True
        return padded.to(self.device, non_blocking=True), mask.to(self.device, non_blocking=True)

    def _pad_id(self) -> int:
        # The configuration's, not the tokenizer's: by it classifiers built on decoders find a text's last token.
        pad = self.model.config.get_text_config().pad_token_id
        return 0 if pad is None else int(pad)

    def read(
        self,
        ids: Int64[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"],
        sites: Sequence[int],
        *,
        logits: bool = False,
    ) -> tuple[dict[int, Float[Tensor, "batch seq d"]], Float[Tensor, "batch class"] | None]:
        """Hidden states at the sites (layer numbers), and the head's logits where wanted.

        Blocks above the highest site do not run unless the logits are wanted.
        """
        states: dict[int, Tensor] = {}

        def keep(site: int, *, last: bool) -> Callable[..., None]:
            def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                states[site] = _hidden(args, kwargs)
                if last:
                    raise _Enough

            return hook

        def keep_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            states[self.depth] = _first(output)

        handles = []
        highest = max(sites, default=0)
        for site in sites:
            if site == self.depth:
                handles.append(self._base.register_forward_hook(keep_output))
            else:
                hook = keep(site, last=site == highest and not logits)
                handles.append(self._blocks[site].register_forward_pre_hook(hook, with_kwargs=True))
        try:
            output = self._forward(ids, mask)
        except _Enough:
            output = None
        finally:
            for handle in handles:
                handle.remove()
        return states, output.logits if logits and output is not None else None

    def logits_from(
        self,
        site: int,
        hidden: Float[Tensor, "batch seq d"],
        ids: Int64[Tensor, "batch seq"],
        mask: Bool[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch class"]:
        """Logits of the model with the hidden states at `site` replaced; blocks below the site do not run.

        Differentiable in `hidden`.

        Raises
        ------
        ConfigError
            Where the model has no head, or no block lies above the site.
        """
        if self.task != "classify":
            raise ConfigError("the model was loaded without a classification head")
        if site >= self.depth:
            raise ConfigError(f"no block lies above hidden.{site}; the last site that can be changed is the one below")

        def replace(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        with self._skipped(site):
            handle = self._blocks[site].register_forward_pre_hook(replace, with_kwargs=True)
            try:
                logits: Tensor = self._forward(ids, mask).logits
            finally:
                handle.remove()
        return logits

    @contextmanager
    def _skipped(self, below: int) -> Iterator[None]:
        """Let the blocks below a site hand their input on; the model itself still makes masks and positions."""

        def hand_on(*args: Any, **kwargs: Any) -> Any:
            state = _hidden(args, kwargs)
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
        if hasattr(self.model.config.get_text_config(), "use_cache"):
            settings["use_cache"] = False
        return self.model(input_ids=ids, attention_mask=mask.to(torch.int64), **settings)

    @torch.inference_mode()
    def _check_sites(self) -> None:
        ids = torch.arange(3, 9, device=self.device)[None] % self.source.config.get_text_config().vocab_size
        mask = torch.ones_like(ids, dtype=torch.bool)

        def note(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._tuple_length = len(output) if isinstance(output, tuple) else None

        handle = self._blocks[0].register_forward_hook(note)
        try:
            states, _ = self.read(ids, mask, range(self.depth + 1))
        except (KeyError, StopIteration) as error:
            raise ModelError(_misread(self.source, "its blocks are not called with hidden states")) from error
        finally:
            handle.remove()
        theirs = self._forward(ids, mask, output_hidden_states=True).hidden_states
        if theirs is None or len(theirs) != self.depth + 1 or len(states) != self.depth + 1:
            raise ModelError(_misread(self.source, "transformers gives another number of hidden states"))
        for site, expected in enumerate(theirs):
            if not _alike(states[site], expected):
                raise ModelError(
                    _misread(self.source, f"hidden.{site} differs from transformers' hidden_states[{site}]")
                )


@contextmanager
def loading_quietly() -> Iterator[None]:
    """Keep transformers from drawing bars and reports on stderr while it loads; afterwards it is as it was."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _load(source: ModelSource, *, task: Task, dtype: torch.dtype) -> Any:
    from transformers import AutoModel, AutoModelForSequenceClassification

    config = source.config
    if task == "classify":
        names = config.architectures or []
        if not any(name.endswith("ForSequenceClassification") for name in names):
            raise ModelError(
                f"{source.name} has no classification head (it is {', '.join(names) or 'of unknown kind'}): "
                "use --task none, or fine-tune it for classification first"
            )
        if config.num_labels < 2 or config.problem_type in ("regression", "multi_label_classification"):
            raise ModelError(
                f"{source.name} is no single-label classifier ({config.num_labels} labels, "
                f"problem type {config.problem_type}); use --task none"
            )
    inner, pad = config.get_text_config(), source.tokenizer.pad_token_id
    if inner.pad_token_id is None and pad is not None and pad < inner.vocab_size:
        inner.pad_token_id = pad
    if inner.pad_token_id is None and task == "classify":
        raise ModelError(
            f"{source.name} has no padding token, by which classification heads find the end of a text: "
            "set pad_token_id in its config.json to a token that does not end texts"
        )
    factory = AutoModelForSequenceClassification if task == "classify" else AutoModel
    try:
        with loading_quietly():
            model, report = factory.from_pretrained(
                source.folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # damaged weights raise safetensors' own kind, and unusual settings any
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{source.name} cannot be loaded: {reason}") from error
    # A pooler is no part of the hidden states, and many checkpoints come without one.
    missing = sorted(key for key in report["missing_keys"] if task == "classify" or "pooler" not in key)
    if missing or report["mismatched_keys"]:
        first = missing[0] if missing else sorted(map(str, report["mismatched_keys"]))[0]
        raise ModelError(f"the weights of {source.name} are incomplete: {first} is missing or has another shape")
    return model


def _find_blocks(base: nn.Module, source: ModelSource) -> nn.ModuleList:
    stacks = {name: part for name, part in base.named_modules() if isinstance(part, nn.ModuleList)}
    for part in stacks.values():
        if len(part) == source.depth:
            return part
    there = ", ".join(f"{name} ({len(part)})" for name, part in stacks.items()) or "no list of modules"
    raise ModelError(_misread(source, f"no stack of {source.depth} blocks was found; there is {there}"))


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    # A model that overflows is not misread; the values are judged where they are stored.
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4, equal_nan=True)


def _misread(source: ModelSource, reason: str) -> str:
    kind = source.config.model_type
    return f"the layers of {source.name} ({kind}) cannot be read: {reason}; this architecture is not supported"


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    state: Tensor = args[0] if args else kwargs["hidden_states"]
    return state


def _first(output: Any) -> Tensor:
    state: Tensor = output[0] if isinstance(output, tuple) else output.last_hidden_state
    return state
