"""The end of a run: exact passes over all rows, the report, and the model's file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from pydantic import JsonValue
from torch import Tensor

from ..cache.files import write_file
from ..cache.layout import to_json
from ..cache.reader import Cache
from ..cache.stream import TextStream
from ..progress import Progress
from . import ranks
from .checkpoint import packed
from .concepts import ConceptModel, on_device
from .config import MethodConfig
from .data import Texts, blocks
from .folder import MODEL, NETWORK, REPORT, TABLES
from .measure import Unexplained, batches, perplexity
from .network import Network
from .sae import SparseAutoencoder


@dataclass(frozen=True)
class Tables:
    """What the training rows of each code are, on average. A code without any has the mean of all rows."""

    counts: Int64[Tensor, " code"]
    concept_means: Float[Tensor, "code d_lower"]
    upper_table: Float[Tensor, "code d_upper"]


def write_results(
    model: ConceptModel,
    cache: Cache,
    config: MethodConfig,
    texts: Texts,
    held_out: TextStream,
    out: Path,
    *,
    course: dict[str, JsonValue],
    device: torch.device,
    progress: Progress,
) -> None:
    """Measure a finished model and write `report.json` and, last, `model.safetensors`.

    Parameters
    ----------
    course
        How the training went.
    """
    model.eval()
    tables = training_tables(model, cache, config, texts, device, progress=progress)
    report: dict[str, JsonValue] = {
        **_held_out(model, held_out, config, tables, device=device, progress=progress),
        **_codebook(model, tables),
        **course,
        "train_rows": int(tables.counts.sum()),
        "train_texts": int(texts.train.sum()),
        "held_out_rows": held_out.rows,
        "held_out_texts": int(texts.held_out.sum()),
    }
    tensors = {f"{NETWORK}{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"{TABLES}{name}": tensor for name, tensor in vars(tables).items()}
    with ranks.led() as leads:
        if leads:
            write_file(out / REPORT, to_json(report))
            write_file(out / MODEL, packed(tensors))


@torch.no_grad()
def training_tables(
    model: ConceptModel,
    cache: Cache,
    config: MethodConfig,
    texts: Texts,
    device: torch.device,
    *,
    progress: Progress,
) -> Tables:
    """One exact pass over the training rows, each with its nearest code; sums in float64."""
    rows = texts.train_rows(cache, config)
    counts = torch.zeros(config.concepts, dtype=torch.int64, device=device)
    sums = {
        site: torch.zeros(config.concepts, cache.width(site), dtype=torch.float64, device=device)
        for site in dict.fromkeys([config.lower, config.upper])
    }
    progress.begin("concept means", rows.rows, "row")
    for number, block in enumerate(blocks(cache, rows, sums)):
        progress.check()
        if number % ranks.count() == ranks.number():
            tensors = {site: on_device(values, device) for site, values in block.items()}
            index = model.concept(tensors[config.lower])
            counts += torch.bincount(index, minlength=len(counts))
            for site, values in tensors.items():
                sums[site].index_add_(0, index, values.double())
        progress.advance(len(block[config.lower]))
    ranks.add_up(counts, *sums.values())

    def means(site: str, mean: Float[Tensor, " d"]) -> Float[Tensor, "code d"]:
        found = sums[site] / counts.clamp_min(1)[:, None]
        return torch.where(counts[:, None] > 0, found, mean.double()).float()

    return Tables(
        counts=counts,
        concept_means=means(config.lower, model.lower_mean),
        upper_table=means(config.upper, model.upper_mean),
    )


@torch.no_grad()
def _held_out(
    model: ConceptModel,
    stream: TextStream,
    config: MethodConfig,
    tables: Tables,
    *,
    device: torch.device,
    progress: Progress,
) -> dict[str, float | int | None]:
    progress.begin("held-out figures", None, "text")
    own, fvu = Unexplained(model.upper_mean), Unexplained(model.target_mean(config))
    indices, places, active = [], [], torch.zeros(config.concepts, dtype=torch.int64, device=device)
    for _, batch in batches(stream, config, device, progress=progress):
        measured = model.measure(batch)
        own.add(batch.upper[batch.mask], own_code_fvu=tables.upper_table[measured.index])
        if measured.predicted:
            fvu.add(batch.target[batch.mask], **measured.predicted)
        if measured.active is not None:
            active += measured.active
        indices.append(measured.index)
        places.append(batch.row[batch.mask])
    figures: dict[str, float | int | None] = {**own.values(), **fvu.values()}
    # Shuffled as they lie in the cache, so that neither the batches nor the number of processes matter.
    place, order = ranks.joined(torch.cat(places)).sort()
    index = ranks.joined(torch.cat(indices))[order]
    if isinstance(model, Network):
        mixed = index[torch.from_numpy(np.random.default_rng(config.seed).permutation(len(index))).to(device)]
        shuffled = Unexplained(model.target_mean(config))
        for _, batch in batches(stream, config, device, progress=progress):
            part = mixed[torch.searchsorted(place, batch.row[batch.mask])]
            predicted = model.from_codes(part, batch.mask, batch.position)
            shuffled.add(batch.target[batch.mask], decoder_fvu_codes_shuffled=predicted)
        figures |= shuffled.values()
    if isinstance(model, SparseAutoencoder):
        ranks.add_up(active)
        figures |= {
            "l0": float(active.sum()) / max(len(index), 1),
            "silent_latents_share": float((active == 0).double().mean()),
        }
        if model.trained_here:
            figures["dead_latents_share"] = float((model.idle >= model.config.dead_after).double().mean())
    counts = np.bincount(index.cpu().numpy(), minlength=config.concepts)
    return {**figures, "perplexity": perplexity(counts), "used_codes": int((counts > 0).sum())}


def _codebook(model: ConceptModel, tables: Tables) -> dict[str, float | int]:
    """The health of the concepts, and of their vectors where there are any."""
    figures: dict[str, float | int] = {
        "codes": len(tables.counts),
        "dead_codes": int((tables.counts == 0).sum()),
        "largest_code_share": float(tables.counts.max() / tables.counts.sum()),
    }
    vectors = model.vectors()
    if vectors is None:
        return figures
    codes = vectors.double()
    units = F.normalize(codes, dim=1)
    pairs = len(codes) * (len(codes) - 1)
    return figures | {
        "mean_pairwise_cosine": float((units.sum(dim=0).square().sum() - units.square().sum()) / pairs),
        "median_code_norm": float(codes.norm(dim=1).median()),
    }
