"""Options that several commands share, and how their text becomes settings."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import ConfigError

if TYPE_CHECKING:
    import torch

    from .evaluation.study.items import Key
    from .pipeline.language_model import LanguageModel
    from .pipeline.source import ModelSource

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Force = Annotated[bool, typer.Option("--force", help="Delete what --out holds from other settings.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Seed = Annotated[int, typer.Option(help="Seed of everything drawn at random.")]


def names(text: str) -> list[str]:
    """The parts of a comma-separated option."""
    return [name.strip() for name in text.split(",") if name.strip()]


def named(runs: list[Path]) -> dict[str, Path]:
    """Runs by the names of their folders; by their paths where two have the same name."""
    called = [path.resolve().name for path in runs]
    return {name if called.count(name) == 1 else str(path): path for name, path in zip(called, runs, strict=True)}


def settings_of(model: Any, **values: Any) -> Any:
    """A settings object; a wrong value becomes a `ConfigError` that names the option."""
    from pydantic import ValidationError

    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        option = {"read_outs": "read-out", "removals": "removal"}.get(name, name.replace("_", "-"))
        given = first["input"] or "''"
        raise ConfigError(f"--{option} {given}: {first['msg'][0].lower()}{first['msg'][1:]}") from error


def settings_file(path: Path | None) -> dict[str, str]:
    """A JSON file of nested settings as `a.b` → JSON text."""
    if path is None:
        return {}
    try:
        plain = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(plain, dict):
        raise ConfigError(f"{path} is not a JSON object of settings")

    def flat(value: dict[str, Any], name: str = "") -> Iterator[tuple[str, str]]:
        for key, inner in value.items():
            if isinstance(inner, dict):
                yield from flat(inner, f"{name}{key}.")
            else:
                yield f"{name}{key}", json.dumps(inner)

    return dict(flat(plain))


def assignments(settings: list[str]) -> dict[str, str]:
    """`--set` options by name."""
    for setting in settings:
        if "=" not in setting:
            raise ConfigError(f"--set {setting}: write it as name=value, such as fit.epochs=20")
    return dict(setting.split("=", 1) for setting in settings)


def device_of(name: str) -> "torch.device":
    """The device that `--device` names."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: give auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here; try --device cpu")
    return device


def set_threads(count: int) -> None:
    """The threads of torch that `--threads` gives."""
    import torch

    torch.set_num_threads(count)


def model_of(made_with: dict[str, Any], given: str | None, *, what: str) -> "ModelSource":
    """The model that a cache was made with, from the folder given or from the Hub, its weights compared."""
    from .pipeline.source import find_model

    if given is None and made_with["commit"] is None:
        raise ConfigError(
            f"{what} was made with the local model {made_with['name']!r}; say where it is with --model FOLDER"
        )
    source = find_model(given or made_with["name"], revision=None if given else made_with["commit"])
    source.require_identity(made_with)
    return source


def model_loader(
    identity: dict[str, Any], given: str | None, *, what: str, device: "torch.device"
) -> Callable[[], "LanguageModel"]:
    """Loads the model that a cache of this identity was made with, once it is needed; see `model_of`."""

    def load() -> "LanguageModel":
        return load_model(model_of(identity["model"], given, what=what), identity["settings"], device=device)

    return load


def load_model(source: "ModelSource", settings: dict[str, Any], *, device: "torch.device") -> "LanguageModel":
    """The model itself, with the head that a cache was made with; `settings` are those in the cache's identity."""
    from pydantic import ValidationError

    from .pipeline.config import ExtractConfig
    from .pipeline.forward import load_model as load

    try:
        config = ExtractConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"the cache was made with settings that this clvq does not know: {error}") from error
    return load(source, config, device=device)


def key_of_items(items: Path, given: Path | None) -> "Key | None":
    """The key of an item file: the one given, else the one beside it, else none.

    Raises
    ------
    DataNotFound, DataError, FormatVersion
    """
    from .evaluation.study.items import key_path, read_items, read_key

    place = given or key_path(items)
    if given is None and not place.is_file():
        return None
    return read_key(place, read_items(items)[1])
