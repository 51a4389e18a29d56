"""sae-lens' `CacheActivationsRunner` on the texts of `extraction.py`, which starts this in an environment that has it.

It takes one hook a run, so a pair takes two runs, whose times are added; a row is counted once. The model is loaded as
`AutoModelForCausalLM`, its documented way for a local folder, and stops at the hooked block. Texts are packed into
windows of one length without padding: rows are the tokens stored, beginnings and separators with them, and the texts'
end that fills no whole batch is left out. Inside its time: all of `run()`, that is reading the data set, forward passes
and its Arrow files; tokenising too where the data set holds texts. Outside: loading the model and the library.

* `texts`: the data set holds texts, tokenised while running, as clvq's extraction does.
* `tokens made before`: made by its own `pretokenize_dataset`, as its documentation advises.

Everything is float32 in one buffer and is not shuffled. Of `SHAPES` each way takes the one that was fastest before.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Windows in a batch and tokens in a window: batches of 2,048 to 8,192 tokens.
SHAPES = ((16, 128), (64, 128), (16, 256))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", type=Path, help="settings.json, as extraction.py writes it")
    settings = json.loads(parser.parse_args().settings.read_text())
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    warnings.simplefilter("ignore")

    import torch
    from datasets import Dataset, disable_caching
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig, PretokenizeRunnerConfig
    from sae_lens.pretokenize_runner import pretokenize_dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(settings["threads"])
    disable_caching()
    config = AutoConfig.from_pretrained(settings["model"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    with torch.device("meta"):
        modules = AutoModelForCausalLM.from_config(config).named_modules()
        blocks = next(
            name
            for name, module in modules
            if isinstance(module, torch.nn.ModuleList) and len(module) == config.num_hidden_layers
        )
    if not all(0 < site < config.num_hidden_layers for site in settings["sites"]):
        raise SystemExit("sites must be the outputs of blocks below the last, which has a norm above it")
    texts = Dataset.from_dict({"text": settings["texts"]})

    def tokens(context: int) -> Any:
        how = PretokenizeRunnerConfig(context_size=context, shuffle=False, num_proc=1, pretokenize_batch_size=None)
        return pretokenize_dataset(texts, tokenizer, how)

    made = {context: tokens(context) for _, context in SHAPES}

    def run(site: int, shape: tuple[int, int], *, ready: bool, share: float) -> tuple[int, float]:
        """Rows and seconds of a run over a share of the data."""
        batch, context = shape
        rows = max(1, int(len(made[context]) * share / batch)) * batch * context
        with tempfile.TemporaryDirectory() as folder:
            runner = CacheActivationsRunner(
                CacheActivationsRunnerConfig(
                    dataset_path="local",
                    model_name=settings["model"],
                    model_class_name="AutoModelForCausalLM",
                    model_batch_size=batch,
                    hook_name=f"{blocks}.{site - 1}",
                    d_in=config.hidden_size,
                    training_tokens=rows,
                    context_size=context,
                    new_cached_activations_path=folder,
                    shuffle=False,
                    dtype="float32",
                    device="cuda" if torch.cuda.is_available() else "cpu",
                    # Half a row more, so that rounding loses no batch.
                    buffer_size_gb=(rows + 0.5) * config.hidden_size * 4 / 1e9,
                    model_from_pretrained_kwargs={"dtype": torch.float32},
                ),
                override_dataset=made[context] if ready else texts,
            )
            started = time.perf_counter()
            stored = len(runner.run()) * context
            return stored, time.perf_counter() - started

    versions = ", ".join(f"{name} {version(name)}" for name in ("sae-lens", "torch", "transformers"))
    print(f"  CacheActivationsRunner ({versions}):")
    for name, ready in (("texts", False), ("tokens made before", True)):
        run(settings["sites"][0], SHAPES[0], ready=ready, share=0.0)
        tried = {shape: run(settings["sites"][0], shape, ready=ready, share=0.3) for shape in SHAPES}
        best = max(tried, key=lambda shape: tried[shape][0] / tried[shape][1])
        seconds = []
        for _ in range(settings["repeats"]):
            done = [run(site, best, ready=ready, share=1.0) for site in settings["sites"]]
            rows = done[0][0]
            seconds.append(sum(taken for _, taken in done))
        speed = rows / statistics.median(seconds)
        what = f"from {name}, batches of {best[0]} × {best[1]}"
        print(
            f"  {what:<48} {speed:>12,.0f} rows/s   {min(seconds):7.2f}–{max(seconds):.2f} s"
            f"   ours is {settings['rows_per_second'] / speed:5.2f} × as fast ({rows:,} rows)"
        )


if __name__ == "__main__":
    main()
