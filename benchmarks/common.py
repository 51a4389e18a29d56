"""What every benchmark shares: the header that makes a number worth quoting, alternated timing, peak memory."""

import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def header(*packages: str) -> str:
    """Processor, cores, versions and commit; no host and no path."""
    import torch

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    here = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=False)
    state = commit.stdout.strip() + (" + changes" if dirty.stdout.strip() else "")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"CPU {cpu}, {os.cpu_count()} cores, torch threads {torch.get_num_threads()}; GPU {gpu}; "
        f"Python {platform.python_version()}, {versions}; commit {state}"
    )


def alternated(ways: dict[str, Callable[[], None]], *, repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, `repeats` times, the ways taking turns so that a drifting machine hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def report(title: str, seconds: dict[str, list[float]], *, ours: str, amount: int, unit: str) -> None:
    """Median speed of each way and its ratio to ours."""
    print(f"\n{title}")
    base = statistics.median(seconds[ours])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(
            f"  {name:<48} {amount / median:>12,.0f} {unit}/s   {min(values):7.2f}–{max(values):.2f} s"
            f"   ours is {median / base:5.2f} × as fast"
        )


def code_means(rows: "Tensor", index: "Tensor", codes: int) -> "Tensor":
    """Mean row of each code in float64; of all rows for a code without any."""
    import torch

    wide = rows.double()
    counts = torch.bincount(index, minlength=codes)
    sums = wide.new_zeros(codes, wide.shape[1]).index_add_(0, index, wide)
    return torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], wide.mean(dim=0))


class Peak:
    """The largest anonymous memory of this process, in MB, while the block runs."""

    def __enter__(self) -> "Peak":
        self.base = self.largest = anonymous()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self.largest = max(self.largest, anonymous())

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def anonymous() -> float:
    """RssAnon of this process in MB."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) / 1024
