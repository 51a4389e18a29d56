"""Which row of a text matters most to the model's prediction: by gradient × input at a site, or as the cache has it.

The target is the logit of the predicted class. A row's score is the sum over its sub-words and channels, then its
absolute value.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from ..cache.reader import Cache
from ..errors import ConfigError
from ..pipeline.language_model import LanguageModel
from .rows import TextRows


@dataclass(frozen=True)
class Clean:
    """A batch of texts as the model sees them, unchanged."""

    ids: Int64[Tensor, "batch seq"]
    mask: Bool[Tensor, "batch seq"]
    hidden: Float[Tensor, "batch seq d"]
    """At the site."""
    probabilities: Float[Tensor, "batch class"]
    attribution: Float64[np.ndarray, "batch seq"]
    """Gradient × input of each position, summed over channels."""


def run_clean(model: LanguageModel, site: str, ids: list[list[int]]) -> Clean:
    """Run a batch up to the site, then from the site on with gradients.

    Raises
    ------
    ConfigError
        Where the model has no head, or no block lies above the site.
    """
    padded, mask = model.pad(ids)
    with torch.no_grad():
        states, _ = model.read(padded, mask, [site])
    hidden = states[site].detach().requires_grad_(True)
    with torch.enable_grad():
        logits = model.logits_from(site, hidden, padded, mask)
        (gradient,) = torch.autograd.grad(logits.max(dim=-1).values.sum(), hidden)
    attribution = (gradient.double() * hidden.detach().double()).sum(dim=-1)
    return Clean(
        ids=padded,
        mask=mask,
        hidden=hidden.detach(),
        probabilities=logits.detach().float().softmax(dim=-1),
        attribution=attribution.cpu().numpy(),
    )


def salient_row(rows: TextRows, attribution: Float64[np.ndarray, " seq"]) -> int | None:
    """Number of the row with the largest score; special rows never win. `None` where all rows are special."""
    ordinary = rows.ordinary()
    if len(ordinary) == 0:
        return None
    scores = [abs(float(attribution[rows.positions(int(number))].sum())) for number in ordinary]
    return int(ordinary[int(np.argmax(scores))])


def stored_salient_rows(cache: Cache, texts: Sequence[TextRows], site: str) -> list[int | None]:
    """What `salient_row` gives, by the saliency that the cache holds; `None` also where the model could not be run.

    Raises
    ------
    ConfigError
        Where the cache holds no saliency, or one of another site.
    """
    saliency = cache.column("saliency")
    settings = cache.manifest.identity.get("settings")
    held = settings.get("saliency_site") if isinstance(settings, Mapping) else None
    if held != site:
        raise ConfigError(
            f"the saliency in {cache.path} is of {held}, and concepts are removed at {site}: use --saliency gradient, "
            f"or extract with --saliency-site {site.removeprefix('hidden.')}"
        )
    result: list[int | None] = []
    for rows in texts:
        ordinary = rows.ordinary()
        scores = np.abs(saliency[rows.row[ordinary]])
        known = len(scores) > 0 and bool(np.isfinite(scores).all())
        result.append(int(ordinary[int(np.argmax(scores))]) if known else None)
    return result
