"""How long a training step waits for its batch: pairs of rows, 4,096 a batch, a step simulated by a sleep.

The cache is larger than what the stream holds in memory, so that it is decoded anew while the steps run. The share is
what `loader_wait_share` in a run's metrics is: time in `next` over all time.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from clvq.cache.row_stream import RowStream
from common import header
from tiled import SITES, hidden_states, tiled


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_500_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--step-ms", type=float, nargs="+", default=[5.0, 10.0])
    given = parser.parse_args()
    print(header("clvq", "numpy", "numcodecs"))
    with tempfile.TemporaryDirectory() as name:
        vectors, counts = hidden_states(Path(name))
        for encoding in ("bf16", "int8"):
            cache = tiled(Path(name) / encoding, vectors, counts, rows=given.rows, encoding=encoding)
            everything = np.ones(len(cache.texts), dtype=bool)
            stream = RowStream(cache, SITES, everything, special="all", seed=0, batch_rows=4096)
            print(
                f"\n{cache.manifest.geometry.rows:,} rows × {len(SITES)} sites of {cache.width(SITES[0])}, {encoding}"
            )
            for step in given.step_ms:
                for epoch in range(given.epochs):
                    waited, longest, seconds = run(stream, epoch, step / 1e3)
                    print(
                        f"  step {step:4.1f} ms, epoch {epoch}: waited {waited / seconds:6.2%}"
                        f"   longest {1e3 * longest:6.1f} ms   {stream.steps / seconds:6.1f} steps/s"
                    )


def run(stream: RowStream, epoch: int, step: float) -> tuple[float, float, float]:
    """Seconds waited in all, at most for one batch, and of the epoch."""
    waited = longest = 0.0
    began = time.perf_counter()
    batches = stream.epoch(epoch)
    while True:
        asked = time.perf_counter()
        batch = next(batches, None)
        wait = time.perf_counter() - asked
        waited, longest = waited + wait, max(longest, wait)
        if batch is None:
            return waited, longest, time.perf_counter() - began
        time.sleep(step)


if __name__ == "__main__":
    main()
