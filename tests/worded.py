"""Caches of texts whose words, labels and rationales are known, and runs trained on them."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import clvq
import numpy as np
import pyarrow as pa
import torch
from clvq.cache.extraction import Extraction, Shard
from clvq.cache.layout import ROW_COLUMNS, SiteLayout
from clvq.cache.placement import place
from clvq.cache.writer import CacheWriter
from clvq.trainer.config import preset_config, with_overrides
from clvq.trainer.fit import fit

LOWER, UPPER = "hidden.1", "hidden.2"
NEUTRAL = ["the", "film", "was", "of", "a", "plot", "and", "is"]
SPEAKING = [["dull", "boring", "bad"], ["great", "fine", "funny"]]
WIDTH = 16


@dataclass(frozen=True)
class Worded:
    """What was written; special rows are the first and the last of a text."""

    cache: clvq.Cache
    words: list[list[str]]
    labels: list[int]


def make_worded(folder: Path, *, texts: int = 120, predictions: bool = True, seed: int = 0) -> Worded:
    """Texts of 6 to 12 words, two of which speak for the label and are the rationale.

    Every third text is in `dev`. The prediction is the label. A lower row is its word's centre with some noise, an
    upper one its text's label.
    """
    generator = np.random.default_rng(seed)
    lexicon = NEUTRAL + SPEAKING[0] + SPEAKING[1]
    centres = 3 * generator.normal(size=(len(lexicon), WIDTH))
    classes = 3 * generator.normal(size=(2, WIDTH))
    labels = generator.integers(0, 2, texts).tolist()
    words, evidence = [], []
    for label in labels:
        plain = generator.choice(NEUTRAL, int(generator.integers(4, 11))).tolist()
        speaking = generator.choice(SPEAKING[label], 2).tolist()
        begin = int(generator.integers(1, len(plain)))
        words.append([*plain[:begin], *speaking, *plain[begin:]])
        evidence.append(" ".join(speaking))
    counts = np.array([len(own) + 2 for own in words])
    placement = place(counts, row_bytes=4 * WIDTH)
    sites = {site: SiteLayout(width=WIDTH, encoding="fp32") for site in (LOWER, UPPER)}
    extraction = Extraction(
        {"model": {"name": "worded"}, "seed": seed}, placement.geometry, sites, 2 if predictions else None
    )
    with CacheWriter(folder, extraction) as writer:
        for shard in range(placement.geometry.shards):
            first, end = placement.shard_starts[shard : shard + 2].tolist()
            own = range(first, end)
            rows = int(counts[first:end].sum())
            columns = {name: np.zeros(rows, dtype) for name, (dtype, _) in ROW_COLUMNS.items()}
            lower, upper = (0.3 * generator.normal(size=(rows, WIDTH)).astype(np.float32) for _ in range(2))
            row = 0
            for text in own:
                columns["text"][row : row + counts[text]] = placement.text_id[text]
                columns["special"][row], columns["special"][row + counts[text] - 1] = 1, 2
                char = 0
                for number, word in enumerate(words[text], start=1):
                    columns["char_start"][row + number], columns["char_end"][row + number] = char, char + len(word)
                    lower[row + number] += centres[lexicon.index(word)]
                    char += len(word) + 1
                upper[row : row + counts[text]] += classes[labels[text]]
                row += int(counts[text])
            logits = np.array([[2.0 - 4 * labels[text], 0.0] for text in own], dtype=np.float32)
            writer.commit(
                Shard(shard, {LOWER: lower, UPPER: upper}, columns, len(own), logits if predictions else None)
            )
        # Upper case, which is the same word.
        said = [" ".join(own).capitalize() for own in words]
        table = {
            "text_id": pa.array(placement.text_id, pa.int64()),
            "source_row": pa.array(range(texts), pa.int64()),
            "split": ["dev" if number % 3 == 0 else "train" for number in range(texts)],
            "text": said,
            "text_sha256": [hashlib.sha256(text.encode()).hexdigest() for text in said],
            "label": pa.array(labels, pa.int32()),
            "truncated_tokens": pa.array([0] * texts, pa.int32()),
            "first_row": placement.first_row,
            "row_count": counts,
            "evidence": evidence,
        }
        writer.finish(pa.table(table), class_names=["bad", "good"], counts={"texts": texts})
    return Worded(clvq.Cache(folder), words, labels)


def train(cache: clvq.Cache, out: Path, *, seed: int = 0, codes: int = 12) -> Path:
    """A run trained on the split `train` for a moment."""
    config = preset_config("default", lower=LOWER, upper=UPPER, codes=codes, held_out="dev", seed=seed)
    config = with_overrides(config, {"fit.epochs": "1", "encoder.epochs": "1", "decoder.heads": "4"})
    fit(cache, config, out, device=torch.device("cpu"))
    return out
