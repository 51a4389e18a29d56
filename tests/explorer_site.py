"""Synthetic sites of the explorer: the data files that its pages read, with text that is up to no good."""

import json
from pathlib import Path
from typing import Any

import clvq
import numpy as np

from .study_maker import HOSTILE

ASSETS = Path(clvq.__file__).parent / "explorer" / "assets"
WORDS = ("film", "dull", "great", "plot", "actor", "boring", "funny", "scene", "bad", "love", "story", "music")
PER_TEXTS, PER_CONCEPTS = 10, 8


def data_file(folder: Path, name: str, content: object) -> None:
    """Write what the pages know as `name`: a script in which no sign is taken for markup."""
    text = json.dumps(content, allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    path = folder / "data" / f"{name}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"clvq.receive({json.dumps(name)}, {text});\n", encoding="ascii")


def read_data(folder: Path, name: str) -> Any:
    """What `data_file` has written."""
    text = (folder / "data" / f"{name}.js").read_text(encoding="ascii")
    return json.loads(text[text.index(",") + 1 : text.rindex(")")])


def make_site(
    folder: Path,
    *,
    runs: int = 3,
    codes: int = 30,
    texts: int = 25,
    hostile: bool = False,
    live: bool = False,
    labels: bool = True,
    effects: bool = True,
    predictions: bool = True,
    overlays: bool = True,
    gaps: bool = False,
    seed: int = 0,
) -> Path:
    """Write a site with the explorer's own pages.

    Parameters
    ----------
    runs
        The first two are of one site, each further one is of a higher one.
    hostile
        Names, words, sentences and texts are made of `HOSTILE`.
    labels, effects, predictions, overlays
        Whether the site has class names and labels, effects, predictions, saliency and rationales.
    gaps
        Single values are unknown: shares, intervals, a row's code, a sentence's text.

    Returns
    -------
    Path
        The folder.
    """
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for name in ASSETS.iterdir():
        (folder / name.name).symlink_to(name)
    words = HOSTILE if hostile else WORDS
    odd = HOSTILE[1] if hostile else ""
    classes = [f"negative{odd}", f"positive{odd}"] if labels else []
    described = [_run(number, codes, effects, odd) for number in range(runs)]
    site = {
        "title": f"Films{odd}",
        "made": {"clvq": "0.1.0", "cache": "c" * 64, "model": f"small{odd}", "lowers": ["hidden.2", "hidden.4"]},
        "classes": classes,
        "texts": {
            "count": texts,
            "per_shard": PER_TEXTS,
            "rationale": overlays,
            "saliency": overlays,
            "predictions": predictions,
        },
        "live": live,
        "flow": runs > 1,
        "runs": described,
    }
    data_file(folder, "site", site)
    for run in described:
        _concepts(folder, run["id"], codes, words, labels, effects, predictions, texts, generator)
    if texts:
        _texts(folder, described, codes, words, labels, predictions, overlays, texts, generator)
    if gaps:
        _forget(folder)
    if runs > 1:
        data_file(folder, "flow", [_flow(described, number, codes, generator) for number in range(runs - 1)])
    return folder


def _run(number: int, codes: int, effects: bool, odd: str) -> dict[str, Any]:
    return {
        "id": f"r{number}",
        "name": f"run {number}{odd}",
        "method": ("clvq-vae", "kmeans", "vq-vae")[number % 3],
        "lower": f"hidden.{2 if number < 2 else 2 * number}",
        "upper": "hidden.9",
        "seed": number,
        "codes": codes,
        "per_shard": PER_CONCEPTS,
        "effects": effects,
        "health": [
            ["Concepts in use", f"{codes} of {codes}", f"how many occur{odd}"],
            ["Perplexity", 17.25 + number, "as if so many were used equally"],
        ],
    }


def _concepts(
    folder: Path,
    run: str,
    codes: int,
    words: tuple[str, ...],
    labels: bool,
    effects: bool,
    predictions: bool,
    texts: int,
    generator: np.random.Generator,
) -> None:
    uses = generator.permutation(np.geomspace(5, 900, codes).astype(int)).tolist()
    purity = (0.5 + 0.5 * generator.random(codes)).round(3).tolist()
    effect = generator.normal(0.02, 0.05, codes).round(4).tolist()
    label = generator.integers(2, size=codes).tolist()
    place = generator.uniform(-1, 1, (2, codes)).round(3).tolist()
    named = [[words[(code + other) % len(words)] for other in range(5)] for code in range(codes)]
    empty: list[None] = [None] * codes
    data_file(
        folder,
        f"{run}/overview",
        {
            "code": list(range(codes)),
            "uses": uses,
            "x": place[0],
            "y": place[1],
            "purity": purity if labels else empty,
            "label": label if labels else empty,
            "words": named,
            "top_share": generator.random(codes).round(3).tolist(),
            "effect": effect if effects else empty,
            "effect_low": [round(one - 0.03, 4) for one in effect] if effects else empty,
            "effect_high": [round(one + 0.03, 4) for one in effect] if effects else empty,
            "flipped": [0.1] * codes if effects else empty,
            "effect_texts": [9] * codes if effects else empty,
        },
    )
    for first in range(0, codes, PER_CONCEPTS):
        shard = {}
        for code in range(first, min(codes, first + PER_CONCEPTS)):
            lost = effect[code]
            shard[str(code)] = {
                "words": [[words[(code + other) % len(words)], 40 - other] for other in range(len(words))],
                "sentences": [
                    {
                        "text": (code + one) % max(1, texts),
                        "row": 1,
                        "before": f"before {words[one % len(words)]} ",
                        "word": words[code % len(words)],
                        "after": f" after {kind} {one}",
                        "label": one % 2 if labels else None,
                        "prediction": (one // 2) % 2 if predictions and labels else None,
                        "kind": kind,
                    }
                    for kind in ("typical", "random")
                    for one in range(6)
                ]
                if texts
                else [],
                "labels": [0.3, 0.7] if labels else [],
                "predictions": [0.25, 0.75] if predictions and labels else [],
                "nearest": [[(code + step) % codes, round(0.9 - step / 10, 2)] for step in range(1, 6)],
                "upper_nearest": [[(code + step) % codes, round(0.8 - step / 10, 2)] for step in range(2, 6)],
                "upper_labels": [0.4, -0.4] if labels else [],
                "upper_norm": 0.62,
                "effect": {
                    "texts": 9,
                    "lost": [lost, round(lost - 0.03, 4), round(lost + 0.03, 4)],
                    "flipped": 0.1,
                    "by_class": [-lost, lost] if labels else None,
                    "removal": "centred",
                }
                if effects
                else None,
            }
        data_file(folder, f"{run}/concepts/{first // PER_CONCEPTS:02}", shard)


def _texts(
    folder: Path,
    runs: list[dict[str, Any]],
    codes: int,
    words: tuple[str, ...],
    labels: bool,
    predictions: bool,
    overlays: bool,
    texts: int,
    generator: np.random.Generator,
) -> None:
    made = []
    for number in range(texts):
        # The sign before the words takes two units of UTF-16: places count signs.
        text, rows = "\U0001f3ac ", [[0, 0, True]]
        for one in range(8):
            word = words[(number + one) % len(words)]
            rows.append([len(text), len(text) + len(word), False])
            text += f"{word} "
        predicted = predictions and labels
        made.append(
            {
                "n": number,
                "split": ("dev", "train")[number % 2],
                "text": text,
                "label": number % 2 if labels else None,
                "prediction": (number // 2) % 2 if predicted else None,
                "probabilities": [0.2, 0.8][:: 1 if (number // 2) % 2 else -1] if predicted else None,
                "rows": rows,
                "codes": {
                    run["id"]: [(number + one + place) % codes for one in range(len(rows))]
                    for place, run in enumerate(runs)
                },
                "saliency": generator.normal(size=len(rows)).round(3).tolist() if overlays else None,
                "rationale": [rows[2][:2], [rows[4][0], rows[5][1]]] if overlays else None,
            }
        )
    for first in range(0, texts, PER_TEXTS):
        data_file(folder, f"texts/{first // PER_TEXTS:03}", made[first : first + PER_TEXTS])
    data_file(
        folder,
        "texts/list",
        {
            "first": [one["text"][:80] for one in made],
            "label": [one["label"] for one in made],
            "prediction": [one["prediction"] for one in made],
            "split": [number % 2 for number in range(texts)],
            "splits": ["dev", "train"],
        },
    )


def _forget(folder: Path) -> None:
    overview = read_data(folder, "r0/overview")
    for name in ("purity", "label", "top_share", "effect", "effect_low", "effect_high", "flipped", "effect_texts"):
        overview[name][::2] = [None] * len(overview[name][::2])
    data_file(folder, "r0/overview", overview)
    concepts = read_data(folder, "r0/concepts/00")
    for concept in concepts.values():
        concept.update(labels=[None, None], predictions=[None, 1], upper_labels=[None, 0.2], upper_norm=None)
        concept["effect"].update(lost=[0.0123, None, None], flipped=None, by_class=[None, 0.1])
        for sentence in concept["sentences"][::2]:
            sentence.update(text=None, label=None, prediction=None)
    data_file(folder, "r0/concepts/00", concepts)
    texts = read_data(folder, "texts/000")
    for text in texts:
        text["codes"]["r0"][::3] = [None] * len(text["codes"]["r0"][::3])
        text["saliency"][::2] = [None] * len(text["saliency"][::2])
    data_file(folder, "texts/000", texts)


def _flow(runs: list[dict[str, Any]], number: int, codes: int, generator: np.random.Generator) -> dict[str, Any]:
    lower, upper = runs[number], runs[number + 1]
    rows = generator.integers(1, 400, 3 * codes)
    pairs = {(one % codes, int(generator.integers(codes))): int(count) for one, count in enumerate(rows)}
    # In no order that a page could rely on.
    links = [[a, b, count] for (a, b), count in pairs.items()]
    return {
        "lower": lower["id"],
        "upper": upper["id"],
        "same_site": lower["lower"] == upper["lower"],
        "links": links[:200],
        "rows": 2 * int(rows.sum()),
        "nmi": 0.43,
    }
