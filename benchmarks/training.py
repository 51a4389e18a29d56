"""Seconds per epoch and peak memory of training: the presets `paper` and `default` beside the published layout.

The published layout is `published.py`, rebuilt from its description. All of its steps have one shape, so an epoch of it
is the mean of some measured steps times the steps of an epoch. An epoch of ours is a whole one, as `metrics.jsonl`
counts it: reading, steps and bookkeeping, without the held-out figures, which the published epoch lacks here too.
`default` has epochs of two kinds, `encoder` before the codebook starts and `train` after it. The start of the codebook
is no part of an epoch and is shown apart; it is cut short (two iterations of k-means) unless --whole-start is given.
Each way runs in processes of its own, the ways taking turns.

On a machine that others use too, processor times are steadier than seconds; those of the presets count the held-out
figures and the checkpoint of each epoch too, and those of the published layout count nothing but its steps.

Memory is anonymous memory. `before` is the interpreter with its libraries, `weights` what the weights, their gradients
and Adam's two moments take, worked out from their sizes; what is left of the peak is compared. The published lists are
freed before training begins; their peak is shown apart.

Without --cache the data have the published size (13,878 sentences, 81,456 rows, 768 channels) and the published lengths
(mean 5.87, median 5, longest 61, 1,126 sentences of one row, the first tenth longer), in clusters around a large common
mean, with an upper site that is a nonlinear function of the lower one and of the sentence; a tenth is held out.

  --equal      both train from the same weights and codes on few texts, in smaller batches; held-out reconstruction at
               equal epochs, and at equal steps too, for batches of like length are more than batches of any
  --scaling    time by rows and by codes, and memory by rows, of `default`
  --overhead   share of an epoch outside forward, backward and optimiser: an epoch, and its batches in a bare loop
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import clvq.trainer.fit as fitting
import numpy as np
import torch
from clvq import Cache
from clvq.progress import Silent
from clvq.trainer.config import PredictorEncoder, TrainConfig, preset_config, with_overrides
from clvq.trainer.data import Texts
from clvq.trainer.network import DefaultNetwork, Network, build
from common import Peak, anonymous, header
from published import PARTS, TEXTS, PublishedNetwork, Training, make_cache, padded, sentences
from torch.optim.optimizer import register_optimizer_step_pre_hook

CPU = torch.device("cpu")
PUBLISHED = "published"


@dataclass(frozen=True)
class Settings:
    """What a process is told."""

    cache: str
    lower: str = "hidden.8"
    upper: str = "hidden.12"
    split: tuple[str, ...] = PARTS
    held_out: str = "dev"
    preset: str = "paper"
    codes: int = 400
    steps: int = 2
    epochs: int = 1
    whole_start: bool = False
    changes: dict[str, str] = field(default_factory=dict)

    def config(self) -> TrainConfig:
        """The preset, cut to what is measured."""
        config = preset_config(
            self.preset,
            lower=self.lower,
            upper=self.upper,
            codes=self.codes,
            split=tuple(self.split),
            held_out=self.held_out,
        )
        changes = {"fit.epochs": str(self.epochs)}
        if isinstance(config.encoder, PredictorEncoder):
            changes["encoder.epochs"] = str(self.epochs)
        if not self.whole_start:
            changes["start.iterations"] = "2"
        return with_overrides(config, changes | self.changes)


class Phases(Silent):
    """Seconds, processor time and peak memory of each task of a fit, by its name."""

    def __init__(self, peak: Peak) -> None:
        self.peak = peak
        self.seconds: Counter[str] = Counter()
        self.processor: Counter[str] = Counter()
        self.largest: dict[str, float] = {}
        self._task, self._began, self._worked = "beginning", time.perf_counter(), time.process_time()

    def begin(self, task: str, total: int | None, unit: str) -> None:
        now, worked = time.perf_counter(), time.process_time()
        self.seconds[self._task] += now - self._began
        self.processor[self._task] += worked - self._worked
        self.largest[self._task] = max(self.largest.get(self._task, 0.0), self.peak.largest)
        self._task, self._began, self._worked, self.peak.largest = task, now, worked, anonymous()


def epochs_of(run: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of `metrics.jsonl` of each phase: `encoder`, which `paper` does not have, and `train`."""
    phases: dict[str, list[dict[str, Any]]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        figures = json.loads(line)
        phases.setdefault(figures["phase"], []).append(figures)
    return phases


@contextmanager
def network_of_fit(then: Callable[[Network], None]) -> Iterator[None]:
    """Hands over the network that `fit` builds."""

    def built(*given: Any, **named: Any) -> Network:
        network = build(*given, **named)
        then(network)
        return network

    with mock.patch.object(fitting, "build", built):
        yield


def time_ours(settings: Settings) -> dict[str, Any]:
    """An epoch of a preset, by `fit`."""
    cache, config = Cache(settings.cache), settings.config()
    with tempfile.TemporaryDirectory() as folder:
        with Peak() as peak:
            phases = Phases(peak)
            fitting.fit(cache, config, Path(folder), device=CPU, progress=phases)
            phases.begin("end", None, "")
        epochs = epochs_of(Path(folder))
    with torch.device("meta"):
        network = build(config, d_lower=cache.width(config.lower), d_upper=cache.width(config.upper))
    return {
        "seconds": {phase: [epoch["seconds"] for epoch in found] for phase, found in epochs.items()},
        "rows": round(epochs["train"][0]["seconds"] * epochs["train"][0]["rows_per_second"]),
        "phases": dict(phases.seconds),
        "processor": {phase: phases.processor[phase] for phase in epochs},
        "largest": phases.largest,
        "before": peak.base,
        "weights": 16 * sum(p.numel() for p in network.parameters()) / 2**20,
    }


def published_tensors(cache: Cache, config: TrainConfig, texts: np.ndarray, longest: int) -> list[torch.Tensor]:
    """Both sites, the lists of both held until the last tensor is made."""
    lists = [sentences(cache, config, texts, site) for site in (config.lower, config.upper)]
    return [padded(words, longest) for words in lists]


def longest_of(cache: Cache, config: TrainConfig, texts: np.ndarray) -> int:
    """Rows of the longest text."""
    return int(cache.chosen(texts, special=config.special).length.max())


def time_published(settings: Settings) -> dict[str, Any]:
    """Some steps of the published layout. All sentences are in its tensors, but only those of training are drawn."""
    cache, config = Cache(settings.cache), settings.config()
    texts = Texts.of(cache, config)
    everything = texts.train | texts.held_out
    drawn = np.flatnonzero(texts.train[cache.chosen(everything, special=config.special).text])
    with Peak() as peak:
        phases = Phases(peak)
        phases.begin("lists and tensors", None, "")
        x, y = published_tensors(cache, config, everything, longest_of(cache, config, everything))
        phases.begin("network", None, "")
        network = PublishedNetwork(config, d_lower=x.shape[2], d_upper=y.shape[2])
        # The start in k-means costs both the same; rows at random do for the time of a step.
        real = torch.nonzero(x.norm(dim=2) > 0)
        where = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))[: settings.codes]]
        network.quantizer.codebook = x[where[:, 0], where[:, 1]].clone()
        network.quantizer.total = network.quantizer.codebook.clone()
        training = Training(network, config, x, y, drawn)
        phases.begin("train", None, "")
        steps, seconds, began = training.steps(), [], time.perf_counter()
        for _, _ in zip(range(settings.steps), steps, strict=False):
            seconds.append(time.perf_counter() - began)
            began = time.perf_counter()
        phases.begin("end", None, "")
    return {
        "seconds": {"train": seconds},
        "steps": len(training.batches),
        "shape": list(x.shape),
        "phases": dict(phases.seconds),
        "processor": {"train": phases.processor["train"]},
        "largest": phases.largest,
        "before": peak.base,
        "weights": training.weight_bytes() / 2**20,
    }


def equal_losses(settings: Settings) -> dict[str, Any]:
    """Held-out reconstruction of both after each epoch, from the weights and codes before the first step of `fit`."""
    cache, config = Cache(settings.cache), settings.config()
    texts = Texts.of(cache, config)
    networks: list[Network] = []
    before: dict[str, torch.Tensor] = {}
    taken = 0

    class Watch(Silent):
        def begin(self, task: str, total: int | None, unit: str) -> None:
            if task == "train":
                before.update({name: tensor.clone() for name, tensor in networks[0].state_dict().items()})

    def count(network: torch.nn.Module, *_: Any) -> None:
        nonlocal taken
        taken += network.training

    def then(network: Network) -> None:
        networks.append(network)
        network.register_forward_pre_hook(count)

    with tempfile.TemporaryDirectory() as folder, network_of_fit(then):
        fitting.fit(cache, config, Path(folder), device=CPU, progress=Watch())
        ours = [epoch["held_out_loss_reconstruction"] for epoch in epochs_of(Path(folder))["train"]]
    sides = texts.train, texts.held_out
    # Padding to less than the longest of the corpus changes no loss.
    train, held_out = (published_tensors(cache, config, side, longest_of(cache, config, side)) for side in sides)
    real = [y[y.norm(dim=2) > 0] for _, y in (train, held_out)]
    torch.manual_seed(config.seed)
    network = PublishedNetwork(config, d_lower=cache.width(config.lower), d_upper=cache.width(config.upper))
    network.take(before)
    training = Training(network, config, *train, np.arange(len(train[0])))
    theirs, start, steps = [], training.held_out_reconstruction(*held_out), len(training.batches)
    for _ in range(max(settings.epochs, round(taken / steps))):
        for _ in training.steps():
            pass
        theirs.append(training.held_out_reconstruction(*held_out))
    return {
        "ours": ours,
        "theirs": theirs,
        "start": start,
        "mean": float((real[1] - real[0].mean(dim=0)).square().mean()),
        "steps": [taken // settings.epochs, steps],
        "texts": [int(side.sum()) for side in sides],
    }


class Clock(Silent):
    """Processor time from the beginning of each task to its last step, that of reading threads included."""

    def __init__(self) -> None:
        self.began: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self._task = ""

    def begin(self, task: str, total: int | None, unit: str) -> None:
        self._task = task
        self.began[task] = time.process_time()

    def advance(self, amount: int = 1, **figures: float) -> None:
        self.ended[self._task] = time.process_time()


def overhead(settings: Settings) -> dict[str, Any]:
    """An epoch of each phase of `fit`, and the same batches through forward, backward and optimiser alone."""
    cache, config = Cache(settings.cache), settings.config()
    networks: list[Network] = []
    optimizers: list[torch.optim.Optimizer] = []
    calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {"encoder": [], "train": []}

    def keep(network: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if network.training:
            calls["train"].append((given, named))

    def then(network: Network) -> None:
        networks.append(network)
        handles.append(network.register_forward_pre_hook(keep, with_kwargs=True))
        if isinstance(network, DefaultNetwork):
            predict = network.row_losses

            def kept(*given: Any, **named: Any) -> dict[str, torch.Tensor]:
                calls["encoder"].append((given, named))
                return predict(*given, **named)

            network.row_losses = kept

    handles: list[Any] = [register_optimizer_step_pre_hook(lambda optimizer, *_: optimizers.append(optimizer))]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, network_of_fit(then):
        fitting.fit(cache, config, Path(folder), device=CPU, progress=clock)
        epochs = epochs_of(Path(folder))
    for handle in handles:
        handle.remove()
    network, optimizer, found = networks[0].train(), optimizers[0], {}
    for phase in epochs:
        full = epochs[phase][0]
        began, worked = time.perf_counter(), time.process_time()
        for given, named in calls[phase]:
            with torch.autocast("cpu", torch.bfloat16, enabled=config.fit.precision == "bfloat16"):
                # The method of the class: that of the object is the one that keeps.
                loss = (
                    type(network).row_losses(network, *given, **named)["predictor"]
                    if phase == "encoder"
                    else torch.stack(list(network(*given, **named).losses.values())).sum()
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[phase] = {
            "seconds": [full["seconds"], time.perf_counter() - began],
            "processor time": [clock.ended[phase] - clock.began[phase], time.process_time() - worked],
            "waited": full["loader_wait_share"],
            "steps": len(calls[phase]),
        }
    return found


JOBS = {"ours": time_ours, PUBLISHED: time_published, "equal": equal_losses, "overhead": overhead}


def alone(job: str, settings: Settings) -> dict[str, Any]:
    """The job in a process of its own."""
    command = [sys.executable, __file__, "--one", job, json.dumps(asdict(settings))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(settings: Settings, ways: list[str], repeats: int) -> None:
    """Time and memory of each way."""
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            job = PUBLISHED if way == PUBLISHED else "ours"
            results[way].append(alone(job, settings if way == PUBLISHED else replace(settings, preset=way)))
            print(f"  measured: {way} {results[way][-1]['seconds']}", file=sys.stderr, flush=True)
    print("\nSeconds per epoch of training")
    base = None
    for way, found in results.items():
        first = found[0]
        times = first["steps"] if way == PUBLISHED else 1
        for phase in first["seconds"]:
            seconds = [value for result in found for value in result["seconds"][phase]]
            epoch = statistics.mean(seconds) * times
            worked = sum(result["processor"][phase] for result in found) / len(seconds) * times
            if way == PUBLISHED:
                base = epoch, worked
            ratio = (
                f"{base[0] / epoch:.1f} × ({base[1] / worked:.1f} ×) as fast as published"
                if base and way != PUBLISHED
                else ""
            )
            print(f"  {way:<10} {phase:<8} {epoch:10.2f} s ({worked:.2f} s processor time)   {ratio}")
            print(f"  {'':<10} {len(seconds)} measured: " + ", ".join(f"{value:.2f}" for value in seconds))
        size = f"{times} steps, tensors {first['shape']}" if way == PUBLISHED else f"{first['rows']:,} rows"
        apart = {name: value for name, value in first["phases"].items() if name not in ("beginning", *first["seconds"])}
        print(f"  {'':<10} an epoch is {size}; apart from that: ", end="")
        print(", ".join(f"{name} {value:.1f} s" for name, value in apart.items()))
    rests = {}
    print("\nPeak anonymous memory, MB")
    for way, found in results.items():
        result = max(found, key=lambda result: max(result["largest"].values()))
        peaks = result["largest"]
        # Training alone of theirs, the whole of ours.
        peak = peaks["train"] if way == PUBLISHED else max(peaks.values())
        rest = rests[way] = peak - result["weights"] - result["before"]
        base = rests.get(PUBLISHED)
        ratio = f"{rest / base:6.3f} of published" if base and way != PUBLISHED else ""
        print(
            f"  {way:<10} peak {peak:7.0f}, before {result['before']:5.0f}, weights {result['weights']:5.0f}, "
            f"left {rest:7.0f}   {ratio}"
        )
        print(f"  {'':<10} by task: " + ", ".join(f"{name} {value:.0f}" for name, value in peaks.items()))


def show_equal(settings: Settings) -> None:
    """Losses of both, one line an epoch."""
    found = alone("equal", replace(settings, preset="paper"))
    (train, held_out), (own, other) = found["texts"], found["steps"]
    print(
        f"\nHeld-out reconstruction (mean squared error) of {held_out} texts, trained on {train}, from the same start"
    )
    print(f"  before the first step {found['start']:.4f}; predicted by the mean training row {found['mean']:.4f}")
    for epoch, theirs in enumerate(found["theirs"], start=1):
        line = f"published {theirs:.4f} (step {other * epoch})"
        if epoch <= len(found["ours"]):
            ours = found["ours"][epoch - 1]
            line += f", paper {ours:.4f} (step {own * epoch}), ratio {ours / theirs:.3f}"
        print(f"  after epoch {epoch:>2}: {line}")
    last, steps = found["ours"][-1], own * len(found["ours"])
    print(f"  at equal steps: paper {last:.4f} (step {steps}), published {theirs:.4f} (step {other * epoch})")


def show_overhead(settings: Settings, ways: list[str], repeats: int) -> None:
    print("\nShare of an epoch outside forward, backward and optimiser")
    for way in ways:
        for _ in range(repeats if way != PUBLISHED else 0):
            found = alone("overhead", replace(settings, preset=way, epochs=1))
            for phase, figures in found.items():
                for name in ("seconds", "processor time"):
                    full, bare = figures[name]
                    share = 100 * (1 - bare / full)
                    print(f"  {way:<8} {phase:<8} {name:<15} {share:5.1f} %   epoch {full:.2f} s, bare {bare:.2f} s")
                steps, waited = figures["steps"], 100 * figures["waited"]
                print(f"  {'':<17} {steps} steps; waited for the next batch {waited:.2f} %", flush=True)


def show_scaling(settings: Settings, code_counts: list[int]) -> None:
    """Pools are so small that the smallest number of rows fills them."""
    settings = replace(settings, preset="default", changes={"fit.pool_bytes": str(8 << 20)})
    print(f"\n`default` by rows, {settings.codes} codes; pools of 8 MiB")
    parts = [PARTS[:1], PARTS[:2], PARTS]
    for split in parts:
        show_size(alone("ours", replace(settings, split=split)), f"{'+'.join(split)}")
    print("\n`default` by codes, all rows")
    for codes in code_counts:
        show_size(alone("ours", replace(settings, codes=codes)), f"{codes:,} codes")


def show_size(found: dict[str, Any], name: str) -> None:
    """One size's time and memory."""
    rows, peaks = found["rows"], found["largest"]
    print(
        f"  {name:<20} {rows:>8,} rows   peak {max(peaks.values()):6.0f} MB, {found['before']:.0f} before", flush=True
    )
    print(f"  {'':<20} by task: " + ", ".join(f"{task} {peak:.0f}" for task, peak in peaks.items()))
    for phase, values in found["seconds"].items():
        worked = found["processor"][phase] / len(values)
        seconds = statistics.mean(values)
        each = f"{seconds / rows * 1e6:.1f} µs a row ({worked / rows * 1e6:.1f} µs of processor time)"
        print(f"  {'':<20} {phase:<8} {seconds:8.2f} s an epoch, {each}", flush=True)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", help="a real cache instead of a synthetic one")
    parser.add_argument("--lower", default="hidden.8")
    parser.add_argument("--upper", default="hidden.12")
    parser.add_argument("--split", default="train", help="of the real cache")
    parser.add_argument("--held-out", default="dev", help="of the real cache")
    parser.add_argument("--texts", type=int, default=TEXTS, help="of the synthetic cache")
    parser.add_argument("--width", type=int, default=768, help="of the synthetic cache")
    parser.add_argument("--codes", type=int, default=400)
    parser.add_argument("--ways", nargs="*", default=[PUBLISHED, "paper", "default"])
    parser.add_argument("--steps", type=int, default=2, help="of the published layout, in each repeat")
    parser.add_argument("--epochs", type=int, default=1, help="of the presets, in each repeat")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--whole-start", action="store_true", help="k-means as the presets have it")
    parser.add_argument("--equal", action="store_true")
    parser.add_argument("--equal-texts", type=int, default=600)
    parser.add_argument("--equal-epochs", type=int, default=3)
    parser.add_argument("--equal-batch", type=int, default=32, help="sentences in a batch, of both")
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--scaling-codes", type=int, nargs="+", default=[400, 1600, 6400])
    parser.add_argument("--no-compare", action="store_true", help="only what is asked for by the flags above")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        job, plain = given.one
        print(json.dumps(JOBS[job](Settings(**json.loads(plain)))))
        return
    print(header("clvq", "torch", "numpy", "scikit-learn"))
    with tempfile.TemporaryDirectory() as folder:
        shared = {"codes": given.codes, "steps": given.steps, "epochs": given.epochs, "whole_start": given.whole_start}
        if given.cache:
            place_of = {"lower": given.lower, "upper": given.upper, "held_out": given.held_out}
            settings = Settings(given.cache, split=(given.split,), **place_of, **shared)
        else:
            settings = Settings(f"{folder}/cache", **shared)
            make_cache(Path(settings.cache), texts=given.texts, width=given.width)
        if not given.no_compare:
            compare(settings, given.ways, given.repeats)
        if given.equal:
            batch = {"fit.texts_per_batch": str(given.equal_batch)}
            few = replace(settings, epochs=given.equal_epochs, changes=batch)
            if not given.cache:
                few = replace(few, cache=f"{folder}/few")
                make_cache(Path(few.cache), texts=given.equal_texts, width=given.width, seed=1)
            show_equal(few)
        if given.overhead:
            show_overhead(settings, given.ways, given.repeats)
        if given.scaling and not given.cache:
            show_scaling(settings, given.scaling_codes)
        elif given.scaling:
            print("\n--scaling is for synthetic caches")


if __name__ == "__main__":
    main()
