"""Fine-tune an encoder as a classifier, and save a folder that `clvq extract` takes.

    python examples/finetune.py --model MODEL --data DATA --out OUT

AdamW with a warm-up and a linear decay, all weights trained, nothing tuned on the evaluation split.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clvq.errors import ClvqError, ConfigError
from clvq.pipeline.batches import batches
from clvq.pipeline.data import Texts, read_texts
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

LOG = logging.getLogger("finetune")

_WARM_UP = 0.1
_WEIGHT_DECAY = 0.01
_LARGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class FineTuned:
    """What fine-tuning came to."""

    path: Path
    accuracy: float
    """On the evaluation split."""
    largest_class: float
    """Share of the evaluation texts in the most frequent class: the accuracy of always saying that."""
    texts: int
    eval_texts: int


def finetune(
    model: str,
    data: str,
    out: Path,
    *,
    train_split: str = "train",
    eval_split: str = "dev",
    texts: int | None = None,
    epochs: int = 2,
    lr: float = 5e-5,
    max_length: int = 256,
    slots: int = 2048,
    seed: int = 0,
    device: str = "cpu",
) -> FineTuned:
    """Fine-tune and save.

    Parameters
    ----------
    model, data
        Folders or Hub names; the texts need the fields `text` and `label`.
    texts
        A seeded sample of so many training texts; all without it.
    max_length
        Tokens at which texts are cut.
    slots
        Upper limit of texts × longest text in a batch.

    Raises
    ------
    ConfigError
        Where `out` is not empty, or a text has no label or one that no training text has.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty: give another --out")
    train = read_texts(data, splits=[train_split], max_texts=texts, seed=seed)
    judged = read_texts(data, splits=[eval_split])
    names = train.class_names or []
    labels, wanted = _labels(train, names, train_split), _labels(judged, names, eval_split)
    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(seed)
    network = AutoModelForSequenceClassification.from_pretrained(
        model,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
        dtype=torch.float32,
    ).to(device)
    ids = tokenizer(train.text, truncation=True, max_length=max_length)["input_ids"]
    _train(network, tokenizer, ids, labels, epochs=epochs, lr=lr, slots=slots, seed=seed)
    ids = tokenizer(judged.text, truncation=True, max_length=max_length)["input_ids"]
    accuracy = _accuracy(network, tokenizer, ids, wanted, slots=slots)
    network.save_pretrained(out)
    tokenizer.save_pretrained(out)
    share = float(wanted.bincount().max()) / len(wanted)
    return FineTuned(out, accuracy, share, len(train), len(judged))


def _labels(texts: Texts, names: Sequence[str], split: str) -> Int64[Tensor, " text"]:
    """The texts' classes, as the training texts number them."""
    mine, found = texts.class_names or [], []
    for row, number in zip(texts.source_row, texts.label, strict=True):
        name = None if number is None else mine[number]
        if name not in names:
            what = "no label" if name is None else f"the label {name!r}, which no training text has"
            raise ConfigError(f"row {row} of {split} has {what}: leave the text out, or label it")
        found.append(names.index(name))
    return torch.tensor(found)


def _train(
    network: Any,
    tokenizer: Any,
    ids: Sequence[Sequence[int]],
    labels: Int64[Tensor, " text"],
    *,
    epochs: int,
    lr: float,
    slots: int,
    seed: int,
) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=_WEIGHT_DECAY)
    plan = list(batches(np.array([len(one) for one in ids]), slots=slots))
    total, done, generator = epochs * len(plan), 0, np.random.default_rng(seed)
    network.train()
    for epoch in range(epochs):
        losses = []
        for number in generator.permutation(len(plan)).tolist():
            for group in optimizer.param_groups:
                group["lr"] = lr * min((done + 1) / (_WARM_UP * total), 1 - done / total, 1.0)
            batch = plan[number]
            loss: Tensor = torch.nn.functional.cross_entropy(
                _logits(network, tokenizer, [ids[text] for text in batch]), labels[batch].to(network.device)
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), _LARGEST_GRADIENT)
            optimizer.step()
            losses.append(float(loss.detach()))
            done += 1
        LOG.info("epoch %d of %d: loss %.4f", epoch + 1, epochs, np.mean(losses))


def _accuracy(
    network: Any, tokenizer: Any, ids: Sequence[Sequence[int]], labels: Int64[Tensor, " text"], *, slots: int
) -> float:
    network.eval()
    right = 0
    with torch.inference_mode():
        for batch in batches(np.array([len(one) for one in ids]), slots=slots):
            logits = _logits(network, tokenizer, [ids[text] for text in batch])
            right += int((logits.argmax(dim=-1).cpu() == labels[batch]).sum())
    return right / len(ids)


def _logits(network: Any, tokenizer: Any, ids: Sequence[Sequence[int]]) -> Float[Tensor, "text class"]:
    padded = tokenizer.pad({"input_ids": list(ids)}, return_tensors="pt").to(network.device)
    logits: Tensor = network(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
    return logits


def main(arguments: Sequence[str] | None = None) -> int:
    """Fine-tune from the command line; 0, or 1 after a mistake."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of an encoder")
    parser.add_argument("--data", required=True, help="folder or Hub name of texts with the fields text and label")
    parser.add_argument("--out", required=True, type=Path, help="folder for the classifier")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--eval-split", default="dev")
    parser.add_argument("--texts", type=int, help="a seeded sample of so many training texts")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--max-length", type=int, default=256, help="tokens at which texts are cut")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = finetune(**vars(parser.parse_args(arguments)))
    except (ClvqError, OSError) as error:
        LOG.error("error: %s", error)
        return 1
    sys.stdout.write(
        f"accuracy {found.accuracy:.3f} on {found.eval_texts:,} texts, "
        f"{found.largest_class:.3f} of which are of the largest class; saved in {found.path}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
