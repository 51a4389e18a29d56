"""The quantiser alone, forward, backward and codebook update, against vector-quantize-pytorch at equal work.

Nearest code by Euclidean distance, running means with the same decay and smoothing, commitment, straight-through; no
draws, no revival. That both do the same is a test (tests/test_trainer_quantizer.py).
"""

import argparse

import torch
from clvq.trainer.config import EmaQuantizer
from clvq.trainer.quantizer import EmaCodebook
from common import alternated, header, report
from vector_quantize_pytorch import VectorQuantize


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--codes", type=int, nargs="+", default=[400, 8_192])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rows", type=int, default=4_096)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    print(header("clvq", "torch", "vector-quantize-pytorch"))
    for codes in given.codes:
        _compare(codes, given)


def _compare(codes: int, given: argparse.Namespace) -> None:
    device = torch.device(given.device)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(given.rows, given.width, generator=generator).to(device)
    start = torch.randn(codes, given.width, generator=generator).to(device)
    settings = EmaQuantizer(
        kind="ema",
        codes=codes,
        decay=0.99,
        epsilon=1e-5,
        smoothed_counts=False,
        commitment=0.1,
        top_k=1,
        temperature=1.0,
        revive_after=0,
    )
    ours = EmaCodebook(settings, width=given.width).to(device).train()
    ours.start(start)
    theirs = VectorQuantize(
        dim=given.width, codebook_size=codes, decay=0.99, eps=1e-5, commitment_weight=0.1, threshold_ema_dead_code=0
    ).to(device)
    theirs._codebook.embed.data.copy_(start[None])
    theirs._codebook.embed_avg.data.copy_(start[None])
    theirs.train()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def our_steps() -> None:
        for _ in range(given.steps):
            leaf = rows.clone().requires_grad_()
            out = ours(leaf)
            (out.straight.square().mean() + out.commitment).backward()
        wait()

    def their_steps() -> None:
        for _ in range(given.steps):
            leaf = rows.clone().requires_grad_()
            out, _, commitment = theirs(leaf[None])
            (out.square().mean() + commitment.sum()).backward()
        wait()

    our_steps(), their_steps()
    seconds = alternated({"clvq": our_steps, "vector-quantize-pytorch": their_steps}, repeats=given.repeats)
    title = f"K = {codes:,}, d = {given.width}, {given.rows:,} rows a step"
    report(title, seconds, ours="clvq", amount=given.steps * given.rows, unit="rows")


if __name__ == "__main__":
    main()
