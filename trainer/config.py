"""Everything that decides what a run of CLVQ-VAE or VQ-VAE becomes, and the presets.

The published figures stand in `_paper` alone: CLVQ-VAE, arXiv 2506.20040, with the authors' code at 9e9b9aa.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..cache.pools import POOL_BYTES
from ..cache.reader import Special
from ..errors import ConfigError

Preset = Literal["paper", "default"]


class Frozen(BaseModel):
    """Settings that are checked once and never change."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class MethodConfig(Frozen):
    """What every method is told."""

    lower: str
    """Full name of the site that concepts live at."""
    upper: str
    """Full name of the site whose rows the concepts are to tell."""
    split: tuple[str, ...]
    held_out: str | None
    """Split that measures; `None` holds out a seeded share of the texts."""
    special: Special
    seed: int = Field(ge=0)

    @property
    def target(self) -> str:
        """Full name of the site that is reconstructed."""
        return self.upper

    codes_name: ClassVar[str] = "codes"
    """The setting that says how many concepts there are."""

    def full_name(self, name: str) -> str:
        """The setting that `codes` stands for; any other name is its own."""
        return self.codes_name if name == "codes" else name

    @property
    def concepts(self) -> int:
        """How many concepts there are."""
        raise NotImplementedError

    @property
    def least_rows(self) -> int:
        """Training rows without which there is nothing to fit."""
        return self.concepts

    @property
    def share(self) -> float:
        """Share of the texts held out where no held-out split is named."""
        raise NotImplementedError


class StartConfig(Frozen):
    """Where the codes stand: k-means on all training rows."""

    space: Literal["lower", "encoded"]
    """What is clustered: rows of the lower site, or what the quantiser sees."""
    spherical: bool
    """Cluster unit vectors; a code is then its centroid's direction times its members' mean norm."""
    iterations: int = Field(ge=1)
    """Upper limit of the iterations on each sample and on all rows."""
    tolerance: float = Field(ge=0)
    """Iterations end with one that lowers the inertia by less than this share of it."""


class EmaQuantizer(Frozen):
    """A codebook that follows its rows by running means while the network is trained."""

    kind: Literal["ema"]
    codes: int = Field(ge=2)
    decay: float = Field(ge=0, lt=1)
    """Weight of the past in the running counts and sums."""
    epsilon: float = Field(gt=0)
    """Laplace smoothing of the counts."""
    smoothed_counts: bool
    """Store the smoothed counts back, as published; unused codes then shrink to zero."""
    commitment: float = Field(ge=0)
    """Weight of the loss that draws rows to their codes."""
    top_k: int = Field(ge=1)
    """While training a row's code is drawn from its `top_k` nearest; 1 takes the nearest."""
    temperature: float = Field(gt=0)
    """Of the draw, in units of squared distance."""
    revive_after: int = Field(ge=0)
    """A code unused for so many steps is put on a row of the batch and its running means begin anew; 0 = never."""


class FixedQuantizer(Frozen):
    """A codebook that stays where k-means put it, after the encoder was trained."""

    kind: Literal["fixed"]
    codes: int = Field(ge=2)


class AdaptiveEncoder(Frozen):
    """The published encoder."""

    kind: Literal["adaptive"]
    mix_start: float
    """a of mix = 0.5·sigmoid(a) before the first step."""


class PredictorEncoder(Frozen):
    """A linear map to the upper site's space plus residual MLPs, trained by itself before the codebook starts."""

    kind: Literal["predictor"]
    expansion: int = Field(ge=1)
    """Hidden units of each MLP per channel of the lower site."""
    blocks: int = Field(ge=1)
    """MLPs, one after the other."""
    dropout: float = Field(ge=0, lt=1)
    """Share of the hidden units that a step leaves out."""
    epochs: int = Field(ge=1)
    rows_per_batch: int = Field(ge=1)


class DecoderConfig(Frozen):
    """The transformer between codes and upper rows."""

    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    hidden: int = Field(ge=1)
    """Units of each layer's feed-forward part."""
    dropout: float = Field(ge=0, lt=1)


class OptimizerConfig(Frozen):
    """Adam and its rate."""

    name: Literal["adam", "adamw"]
    """`adam` adds the weight decay to the gradient, `adamw` takes it from the weights."""
    lr: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    schedule: Literal["plateau", "linear"]
    """`plateau` multiplies the rate by a factor when the held-out loss gets no better. `linear` lowers it
    to 0 over the encoder's training, and again over what follows; in the first twentieth of each it also rises."""
    plateau_factor: float = Field(gt=0, lt=1)
    plateau_patience: int = Field(ge=0)
    """Epochs without a better held-out loss before the rate is multiplied by the factor."""


class StreamConfig(Frozen):
    """In what portions texts are read."""

    texts_per_batch: int = Field(ge=1)
    slots_per_batch: int = Field(ge=1)
    """Upper limit of texts × longest text in a batch."""
    pool_bytes: int = Field(ge=1)
    """Rows that are shuffled together, in bytes as stored; twice that much is held in memory."""
    precision: Literal["float32", "bfloat16"]
    """Of the products of encoder and decoder; weights, codebook, distances and sums are float32 in any case."""
    held_out_share: float = Field(gt=0, lt=1)
    """Share of the texts held out where no held-out split is named."""
    checkpoint_minutes: float = Field(gt=0)
    """Also save within an epoch, so often. A checkpoint is saved at each epoch's end in any case."""


class FitConfig(StreamConfig):
    """How long and in what portions."""

    epochs: int = Field(ge=1)
    """Upper limit, those of a predictor not counted."""
    patience: int = Field(ge=1)
    """Epochs without a better held-out loss before training stops."""


class TrainConfig(MethodConfig):
    """A run's settings. Two runs of one cache with equal settings are equal."""

    method: Literal["clvq-vae", "vq-vae"]
    """`vq-vae` looks at one site: it reconstructs the lower one."""
    preset: Preset
    """Which network: the published one, or one whose decoder sees codes only."""
    start: StartConfig
    quantizer: Annotated[EmaQuantizer | FixedQuantizer, Field(discriminator="kind")]
    encoder: Annotated[AdaptiveEncoder | PredictorEncoder, Field(discriminator="kind")]
    decoder: DecoderConfig
    optimizer: OptimizerConfig
    fit: FitConfig

    codes_name: ClassVar[str] = "quantizer.codes"

    @property
    def target(self) -> str:
        return self.upper if self.method == "clvq-vae" else self.lower

    @property
    def concepts(self) -> int:
        return self.quantizer.codes

    @property
    def share(self) -> float:
        return self.fit.held_out_share


# How all but the published method read, and how they learn where they do.
READING = StreamConfig(
    texts_per_batch=512,
    slots_per_batch=2048,
    pool_bytes=POOL_BYTES,
    precision="float32",
    held_out_share=0.1,
    checkpoint_minutes=10,
)
DESCENT = OptimizerConfig(
    name="adamw", lr=1e-3, weight_decay=1e-2, schedule="linear", plateau_factor=0.5, plateau_patience=0
)


def _fit(epochs: int) -> FitConfig:
    return FitConfig(epochs=epochs, patience=epochs, **dict(READING))


def _paper(codes: int) -> dict[str, Frozen]:
    return {
        # codebook_initialization.py, `spherical`.
        "start": StartConfig(space="lower", spherical=True, iterations=300, tolerance=5e-4),
        # vector_quantizer.py and main.py: g = 0.99, ε = 1e-5, β = 0.1, k = 5, τ = 1 on raw squared distances.
        "quantizer": EmaQuantizer(
            kind="ema",
            codes=codes,
            decay=0.99,
            epsilon=1e-5,
            smoothed_counts=True,
            commitment=0.1,
            top_k=5,
            temperature=1.0,
            revive_after=0,
        ),
        # model.py, `_ContinuousEmbedding`.
        "encoder": AdaptiveEncoder(kind="adaptive", mix_start=0.2),
        # model.py: nn.TransformerDecoder's defaults, six layers of eight heads.
        "decoder": DecoderConfig(layers=6, heads=8, hidden=2048, dropout=0.1),
        # main.py: Adam with L2, ReduceLROnPlateau(min, 0.5, 5).
        "optimizer": OptimizerConfig(
            name="adam", lr=5e-3, weight_decay=1e-4, schedule="plateau", plateau_factor=0.5, plateau_patience=5
        ),
        # main.py: 50 epochs, early stop 15, batches of 128 sentences, 90/10 by sentence.
        "fit": FitConfig(
            epochs=50,
            patience=15,
            texts_per_batch=128,
            slots_per_batch=128 * 512,
            pool_bytes=POOL_BYTES,
            precision="float32",
            held_out_share=0.1,
            checkpoint_minutes=10,
        ),
    }


def _default(codes: int) -> dict[str, Frozen]:
    # docs/trainer.md has the measurement behind each figure.
    return {
        "start": StartConfig(space="encoded", spherical=False, iterations=100, tolerance=5e-4),
        "quantizer": FixedQuantizer(kind="fixed", codes=codes),
        "encoder": PredictorEncoder(kind="predictor", expansion=4, blocks=2, dropout=0.2, epochs=8, rows_per_batch=512),
        "decoder": DecoderConfig(layers=2, heads=8, hidden=1024, dropout=0.0),
        "optimizer": DESCENT,
        "fit": _fit(4),
    }


def _single(codes: int) -> dict[str, Frozen]:
    # van den Oord et al. (2017) with a codebook that starts at k-means and revives its dead codes, trained end to end.
    return {
        "start": StartConfig(space="encoded", spherical=False, iterations=100, tolerance=5e-4),
        "quantizer": EmaQuantizer(
            kind="ema",
            codes=codes,
            decay=0.99,
            epsilon=1e-5,
            smoothed_counts=False,
            commitment=0.25,
            top_k=1,
            temperature=1.0,
            revive_after=200,
        ),
        "encoder": AdaptiveEncoder(kind="adaptive", mix_start=0.2),
        "decoder": DecoderConfig(layers=2, heads=8, hidden=1024, dropout=0.0),
        "optimizer": DESCENT,
        "fit": _fit(12),
    }


_PRESETS = {
    ("clvq-vae", "paper"): _paper,
    ("clvq-vae", "default"): _default,
    # The published baseline is the same network, its upper site the lower one.
    ("vq-vae", "paper"): _paper,
    ("vq-vae", "default"): _single,
}
PRESETS = ("paper", "default")


def preset_config(
    preset: str,
    *,
    lower: str,
    upper: str,
    method: str = "clvq-vae",
    codes: int = 400,
    split: tuple[str, ...] = ("train",),
    held_out: str | None = None,
    seed: int = 42,
) -> TrainConfig:
    """The settings of a preset.

    Raises
    ------
    ConfigError
        Where there is no such preset or a value is out of range.
    """
    if (method, preset) not in _PRESETS:
        raise ConfigError(f"{method} has no preset {preset!r}: use one of {', '.join(PRESETS)}")
    try:
        return TrainConfig.model_validate(
            {
                "method": method,
                "preset": preset,
                "lower": lower,
                "upper": upper,
                "split": split,
                "held_out": held_out,
                # The paper keeps <s>/[CLS] and drops </s>/[SEP].
                "special": "leading",
                "seed": seed,
                **_PRESETS[method, preset](codes),
            }
        )
    except ValidationError as error:
        raise ConfigError(wrong_setting(error)) from error


Config = TypeVar("Config", bound=MethodConfig)


def with_overrides(config: Config, values: Mapping[str, str]) -> Config:
    """The settings with some replaced, named as `fit.epochs`; values are JSON where they parse as JSON, else strings.

    Raises
    ------
    ConfigError
        Where there is no such setting, or the value does not suit it.
    """
    plain = config.model_dump(mode="json")
    for name, text in values.items():
        level, parts = plain, config.full_name(name).split(".")
        for depth, part in enumerate(parts):
            last = depth == len(parts) - 1
            if part not in level or isinstance(level[part], dict) == last:
                raise ConfigError(_no_setting(name, ".".join(parts[:depth]), part, level))
            if last:
                level[part] = _parsed(text)
            else:
                level = level[part]
    try:
        changed = type(config).model_validate(plain)
    except ValidationError as error:
        raise ConfigError(wrong_setting(error)) from error
    for name in ("method", "preset", "encoder.kind", "quantizer.kind"):
        if name in values and changed != config:
            raise ConfigError(f"{name} cannot be set by itself: choose another --method or --preset")
    return changed


def _no_setting(name: str, parent: str, part: str, level: dict[str, Any]) -> str:
    where = f"in {parent!r}" if parent else "here"
    if isinstance(level.get(part), dict):
        inner = ", ".join(f"{name}.{key}" for key in level[part])
        return f"{name!r} is a group of settings: set one of {inner}"
    return f"there is no setting {name!r}: {where} there are {', '.join(level)}"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def wrong_setting(error: ValidationError) -> str:
    """What is wrong with a setting, and which one it is."""
    first = error.errors()[0]
    # A discriminated union puts its tag into the place; it is no part of the setting's name.
    name = ".".join(
        str(part) for part in first["loc"] if part not in ("adaptive", "predictor", "ema", "fixed", "sparse")
    )
    return f"{name} cannot be {first['input']!r}: {first['msg']}"
