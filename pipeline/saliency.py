"""How much each position of a text matters to the model's prediction, at a hidden site; computed by captum.

What is attributed is the logit of the predicted class: to the hidden states at the site, by integrated gradients from a
baseline (Sundararajan et al. 2017) or by gradient × input, and summed over channels. Integrated gradients add up, over
the positions of a text, to the logit less the logit at the baseline; what they miss is the convergence delta.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from ..errors import ConfigError, MissingExtra
from .config import ExtractConfig
from .language_model import LanguageModel
from .source import ModelSource
from .words import Rows


def saliency_settings(
    source: ModelSource, sites: Sequence[str], *, kind: str, site: str | None, steps: int, baseline: str
) -> dict[str, Any]:
    """The fields of `ExtractConfig` that `--saliency` and its options stand for.

    Parameters
    ----------
    kind
        `none`, `ig` or `gradient`.
    site
        `8` or `hidden.8`; `None` for the lowest hidden site of `sites`.

    Raises
    ------
    ConfigError
        Where no site is given, and none can be chosen.
    """
    if kind == "none":
        return {}
    if site is None:
        hidden = [name for name in sites if name.startswith("hidden.")]
        if not hidden:
            raise ConfigError("--saliency needs a hidden site, and --sites names none: give --saliency-site")
        chosen = min(hidden, key=_layer)
    else:
        (chosen,) = source.sites([site])
    integrated = {"saliency_steps": steps, "saliency_baseline": baseline} if kind == "ig" else {}
    return {"saliency": kind, "saliency_site": chosen, **integrated}


def check_saliency(source: ModelSource, config: ExtractConfig) -> None:
    """Refuse what cannot be computed, before anything is.

    Raises
    ------
    ConfigError
        Where the model predicts nothing, or no block lies above the site.
    MissingExtra
        Where captum is not installed.
    """
    if config.saliency is None:
        return
    if config.task == "none":
        raise ConfigError("--saliency explains predictions, and --task none makes none: give --task classify")
    site = config.saliency_site or ""
    if not site.startswith("hidden.") or _layer(site) >= source.depth:
        raise ConfigError(
            f"--saliency-site {site or 'none'}: saliency is attributed to a hidden site with blocks above it, "
            f"hidden.0 … hidden.{source.depth - 1} of {source.name}"
        )
    if config.saliency == "ig" and (config.saliency_steps is None or config.saliency_baseline is None):
        raise ConfigError("--saliency ig needs a number of steps and a baseline")
    if config.saliency_steps is not None and config.saliency_steps < 1:
        raise ConfigError(f"--saliency-steps is {config.saliency_steps}; it must be at least 1")
    try:
        import captum.attr  # noqa: F401
    except ImportError as error:
        raise MissingExtra("--saliency needs captum: pip install 'clvq[attribution]'") from error


@dataclass(frozen=True)
class Attribution:
    """What a batch of predictions follows from, in units of the logit."""

    positions: Float64[np.ndarray, "batch seq"]
    """Sum over channels; 0 at padding."""
    delta: Float32[np.ndarray, " batch"]
    """Sum over a text less (logit − logit at the baseline); NaN for gradient × input, which promises no sum."""


def attribute(
    model: LanguageModel,
    config: ExtractConfig,
    hidden: Float[Tensor, "batch seq d"],
    ids: Int64[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    *,
    kept: Bool[Tensor, "batch seq"],
    target: Int64[Tensor, " batch"],
) -> Attribution:
    """Attribute the logit of each text's target class to the hidden states at the saliency site.

    Parameters
    ----------
    hidden
        What the model has at the site; no tensor of inference mode.
    kept
        Tokens that the baseline `pad` keeps: those that are not of the text itself.
    target
        Class of each text.
    """
    from captum.attr import InputXGradient, IntegratedGradients

    site = str(config.saliency_site)
    # In float32 whatever the model computes in, so that the path is not rounded to the model's steps.
    states = hidden.float()

    def logits(
        states: Float32[Tensor, "step_batch seq d"],
        ids: Int64[Tensor, "step_batch seq"],
        mask: Bool[Tensor, "step_batch seq"],
    ) -> Float32[Tensor, "step_batch class"]:
        return model.logits_from(site, states.to(hidden.dtype), ids, mask).float()

    if config.saliency == "gradient":
        found = InputXGradient(logits).attribute(
            states.requires_grad_(True), target=target, additional_forward_args=(ids, mask)
        )
        delta = torch.full((len(ids),), torch.nan)
    else:
        baseline = baseline_states(model, config, states, ids, mask, kept=kept)
        found, delta = IntegratedGradients(logits).attribute(
            states,
            baselines=baseline,
            target=target,
            additional_forward_args=(ids, mask),
            n_steps=config.saliency_steps,
            # As many slots at once as a batch may have; captum takes at least one step of all texts.
            internal_batch_size=max(len(ids), config.batch_tokens // ids.shape[1]),
            return_convergence_delta=True,
        )
    positions = found.detach().double().sum(dim=-1) * mask
    return Attribution(positions=positions.cpu().numpy(), delta=delta.detach().float().cpu().numpy())


def baseline_states(
    model: LanguageModel,
    config: ExtractConfig,
    states: Float32[Tensor, "batch seq d"],
    ids: Int64[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    *,
    kept: Bool[Tensor, "batch seq"],
) -> Float32[Tensor, "batch seq d"]:
    """Where the path of integrated gradients begins; at padding, where it ends, so that nothing is attributed to it."""
    if config.saliency_baseline == "zero":
        return torch.where(mask[..., None], 0.0, states)
    if config.saliency_baseline == "published":
        replaced = torch.zeros_like(ids)
    else:
        replaced = torch.where(kept, ids, model.pad_id)
    site = str(config.saliency_site)
    with torch.no_grad():
        found, _ = model.read(replaced, mask, [site])
    return torch.where(mask[..., None], found[site].float(), states)


def of_rows(
    positions: Float64[np.ndarray, " seq"], rows: Rows
) -> tuple[Float64[np.ndarray, " row"], Float64[np.ndarray, " row"]]:
    """The two saliencies of each row of a text: the sum over its sub-words, and |largest of its sub-words|.

    The second is as published: of a word whose sub-words all speak against the class, the least.
    """
    total, largest = np.zeros(len(rows)), np.full(len(rows), -np.inf)
    for back in range(int(rows.subwords.max(initial=0))):
        inside = back < rows.subwords
        own = positions[rows.position[inside] - back]
        total[inside] += own
        largest[inside] = np.maximum(largest[inside], own)
    return total, np.abs(largest)


def _layer(site: str) -> int:
    return int(site.removeprefix("hidden."))
