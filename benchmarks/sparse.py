"""Sparse autoencoders of clvq and of sae-lens, trained on the same rows: FVU, active latents, dead latents, seconds.

Both have the same rows, width, number of active latents, batches and epochs, one thread, float32; k = 32 of 4,096 by
default. clvq trains through `fit` from the cache, its seconds are those of its training steps and of waiting for rows.
sae-lens (`--sae-lens PYTHON`, an environment that has it) trains with its `SAETrainer` on the rows in memory, given in
a new random order each epoch, less their mean, which it does not take off itself; with `normalize_activations =
expected_average_only_in`, a latent dead after as many rows as in clvq, and everything else as it comes (its sparse
activations end in an error in this loop). Each of `--rates` is tried, with a rise and a fall as in clvq. Its seconds
are those of `fit()`.

All figures are over the rows of the held-out split, computed by one function. *silent* latents are active on none of
them; *dead* ones, by each library's own count, were not active on the last rows trained on.
"""

import argparse
import json
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROWS = 2_048


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path, help="with splits train and dev; with --theirs a folder of this script's")
    parser.add_argument("--lower", default="8")
    parser.add_argument("--latents", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rows-per-batch", type=int, default=1024)
    parser.add_argument("--activations", nargs="*", default=["topk", "batchtopk"])
    parser.add_argument("--rates", nargs="*", type=float, default=[3e-3, 1e-3])
    parser.add_argument("--sae-lens", metavar="PYTHON")
    parser.add_argument("--theirs", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.theirs:
        _theirs(given.cache)
        return
    with tempfile.TemporaryDirectory() as folder:
        _ours(given, Path(folder))
        if given.sae_lens:
            subprocess.run([given.sae_lens, __file__, folder, "--theirs"], check=True)


def figures(
    rows: "torch.Tensor", ask: "Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]"
) -> dict[str, float]:
    """FVU, active latents a row and the share of silent ones; `ask` gives activations and reconstructions of rows."""
    wide, error, active = rows.double(), 0.0, 0
    counts: Any = 0
    for part in rows.split(ROWS):
        with torch.no_grad():
            activations, predicted = ask(part)
        error += float((part.double() - predicted.double()).square().sum())
        counts = counts + (activations > 0).sum(dim=0)
        active += int((activations > 0).sum())
    return {
        "fvu": error / float((wide - wide.mean(dim=0)).square().sum()),
        "l0": active / len(rows),
        "silent": float((counts == 0).double().mean()),
    }


def _show(what: str, found: dict[str, float], dead: float, seconds: float) -> None:
    print(
        f"  {what:<58} FVU {found['fvu']:.4f}   L0 {found['l0']:5.1f}   silent {found['silent']:6.2%}   "
        f"dead {dead:6.2%}   {seconds:6.1f} s",
        flush=True,
    )


def _ours(given: argparse.Namespace, folder: Path) -> None:
    from clvq.cache.reader import Cache
    from clvq.trainer.config import with_overrides
    from clvq.trainer.fit import fit
    from clvq.trainer.methods import method_config
    from clvq.trainer.run import Run
    from common import header

    cache = Cache(given.cache)
    site = cache.site(given.lower)
    base = method_config("sae", lower=site, upper=site, codes=given.latents, held_out="dev")
    for split in ("train", "dev"):
        np.save(folder / f"{split}.npy", cache.vectors(site, cache.rows_of(cache.splits([split]), special="leading")))
    train, dev = (np.load(folder / f"{split}.npy") for split in ("train", "dev"))
    print(header("clvq", "torch"))
    print(
        f"{len(train):,} rows of {train.shape[1]}, held out {len(dev):,}; {given.latents:,} latents, k = {given.k}, "
        f"{given.epochs} epochs, {given.rows_per_batch:,} rows a batch"
    )
    for activation in given.activations:
        config = with_overrides(
            base,
            {
                "encoder.activation": activation,
                "encoder.k": str(given.k),
                "encoder.epochs": str(given.epochs),
                "encoder.rows_per_batch": str(given.rows_per_batch),
            },
        )
        result = fit(cache, config, folder / activation, device=torch.device("cpu"))
        weights = Run.from_pretrained(result.path).sparse_weights()

        def ask(rows: torch.Tensor, weights: Any = weights, activation: str = activation) -> tuple[Any, Any]:
            seen = rows.double() @ weights.encoder + weights.encoder_bias
            active = seen.relu() * (seen > weights.threshold)
            if activation == "topk":
                best = active.topk(given.k, dim=1)
                active = torch.zeros_like(active).scatter(1, best.indices, best.values)
            return active, active @ weights.decoder + weights.decoder_bias

        what = f"clvq {activation}, rate {config.optimizer.lr:g}, {config.optimizer.schedule}"
        report = result.report
        _show(what, figures(torch.from_numpy(dev), ask), report["dead_latents_share"], report["train_seconds"])
    settings = {
        "latents": given.latents, "k": given.k, "epochs": given.epochs, "rows_per_batch": given.rows_per_batch,
        "activations": given.activations, "rates": given.rates, "dead_after": base.encoder.dead_after,
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))


def _theirs(folder: Path) -> None:
    from sae_lens import (
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        SAETrainer,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )
    from sae_lens.config import SAETrainerConfig

    settings = json.loads((folder / "settings.json").read_text())
    train, dev = (torch.from_numpy(np.load(folder / f"{split}.npy")) for split in ("train", "dev"))
    size, epochs = settings["rows_per_batch"], settings["epochs"]
    mean = train.mean(dim=0)
    train, dev = train - mean, dev - mean
    steps = epochs * (len(train) // size)
    print(f"  sae-lens {version('sae-lens')}, torch {version('torch')}")

    def rows() -> "Iterator[torch.Tensor]":
        generator = torch.Generator().manual_seed(0)
        while True:
            order = torch.randperm(len(train), generator=generator)
            for start in range(0, len(train) - size + 1, size):
                yield train[order[start : start + size]]

    for activation in settings["activations"]:
        for rate in settings["rates"]:
            torch.manual_seed(0)
            own = {
                "d_in": train.shape[1], "d_sae": settings["latents"], "k": settings["k"],
                "normalize_activations": "expected_average_only_in",
            }  # fmt: skip
            if activation == "topk":
                sae: Any = TopKTrainingSAE(TopKTrainingSAEConfig(**own))
            else:
                sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**own))
            trainer: Any = SAETrainer(
                cfg=SAETrainerConfig(
                    total_training_samples=steps * size,
                    train_batch_size_samples=size,
                    lr=rate,
                    lr_end=rate,
                    lr_warm_up_steps=steps // 20,
                    lr_decay_steps=steps - steps // 20,
                    dead_feature_window=settings["dead_after"] // size,
                    n_batches_for_norm_estimate=len(train) // size,
                ),
                sae=sae,
                data_provider=rows(),
            )
            began = time.perf_counter()
            trainer.fit()
            seconds = time.perf_counter() - began
            dead = float(trainer.dead_neurons.double().mean())
            with tempfile.TemporaryDirectory() as saved:
                sae.save_inference_model(saved)
                found = figures(dev, _opened(Path(saved)))
            _show(f"sae-lens {activation}, rate {rate:g}, linear", found, dead, seconds)


def _opened(folder: Path) -> "Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]":
    from sae_lens import SAE

    sae: Any = SAE.load_from_disk(folder)

    def ask(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        activations = sae.encode(rows)
        return activations, sae.decode(activations)

    return ask


if __name__ == "__main__":
    main()
