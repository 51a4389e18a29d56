"""Sparse autoencoders in the files of sae-lens (Bloom et al., version 6): `cfg.json` and `sae_weights.safetensors`."""

import hashlib
import json
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from jaxtyping import Float64
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from ..cache.files import make_folder, sha256_of, write_file
from ..cache.layout import to_json
from ..cache.reader import Cache
from ..errors import ConfigError, DataError, DataNotFound
from ..progress import Progress
from .checkpoint import packed
from .concepts import on_device
from .config import MethodConfig
from .data import Texts, blocks
from .methods import SaeConfig
from .run import Run
from .sae import SparseAutoencoder, SparseWeights

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

_LARGEST_CFG = 1 << 20
# What a safetensors file may hold besides its tensors.
_LARGEST_HEADER = 1 << 20
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_SINGLE = ("standard", "topk", "jumprelu", "batchtopk")
_CROSSING = ("transcoder", "jumprelu_transcoder")
_NORMALIZATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")
# The first version whose cfg.json looks like this; older ones are filled up by sae-lens.
_VERSION = "6.0.0"
# Latents that are listed of a row where the file does not say how many are active.
_LISTED = 32

_log = logging.getLogger(__name__)


class _Cfg(BaseModel):
    """What counts of `cfg.json`, that of version 5 included."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    architecture: str = "standard"
    d_in: int = Field(ge=1)
    d_sae: int = Field(ge=2)
    d_out: int | None = Field(default=None, ge=1)
    k: float | None = Field(default=None, ge=1)
    apply_b_dec_to_input: bool = True
    normalize_activations: str | bool | None = None
    rescale_acts_by_decoder_norm: bool | None = None
    reshape_activations: str | None = None
    activation_fn: str | None = None
    activation_fn_str: str | None = None
    activation_fn_kwargs: dict[str, JsonValue] = {}
    finetuning_scaling_factor: bool = False
    hook_name: str | None = None
    metadata: dict[str, JsonValue] = {}


@dataclass(frozen=True)
class ForeignSae:
    """An autoencoder from a folder of sae-lens."""

    path: Path
    sha256: str
    """Of both files' SHA-256, one after the other."""
    method: Literal["sae", "cross-sae"]
    activation: Literal["topk", "relu", "jumprelu"]
    normalization: Literal["site", "constant_norm_rescale", "layer_norm"]
    by_mean_norm: bool
    """Whether rows are to be scaled so that their mean norm is √d, which has not been folded into the weights."""
    latents: int
    k: int
    hook_name: str | None
    weights: SparseWeights

    def settings(self, config: SaeConfig) -> SaeConfig:
        """The settings with what the file decides."""
        own = {"activation": self.activation, "normalization": self.normalization, "latents": self.latents, "k": self.k}
        return config.model_copy(
            update={"source": self.sha256, "encoder": config.encoder.model_copy(update=own)},
        )

    def check(self, config: SaeConfig) -> None:
        """Make sure that the settings are those of `settings`.

        Raises
        ------
        ConfigError
        """
        if config.method != self.method:
            raise ConfigError(f"{self.path} is of --method {self.method}, and {config.method} is asked for")
        if self.settings(config) != config:
            raise ConfigError(
                f"{self.path} decides source, encoder.activation, encoder.normalization, encoder.latents and "
                "encoder.k: do not set them"
            )

    def fill(
        self, model: SparseAutoencoder, cache: Cache, config: SaeConfig, texts: Texts, *, progress: Progress
    ) -> None:
        """Put the weights into a model that `place` has been called of.

        Raises
        ------
        Interrupted
        """
        self._compare_site(config.lower)
        weights = self.weights
        if self.by_mean_norm:
            scale = _mean_norm(cache, config, texts, progress=progress) / cache.width(config.lower) ** 0.5
            # Rows are divided by the scale and multiplied by it in the end: the activations may grow by it instead.
            weights = replace(
                weights,
                encoder_bias=weights.encoder_bias * scale,
                decoder_bias=weights.decoder_bias * scale,
                threshold=weights.threshold * scale,
            )
        model.adopt(weights)

    def _compare_site(self, lower: str) -> None:
        found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", self.hook_name or "")
        if found is None:
            return
        site = f"hidden.{int(found[1]) + (found[2] == 'post')}"
        if site != lower:
            _log.warning("%s was trained at %s, which is %s, and is used at %s", self.path, self.hook_name, site, lower)


def read(folder: Path, *, d_lower: int, d_upper: int) -> ForeignSae:
    """The autoencoder in a folder of sae-lens; of the weights nothing is read before their sizes are known.

    Parameters
    ----------
    d_lower, d_upper
        Widths of the sites that it is to be used at.

    Raises
    ------
    DataNotFound
        Where a file is missing.
    DataError
        Where the files are damaged, too large, or of a kind that clvq does not know.
    ConfigError
        Where the widths are not those of the sites.
    """
    cfg = _read_cfg(folder / CFG)
    architecture = _architecture(cfg, folder)
    normalization = _normalization(cfg, folder)
    crosses = architecture in _CROSSING
    d_target = (cfg.d_out or cfg.d_in) if crosses else cfg.d_in
    for name, width, wanted in (("d_in", cfg.d_in, d_lower), ("d_out", d_target, d_upper if crosses else d_lower)):
        if width != wanted:
            raise ConfigError(
                f"{folder} has {name} = {width}, and the site has {wanted} channels: "
                "use the site that the autoencoder was trained at"
            )
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (cfg.d_in, cfg.d_sae),
        "b_enc": (cfg.d_sae,),
        "W_dec": (cfg.d_sae, d_target),
        "b_dec": (d_target,),
    }
    if architecture.startswith("jumprelu"):
        shapes["threshold"] = (cfg.d_sae,)
    elif architecture == "batchtopk":
        shapes["topk_threshold"] = ()
    tensors = _read_tensors(folder / WEIGHTS, shapes)
    k = cfg.k if cfg.k is not None else cfg.activation_fn_kwargs.get("k")
    trained_with = cfg.metadata.get("training_architecture_details")
    if architecture == "topk" and not (isinstance(k, int | float) and 1 <= k <= cfg.d_sae):
        raise DataError(f"{folder / CFG} has k = {k!r}, and a topk autoencoder has 1 to {cfg.d_sae} active latents")
    hook_name = cfg.metadata.get("hook_name", cfg.hook_name)
    return ForeignSae(
        path=folder,
        sha256=hashlib.sha256("".join(sha256_of(folder / name) for name in (CFG, WEIGHTS)).encode()).hexdigest(),
        method="cross-sae" if crosses else "sae",
        activation="topk" if architecture == "topk" else "jumprelu" if len(shapes) > 4 else "relu",
        normalization="site" if normalization in ("none", "expected_average_only_in") else normalization,
        by_mean_norm=normalization == "expected_average_only_in",
        latents=cfg.d_sae,
        k=_listed(k, trained_with.get("k") if isinstance(trained_with, dict) else None, cfg.d_sae),
        hook_name=hook_name if isinstance(hook_name, str) else None,
        weights=_raw(cfg, architecture, tensors),
    )


def _listed(k: object, trained_with: object, latents: int) -> int:
    """How many latents of a row are listed."""
    for found in (k, trained_with):
        if isinstance(found, int | float) and 1 <= found <= latents:
            return int(found)
    return min(_LISTED, latents)


def _read_cfg(file: Path) -> _Cfg:
    if not file.is_file():
        raise DataNotFound(f"{file.parent} is not an autoencoder of sae-lens: it has no {CFG}; give the folder with it")
    if file.stat().st_size > _LARGEST_CFG:
        raise DataError(f"{file} has {file.stat().st_size:,} bytes, more than the {_LARGEST_CFG:,} that are read")
    try:
        return _Cfg.model_validate(json.loads(file.read_bytes()))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise DataError(f"{file} is not a cfg.json of sae-lens, at {where!r}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}") from error


def _architecture(cfg: _Cfg, folder: Path) -> str:
    architecture = cfg.architecture
    activation = cfg.activation_fn or cfg.activation_fn_str or "relu"
    if architecture == "standard" and activation == "topk":
        architecture = activation
    if architecture not in (*_SINGLE, *_CROSSING):
        raise DataError(
            f"{folder} has the architecture {cfg.architecture!r}: clvq reads {', '.join((*_SINGLE, *_CROSSING))}"
        )
    for name, value, known in (
        ("activation_fn", activation, ("relu", "topk")),
        ("reshape_activations", cfg.reshape_activations, (None, "none")),
        ("finetuning_scaling_factor", cfg.finetuning_scaling_factor, (False,)),
        ("apply_b_dec_to_input", cfg.apply_b_dec_to_input, (False,) if architecture in _CROSSING else (False, True)),
    ):
        if value not in known:
            raise DataError(f"{folder} has {name} = {value!r}: clvq reads {', '.join(map(repr, known))}")
    return architecture


def _normalization(cfg: _Cfg, folder: Path) -> Any:
    name = cfg.normalize_activations or "none"
    if name is True:
        # As sae-lens reads older files.
        name = "expected_average_only_in"
    if name not in _NORMALIZATIONS:
        raise DataError(f"{folder} has normalize_activations = {name!r}: clvq reads {', '.join(_NORMALIZATIONS)}")
    return name


def _read_tensors(file: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Float64[Tensor, "*any"]]:
    """The tensors in float64, once their names, types and shapes are what they have to be."""
    if not file.is_file():
        raise DataNotFound(
            f"{file.parent} has no {WEIGHTS}: clvq reads no other files of weights; save it again as one"
        )
    most = _LARGEST_HEADER + sum(8 * _size(shape) for shape in shapes.values())
    if file.stat().st_size > most:
        raise DataError(f"{file} has {file.stat().st_size:,} bytes, and its {CFG} allows {most:,}: get a whole copy")
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            # Of a former version, and 1 where it is not said to count.
            names = set(opened.keys()) - {"scaling_factor"}
            if names != shapes.keys():
                odd = sorted(names ^ shapes.keys())
                raise DataError(f"{file} and its {CFG} do not agree on {', '.join(odd)}: get a whole copy")
            for name, shape in shapes.items():
                part = opened.get_slice(name)
                found = tuple(part.get_shape())
                if found != shape or part.get_dtype() not in _FLOATS:
                    raise DataError(
                        f"{name} in {file} is {part.get_dtype()} {list(found)}, and {list(shape)} of "
                        f"{', '.join(_FLOATS)} was expected: get a whole copy"
                    )
            tensors = {name: opened.get_tensor(name).double() for name in shapes}
    except SafetensorError as error:
        raise DataError(f"{file} is not a whole safetensors file ({error}): get a whole copy") from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise DataError(f"{name} in {file} has values that are not finite")
    return tensors


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _raw(cfg: _Cfg, architecture: str, tensors: dict[str, Float64[Tensor, "*any"]]) -> SparseWeights:
    encoder, bias, decoder, decoder_bias = (tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    threshold = tensors.get("threshold", tensors.get("topk_threshold", torch.zeros(()))).expand_as(bias)
    lengths = decoder.norm(dim=1).clamp_min(1e-12)
    by_length = cfg.rescale_acts_by_decoder_norm
    if by_length is None:
        by_length = architecture == "batchtopk"
    if architecture != "batchtopk" or not by_length:
        threshold = threshold * lengths
    # With decoder vectors of unit length the strongest latent is the one that adds most. Which latents are the k
    # largest may change by that, unless lengths counted there already.
    if architecture != "topk" or by_length:
        encoder, bias, decoder = encoder * lengths, bias * lengths, decoder / lengths[:, None]
    if cfg.apply_b_dec_to_input and architecture not in _CROSSING:
        bias = bias - decoder_bias @ encoder
    return SparseWeights(encoder, bias, decoder, decoder_bias, threshold)


def _mean_norm(cache: Cache, config: MethodConfig, texts: Texts, *, progress: Progress) -> float:
    rows = texts.train_rows(cache, config)
    progress.begin("norms", rows.rows, "row")
    total = 0.0
    for block in blocks(cache, rows, [config.lower]):
        progress.check()
        total += float(on_device(block[config.lower], torch.device("cpu")).double().norm(dim=1).sum())
        progress.advance(len(block[config.lower]))
    return total / max(rows.rows, 1)


def write(run: Run, out: Path, *, cache: Cache | None = None) -> dict[str, JsonValue]:
    """Write a run of `sae` or `cross-sae` into an empty folder, so that `SAE.load_from_disk` of sae-lens opens it.

    It takes and gives raw rows. Its activations are those of the run times the scale of the rows that it reconstructs,
    so that its decoder's vectors have the run's length. BatchTopK becomes JumpReLU, as sae-lens itself saves it.

    Parameters
    ----------
    cache
        The run's cache, which knows the model's name.

    Returns
    -------
    dict
        What stands in `cfg.json`.

    Raises
    ------
    ConfigError
        Where the run has no latents, sae-lens has no such kind, or the folder is not empty.
    RunMismatch
        Where the cache is not the run's.
    DiskFull
    """
    config = run.config
    weights = run.sparse_weights()
    if not isinstance(config, SaeConfig):
        raise ConfigError(f"{config.method} is no sparse autoencoder: export a run of sae or cross-sae")
    if cache is not None:
        run.check_cache(cache)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty: give another folder")
    crosses, encoder = config.method == "cross-sae", config.encoder
    if crosses and encoder.activation == "topk":
        raise ConfigError(
            "sae-lens has no cross-layer autoencoder (transcoder) with topk: "
            "train with --set encoder.activation=batchtopk, which becomes its jumprelu_transcoder"
        )
    kind = {"topk": "topk", "relu": "standard"}.get(encoder.activation, "jumprelu")
    if crosses:
        kind = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}[kind]
    # In sae-lens the decoder's bias is taken off before the encoder.
    encoder_bias = weights.encoder_bias + (0 if crosses else weights.decoder_bias @ weights.encoder)
    tensors = {
        "W_enc": weights.encoder,
        "b_enc": encoder_bias,
        "W_dec": weights.decoder,
        "b_dec": weights.decoder_bias,
    }
    if kind.startswith("jumprelu"):
        tensors["threshold"] = weights.threshold
    cfg: dict[str, JsonValue] = {
        "architecture": kind,
        "d_in": weights.encoder.shape[0],
        "d_sae": encoder.latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not crosses,
        "normalize_activations": "none" if encoder.normalization == "site" else encoder.normalization,
        "reshape_activations": "none",
        "metadata": _metadata(config, cache),
    }
    if crosses:
        cfg["d_out"] = weights.decoder.shape[1]
    if kind == "topk":
        cfg |= {"k": encoder.k, "rescale_acts_by_decoder_norm": False}
    make_folder(out)
    write_file(out / CFG, to_json(cfg))
    write_file(out / WEIGHTS, packed({name: tensor.float() for name, tensor in tensors.items()}))
    return cfg


def _metadata(config: SaeConfig, cache: Cache | None) -> dict[str, JsonValue]:
    metadata: dict[str, JsonValue] = {"sae_lens_version": _VERSION, "clvq_site": config.lower}
    if hook := _hook(config.lower):
        metadata["hook_name"] = hook
    if config.encoder.activation == "batchtopk":
        # As sae-lens notes it.
        metadata |= {"training_architecture": "batchtopk", "training_architecture_details": {"k": config.encoder.k}}
    if config.method == "cross-sae":
        metadata["clvq_upper_site"] = config.upper
        if hook := _hook(config.upper):
            metadata["hook_name_out"] = hook
    model = cache.manifest.identity.get("model") if cache is not None else None
    if isinstance(model, dict) and isinstance(model.get("name"), str):
        metadata["model_name"] = model["name"]
        if model.get("commit"):
            metadata["model_from_pretrained_kwargs"] = {"revision": model["commit"]}
    return metadata


def _hook(site: str) -> str | None:
    """The place as TransformerLens names it; `None` for one that is no residual stream."""
    found = re.fullmatch(r"hidden\.(\d+)", site)
    if found is None:
        return None
    layer = int(found[1])
    return f"blocks.{layer - 1}.hook_resid_post" if layer else "blocks.0.hook_resid_pre"
