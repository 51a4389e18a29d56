"""Extraction by several workers: the same bytes, whatever becomes of the workers and the scheduler."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
from clvq.cache.files import only_writer
from clvq.cache.verify import verify
from clvq.errors import ClvqError, ConfigError, DataError, FolderInUse, Interrupted, RemoteUnreachable
from clvq.pipeline.cluster import Cluster, _Dispatch, extract_on
from clvq.pipeline.plan import Plan
from clvq.pipeline.receipts import Tally
from clvq.pipeline.worker import Order, make, versions
from clvq.progress import SILENT, Silent

from .cache_maker import contents
from .tiny import plan_of, run, write_texts

TinyModel = Callable[..., Path]
# Every kind of array: scales that all workers share, logits, words.
SETTINGS = {"encoding": "int8", "task": "classify", "rows": "word"}

# A scheduler with one worker, in a process to be killed; its address is printed.
SERVER = """
import sys, time
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=int(sys.argv[1]), threads_per_worker=2, host="127.0.0.1", memory_limit=0,
                      dashboard_address="127.0.0.1:0", scheduler_kwargs={"dashboard": False},
                      worker_dashboard_address=None) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data") / "texts", texts=140)


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> Path:
    return tiny_model("bert", classes=3, id2label=((0, "joy"), (1, "anger"), (2, "fear")))


@pytest.fixture(scope="module")
def plan(model: Path, data: Path) -> Plan:
    return plan_of(model, data, **SETTINGS)


@pytest.fixture(scope="module")
def whole(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes on its own."""
    out = tmp_path_factory.mktemp("whole") / "cache"
    run(plan, out)
    return out


class Server:
    """A Dask cluster in a process of its own."""

    def __init__(self, folder: Path, *, workers: int) -> None:
        script = folder / "server.py"
        script.write_text(SERVER)
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(workers)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()

    def stop(self) -> None:
        for child in psutil.Process(self.process.pid).children(recursive=True):
            child.kill()
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), workers=1)
    yield server
    server.stop()


def on(server: Server, plan: Plan, model: Path, out: Path, **others: Any) -> Any:
    """Extract by the workers of a server."""
    return extract_on(plan, out, Cluster(scheduler=server.address, threads=1), model=str(model), **others)


def records(out: Path) -> int:
    return len(list(out.glob("records/*.json")))


def test_one_worker_and_one_process_make_the_same_bytes(
    server: Server, plan: Plan, model: Path, whole: Path, tmp_path: Path
) -> None:
    result = on(server, plan, model, tmp_path / "cache")
    assert contents(tmp_path / "cache") == contents(whole)
    assert result.shards_left == 0
    assert result.shards > 4
    assert result.real_share > 0.5
    # A second time nothing is left to do.
    again = on(server, plan, model, tmp_path / "cache")
    assert again.cache_id == result.cache_id
    assert again.shards_done_before == result.shards


@pytest.mark.soak
def test_workers_killed_and_stopped_leave_the_same_bytes(
    plan: Plan, model: Path, whole: Path, tmp_path: Path, soak: bool, tell: Callable[[str], None]
) -> None:
    """Every second victim is stopped, as by a frozen machine, and must be replaced; the others are killed."""
    victims, rounds = 0, 0
    random = Random(0)
    wanted = 60 if soak else 2
    while victims < wanted:
        out = tmp_path / f"cache-{rounds}"
        rounds += 1
        ended = threading.Event()

        def hunt(out: Path = out, ended: threading.Event = ended) -> None:
            nonlocal victims
            seen = 0
            while not ended.is_set() and victims < wanted:
                time.sleep(random.random() * 0.05)
                workers = [child for child in psutil.Process().children() if "spawn_main" in " ".join(_command(child))]
                if records(out) > seen and workers:
                    seen = records(out)
                    how = signal.SIGSTOP if victims % 2 else signal.SIGKILL
                    os.kill(random.choice(workers).pid, how)
                    victims += 1

        hunter = threading.Thread(target=hunt)
        hunter.start()
        try:
            cluster = Cluster(workers=2, threads=1, worker_ttl=5.0, allowed_failures=100)
            extract_on(plan, out, cluster, model=str(model))
        finally:
            ended.set()
            hunter.join()
        assert contents(out) == contents(whole)
        shutil.rmtree(out)
    tell(f"{victims} workers killed or stopped in {rounds} extractions: every cache byte for byte the same")


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def test_a_killed_scheduler_keeps_finished_shards_and_the_command_goes_on(
    plan: Plan, model: Path, whole: Path, tmp_path: Path
) -> None:
    server = Server(tmp_path, workers=1)
    out = tmp_path / "cache"

    class KillAfterOne(Silent):
        def advance(self, amount: int = 1, **figures: float) -> None:
            server.stop()

    with pytest.raises(RemoteUnreachable, match=r"^the Dask scheduler is gone \(.*every finished shard is kept"):
        on(server, plan, model, out, progress=KillAfterOne())
    assert 1 <= records(out) < plan.placement.geometry.shards
    run(plan, out)
    assert contents(out) == contents(whole)


def test_a_scheduler_that_is_not_there_is_named(plan: Plan, model: Path, tmp_path: Path) -> None:
    with pytest.raises(RemoteUnreachable, match=r"^there is no Dask scheduler at nonsense \(missing port"):
        extract_on(plan, tmp_path / "cache", Cluster(scheduler="nonsense"), model=str(model))


def test_a_stop_keeps_finished_shards(server: Server, plan: Plan, model: Path, whole: Path, tmp_path: Path) -> None:
    class StopAfterOne(Silent):
        def advance(self, amount: int = 1, **figures: float) -> None:
            assert figures["shards_done"] == 1
            assert figures["workers"] == 1
            raise Interrupted("stopped", signal_number=2)

    out = tmp_path / "cache"
    with pytest.raises(Interrupted):
        on(server, plan, model, out, progress=StopAfterOne())
    # A task that was under way may still write its shard; that does no harm.
    on(server, plan, model, out)
    assert contents(out) == contents(whole)


def test_a_poison_text_is_named_and_the_other_shards_are_kept(
    server: Server, model: Path, data: Path, tmp_path: Path
) -> None:
    folder, texts = poisoned(model, data, tmp_path)
    plan = plan_of(folder, texts)
    shards = plan.placement.geometry.shards
    alone, together = tmp_path / "alone", tmp_path / "together"
    messages = []
    for out, start in ((alone, lambda: run(plan, alone)), (together, lambda: on(server, plan, folder, together))):
        with pytest.raises(DataError) as caught:
            start()
        messages.append(str(caught.value))
        assert records(out) == shards - 1
    assert messages[0] == messages[1]
    assert re.fullmatch(
        r"poisoned gives values at hidden\.1 that are not finite numbers, for row 17 of split 'train': try --dtype "
        rf"float32, or drop the text \(1 shard could not be made; {shards - 1} of {shards} were, and are kept\)",
        messages[0],
    )


def poisoned(model: Path, data: Path, folder: Path) -> tuple[Path, Path]:
    """A model that has no finite vector for 中, and texts one of which holds it."""
    import json

    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(model, folder / "poisoned"))
    weights = load_file(broken / "model.safetensors")
    (name,) = (name for name in weights if name.endswith("word_embeddings.weight"))
    tokenizer = json.loads((broken / "tokenizer.json").read_text())
    weights[name][tokenizer["model"]["vocab"]["中"]] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    texts = folder / "texts"
    texts.mkdir()
    lines = (data / "train.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if "中" not in json.loads(line)["text"]]
    lines.insert(17, json.dumps({"text": "never 中 seen", "label": None, "doc": "d"}))
    (texts / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return broken, texts


def test_a_failure_of_every_shard_ends_the_work_early(model: Path, data: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    for name, values in weights.items():
        if name.endswith("LayerNorm.weight"):
            values.fill_(float("inf"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"\(4 shards could not be made; 0 of \d+ were, and are kept\)$"):
        run(plan_of(broken, data), tmp_path / "cache")


def test_a_shard_that_ends_its_workers_names_its_texts(server: Server, plan: Plan, tmp_path: Path) -> None:
    from distributed import Client

    with Client(server.address) as client:
        dispatch = _Dispatch(client, order_of(plan, Path("x"), tmp_path), plan, Tally(1, SILENT), Cluster(workers=1))
        future = client.submit(os._exit, 1, allow_other_workers=False)
        with pytest.raises(
            DataError, match=r"^shard 2 ended 5 workers, one after the other: one of its \d+ texts \(row"
        ):
            dispatch._result(future, 2)


def order_of(plan: Plan, model: Path, out: Path, **changes: Any) -> Order:
    fields: dict[str, Any] = {
        "model": str(model), "revision": None, "config": plan.config, "extraction": plan.extraction(),
        "out": str(out), "device": "cpu", "threads": None, "versions": versions(),
    }  # fmt: skip
    return Order(**(fields | changes))


def test_a_worker_that_cannot_give_the_same_bytes_says_why(
    plan: Plan, model: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    others = versions() | {"torch": "1.0"}
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"versions": others},
            rf"^a worker has other versions, .* \(torch {re.escape(versions()['torch'])} there, 1\.0",
        ),
        ({}, r"^a worker does not see the cache at .*: put it on a disk that all workers share$"),
    ]
    for changes, message in cases:
        with pytest.raises(ConfigError, match=message):
            make(order_of(plan, model, tmp_path / "none", **changes), plan.work(0))
    out = tmp_path / "cache"
    with pytest.raises(Interrupted):
        run(plan, out, progress=StopAtOnce())
    with pytest.raises(ClvqError, match=r"is not the model that the cache was made with"):
        make(order_of(plan, tiny_model("bert", classes=3, seed=5), out), plan.work(0))
    first = make(order_of(plan, model, out), plan.work(1))
    again = make(order_of(plan, model, out), plan.work(1))
    assert (first.bytes, first.rows) == (again.bytes, again.rows)
    assert first.slots > 0
    # It was there already.
    assert again.slots == 0


class StopAtOnce(Silent):
    """Stops an extraction before its first shard, once the channel scales are fixed."""

    def advance(self, amount: int = 1, **figures: float) -> None:
        raise Interrupted("stopped", signal_number=2)


# Parts of the shards, as the jobs of an array make them.


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """Run all at once; what each returned or raised."""
    results: list[Any] = [None] * len(calls)

    def guarded(number: int, call: Callable[[], Any]) -> None:
        try:
            results[number] = call()
        except ClvqError as error:
            results[number] = error

    threads = [threading.Thread(target=guarded, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def part(plan: Plan, out: Path, number: int, parts: int) -> Any:
    from clvq.pipeline.extract import extract

    from .tiny import load

    return extract(plan, out, lambda: load(plan.source, task=plan.config.task), part=(number, parts))


def test_parts_made_one_after_the_other_make_the_same_cache(plan: Plan, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    results = [part(plan, out, number, 3) for number in (3, 1, 2)]
    assert [result.shards_left > 0 for result in results] == [True, True, False]
    assert [result.cache_id is None for result in results] == [True, True, False]
    assert contents(out) == contents(whole)
    assert part(plan, out, 2, 3).cache_id == results[-1].cache_id


@pytest.mark.soak
def test_parts_made_at_the_same_time_make_the_same_cache(
    model: Path, data: Path, whole: Path, tmp_path: Path, soak: bool, tell: Callable[[str], None]
) -> None:
    # A plan each, as processes have: tokenizers are not for several threads at once.
    plans = [plan_of(model, data, **SETTINGS) for _ in range(4)]
    rounds = 40 if soak else 3
    for number in range(rounds):
        out = tmp_path / f"cache-{number}"
        # The second part is asked for twice.
        jobs = zip(plans, (1, 2, 2, 3), strict=True)
        results = in_threads(*(partial(part, plan, out, mine, 3) for plan, mine in jobs))
        assert not [result for result in results if isinstance(result, ClvqError)]
        assert any(result.cache_id for result in results)
        assert contents(out) == contents(whole)
        assert verify(out).problems == []
        shutil.rmtree(out)
    tell(f"{rounds} times four jobs at once, two of them for the same part: every cache byte for byte the same")


def test_parts_and_a_whole_run_keep_out_of_each_others_way(plan: Plan, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    with only_writer(out), pytest.raises(FolderInUse, match="is being written by another process"):
        part(plan, out, 1, 2)
    part(plan, out, 1, 2)
    with only_writer(out, shared=True), pytest.raises(FolderInUse, match="is being written by another process"):
        run(plan, out)
    with only_writer(out, shared=True):
        # Somebody else is still at work: who is last finishes the cache.
        assert part(plan, out, 2, 2).cache_id is None
    run(plan, out)
    assert contents(out) == contents(whole)


def test_parts_out_of_range_and_with_force_are_refused(plan: Plan, tmp_path: Path) -> None:
    for number, parts in ((0, 2), (3, 2), (1, 0)):
        message = rf"^--shard-range {number}/{parts}: give i/n with i from 1 to n"
        with pytest.raises(ConfigError, match=message):
            part(plan, tmp_path / "cache", number, parts)
    from clvq.pipeline.extract import extract

    with pytest.raises(ConfigError, match=r"^--force would delete what others are writing"):
        extract(plan, tmp_path / "cache", lambda: pytest.fail("loaded"), part=(1, 2), force=True)


def test_more_parts_than_shards_leave_some_with_nothing_to_do(plan: Plan, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "cache"
    for number in range(1, 41):
        part(plan, out, number, 40)
    assert contents(out) == contents(whole)


def test_local_workers_share_the_cores_unless_told_otherwise() -> None:
    from clvq.pipeline.cluster import _threads

    cores = len(os.sched_getaffinity(0))
    assert _threads(Cluster(workers=1)) == cores
    assert _threads(Cluster(workers=4 * cores)) == 1
    assert _threads(Cluster(workers=2, threads=7)) == 7
    assert _threads(Cluster(scheduler="tcp://somewhere:1")) is None
