"""Concepts of movie-review sentences (ERASER's evidence sentences, negative or positive).

Of an encoder fine-tuned on them, between its layers 8 and 12; with --decoder of a decoder that a prompt asks, between
its layers 20 and 30.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import study  # noqa: E402

ENCODER = {"lower": "8", "upper": "12", "rationale": "evidence"}
DECODER = {
    "lower": "20",
    "upper": "30",
    "prompt": HERE / "prompt.txt",
    "answers": "negative,positive",
    "max_length": 256,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; the exit code of `study.main`."""
    return study.main(arguments, about=__doc__, defaults=ENCODER, decoder=DECODER)


if __name__ == "__main__":
    sys.exit(main())
