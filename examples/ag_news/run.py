"""Concepts of news in four classes: world, sports, business, science and technology (AG News).

Of an encoder fine-tuned on them, between its layers 8 and 12; with --decoder of a decoder that a prompt asks, between
its layers 20 and 30. Of the test split 1,200 texts are drawn.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import study  # noqa: E402

ENCODER = {"lower": "8", "upper": "12", "eval_split": "test", "eval_texts": 1200}
DECODER = {
    "lower": "20",
    "upper": "30",
    "prompt": HERE / "prompt.txt",
    "answers": "world=politics,sports=sports,business=business,technology=technology",
    "max_length": 256,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; the exit code of `study.main`."""
    return study.main(arguments, about=__doc__, defaults=ENCODER, decoder=DECODER)


if __name__ == "__main__":
    sys.exit(main())
