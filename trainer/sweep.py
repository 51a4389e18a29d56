"""Many runs at once: which there are, what they share, and the processes that train them.

Each is an ordinary run in its own folder, trained by a process of its own, so that it has the bytes that it would have
alone. Runs that differ only in what comes after the encoder share the encoder's training through a file.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import IO, Any

from ..cache.files import only_writer
from ..cache.layout import to_json
from ..errors import ConfigError, RunNotFound
from ..progress import Progress
from .config import AdaptiveEncoder, TrainConfig, with_overrides
from .folder import CONFIG, METRICS, MODEL, read_config
from .methods import PlainConfig, TrainedConfig

# Settings in which runs may differ and still have the same encoder, statistics and first epochs.
_AFTER_CODES = ("start", "quantizer", "decoder")
_AFTER_CODES_FIT = ("epochs", "patience", "texts_per_batch", "slots_per_batch", "checkpoint_minutes")
_LONGEST_NAME = 120
_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Member:
    """A run of a sweep."""

    name: str
    """Of its folder: the settings that are swept, and the seed."""
    settings: dict[str, Any]
    """The settings that are swept, by the names given."""
    config: TrainedConfig | PlainConfig

    @property
    def before_codes(self) -> str:
        """Equal for runs that differ only in what comes after the encoder's training."""
        if not isinstance(self.config, TrainConfig):
            return hashlib.sha256(to_json(self.config)).hexdigest()[:16]
        plain = self.config.model_dump(mode="json", exclude=set(_AFTER_CODES))
        for name in _AFTER_CODES_FIT:
            del plain["fit"][name]
        return hashlib.sha256(to_json(plain)).hexdigest()[:16]

    def overrides(self) -> dict[str, str]:
        """What distinguishes it from the other members, as `with_overrides` takes it."""
        return _overrides(self.settings, self.config.seed)


def members(base: TrainedConfig | PlainConfig, sweep: Sequence[str], *, seeds: int) -> list[Member]:
    """All combinations of the values given, each with the seeds `base.seed`, `base.seed + 1`, …

    Parameters
    ----------
    sweep
        Such as `codes=100,400` or `encoder.dropout=0,0.2`; `codes` is the number of concepts in any method.

    Raises
    ------
    ConfigError
        Where there is no such setting, a value does not suit it, or two combinations are the same.
    """
    named = [_values(text) for text in sweep]
    twice = [name for name, times in Counter(base.full_name(name) for name, _ in named).items() if times > 1]
    if twice:
        raise ConfigError(f"--sweep names {twice[0]} twice: give all its values in one, such as {twice[0]}=1,2")
    found: list[Member] = []
    for values in product(*(values for _, values in named)):
        settings = dict(zip((name for name, _ in named), values, strict=True))
        for seed in range(base.seed, base.seed + seeds):
            config = with_overrides(base, _overrides(settings, seed))
            shown = {name: _value_of(config, base.full_name(name)) for name in settings}
            same = next((other for other in found if other.config == config), None)
            if same is not None:
                raise ConfigError(f"--sweep gives {same.name} twice: leave one of the equal values out")
            found.append(Member(_name({**shown, "seed": seed}), shown, config))
    return found


def _values(text: str) -> tuple[str, list[Any]]:
    """The name, and the values: parts of a JSON array where they are, else strings."""
    name, equals, listed = text.partition("=")
    if not (equals and name and listed):
        raise ConfigError(f"--sweep {text}: write it as name=value,value, such as codes=100,400")
    if name == "seed":
        raise ConfigError(f"--sweep {text}: give --seed for the first seed and --seeds for how many")
    try:
        return name, list(json.loads(f"[{listed}]"))
    except ValueError:
        return name, listed.split(",")


def _overrides(settings: dict[str, Any], seed: int) -> dict[str, str]:
    return {**{name: json.dumps(value) for name, value in settings.items()}, "seed": str(seed)}


def _value_of(config: TrainedConfig | PlainConfig, name: str) -> Any:
    value: Any = config.model_dump(mode="json")
    for part in name.split("."):
        value = value[part]
    return value


def _name(settings: dict[str, Any]) -> str:
    """Readable, safe in any file system, and another one for other settings."""
    plain = "-".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()
    )
    safe = re.sub(r"[^A-Za-z0-9.+=_-]+", "_", plain)
    if safe == plain and len(safe) <= _LONGEST_NAME:
        return safe
    return f"{safe[:_LONGEST_NAME]}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


@dataclass
class _Child:
    """A process that trains a member."""

    process: subprocess.Popen[bytes]
    said: IO[bytes]

    def why(self) -> str | None:
        """Why it failed; `None` where it did not."""
        code = self.process.returncode
        if code == 0:
            return None
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        return lines[-1].removeprefix("error: ") if lines and code > 0 else ended

    def close(self) -> None:
        """Let go of what it was started with."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.said.close()


def train_all(
    chosen: Sequence[Member],
    out: Path,
    command: Callable[[Member, Path, Path], list[str]],
    *,
    cache_id: str,
    jobs: int,
    progress: Progress,
) -> dict[str, str]:
    """Train what is not yet finished, `jobs` at once; gives why runs failed, by name.

    Of runs that share what comes before the codes one goes ahead, and the others begin when it has that.

    Parameters
    ----------
    command
        The process to start for a member, its folder and the file of `fit`'s `shared`. It is to save and end on
        SIGTERM, and also when its standard input ends, which happens when this process is killed.

    Raises
    ------
    ConfigError
        Where `out` is a run itself.
    FolderInUse
    Interrupted
        After all processes have saved and ended.
    """
    if (out / CONFIG).exists():
        raise ConfigError(f"{out} is a run, and a sweep needs a folder to put runs in: give another --out")
    with only_writer(out):
        sweep = _Sweep(chosen, out, command, cache_id, progress)
        try:
            sweep.train(jobs)
        finally:
            sweep.stop()
        for file in sweep.shared_files():
            if not sweep.failed:
                file.unlink(missing_ok=True)
        return sweep.failed


class _Sweep:
    def __init__(
        self,
        chosen: Sequence[Member],
        out: Path,
        command: Callable[[Member, Path, Path], list[str]],
        cache_id: str,
        progress: Progress,
    ) -> None:
        self.chosen, self.out, self.command, self.progress = chosen, out, command, progress
        self.cache_id = cache_id
        self.waiting = [member for member in chosen if not self._finished(member)]
        self.running: dict[str, tuple[Member, _Child]] = {}
        self.failed: dict[str, str] = {}
        self.told = 0

    def _finished(self, member: Member) -> bool:
        folder = self.out / member.name
        try:
            found = read_config(folder)
        except RunNotFound:
            return False
        return (folder / MODEL).is_file() and (found.cache_id, found.config) == (self.cache_id, member.config)

    def _shared(self, member: Member) -> Path:
        return self.out / f"before-codes-{self.cache_id[:12]}-{member.before_codes}.safetensors"

    def shared_files(self) -> set[Path]:
        return {self._shared(member) for member in self.chosen}

    def train(self, jobs: int) -> None:
        self.progress.begin("sweep", sum(_epochs(member) for member in self.chosen), "epoch")
        while self.waiting or self.running:
            while len(self.running) < jobs and (member := self._next()) is not None:
                self._start(member)
            self._collect()
            self._tell()
            time.sleep(_LOOK_SECONDS)

    def _next(self) -> Member | None:
        """The first that need not wait for another to train its encoder."""
        ahead = {member.before_codes for member, _ in self.running.values()}
        for member in self.waiting:
            if member.before_codes not in ahead or self._shared(member).is_file():
                self.waiting.remove(member)
                return member
        return None

    def _start(self, member: Member) -> None:
        said = tempfile.TemporaryFile()  # noqa: SIM115 — closed with the child
        process = subprocess.Popen(
            self.command(member, self.out / member.name, self._shared(member)),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=said,
            # A terminal's Ctrl-C would reach it beside our own signal, and twice means: do not save.
            start_new_session=True,
        )
        self.running[member.name] = (member, _Child(process, said))

    def _collect(self) -> None:
        for name, (_, child) in list(self.running.items()):
            if child.process.poll() is not None:
                why = child.why()
                if why is not None:
                    self.failed[name] = why
                child.close()
                del self.running[name]

    def _tell(self) -> None:
        """How many epochs are done; may raise `Interrupted`."""
        unfinished = {member.name for member in self.waiting} | set(self.running)
        done = sum(
            min(_lines(self.out / member.name), _epochs(member)) if member.name in unfinished else _epochs(member)
            for member in self.chosen
        )
        new, self.told = max(0, done - self.told), max(done, self.told)
        ended = len(self.chosen) - len(unfinished)
        counts = {"runs done": ended, "running": len(self.running), "to do": len(self.waiting)}
        self.progress.advance(new, **{name: float(count) for name, count in counts.items()})

    def stop(self) -> None:
        """Have what still runs save and end."""
        for _, child in self.running.values():
            with suppress(ProcessLookupError):
                child.process.send_signal(signal.SIGTERM)
        for _, child in self.running.values():
            child.process.wait()
            child.close()


def _epochs(member: Member) -> int:
    config = member.config
    if not isinstance(config, TrainedConfig):
        return 0
    of_rows = 0 if isinstance(config.encoder, AdaptiveEncoder) else config.encoder.epochs
    return of_rows + (config.fit.epochs if isinstance(config, TrainConfig) else 0)


def _lines(folder: Path) -> int:
    with suppress(FileNotFoundError):
        return (folder / METRICS).read_bytes().count(b"\n")
    return 0


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
