"""How well a codebook is used, in figures that explain themselves."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..trainer.folder import REPORT
from ..trainer.measure import perplexity
from ..trainer.run import Run

# Figure of `report.json` → what it is called, and what it says.
_OF_REPORT = {
    "own_code_fvu": (
        "Own-code error",
        "Share of the variance at the upper site that is left when each held-out row is predicted by its own concept "
        "alone (FVU): 0 is perfect, 1 is no better than the mean",
    ),
    "decoder_fvu_codes_only": (
        "Decoder error",
        "The same share when the decoder sees the concepts of the whole text, and nothing else",
    ),
    "decoder_fvu_codes_shuffled": (
        "Decoder error, shuffled",
        "The same with concepts shuffled between rows: the nearer to the error above, the less the concepts matter",
    ),
    "sae_fvu": ("Reconstruction error", "Share of the variance that the sparse autoencoder leaves, on held-out rows"),
    "l0": ("Active latents", "Latents that are active on a row, on average; the strongest one is shown as its concept"),
    "dead_latents_share": ("Dead latents", "Share of latents that were active on no row for a long time of training"),
    "train_rows": ("Training rows", "Tokens or words that the concepts were formed from"),
    "train_texts": ("Training texts", "Texts that these rows come from"),
    "held_out_texts": ("Held-out texts", "Texts that were kept aside to measure"),
    "train_seconds": ("Training time (s)", "Seconds that the training took"),
}


def health(run: Run, path: Path) -> list[list[Any]]:
    """Lines of name, value and explanation."""
    counts, rows = run.counts, max(1, int(run.counts.sum()))
    used = counts[counts > 0]
    lines: list[list[Any]] = [
        ["Concepts in use", f"{len(used):,} of {len(counts):,}", "Concepts that at least one training row belongs to"],
        [
            "Perplexity",
            perplexity(counts),
            "As many equally used concepts would be as spread out as these are; the nearer to the number in use, the "
            "more evenly they are used",
        ],
        [
            "Largest concept",
            f"{counts.max(initial=0) / rows:.1%}",
            "Share of the training rows in the most used concept",
        ],
        ["Median use", float(np.median(used)) if len(used) else 0, "Training rows of the concept in the middle"],
    ]
    report = json.loads((path / REPORT).read_bytes())
    for name, (called, explained) in _OF_REPORT.items():
        value = report.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            lines.append([called, value, explained])
    return lines
