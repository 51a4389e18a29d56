"""Processes that train one model together. To be run as a script.

`train JOB` is a worker for torchrun. `jobs [JOB, …]` does one after the other: for each it forks its ranks, waits for
them and prints a line of JSON with their exit codes. Forked from a process that has imported everything (torch._dynamo
too, as an optimiser does when it is made), they begin at once. A job is JSON: see `Job`.
"""

import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, TypedDict

import clvq
import torch
import torch._dynamo
from caches import LOWER, UPPER
from clvq.errors import ClvqError, Interrupted, RanksDiffer
from clvq.progress import Silent
from clvq.trainer import fit as fitting
from clvq.trainer import ranks
from clvq.trainer.config import TrainConfig, preset_config, with_overrides

DIFFER, REFUSED = 3, 4

SMALL = {
    "decoder.layers": 2,
    "decoder.heads": 2,
    "decoder.hidden": 8,
    "decoder.dropout": 0,
    "start.iterations": 5,
    "fit.epochs": 2,
    "fit.texts_per_batch": 5,
    "optimizer.lr": 0.003,
}
OWN = {
    "default": {"encoder.dropout": 0, "encoder.epochs": 2, "encoder.rows_per_batch": 20},
    # Codes die, are revived and are drawn.
    "paper": {"quantizer.revive_after": 2, "quantizer.temperature": 20},
}


class Job(TypedDict, total=False):
    """A training, and what is done to it."""

    cache: str
    out: str
    copied: str
    """A folder that `out` begins as a copy of."""
    preset: str
    settings: dict[str, Any]
    ranks: int
    harm: str
    """`kill` or `stop` one rank, `stop launcher`, or `drift`: change the codebook of one rank."""
    rank: int
    """Which one does or suffers it."""
    step: int
    """After so many steps."""


def config_of(job: Job) -> TrainConfig:
    """The settings of a job."""
    config = preset_config(job["preset"], lower=LOWER, upper=UPPER, codes=9)
    changes = SMALL | OWN[job["preset"]] | job.get("settings", {})
    return with_overrides(config, {name: json.dumps(value) for name, value in changes.items()})


class _Harm(Silent):
    """Does to this process what the job says; stops on SIGTERM."""

    def __init__(self, job: Job, network: list[torch.nn.Module]) -> None:
        self.job, self.network, self.steps, self.asked = job, network, 0, False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def advance(self, amount: int = 1, **figures: float) -> None:
        # Only steps have a loss.
        self.steps += "loss" in figures
        if "loss" in figures and self.steps == self.job.get("step") and ranks.number() == self.job["rank"]:
            self._harm(self.job["harm"])
        self.check()

    def _harm(self, harm: str) -> None:
        if harm == "kill" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        elif harm == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        elif harm == "stop launcher":
            os.kill(os.getppid(), signal.SIGTERM)
            while not self.asked:
                time.sleep(0.01)
        elif harm == "drift":
            for tensor in self.network[0].quantizer.buffers():
                tensor[0] += 1

    def check(self) -> None:
        if self.asked:
            raise Interrupted("stop", signal_number=signal.SIGTERM)


def train(job: Job) -> int:
    """One rank; gives its exit code."""
    torch.set_num_threads(1)
    build, networks = fitting.build, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        networks.append(build(*args, **kwargs))
        return networks[-1]

    fitting.build = watched
    progress = _Harm(job, networks)
    try:
        with ranks.process_group(torch.device("cpu")) as device:
            fitting.fit(clvq.Cache(job["cache"]), config_of(job), Path(job["out"]), device=device, progress=progress)
    except Interrupted as error:
        return 128 + error.signal_number
    except RanksDiffer:
        return DIFFER
    except ClvqError as error:
        sys.stderr.write(f"{error}\n")
        return REFUSED
    return 0


def forked(job: Job) -> list[int]:
    """Exit codes of the job's ranks."""
    if "copied" in job:
        shutil.copytree(job["copied"], job["out"])
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": job["ranks"], "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    children = []
    for rank in range(job["ranks"]):
        if (child := os.fork()) == 0:
            code = 1
            try:
                if job["ranks"] > 1:
                    os.environ |= {name: str(value) for name, value in group.items()}
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                code = train(job)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    what, told = sys.argv[1], json.loads(sys.argv[2])
    if what == "train":
        sys.exit(train(told))
    for each in told:
        sys.stdout.write(json.dumps(forked(each)) + "\n")
        sys.stdout.flush()
