"""How much of planted concepts each method recovers: k-means in five spaces, the published method, and clvq's default.

The data are those of `clvq.evaluation.planted`, one scenario for each difficulty alone and one for all together. Every
method is fitted on `train`; all figures are of `dev`. The figures are means over seeds of the method, with the 95 %
interval of the mean by Student's t: the data of a scenario are the same for all seeds.

* k-means: scikit-learn's, with `--restarts` starts, 1 by default. `spherical` clusters unit vectors of centred rows.
  `linear` and `MLP` cluster what a linear map (least squares) or an MLP (one hidden layer beside a linear map, on
  standardised channels) says of the upper row from the lower row alone. `upper` is told the upper row itself, which no
  other method is.
* `clvq paper` has `--paper-epochs` epochs instead of 50 and a decoder of two layers of 256 units instead of six of
  2,048; `clvq default` has `--default-epochs` epochs for its decoder; `longer` also has
  `--encoder-epochs` epochs for its encoder instead of 8. All start from clvq's own k-means.
* The other `clvq …` are the rivals of `clvq train --method`, with as many latents as codes for the sparse ones, four of
  them active on a row, and 40 epochs.
* `truth` is told the concept. The ceilings are told all that was added to each row but noise, with or without the row
  before it: see `Planted.ceiling`.

FVU is the share of the upper rows' variance that is left when each is predicted by the mean upper row, over `train`,
of its code.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clvq.evaluation.agreement import assignment_stability, direction_stability, matched_f1, recovery
from clvq.evaluation.compare import over_seeds
from clvq.evaluation.planted import LOWER, UPPER, Planted, PlantedConfig, plant
from clvq.trainer.config import with_overrides
from clvq.trainer.fit import fit
from clvq.trainer.methods import method_config
from clvq.trainer.run import Run
from common import code_means, header
from sklearn.cluster import KMeans

SIDES = ("train", "dev")
# Of at least 50 concepts.
SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "duplicated": {"duplicated": 25, "synonyms": 3},
    "crossed": {"crossed": 8, "crossing": 4},
    "superposed": {"superposed": 2, "superposition": 0.6},
    "nuisance": {"nuisance_types": 12, "nuisance": 2.0, "positional": 1.0, "upper_nuisance": 0.2},
    "outliers": {"outlier_channels": 3, "outlier_scale": 100.0},
    "outliers at both sites": {"outlier_channels": 3, "outlier_scale": 100.0, "upper_outliers": 0.1},
    "row pairs": {"row_pairs": 15},
    "neighbour pairs": {"neighbour_pairs": 15},
}
SCENARIOS["all together"] = {
    **SCENARIOS["nuisance"],
    **SCENARIOS["outliers"],
    "duplicated": 8,
    "crossed": 2,
    "superposed": 1,
    "superposition": 0.4,
    "row_pairs": 5,
    "neighbour_pairs": 4,
}
LONGER = "clvq default, longer"
# Four latents on a row: of only as many as there are concepts, the usual 32 would be most.
RIVALS = {
    "kmeans": {},
    "agglomerative": {},
    "vq-vae": {},
    "sae": {"encoder.k": "4", "encoder.epochs": "40"},
    "cross-sae": {"encoder.k": "4", "encoder.epochs": "40"},
    "pca": {},
}
FIGURES = ("v_measure", "matched_f1", "ami", "fvu")
TITLES = ("", "V-measure", "matched F1", "AMI", "own-code FVU", "AMI of seeds", "s/seed")
WIDTHS = (33, 24, 24, 24, 24, 24, 6)

Sides = dict[str, np.ndarray]


@dataclass
class Data:
    """A scenario's vectors in memory, and what methods share."""

    planted: Planted
    folder: Path
    options: argparse.Namespace
    predicted: dict[int, Sides] = field(default_factory=dict)
    """By the MLP, for each seed."""

    def __post_init__(self) -> None:
        self.rows = {side: self.planted.rows(side) for side in SIDES}
        self.truth = {side: self.planted.concept[rows] for side, rows in self.rows.items()}
        self.lower, self.upper = (
            {side: self.planted.cache.vectors(site, rows) for side, rows in self.rows.items()}
            for site in (LOWER, UPPER)
        )
        mean = self.lower["train"].mean(axis=0, dtype=np.float64)
        scale = self.lower["train"].std(axis=0, dtype=np.float64)
        self.centred = {side: (rows - mean).astype(np.float32) for side, rows in self.lower.items()}
        self.standard = {side: ((rows - mean) / scale).astype(np.float32) for side, rows in self.lower.items()}
        self.upper_mean = self.upper["train"].mean(axis=0, dtype=np.float64)


def clustered(data: Data, space: Sides, *, codes: int, seed: int) -> Sides:
    """k-means on one side, codes of both."""
    means = KMeans(codes, n_init=data.options.restarts, random_state=seed).fit(space["train"])
    return {side: means.predict(space[side]).astype(np.int64) for side in SIDES}


def on_sphere(data: Data, *, codes: int, seed: int) -> Sides:
    """k-means of unit vectors, codes by the largest cosine with a centroid."""
    units = {side: rows / np.linalg.norm(rows, axis=1, keepdims=True) for side, rows in data.centred.items()}
    centres = KMeans(codes, n_init=data.options.restarts, random_state=seed).fit(units["train"]).cluster_centers_
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    return {side: (rows @ centres.T).argmax(axis=1) for side, rows in units.items()}


def linear(data: Data) -> Sides:
    """Upper rows by least squares from standardised lower rows."""
    target = data.upper["train"] - data.upper_mean
    weights = np.linalg.lstsq(data.standard["train"].astype(np.float64), target, rcond=None)[0]
    return {side: (data.standard[side] @ weights).astype(np.float32) for side in SIDES}


def by_mlp(data: Data, seed: int) -> Sides:
    """Upper rows by a linear map and an MLP; the epoch with the best loss on a tenth of the training rows."""
    if seed not in data.predicted:
        torch.manual_seed(seed)
        x = torch.from_numpy(data.standard["train"])
        y = data.upper["train"] - data.upper_mean
        y = torch.from_numpy((y / y.std()).astype(np.float32))
        network = PerRow(x.shape[1], y.shape[1])
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2)
        order = torch.randperm(len(x))
        aside, mine = order[: len(x) // 10], order[len(x) // 10 :]
        best, kept = np.inf, network.state_dict()
        for _ in range(data.options.mlp_epochs):
            for batch in mine[torch.randperm(len(mine))].split(256):
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(network(x[batch]), y[batch]).backward()
                optimizer.step()
            with torch.no_grad():
                loss = float(torch.nn.functional.mse_loss(network(x[aside]), y[aside]))
            if loss < best:
                best, kept = loss, {name: tensor.clone() for name, tensor in network.state_dict().items()}
        network.load_state_dict(kept)
        with torch.no_grad():
            data.predicted[seed] = {
                side: network(torch.from_numpy(rows)).numpy() for side, rows in data.standard.items()
            }
    return data.predicted[seed]


class PerRow(torch.nn.Module):
    """A linear map plus an MLP."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, out)
        self.inner = torch.nn.Sequential(
            torch.nn.Linear(width, 8 * width), torch.nn.GELU(), torch.nn.Linear(8 * width, out)
        )

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Predictions."""
        return self.linear(rows) + self.inner(rows)


def ours(data: Data, preset: str, changes: dict[str, str], *, codes: int, seed: int, method: str = "clvq-vae") -> Sides:
    """A run of clvq."""
    config = method_config(method, preset=preset, lower=LOWER, upper=UPPER, codes=codes, held_out="dev", seed=seed)
    out = data.folder / f"{method}-{preset}-{'-'.join(changes.values())}-{codes}-{seed}"
    fit(data.planted.cache, with_overrides(config, changes), out, device=torch.device("cpu"))
    run = Run.from_pretrained(out)
    return {side: run.assign(rows) for side, rows in data.lower.items()}


def rival(data: Data, method: str, changes: dict[str, str]) -> Callable[..., Sides]:
    """Another method of clvq, with its settings as they are."""
    return lambda codes, seed: ours(data, "default", changes, codes=codes, seed=seed, method=method)


def methods(data: Data) -> dict[str, Callable[..., Sides]]:
    """What is compared; each takes `codes` and `seed`."""
    options, straight = data.options, linear(data)
    paper = {"fit.epochs": str(options.paper_epochs), "decoder.layers": "2", "decoder.hidden": "256"}
    default = {"fit.epochs": str(options.default_epochs)}
    longer = {**default, "encoder.epochs": str(options.encoder_epochs)}
    found: dict[str, Callable[..., Sides]] = {
        "k-means, lower": lambda codes, seed: clustered(data, data.centred, codes=codes, seed=seed),
        "k-means, lower, spherical": lambda codes, seed: on_sphere(data, codes=codes, seed=seed),
        "k-means, linear": lambda codes, seed: clustered(data, straight, codes=codes, seed=seed),
        "k-means, MLP": lambda codes, seed: clustered(data, by_mlp(data, seed), codes=codes, seed=seed),
        "k-means, upper": lambda codes, seed: clustered(data, data.upper, codes=codes, seed=seed),
        "clvq paper": lambda codes, seed: ours(data, "paper", paper, codes=codes, seed=seed),
        "clvq default": lambda codes, seed: ours(data, "default", default, codes=codes, seed=seed),
        LONGER: lambda codes, seed: ours(data, "default", longer, codes=codes, seed=seed),
        **{f"clvq {method}": rival(data, method, changes) for method, changes in RIVALS.items()},
    }
    return {name: method for name, method in found.items() if not options.methods or name in options.methods}


def table(rows: np.ndarray, index: np.ndarray, codes: int) -> np.ndarray:
    """`code_means` of arrays."""
    return code_means(torch.from_numpy(rows), torch.from_numpy(index), codes).numpy()


def figures(data: Data, found: Sides, codes: int) -> dict[str, float]:
    """Recovery and own-code FVU on `dev`; F1 also by kind of concept."""
    truth, upper = data.truth["dev"], data.upper["dev"]
    left = upper - table(data.upper["train"], found["train"], codes)[found["dev"]]
    f1 = dict(zip(np.unique(truth).tolist(), matched_f1(truth, found["dev"]).tolist(), strict=True))
    kinds = {data.planted.kinds[concept] for concept in f1}
    by_kind = {kind: np.mean([f1[concept] for concept in f1 if data.planted.kinds[concept] == kind]) for kind in kinds}
    return {
        **vars(recovery(truth, found["dev"])),
        "fvu": float(np.square(left).sum() / np.square(upper - upper.mean(axis=0, dtype=np.float64)).sum()),
        **{f"f1 {kind}": float(value) for kind, value in sorted(by_kind.items())},
    }


def compared(data: Data, scenario: str, codes: int) -> list[dict[str, Any]]:
    """A line for each method."""
    lines = []
    for name, method in methods(data).items():
        began, found, directions = time.perf_counter(), [], []
        for seed in range(data.options.seeds):
            found.append(method(codes=codes, seed=seed))
            mean = data.centred["train"].mean(axis=0)
            directions.append(table(data.centred["train"], found[-1]["train"], codes) - mean)
        line = {
            "scenario": scenario,
            "codes": codes,
            "method": name,
            "seconds": (time.perf_counter() - began) / len(found),
            "seeds": [figures(data, each, codes) for each in found],
        }
        if len(found) > 1:
            line["assignment_stability"] = vars(assignment_stability([each["dev"] for each in found]))
            line["direction_stability"] = vars(direction_stability(directions))
        lines.append(line)
        show(line)
    return lines


def bounds(data: Data, scenario: str) -> list[dict[str, Any]]:
    """What can be reached at all."""
    planted, rows = data.planted, data.rows["dev"]
    found: dict[str, dict[str, float]] = {
        "truth": figures(data, data.truth, planted.config.concepts),
        "ceiling, row alone": vars(planted.ceiling(rows, neighbours=False)),
        "ceiling, row and the one before": vars(planted.ceiling(rows, neighbours=True)),
    }
    lines = [{"scenario": scenario, "method": name, "seeds": [values]} for name, values in found.items()]
    for line in lines:
        show(line)
    return lines


def interval(values: list[float]) -> str:
    """Mean and 95 % interval of the mean."""
    found = over_seeds(np.array(values))
    return f"{found.mean:5.3f}" + ("" if found.low is None else f" [{found.low:5.3f}, {found.high:5.3f}]")


def show(line: dict[str, Any]) -> None:
    """One line of the table."""
    first, stable = line["seeds"][0], line.get("assignment_stability")
    cells = [line["method"]]
    cells += [interval([seed[name] for seed in line["seeds"]]) if name in first else "–" for name in FIGURES]
    cells.append(f"{stable['mean']:5.3f} ({stable['low']:5.3f}–{stable['high']:5.3f})" if stable else "–")
    cells.append(f"{line['seconds']:.1f}" if "seconds" in line else "–")
    print("  " + "".join(f"{cell:<{width}}" for cell, width in zip(cells, WIDTHS, strict=True)).rstrip(), flush=True)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two seeds, 300 texts, two scenarios, few epochs")
    parser.add_argument("--scenario", action="append", choices=SCENARIOS, help="may be given several times")
    parser.add_argument("--texts", type=int, default=1_200)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--data-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--times", type=int, action="append", help="codes per concept; 1 and, for `all together`, 2")
    parser.add_argument("--restarts", type=int, default=1, help="starts of each k-means")
    parser.add_argument("--mlp-epochs", type=int, default=15)
    parser.add_argument("--paper-epochs", type=int, default=5)
    parser.add_argument("--default-epochs", type=int, default=5)
    parser.add_argument("--encoder-epochs", type=int, default=40, help=f"of {LONGER}")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--json", type=Path, help="where to save all figures of all seeds")
    options = parser.parse_args()
    if options.quick:
        options.texts, options.seeds, options.scenario = 300, 2, options.scenario or ["plain", "all together"]
        options.mlp_epochs = options.paper_epochs = options.default_epochs = options.encoder_epochs = 2
    return options


def main() -> None:
    options = parsed()
    print(header("torch", "scikit-learn", "clvq"))
    lines = []
    for scenario in options.scenario or SCENARIOS:
        config = PlantedConfig(
            texts=options.texts,
            width=options.width,
            upper_width=options.width,
            seed=options.data_seed,
            **SCENARIOS[scenario],
        )
        with tempfile.TemporaryDirectory() as folder:
            data = Data(plant(config, Path(folder) / "cache"), Path(folder), options)
            counts = " and ".join(f"{len(data.rows[side]):,} rows of {side}" for side in SIDES)
            print(f"\n{scenario}: {counts}; {SCENARIOS[scenario] or 'no difficulty'}")
            print("  " + "".join(f"{title:<{width}}" for title, width in zip(TITLES, WIDTHS, strict=True)))
            lines += bounds(data, scenario)
            for times in options.times or ((1, 2) if scenario == "all together" else (1,)):
                print(f"  {times * config.concepts} codes")
                lines += compared(data, scenario, times * config.concepts)
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        saved = {"header": header("torch", "scikit-learn", "clvq"), "settings": settings, "lines": lines}
        options.json.write_text(json.dumps(saved, indent=1))


if __name__ == "__main__":
    main()
