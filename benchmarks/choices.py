"""Each choice of the default against what else might be chosen: own-code FVU on held-out texts, several seeds.

Everything is done on rows in memory, so that a variant is a few lines. `joint` variants train encoder and codes
together for the second half of the epochs, after k-means; all variants see the training rows equally often.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from clvq import Cache
from clvq.trainer.config import TrainConfig, preset_config, with_overrides
from clvq.trainer.encoders import ResidualPredictor
from clvq.trainer.kmeans import assign, blocks_of, kmeans
from common import code_means, header
from own_code import CPU, Side, _fvu, _interval, _judged, _sides, steps, train_predictor
from torch import Tensor, nn


@dataclass(frozen=True)
class Variant:
    """How codes are made; the values here are the default's."""

    name: str
    why: str
    blocks: int = 2
    dropout: float = 0.2
    epochs: int = 8
    batch: int = 512
    per_channel: bool = True
    start: str = "k-means"
    cosine: bool = False
    joint: str = ""
    """`own`: expected own-code error at an annealed temperature; `ema`: straight-through, commitment, running means;
    `rotation`: the same with the rotation trick (Fifty et al. 2024, arXiv 2410.06424); `entropy`: `own` with an even
    use of codes rewarded."""


VARIANTS = [
    Variant("default", "–"),
    Variant("1 block", "one MLP", blocks=1),
    Variant("3 blocks", "three MLPs", blocks=3),
    Variant("no dropout", "dropout 0", dropout=0.0),
    Variant("4 epochs", "half the encoder's epochs", epochs=4),
    Variant("16 epochs", "twice the encoder's epochs", epochs=16),
    Variant("batches of 2,048", "larger batches", batch=2048),
    Variant("one scale", "one scale for all channels of the lower site", per_channel=False),
    Variant("random start", "codes on random rows, no Lloyd", start="random"),
    Variant("k-means++ only", "seeds without Lloyd", start="seeds"),
    Variant("cosine codes", "k-means on unit vectors of the prediction", cosine=True),
    Variant("joint: own-code loss", "expected error of the own code, temperature annealed", joint="own"),
    Variant("joint: own-code loss, entropy", "the same, even use rewarded", joint="entropy"),
    Variant("joint: EMA, straight-through", "as VQ-VAEs are trained, from k-means on", joint="ema"),
    Variant("joint: EMA, rotation trick", "gradient rotated with the code", joint="rotation"),
]
DECODERS = {
    "decoder: default": {},
    "decoder: no positions": {},
    "decoder: 1 layer": {"decoder.layers": "1"},
    "decoder: 4 layers": {"decoder.layers": "4"},
    "decoder: 2 epochs": {"fit.epochs": "2"},
    "decoder: 8 epochs": {"fit.epochs": "8"},
    "decoder: dropout 0.1": {"decoder.dropout": "0.1"},
}
"""Settings of the decoder that differ from the default's, all of them on the default's codes."""


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--lower", default="8")
    parser.add_argument("--upper", default="12")
    parser.add_argument("--codes", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--decoders", action="store_true", help="the decoder's choices, and none of the encoder's")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--results", type=Path, required=True, help="file of JSON lines that is added to")
    given = parser.parse_args()
    print(header("clvq", "torch"))
    cache = Cache(given.cache)
    config = with_overrides(
        preset_config(
            "default", lower=cache.site(given.lower), upper=cache.site(given.upper), codes=given.codes, held_out="dev"
        ),
        {"fit.precision": given.precision},
    )
    sides = _sides(cache, config)
    names = list(DECODERS) if given.decoders else [variant.name for variant in VARIANTS]
    found: list[dict[str, object]] = []
    if given.results.exists():
        found = [json.loads(line) for line in given.results.read_text().splitlines()]
    done = {(line["cache"], line["name"], line["seed"]) for line in found}
    for seed in range(given.seeds):
        missing = [name for name in given.only or names if name in names and (given.cache.name, name, seed) not in done]
        for line in _lines(missing, cache, with_overrides(config, {"seed": str(seed)}), sides):
            found.append({"cache": given.cache.name, "seed": seed, **line})
            with open(given.results, "a") as file:
                file.write(json.dumps(found[-1]) + "\n")
    print(f"\n{given.cache.name}, {len(sides[0].lower):,} training rows, K = {given.codes}, {given.precision}")
    lines = [line for line in found if line["cache"] == given.cache.name]
    why = {variant.name: variant.why for variant in VARIANTS}
    for first, key, title in (("default", "own", "own-code"), ("decoder: default", "decoder", "decoder")):
        own = [line for line in lines if key in line]
        if own:
            print(f"\n| variant | what is other | {title} FVU | less the default's, same seeds | seeds |")
            print("|---|---|---|---|---|")
        base = {line["seed"]: float(line[key]) for line in own if line["name"] == first}  # type: ignore[arg-type]
        for name in dict.fromkeys([*why, *DECODERS]):
            values = {line["seed"]: float(line[key]) for line in own if line["name"] == name}  # type: ignore[arg-type]
            less = [value - base[seed] for seed, value in values.items() if seed in base]
            if values:
                print(
                    f"| {name} | {why.get(name, '')} | {_interval(list(values.values()), '.4f')} "
                    f"| {'–' if name == first else _interval(less, '+.4f')} | {len(values)} |"
                )


def _lines(
    names: list[str], cache: Cache, config: TrainConfig, sides: tuple[Side, Side]
) -> Iterator[dict[str, object]]:
    """What each variant comes to, with the config's seed."""
    low, of_name = config.fit.precision == "bfloat16", {variant.name: variant for variant in VARIANTS}
    codes: tuple[Tensor, Tensor] | None = None
    for name in names:
        began = time.perf_counter()
        if name in of_name:
            own, used, _ = _run(of_name[name], *sides, config.quantizer.codes, config.seed, low=low)
            figures: dict[str, object] = {"own": own, "used": used}
        else:
            if codes is None:
                codes = _run(VARIANTS[0], *sides, config.quantizer.codes, config.seed, low=low)[2]
            judged = _judged(
                cache,
                with_overrides(config, DECODERS[name]),
                sides,
                *codes,
                decoder=True,
                positions=name != "decoder: no positions",
            )
            figures = {"decoder": judged["decoder"]}
        print(f"  seed {config.seed} {name}: {figures}", flush=True)
        yield {"name": name, **figures, "seconds": time.perf_counter() - began}


def _run(
    variant: Variant, train: Side, dev: Side, codes: int, seed: int, *, low: bool
) -> tuple[float, int, tuple[Tensor, Tensor]]:
    """Own-code FVU, codes used on the held-out rows, and each row's code on either side."""
    torch.manual_seed(seed)
    x, x_dev = _scaled(train.lower, dev.lower, per_channel=variant.per_channel)
    y_mean = train.upper.mean(dim=0)
    y_scale = (train.upper - y_mean).square().mean().sqrt()
    y, y_dev = (train.upper - y_mean) / y_scale, (dev.upper - y_mean) / y_scale
    network = ResidualPredictor(x.shape[1], y.shape[1], expansion=4, blocks=variant.blocks, dropout=variant.dropout)
    alone = variant.epochs // 2 if variant.joint else variant.epochs
    train_predictor(network, x, y, epochs=alone, batch=variant.batch, seed=seed, low=low)
    centroids = _start(variant, _encoded(network, x), codes, seed)
    if variant.joint:
        centroids = _train_jointly(network, centroids, x, y, variant, epochs=variant.epochs - alone, seed=seed, low=low)
    z, z_dev = _encoded(network, x), _encoded(network, x_dev)
    if variant.cosine:
        z, z_dev = F.normalize(z, dim=1), F.normalize(z_dev, dim=1)
    index, index_dev = assign(z, centroids), assign(z_dev, centroids)
    table = code_means(y, index, codes)
    return _fvu(y_dev, table[index_dev]), len(index_dev.unique()), (index, index_dev)


def _scaled(lower: Tensor, other: Tensor, *, per_channel: bool) -> tuple[Tensor, Tensor]:
    mean = lower.mean(dim=0)
    scale = lower.std(dim=0).clamp_min(1e-12) if per_channel else (lower - mean).square().mean().sqrt()
    return (lower - mean) / scale, (other - mean) / scale


@torch.no_grad()
def _encoded(network: nn.Module, rows: Tensor) -> Tensor:
    network.eval()
    return torch.cat([network(part) for part in rows.split(8192)])


def _start(variant: Variant, rows: Tensor, codes: int, seed: int) -> Tensor:
    if variant.start == "random":
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:codes]]
    if variant.cosine:
        rows = F.normalize(rows, dim=1)
    if variant.start == "seeds":
        return _seeds(rows, codes, seed)
    found = kmeans(blocks_of(rows.numpy(), device=CPU), codes=codes, iterations=100, seed=seed, device=CPU)
    return found.centroids


def _seeds(rows: Tensor, codes: int, seed: int) -> Tensor:
    from sklearn.cluster import kmeans_plusplus

    sample = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:20_000]]
    return torch.from_numpy(kmeans_plusplus(sample.numpy(), codes, random_state=seed)[0])


def _train_jointly(
    network: nn.Module,
    centroids: Tensor,
    x: Tensor,
    y: Tensor,
    variant: Variant,
    *,
    epochs: int,
    seed: int,
    low: bool,
) -> Tensor:
    """The predictor's loss goes on at weight 1; what is added is the variant."""
    network.eval()
    z = _encoded(network, x[:20_000])
    typical = float((z - centroids[assign(z, centroids)]).square().sum(dim=1).mean())
    codes, table = (nn.Parameter(centroids.clone()) for _ in range(2))
    count, total = torch.ones(len(codes)), centroids.clone()
    head = nn.Linear(y.shape[1], y.shape[1])
    nn.init.eye_(head.weight)
    nn.init.zeros_(head.bias)
    moved = [codes, table] if variant.joint in ("own", "entropy") else list(head.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": network.parameters()}, {"params": moved, "weight_decay": 0.0}],
        lr=5e-4,
        weight_decay=1e-2,
        fused=True,
    )
    network.train()
    drawn = steps(x, y, optimizer, epochs=epochs, batch=variant.batch, seed=seed + 1, rate=5e-4)
    for rows, target, over in drawn:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            encoded = network(rows)
        encoded = encoded.float()
        distances = codes.square().sum(dim=1) - 2 * encoded @ codes.T
        loss = F.mse_loss(encoded, target)
        if variant.joint in ("own", "entropy"):
            # From 0.3 of the typical squared distance down to 0.05 of it.
            chances = torch.softmax(-distances / (typical * 0.3 * (0.05 / 0.3) ** over), dim=1)
            errors = table.square().sum(dim=1) - 2 * target @ table.T + target.square().sum(dim=1, keepdim=True)
            loss = loss + (chances * errors).sum(dim=1).mean() / target.shape[1]
            if variant.joint == "entropy":
                use = chances.mean(dim=0)
                loss = loss + 0.02 * (use * (use + 1e-10).log()).sum()
        else:
            index = distances.argmin(dim=1)
            nearest = codes.detach()[index]
            passed = (
                _rotated(encoded, nearest) if variant.joint == "rotation" else encoded + (nearest - encoded).detach()
            )
            loss = loss + F.mse_loss(head(passed), target) + 0.1 * F.mse_loss(encoded, nearest)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if variant.joint in ("ema", "rotation"):
            with torch.no_grad():
                count.mul_(0.99).add_(torch.bincount(index, minlength=len(codes)), alpha=0.01)
                total.mul_(0.99).add_(torch.zeros_like(total).index_add_(0, index, encoded), alpha=0.01)
                codes.copy_(total / count.clamp_min(1e-5)[:, None])
    return codes.detach()


def _rotated(rows: Tensor, codes: Tensor) -> Tensor:
    """The codes; the gradient is rotated and scaled as the rows are on their way to them (arXiv 2410.06424, eq. 4)."""
    row_norm, code_norm = rows.norm(dim=1, keepdim=True), codes.norm(dim=1, keepdim=True)
    e, q = (rows / row_norm).detach(), (codes / code_norm).detach()
    r = F.normalize(e + q, dim=1)
    turned = rows - 2 * (rows * r).sum(dim=1, keepdim=True) * r + 2 * (rows * e).sum(dim=1, keepdim=True) * q
    return turned * (code_norm / row_norm).detach()


if __name__ == "__main__":
    main()
