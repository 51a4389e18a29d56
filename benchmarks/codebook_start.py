"""What the codebook's start costs and how good it is, beside scikit-learn's k-means.

Compared are `clvq.trainer.kmeans.kmeans` and `KMeans(init="k-means++", n_init=5, max_iter=300)`, the settings of the
published start, on the same rows in memory: plain, and on unit vectors (`spherical`). Seconds are wall-clock and of
the processor; the inertia of both is the sum of squared distances to the means of the clusters, in float64.

    OMP_NUM_THREADS=1 python benchmarks/codebook_start.py --cache CACHE --site 8
    OMP_NUM_THREADS=1 python benchmarks/codebook_start.py --rows 80000 --width 384   # rows made up

`--growth` measures ours alone as rows and codes grow, with the rows streamed from a file on disk in every pass:
seconds, seconds of the processor per row and code, and the largest anonymous memory.

Unset OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE where they are set: they slow scikit-learn down.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import clvq
import numpy as np
import torch
from clvq.trainer.kmeans import blocks_of, kmeans
from common import Peak, header
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

CPU = torch.device("cpu")


def made_up(rows: int, width: int, kinds: int, *, seed: int) -> Iterator[np.ndarray]:
    """Blocks of a mixture: the k-th kind is 1/k as frequent as the first; a common mean larger than the deviations."""
    generator = np.random.default_rng(seed)
    shares = 1 / np.arange(1, kinds + 1)
    centres = generator.normal(size=(kinds, width)) + 5 * generator.normal(size=width)
    for start in range(0, rows, 8_192):
        kind = generator.choice(kinds, min(8_192, rows - start), p=shares / shares.sum())
        yield (centres[kind] + generator.normal(size=(len(kind), width))).astype(np.float32)


def real(path: Path, site: str, limit: int) -> np.ndarray:
    cache = clvq.Cache(path)
    rows = cache.rows_of(cache.splits(["train"]), special="leading")[:limit]
    return cache.vectors(cache.site(site), rows)


def of_partition(rows: np.ndarray, labels: np.ndarray, codes: int) -> float:
    """Inertia around the clusters' means, in float64."""
    wide = rows - rows.mean(axis=0, dtype=np.float64)
    sums = np.zeros((codes, rows.shape[1]))
    np.add.at(sums, labels, wide)
    counts = np.maximum(np.bincount(labels, minlength=codes), 1)
    return float((wide**2).sum() - ((sums**2).sum(axis=1) / counts).sum())


def side_by_side(rows: np.ndarray, codes: int, *, spherical: bool, seeds: int, starts: int) -> None:
    print(f"\n{'spherical' if spherical else 'plain'}, {len(rows):,} rows of {rows.shape[1]}, {codes} codes")
    ours = []
    for seed in range(seeds):
        wall, cpu = time.perf_counter(), time.process_time()
        found = kmeans(
            blocks_of(rows, device=CPU), codes=codes, iterations=300, seed=seed, device=CPU, spherical=spherical
        )
        ours.append((time.perf_counter() - wall, time.process_time() - cpu, found.inertia, found.passes))
    wall, cpu = time.perf_counter(), time.process_time()
    seen = rows / np.linalg.norm(rows, axis=1, keepdims=True) if spherical else rows
    with threadpool_limits(torch.get_num_threads()):
        fitted = KMeans(codes, init="k-means++", n_init=starts, max_iter=300, random_state=0).fit(seen)
    theirs = (time.perf_counter() - wall, time.process_time() - cpu, of_partition(seen, fitted.labels_, codes))
    print(f"  scikit-learn, best of {starts:<9} {theirs[0]:8.1f} s  {theirs[1]:8.1f} s CPU   inertia {theirs[2]:.6g}")
    for seed, (seconds, busy, inertia, passes) in enumerate(ours):
        print(
            f"  clvq, seed {seed}, {passes:>2} passes      {seconds:8.1f} s  {busy:8.1f} s CPU   inertia {inertia:.6g}"
            f"   {theirs[0] / seconds:.1f} × as fast ({theirs[1] / busy:.1f} × by CPU),"
            f" inertia × {inertia / theirs[2]:.4f}"
        )


def streamed(rows: int, width: int, codes: int, kept_bytes: int, threads: int, folder: Path) -> None:
    torch.set_num_threads(threads)
    file = folder / "rows"
    with file.open("wb") as out:
        for block in made_up(rows, width, 400, seed=0):
            block.tofile(out)

    def blocks() -> Iterator[torch.Tensor]:
        with file.open("rb") as source:
            while (values := np.fromfile(source, np.float32, 8_192 * width)).size:
                yield torch.from_numpy(values.reshape(-1, width))

    wall, cpu = time.perf_counter(), time.process_time()
    with Peak() as peak:
        found = kmeans(blocks, codes=codes, iterations=300, seed=0, device=CPU, kept_bytes=kept_bytes)
    seconds, busy = time.perf_counter() - wall, time.process_time() - cpu
    print(
        f"  {rows:>10,} rows ({rows * width * 4 / 2**20:6.0f} MiB) {codes:>6,} codes  "
        f"{seconds:7.1f} s {busy:7.1f} s CPU  {found.passes:>3} passes  "
        f"{busy / (rows * codes) * 1e9:7.1f} ns CPU per row and code  "
        f"{peak.largest - peak.base:6.0f} MB anonymous"
    )


def alone(*settings: int) -> None:
    """Stream in a process of its own: memory that another run gave back would hide what this one takes."""
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("spawn").Process(target=streamed, args=(*settings, Path(folder)))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="a cache with a split `train`; rows are made up without one")
    parser.add_argument("--site", default="8")
    parser.add_argument("--rows", type=int, default=80_000, help="at most so many")
    parser.add_argument("--width", type=int, default=384, help="of rows made up")
    parser.add_argument("--codes", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=1, help="of ours")
    parser.add_argument("--starts", type=int, default=5, help="n_init of scikit-learn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--growth", action="store_true", help="the tables of growing rows and codes instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(header("torch", "scikit-learn", "numpy"))
    if options.growth:
        for grown, kept_bytes in (("rows", 32 << 20), ("codes", 128 << 20)):
            print(f"\n{grown} grow, streamed; {kept_bytes >> 20} MiB kept", flush=True)
            for times in (1, 2, 4, 8):
                rows = options.rows * (times if grown == "rows" else 1)
                codes = options.codes * (times if grown == "codes" else 1)
                alone(rows, options.width, codes, kept_bytes, options.threads)
        return
    if options.cache:
        rows = real(options.cache, options.site, options.rows)
    else:
        rows = np.concatenate(list(made_up(options.rows, options.width, 2 * options.codes, seed=0)))
    for spherical in (False, True):
        side_by_side(rows, options.codes, spherical=spherical, seeds=options.seeds, starts=options.starts)


if __name__ == "__main__":
    main()
