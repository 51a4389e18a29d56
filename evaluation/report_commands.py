"""The commands that make results again, from the settings that stand beside them."""

import json
import math
import shlex
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from ..errors import ConfigError
from ..trainer.config import TrainConfig, with_overrides
from ..trainer.methods import PlainConfig, TrainedConfig, method_config
from .report_document import shown
from .report_files import Node


class Variable(str):
    """A word that the shell is to replace."""


CACHE, MODEL = Variable("$CACHE"), Variable("$MODEL")


def joined(words: Sequence[str]) -> str:
    """Words as a shell reads them."""
    return " ".join(word if isinstance(word, Variable) else shlex.quote(word) for word in words)


def folder_word(name: str) -> str:
    """A folder as an argument that no program takes for an option."""
    return f"./{name}" if name.startswith("-") else name


def train_words(config: TrainedConfig | PlainConfig, *, leave: Collection[str] = ()) -> list[str] | None:
    """The `clvq train` that has these settings, without `--seed` and `--out`; `None` where no command has them.

    Parameters
    ----------
    leave
        Settings that another option is to give; `codes` is the number of concepts in any method.
    """
    preset = config.preset if isinstance(config, TrainConfig) else "default"
    has_codes = config.method != "mean-difference"
    try:
        base: TrainedConfig | PlainConfig = method_config(
            config.method,
            preset=preset,
            lower=config.lower,
            upper=config.upper,
            codes=config.concepts if has_codes else None,
            classes=config.concepts,
            split=config.split,
            held_out=config.held_out,
            seed=config.seed,
        )
        settings = {
            name: json.dumps(value)
            for name, value in _flat(config.model_dump(mode="json"))
            if dict(_flat(base.model_dump(mode="json"))).get(name) != value
        }
        if with_overrides(base, settings) != config:
            return None
    except ConfigError:
        return None
    left = {config.full_name(name) for name in leave}
    words: list[str] = ["clvq", "train", CACHE, "--lower", config.lower, "--upper", config.upper]
    words += ["--method", config.method]
    words += ["--preset", preset] if isinstance(config, TrainConfig) else []
    words += ["--codes", str(config.concepts)] if has_codes and config.full_name("codes") not in left else []
    words += ["--split", ",".join(config.split)]
    words += [] if config.held_out is None else ["--held-out", config.held_out]
    for name, value in settings.items():
        words += [] if name in left else ["--set", f"{name}={value}"]
    return words


def _flat(value: dict[str, Any], name: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{name}{key}.")
        else:
            yield f"{name}{key}", inner


def ablate_words(config: Node, runs: Sequence[str], out: str, *, local_model: bool) -> list[str]:
    """The `clvq ablate` of the settings in an `ablation.json`."""
    words: list[str] = ["clvq", "ablate", CACHE, *map(folder_word, runs), "--out", folder_word(out)]
    words += ["--model", MODEL] if local_model else []
    words += _options(config, {"read_outs": "--read-out", "removals": "--removal"}, flags={"concepts"})
    return words


def quality_words(config: Node, runs: Sequence[str], out: str, *, tagged: bool) -> list[str]:
    """The `clvq quality` of the settings in a `quality.json`."""
    words: list[str] = ["clvq", "quality", CACHE, *map(folder_word, runs), "--out", folder_word(out)]
    return [*words, *_options(config, {}, flags=set()), "--pos" if tagged else "--no-pos"]


def _options(config: Node, names: dict[str, str], *, flags: Collection[str]) -> Iterator[str]:
    for name, node in config.members().items():
        option, value = names.get(name, f"--{name.replace('_', '-')}"), node.value
        # Without them the splits are those that the runs held out.
        if value is None or value is False or (name == "split" and not value):
            continue
        yield option
        if name not in flags:
            yield ",".join(map(_word, value)) if isinstance(value, list) else _word(value)


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings_of(config: Node) -> tuple[tuple[str, str], ...]:
    """Settings by name, as JSON; of nested ones the names are joined by dots."""
    flat = _flat({name: node.value for name, node in config.members().items()})
    return tuple((shown(name), shown(json.dumps(value, ensure_ascii=False))) for name, value in flat)


def sweep_words(
    configs: Sequence[TrainedConfig | PlainConfig], rows: Sequence[dict[str, Any]], out: str, *, members: int
) -> list[str] | None:
    """The `clvq train --sweep`; `None` where its runs do not tell it.

    Parameters
    ----------
    configs
        Of those of its runs that are there.
    rows
        What is swept, for each combination.
    members
        How many runs it has, failed ones included.
    """
    if not configs or not rows or members % len(rows):
        return None
    values = {name: list(dict.fromkeys(json.dumps(row.get(name)) for row in rows)) for name in rows[0]}
    base = train_words(configs[0], leave=tuple(values))
    if base is None or math.prod(map(len, values.values())) != len(rows):
        return None
    words = list(base)
    for name, given in values.items():
        words += ["--sweep", f"{name}={','.join(given)}"]
    seed = min(config.seed for config in configs)
    return [*words, "--seed", str(seed), "--seeds", str(members // len(rows)), "--out", folder_word(out)]
