"""The model read-out of `clvq ablate`: blocks above the site alone, against the whole model for each condition.

Both ways run the same batches with the same displaced states and must give the same answers; the second lets all blocks
run and puts the states in with a hook, as one does without access to the model's parts. What equal conditions save is
reported apart: the second way is timed for the same texts as the first, not for those that the first never runs.

    python benchmarks/ablation.py CACHE RUN… --model FOLDER
"""

import argparse
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median

import clvq
import numpy as np
import torch
from clvq.evaluation.ablate import AblateConfig, asked_of, choose_texts, removals_of
from clvq.evaluation.outcome import Condition, Outcome
from clvq.evaluation.patched import CleanTexts, Forwards, read_clean
from clvq.evaluation.readouts import Asked, Removals, read_out_model
from clvq.evaluation.rows import changed_rows, rows_by_text
from clvq.options import load_model, model_of
from clvq.pipeline.language_model import LanguageModel
from clvq.progress import SILENT
from clvq.trainer.run import Run
from common import header


class WholeModel(LanguageModel):
    """Runs all blocks, whatever site is changed."""

    def _skipped(self, below: int) -> AbstractContextManager[None]:
        return nullcontext()


class Study:
    """What one ablation asks, ready to be asked."""

    def __init__(self, cache: clvq.Cache, runs: Mapping[str, Run], model: LanguageModel, config: AblateConfig) -> None:
        self.cache, self.model = cache, model
        self.site = next(iter(runs.values())).config.lower
        self.texts = rows_by_text(cache, choose_texts(cache, runs, config))
        removals, _ = removals_of(runs, config.removals, config.rows_changed)
        self.asked: list[Asked] = [
            asked_of(cache, name, run, self.texts, removals[name], config) for name, run in runs.items()
        ]
        self.plan = Removals(
            removals=removals,
            controls=config.controls,
            strengths=config.strengths,
            curves=config.curves,
            seed=config.seed,
        )
        started = time.perf_counter()
        self.clean: CleanTexts = read_clean(cache, model, self.texts, site=self.site, salient=None, progress=SILENT)
        self.clean_seconds = time.perf_counter() - started
        self.changed = {
            name: [
                changed_rows(rows, number, config.rows_changed, run.config.special)
                for rows, number in zip(self.texts, self.clean.salient, strict=True)
            ]
            for name, run in runs.items()
        }

    def run(self, *, whole: bool) -> tuple[float, Forwards, dict[Condition, Outcome]]:
        """Seconds, forward passes and answers of all conditions."""
        own = type(self.model)
        forwards = Forwards()
        if whole:
            self.model.__class__ = WholeModel
        started = time.perf_counter()
        try:
            _, outcomes, _ = read_out_model(
                self.cache, self.model, self.clean, self.asked, self.texts, self.changed, self.plan,
                site=self.site, forwards=forwards, progress=SILENT,
            )  # fmt: skip
        finally:
            self.model.__class__ = own
        return time.perf_counter() - started, forwards, outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--removal", default="centred")
    parser.add_argument("--rows-changed", default="salient")
    parser.add_argument("--split", default="")
    parser.add_argument("--max-texts", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    cache = clvq.Cache(arguments.cache)
    runs = {path.resolve().name: Run.from_pretrained(path) for path in arguments.runs}
    identity = cache.manifest.identity
    source = model_of(identity["model"], arguments.model, what=str(arguments.cache))
    model = load_model(
        source, identity["settings"], device=torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    config = AblateConfig(
        read_outs=("model",),
        removals=(arguments.removal,),
        rows_changed=arguments.rows_changed,
        split=tuple(arguments.split.split(",")) if arguments.split else (),
        max_texts=arguments.max_texts,
    )
    print(header("torch", "transformers"))
    study = Study(cache, runs, model, config)
    conditions = 1 + len(list(study.plan.conditions()))
    print(
        f"{len(study.texts):,} texts, {conditions} conditions of {len(runs)} runs; site {study.site} of {model.depth}"
    )
    print(f"clean pass with gradients: {study.clean_seconds:.1f} s")
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(arguments.repeats):
        answers = {}
        for whole in seconds:
            taken, forwards, answers[whole] = study.run(whole=whole)
            seconds[whole].append(taken)
        largest = max(
            float(np.nanmax(np.abs(outcome.probability_lost - answers[True][key].probability_lost)))
            for key, outcome in answers[False].items()
        )
    above, all_blocks = (median(seconds[whole]) for whole in (False, True))
    print(f"blocks above the site: {above:.1f} s ({min(seconds[False]):.1f} to {max(seconds[False]):.1f})")
    print(f"whole model:           {all_blocks:.1f} s ({min(seconds[True]):.1f} to {max(seconds[True]):.1f})")
    print(f"ratio: {all_blocks / above:.2f}; answers differ by at most {largest:.1e}")
    print(
        f"apart from that: {forwards.asked:,} texts asked about, {forwards.run:,} run, "
        f"{forwards.asked / forwards.run:.2f} times fewer"
    )


if __name__ == "__main__":
    main()
