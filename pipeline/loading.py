"""Loading a model's weights, with the head that a task needs and no more."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import Any, Literal

import torch

from ..errors import ModelError
from .source import ModelSource

Task = Literal["none", "classify", "prompt"]
DTypeName = Literal["float32", "bfloat16", "float16"]

DTYPES: dict[DTypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


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


def load_weights(source: ModelSource, *, task: Task, dtype: torch.dtype) -> Any:
    """Load a model on the CPU; of an encoder-decoder, its encoder.

    Raises
    ------
    ModelError
        Where the head that the task needs is absent, or weights are missing or damaged.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    if task != "none" and source.encoder_decoder:
        raise ModelError(
            f"{source.name} is an encoder-decoder ({source.config.model_type}), of which the encoder alone is read: "
            "use --task none"
        )
    if task == "classify":
        _require_classifier(source)
    elif task == "prompt":
        _require_decoder(source)
    _settle_padding(source, task)
    factory = {"none": AutoModel, "classify": AutoModelForSequenceClassification, "prompt": AutoModelForCausalLM}[task]
    # The bar that transformers draws over a GGUF file's tensors heeds no setting.
    hushed = redirect_stderr(io.StringIO()) if source.gguf else nullcontext()
    try:
        with loading_quietly(), hushed:
            model, report = factory.from_pretrained(
                source.folder,
                config=source.config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **source.gguf_argument,
            )
    except Exception as error:  # damaged weights raise safetensors' own kind, and unusual settings any
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{source.name} cannot be loaded: {reason}") from error
    whole = model
    if source.encoder_decoder:
        model = whole.get_encoder()
        if model is whole or not isinstance(model, torch.nn.Module):
            raise ModelError(f"{source.name} ({source.config.model_type}) cannot be read: its encoder was not found")
    wanted = {id(parameter) for parameter in model.parameters()}
    needless = {key for key, part in whole.named_parameters(remove_duplicate=False) if id(part) not in wanted}
    # A pooler is no part of the hidden states, and many checkpoints come without one.
    missing = sorted(
        key for key in report["missing_keys"] if key not in needless and (task == "classify" or "pooler" not in key)
    )
    if missing or report["mismatched_keys"]:
        first = missing[0] if missing else sorted(map(str, report["mismatched_keys"]))[0]
        raise ModelError(f"the weights of {source.name} are incomplete: {first} is missing or has another shape")
    return model


def _require_classifier(source: ModelSource) -> None:
    config = source.config
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


def _require_decoder(source: ModelSource) -> None:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    config, kind = source.config, source.config.model_type
    names = config.architectures or []
    head = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    # Architectures made to fill gaps can be built as decoders too; then their configuration says so.
    fills_gaps = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if head is None or fills_gaps:
        raise ModelError(
            f"{source.name} ({kind}) does not continue texts, so that it cannot be prompted: use a decoder"
        )
    # GGUF files name no head; what they hold are language models.
    if names and not any(name == head or name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        raise ModelError(
            f"{source.name} has no language-model head (it is {', '.join(names)}), so that it cannot be prompted: "
            "use --task none, or the checkpoint with its head"
        )


def _settle_padding(source: ModelSource, task: Task) -> None:
    inner, pad = source.text_config, source.tokenizer.pad_token_id
    if inner.pad_token_id is None and pad is not None and pad < inner.vocab_size:
        inner.pad_token_id = pad
    if inner.pad_token_id is None and task == "classify":
        raise ModelError(
            f"{source.name} has no padding token, by which classification heads find the end of a text: "
            "set pad_token_id in its config.json to a token that does not end texts"
        )
