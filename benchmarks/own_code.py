"""What codes carry: every way to make K codes from the same training rows, judged on the same held-out texts.

Judged are the upper row predicted by its own code alone (own-code FVU) and by a decoder over the text's codes, the same
decoder for all ways. The rivals' k-means is clvq's own; a per-row MLP has one hidden layer of four times the width and
seven epochs. Results are added to a file of JSON lines, and what stands there is not computed again; tables are made
from it, with 95 % intervals: Student's t over seeds, and paired by text (bootstrap) for the differences between ways.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from clvq import Cache
from clvq.evaluation.agreement import assignment_stability
from clvq.evaluation.bootstrap import RESAMPLES
from clvq.evaluation.compare import over_seeds
from clvq.trainer.concepts import Batch
from clvq.trainer.config import TrainConfig, preset_config, with_overrides
from clvq.trainer.data import Texts
from clvq.trainer.decoders import CodesDecoder
from clvq.trainer.fit import fit
from clvq.trainer.kmeans import assign, blocks_of, kmeans
from clvq.trainer.network import _laid_out
from clvq.trainer.run import Run
from common import code_means, header
from torch import Tensor, nn

from clvq.cache.stream import TextStream  # isort: skip

CPU = torch.device("cpu")
WAYS = ("k-means", "spherical k-means", "k-means, linear", "k-means, MLP", "default", "paper", "k-means, upper")


@dataclass(frozen=True)
class Side:
    """Rows of the training or the held-out texts, and where they come from."""

    place: np.ndarray
    text: np.ndarray
    lower: Tensor
    upper: Tensor


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("caches", nargs="+", type=Path, help="caches with the splits train and dev")
    parser.add_argument("--lower", default="8", help="site, or a comma-separated list, one for each cache")
    parser.add_argument("--upper", default="12")
    parser.add_argument("--codes", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--first-seed", type=int, default=0, help="below --seeds; several processes can share the seeds"
    )
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--paper-epochs", type=int, default=3, help="of the published 50")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--decoder-seeds", type=int, default=99, help="train the decoder for so many seeds only")
    parser.add_argument("--results", type=Path, required=True, help="file of JSON lines that is added to")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    given = parser.parse_args()
    print(header("clvq", "torch", "numpy"))
    lowers, uppers = (_for_each(value, len(given.caches)) for value in (given.lower, given.upper))
    if not given.table:
        print(f"K = {given.codes}; paper: {given.paper_epochs} epochs; products in {given.precision}\n")
        for path, lower, upper in zip(given.caches, lowers, uppers, strict=True):
            for seed in range(given.first_seed, given.seeds):
                _run(path, lower, upper, seed, given)
    lines = [json.loads(line) for line in given.results.read_text().splitlines()]
    names = [path.name for path in given.caches]
    _tables([line for line in lines if line["cache"] in names and line["way"] in given.ways], names)


def _for_each(value: str, count: int) -> list[str]:
    values = value.split(",")
    return values * count if len(values) == 1 else values


def _run(path: Path, lower: str, upper: str, seed: int, given: argparse.Namespace) -> None:
    done = set()
    if given.results.exists():
        for line in map(json.loads, given.results.read_text().splitlines()):
            done.add((line["cache"], line["way"], line["seed"], line["codes"]))
    missing = [way for way in given.ways if (path.name, way, seed, given.codes) not in done]
    if not missing:
        return
    cache = Cache(path)
    config = with_overrides(
        preset_config(
            "default", lower=cache.site(lower), upper=cache.site(upper), codes=given.codes, held_out="dev", seed=seed
        ),
        {"fit.precision": given.precision},
    )
    sides = _sides(cache, config)
    for way in missing:
        began = time.perf_counter()
        extra: dict[str, object] = {}
        torch.manual_seed(seed)
        train, dev = _codes(way, cache, config, sides, given, extra)
        seconds = time.perf_counter() - began
        line = {
            "cache": path.name,
            "way": way,
            "seed": seed,
            "codes": given.codes,
            "train_rows": len(train),
            "dev_rows": len(dev),
            **_judged(cache, config, sides, train, dev, decoder=seed < given.decoder_seeds),
            "seconds": seconds,
            **extra,
        }
        with open(given.results, "a") as file:
            file.write(json.dumps(line) + "\n")
        decoder = line.get("decoder", math.nan)
        print(f"  {path.name} seed {seed} {way}: own-code FVU {line['own']:.4f}, decoder {decoder:.4f}", flush=True)


def _sides(cache: Cache, config: TrainConfig) -> tuple[Side, Side]:
    texts, sides = Texts.of(cache, config), []
    for chosen in (texts.train, texts.held_out):
        place = cache.rows_of(chosen, special=config.special)
        vectors = [torch.from_numpy(cache.vectors(site, place)) for site in (config.lower, config.upper)]
        sides.append(Side(place, cache.column("text")[place], *vectors))
    return sides[0], sides[1]


def _codes(
    way: str,
    cache: Cache,
    config: TrainConfig,
    sides: tuple[Side, Side],
    given: argparse.Namespace,
    extra: dict[str, object],
) -> tuple[Tensor, Tensor]:
    """Each row's code, of the training and the held-out rows."""
    train, dev = sides
    if way in ("default", "paper"):
        if way == "paper":
            config = with_overrides(
                preset_config(
                    "paper",
                    lower=config.lower,
                    upper=config.upper,
                    codes=given.codes,
                    held_out="dev",
                    seed=config.seed,
                ),
                {"fit.precision": given.precision, "fit.epochs": str(given.paper_epochs)},
            )
        with tempfile.TemporaryDirectory() as folder:
            result = fit(cache, config, Path(folder) / "run", device=CPU)
            run = Run.from_pretrained(Path(folder) / "run")
        extra["report"] = result.report
        return tuple(torch.from_numpy(run.assign(side.lower.numpy())) for side in sides)  # type: ignore[return-value]
    if way == "k-means, upper":
        seen = (train.upper, dev.upper)
    elif way == "k-means, linear":
        seen = _linear(train, dev)
    elif way == "k-means, MLP":
        seen = _mlp(train, dev, config.seed)
        extra["predictor_fvu"] = _fvu(dev.upper, seen[1])
    else:
        seen = (train.lower, dev.lower)
    if way == "spherical k-means":
        mean = train.lower.mean(dim=0)
        seen = tuple(nn.functional.normalize(rows - mean, dim=1) for rows in seen)  # type: ignore[assignment]
    found = kmeans(
        blocks_of(seen[0].numpy(), device=CPU), codes=given.codes, iterations=100, seed=config.seed, device=CPU
    )
    return assign(seen[0], found.centroids), assign(seen[1], found.centroids)


def _linear(train: Side, dev: Side) -> tuple[Tensor, Tensor]:
    """Least squares in float64, with so little of a ridge that it only keeps channels apart that are equal."""
    mean, scale = train.lower.double().mean(dim=0), train.lower.double().std(dim=0).clamp_min(1e-12)
    x, y_mean = (train.lower.double() - mean) / scale, train.upper.double().mean(dim=0)
    gram = x.T @ x + 1e-6 * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, x.T @ (train.upper.double() - y_mean))
    return tuple((((side.lower.double() - mean) / scale) @ weight + y_mean).float() for side in (train, dev))  # type: ignore[return-value]


def _mlp(train: Side, dev: Side, seed: int, *, epochs: int = 7, batch: int = 512) -> tuple[Tensor, Tensor]:
    """One hidden layer; the rate falls to 0 as in clvq's default."""
    mean, scale = train.lower.mean(dim=0), train.lower.std(dim=0).clamp_min(1e-12)
    y_mean, y_scale = train.upper.mean(dim=0), (train.upper - train.upper.mean(dim=0)).square().mean().sqrt()
    wide, out = train.lower.shape[1], train.upper.shape[1]
    network = nn.Sequential(nn.Linear(wide, 4 * wide), nn.GELU(), nn.Linear(4 * wide, out))
    x, y = (train.lower - mean) / scale, (train.upper - y_mean) / y_scale
    train_predictor(network, x, y, epochs=epochs, batch=batch, seed=seed, low=False)
    with torch.no_grad():
        return tuple(network((side.lower - mean) / scale) * y_scale + y_mean for side in (train, dev))  # type: ignore[return-value]


def steps(
    x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer, *, epochs: int, batch: int, seed: int, rate: float
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Batches of rows, the rate set before each; and the share that is over."""
    generator, step, count = torch.Generator().manual_seed(seed), 0, epochs * (len(x) // batch)
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=generator)[: len(x) // batch * batch].split(batch):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / (0.05 * count)) * (1 - step / count)
            yield x[index], y[index], step / count
            step += 1


def train_predictor(network: nn.Module, x: Tensor, y: Tensor, *, epochs: int, batch: int, seed: int, low: bool) -> None:
    """AdamW on the mean squared error; products in bfloat16 where `low`."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2, fused=True)
    network.train()
    for rows, target, _ in steps(x, y, optimizer, epochs=epochs, batch=batch, seed=seed, rate=1e-3):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            predicted = network(rows)
        optimizer.zero_grad()
        nn.functional.mse_loss(predicted.float(), target).backward()
        optimizer.step()


def _fvu(upper: Tensor, predicted: Tensor) -> float:
    wide = upper.double()
    return float((wide - predicted.double()).square().sum() / (wide - wide.mean(dim=0)).square().sum())


def _judged(
    cache: Cache,
    config: TrainConfig,
    sides: tuple[Side, Side],
    train: Tensor,
    dev: Tensor,
    *,
    decoder: bool,
    positions: bool = True,
) -> dict[str, object]:
    """Own-code FVU, the decoder's, use of the codes; and each text's squared errors for paired intervals."""
    codes, (train_side, dev_side) = config.quantizer.codes, sides
    table = code_means(train_side.upper, train, codes)
    own = (dev_side.upper.double() - table[dev]).square().sum(dim=1)
    errors = {"own": own}
    if decoder:
        decoded = _decoded(cache, config, sides, train, dev, table, positions=positions)
        errors["decoder"] = (dev_side.upper.double() - decoded).square().sum(dim=1)
    deviation = dev_side.upper.double() - dev_side.upper.double().mean(dim=0)
    total = deviation.square().sum(dim=1)
    texts, which = np.unique(dev_side.text, return_inverse=True)
    by_text = {
        name: np.bincount(which, weights=values.numpy(), minlength=len(texts)).round(3).tolist()
        for name, values in (*errors.items(), ("total", total))
    }
    used = np.bincount(dev.numpy(), minlength=codes)
    shares = used[used > 0] / used.sum()
    return {
        **{name: float(values.sum() / total.sum()) for name, values in errors.items()},
        "used": int((used > 0).sum()),
        "perplexity": float(np.exp(-(shares * np.log(shares)).sum())),
        "by_text": by_text,
        "dev_codes": dev.tolist(),
    }


def _decoded(
    cache: Cache,
    config: TrainConfig,
    sides: tuple[Side, Side],
    train: Tensor,
    dev: Tensor,
    table: Tensor,
    *,
    positions: bool,
) -> Tensor:
    """Upper rows of the held-out side from the texts' codes, by the default's decoder trained as the default trains."""
    texts, settings = Texts.of(cache, config), config.fit
    scale = (sides[0].upper - sides[0].upper.mean(dim=0)).square().mean().sqrt()
    mean = sides[0].upper.mean(dim=0)
    own = ((table - mean) / scale).float()
    code_of = torch.full((cache.manifest.geometry.row_places,), -1)
    code_of[sides[0].place], code_of[sides[1].place] = train, dev
    torch.manual_seed(config.seed)
    decoder = CodesDecoder(config.decoder, width=own.shape[1])
    optimizer = torch.optim.AdamW(
        decoder.parameters(), lr=config.optimizer.lr, weight_decay=config.optimizer.weight_decay, fused=True
    )

    def stream(side: np.ndarray) -> TextStream:
        return TextStream(
            cache,
            [config.lower, config.upper],
            side,
            special=config.special,
            seed=config.seed,
            texts_per_batch=settings.texts_per_batch,
            slots_per_batch=settings.slots_per_batch,
        )

    def predicted(batch: Batch) -> Tensor:
        codes = own[code_of[batch.row[batch.mask]]]
        position = batch.position if positions else torch.zeros_like(batch.position)
        added: Tensor = decoder(_laid_out(codes, batch.mask), batch.mask, position)
        return codes + added[batch.mask].float()

    training, done, total = stream(texts.train), 0, settings.epochs * int(texts.train.sum())
    low = settings.precision == "bfloat16"
    for epoch in range(settings.epochs):
        for texts_batch in training.epoch(epoch):
            batch = Batch.of(texts_batch, config, CPU)
            share = done / total
            optimizer.param_groups[0]["lr"] = config.optimizer.lr * min(1.0, (share + 1e-3) / 0.05) * (1 - share)
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = nn.functional.mse_loss(predicted(batch), (batch.upper[batch.mask] - mean) / scale)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += len(texts_batch.text)
    decoder.eval()
    row_of = torch.full((cache.manifest.geometry.row_places,), -1)
    row_of[sides[1].place] = torch.arange(len(dev))
    out = torch.empty(len(dev), own.shape[1], dtype=torch.float64)
    with torch.no_grad():
        for texts_batch in stream(texts.held_out).epoch(0):
            batch = Batch.of(texts_batch, config, CPU)
            out[row_of[batch.row[batch.mask]]] = (predicted(batch) * scale + mean).double()
    return out


def _tables(lines: list[dict[str, object]], names: list[str]) -> None:
    """A table for each figure: a row for each cache, a column for each way."""
    ways = [way for way in WAYS if any(line["way"] == way for line in lines)]
    cell = {
        (name, way): [line for line in lines if (line["cache"], line["way"]) == (name, way)]
        for name in names
        for way in ways
    }
    most = max(map(len, cell.values()))
    for title, figure in FIGURES.items():
        shown = [way for way in ways if any(figure(cell[name, way], name, cell) for name in names)]
        if not shown:
            continue
        print(f"\n| {title} | {' | '.join(shown)} |\n|{'---|' * (len(shown) + 1)}")
        for name in names:
            cells = [figure(cell[name, way], name, cell) or "–" for way in shown]
            seeds = [len(cell[name, way]) for way in shown]
            cells = [
                f"{text} [{count}]" if text != "–" and count < most else text
                for text, count in zip(cells, seeds, strict=True)
            ]
            print(f"| {name} | {' | '.join(cells)} |")
    print(f"\n{most} seeds, or as many as [ ] says")


Cells = dict[tuple[str, str], list[dict[str, object]]]


def _mean(key: str, form: str) -> Callable[[list[dict[str, object]], str, Cells], str]:
    return lambda lines, name, cell: _interval(_values(lines, key), form) if _values(lines, key) else ""


def _of_preset(key: str, form: str) -> Callable[[list[dict[str, object]], str, Cells], str]:
    def figure(lines: list[dict[str, object]], name: str, cell: Cells) -> str:
        reports: list[dict[str, object]] = [line["report"] for line in lines if "report" in line]  # type: ignore[misc]
        return _interval(_values(reports, key), form) if reports else ""

    return figure


def _to_oracle(lines: list[dict[str, object]], name: str, cell: Cells) -> str:
    oracle = _values(cell.get((name, "k-means, upper"), []), "own")
    return f"{np.mean(_values(lines, 'own')) / np.mean(oracle):.3f}" if lines and oracle else ""


def _less_default(key: str) -> Callable[[list[dict[str, object]], str, Cells], str]:
    def figure(lines: list[dict[str, object]], name: str, cell: Cells) -> str:
        default = {line["seed"]: line for line in cell.get((name, "default"), []) if key in line}
        own = [line for line in lines if key in line and line["way"] != "default"]
        return _paired(own, default, key) if default and own else ""

    return figure


FIGURES = {
    "own-code FVU": _mean("own", ".4f"),
    "own-code FVU, × oracle": _to_oracle,
    "own-code FVU less default's": _less_default("own"),
    "decoder FVU, the same decoder": _mean("decoder", ".4f"),
    "decoder FVU less default's": _less_default("decoder"),
    "decoder FVU from codes, the preset's own": _of_preset("decoder_fvu_codes_only", ".4f"),
    "the same, codes shuffled": _of_preset("decoder_fvu_codes_shuffled", ".3f"),
    "codes used": _mean("used", ".0f"),
    "perplexity": _mean("perplexity", ".0f"),
    "AMI of seeds": lambda lines, name, cell: _stability(lines),
}


def _values(lines: list[dict[str, object]], key: str) -> list[float]:
    return [float(line[key]) for line in lines if key in line]  # type: ignore[arg-type]


def _interval(values: list[float], form: str) -> str:
    found = over_seeds(np.array(values))
    return f"{found.mean:{form}}" + ("" if found.high is None else f" ± {found.high - found.mean:{form.lstrip('+')}}")


def _stability(lines: list[dict[str, object]]) -> str:
    if len(lines) < 2:
        return ""
    return f"{assignment_stability([np.array(line['dev_codes']) for line in lines]).mean:.3f}"


def _paired(lines: list[dict[str, object]], default: dict[object, dict[str, object]], key: str) -> str:
    """A FVU less the default's, texts resampled, seeds averaged."""
    pairs = [(line["by_text"], default[line["seed"]]["by_text"]) for line in lines if line["seed"] in default]
    if not pairs:
        return "–"
    difference = np.mean([np.subtract(one[key], other[key]) for one, other in pairs], axis=0)  # type: ignore[index]
    total = np.array(pairs[0][0]["total"])  # type: ignore[index]
    generator = np.random.default_rng(0)
    picked = generator.integers(0, len(total), (RESAMPLES, len(total)))
    low, high = np.quantile(difference[picked].sum(axis=1) / total[picked].sum(axis=1), [0.025, 0.975])
    return f"{difference.sum() / total.sum():+.4f} [{low:+.4f}, {high:+.4f}]"


if __name__ == "__main__":
    main()
