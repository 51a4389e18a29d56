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
from .checkpoint import Fitting, State, packed
from .config import PredictorEncoder, TrainConfig
from .data import Texts, blocks
from .folder import MODEL, NETWORK, REPORT, TABLES
from .measure import Unexplained, batches, perplexity
from .network import Network, PaperNetwork, on_device


@dataclass(frozen=True)
class Tables:
    """What the training rows of each code are, on average. A code without any has the mean of all rows."""

    counts: Int64[Tensor, " code"]
    concept_means: Float[Tensor, "code d_lower"]
    upper_table: Float[Tensor, "code d_upper"]


def write_results(
    fitting: Fitting,
    cache: Cache,
    config: TrainConfig,
    texts: Texts,
    held_out: TextStream,
    out: Path,
    *,
    device: torch.device,
    progress: Progress,
) -> None:
    """Measure the best epoch's weights and write figures, `report.json` and, last, `model.safetensors`."""
    network, state = fitting.network.eval(), fitting.state
    # The present weights return to the network if this is interrupted: a checkpoint then holds them, not the best.
    present = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.load_state_dict(fitting.best_tensors)
    try:
        tables = training_tables(network, cache, config, texts, device, progress=progress)
        figures = _held_out(network, held_out, config, tables, device=device, progress=progress)
        report: dict[str, JsonValue] = {
            **figures,
            **_codebook(network, tables),
            **_course(state, config),
            "train_rows": int(tables.counts.sum()),
            "train_texts": int(texts.train.sum()),
            "held_out_rows": held_out.rows,
            "held_out_texts": int(texts.held_out.sum()),
        }
        tensors = {f"{NETWORK}{name}": tensor for name, tensor in network.state_dict().items()}
        tensors |= {f"{TABLES}{name}": tensor for name, tensor in vars(tables).items()}
        with ranks.led() as leads:
            if leads:
                write_file(out / REPORT, to_json(report))
                write_file(out / MODEL, packed(tensors))
    finally:
        network.load_state_dict(present)


@torch.no_grad()
def training_tables(
    network: Network,
    cache: Cache,
    config: TrainConfig,
    texts: Texts,
    device: torch.device,
    *,
    progress: Progress,
) -> Tables:
    """One exact pass over the training rows, each with its nearest code; sums in float64."""
    rows = texts.train_rows(cache, config)
    counts = torch.zeros(config.quantizer.codes, dtype=torch.int64, device=device)
    sums = {
        site: torch.zeros(config.quantizer.codes, cache.width(site), dtype=torch.float64, device=device)
        for site in dict.fromkeys([config.lower, config.upper])
    }
    progress.begin("concept means", rows.rows, "row")
    for number, block in enumerate(blocks(cache, rows, sums)):
        progress.check()
        if number % ranks.count() == ranks.number():
            tensors = {site: on_device(values, device) for site, values in block.items()}
            index = network.quantizer.nearest(network.encode(tensors[config.lower]))
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
        concept_means=means(config.lower, network.lower_mean),
        upper_table=means(config.upper, network.upper_mean),
    )


@torch.no_grad()
def _held_out(
    network: Network,
    stream: TextStream,
    config: TrainConfig,
    tables: Tables,
    *,
    device: torch.device,
    progress: Progress,
) -> dict[str, float | int | None]:
    progress.begin("held-out figures", None, "text")
    fvu, indices, places = Unexplained(network.upper_mean), [], []
    for _, batch in batches(stream, config, device, progress=progress):
        output, upper = network(batch), batch.upper[batch.mask]
        ways = {"own_code_fvu": tables.upper_table[output.index], "decoder_fvu_codes_only": output.predicted}
        if isinstance(network, PaperNetwork):
            ways["decoder_fvu_published"] = output.predicted
            ways["decoder_fvu_codes_only"] = network.from_codes(output.index, batch.mask, batch.position)
        fvu.add(upper, **ways)
        indices.append(output.index)
        places.append(batch.row[batch.mask])
    # Shuffled as they lie in the cache, so that neither the batches nor the number of processes matter.
    place, order = ranks.joined(torch.cat(places)).sort()
    index = ranks.joined(torch.cat(indices))[order]
    mixed = index[torch.from_numpy(np.random.default_rng(config.seed).permutation(len(index))).to(device)]
    shuffled = Unexplained(network.upper_mean)
    for _, batch in batches(stream, config, device, progress=progress):
        upper = batch.upper[batch.mask]
        part = mixed[torch.searchsorted(place, batch.row[batch.mask])]
        shuffled.add(upper, decoder_fvu_codes_shuffled=network.from_codes(part, batch.mask, batch.position))
    counts = np.bincount(index.cpu().numpy(), minlength=config.quantizer.codes)
    return {
        **fvu.values(),
        **shuffled.values(),
        "perplexity": perplexity(counts),
        "used_codes": int((counts > 0).sum()),
    }


def _codebook(network: Network, tables: Tables) -> dict[str, float | int]:
    """The codebook's health."""
    codes = network.quantizer.codebook.double()
    units = F.normalize(codes, dim=1)
    pairs = len(codes) * (len(codes) - 1)
    return {
        "codes": len(codes),
        "dead_codes": int((tables.counts == 0).sum()),
        "largest_code_share": float(tables.counts.max() / tables.counts.sum()),
        "mean_pairwise_cosine": float((units.sum(dim=0).square().sum() - units.square().sum()) / pairs),
        "median_code_norm": float(codes.norm(dim=1).median()),
    }


def _course(state: State, config: TrainConfig) -> dict[str, float | int | bool | str | None]:
    """How the training went."""
    best = state.best_epoch if state.best_epoch is not None else 0
    run = state.epoch - (config.encoder.epochs if isinstance(config.encoder, PredictorEncoder) else 0)
    return {
        "epochs": run,
        "best_epoch": best,
        "stopped_early": run < config.fit.epochs,
        "stop_reason": state.stop_reason,
        "loader_wait_share": state.total_waited / state.total_seconds,
        "train_seconds": state.total_seconds,
    }
