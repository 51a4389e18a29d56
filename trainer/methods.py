"""The settings of the rivals, and of all methods together."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationError

from ..errors import ConfigError
from .config import (
    DESCENT,
    READING,
    Frozen,
    MethodConfig,
    OptimizerConfig,
    StreamConfig,
    TrainConfig,
    preset_config,
    wrong_setting,
)

METHODS = ("clvq-vae", "vq-vae", "kmeans", "agglomerative", "sae", "cross-sae", "pca", "mean-difference")

_CODES, _LATENTS = 400, 4096


class _Plain(MethodConfig):
    """A method without epochs."""

    codes: int = Field(ge=2)
    held_out_share: float = Field(gt=0, lt=1)
    """Share of the texts held out where no held-out split is named."""

    @property
    def concepts(self) -> int:
        return self.codes

    @property
    def share(self) -> float:
        return self.held_out_share


class KMeansConfig(_Plain):
    """k-means on the lower rows."""

    method: Literal["kmeans"]
    spherical: bool
    """Cluster unit vectors; a code is then its centroid's direction times its members' mean norm."""
    iterations: int = Field(ge=1)
    """Upper limit of the iterations on each sample and on all rows."""
    tolerance: float = Field(ge=0)
    """Iterations end with one that lowers the inertia by less than this share of it."""


class AgglomerativeConfig(_Plain):
    """Ward's clustering of the lower rows, as in ConceptX (Dalvi et al. 2022)."""

    method: Literal["agglomerative"]
    rows: int = Field(ge=2, le=40_000)
    """Rows that are clustered, drawn at random where there are more; all others join the nearest mean. Memory grows
    with the square: 1.6 GB for 20,000."""


class PcaConfig(_Plain):
    """Principal components of the lower rows, each with its two signs as two concepts."""

    method: Literal["pca"]
    codes: int = Field(ge=2, multiple_of=2)

    @property
    def least_rows(self) -> int:
        return 2


class MeanDifferenceConfig(_Plain):
    """The mean of each class's rows less the mean of all: what the labels alone give."""

    method: Literal["mean-difference"]

    @property
    def least_rows(self) -> int:
        return 2


class SparseEncoder(Frozen):
    """A dictionary of latents of which few are active on a row."""

    kind: Literal["sparse"]
    activation: Literal["topk", "batchtopk", "relu", "jumprelu"]
    """`topk` keeps each row's largest (Gao et al. 2024), `batchtopk` the largest of all of a batch's rows (Bussmann et
    al. 2024), and afterwards what lies above a fixed threshold. `relu` keeps what is above 0, `jumprelu` what is above
    each latent's threshold; both come from elsewhere only."""
    normalization: Literal["site", "constant_norm_rescale", "layer_norm"]
    """`site` centres rows and divides them by one number; the others, named as in sae-lens, look at each row alone."""
    latents: int = Field(ge=2)
    k: int = Field(ge=1)
    """Active latents per row; with `batchtopk` on average, with `relu` and `jumprelu` only how many are listed."""
    aux_k: int = Field(ge=0)
    """Dead latents that predict what the living ones leave over; 0 = none."""
    aux_weight: float = Field(ge=0)
    dead_after: int = Field(ge=1)
    """A latent is dead when it was not active on so many rows."""
    epochs: int = Field(ge=1)
    rows_per_batch: int = Field(ge=1)


class SaeConfig(MethodConfig):
    """A sparse autoencoder of the lower rows, or a sparse map of them to the upper rows."""

    method: Literal["sae", "cross-sae"]
    source: str | None
    """Which autoencoder (`ForeignSae.sha256`) where it comes from elsewhere and nothing is trained; else `None`."""
    encoder: SparseEncoder
    optimizer: OptimizerConfig
    fit: StreamConfig

    codes_name: ClassVar[str] = "encoder.latents"

    @property
    def target(self) -> str:
        return self.lower if self.method == "sae" else self.upper

    @property
    def concepts(self) -> int:
        return self.encoder.latents

    @property
    def least_rows(self) -> int:
        return 2

    @property
    def share(self) -> float:
        return self.fit.held_out_share


PlainConfig = KMeansConfig | AgglomerativeConfig | PcaConfig | MeanDifferenceConfig
AnyConfig = Annotated[TrainConfig | SaeConfig | PlainConfig, Field(discriminator="method")]
TrainedConfig = TrainConfig | SaeConfig
"""Methods that are trained in epochs."""


def method_config(
    method: str,
    *,
    lower: str,
    upper: str,
    preset: str = "default",
    codes: int | None = None,
    classes: int = 0,
    split: tuple[str, ...] = ("train",),
    held_out: str | None = None,
    seed: int = 42,
) -> TrainConfig | SaeConfig | PlainConfig:
    """The settings that a method begins with.

    Parameters
    ----------
    preset
        Of `clvq-vae` and `vq-vae`; the others have `default` alone.
    codes
        Concepts; where not given 400, or 4,096 latents. `mean-difference` has one for each class.
    classes
        Of the texts' labels.

    Raises
    ------
    ConfigError
        Where there is no such method or preset, or a value is out of range.
    """
    if method not in METHODS:
        raise ConfigError(f"there is no method {method!r}: use one of {', '.join(METHODS)}")
    if method in ("clvq-vae", "vq-vae"):
        wanted = _CODES if codes is None else codes
        return preset_config(
            preset, method=method, lower=lower, upper=upper, codes=wanted, split=split, held_out=held_out, seed=seed
        )
    if preset != "default":
        raise ConfigError(f"{method} has no preset {preset!r}: leave --preset out")
    if method == "mean-difference":
        if codes not in (None, classes):
            raise ConfigError(f"mean-difference has one concept for each of the {classes} classes: leave --codes out")
        if classes < 2:
            raise ConfigError(
                f"mean-difference needs texts with labels of two classes or more, and the cache has {classes}: "
                "extract with --label-field, or choose another --method"
            )
        codes = classes
    common = {
        "method": method,
        "lower": lower,
        "upper": upper,
        "split": split,
        "held_out": held_out,
        # As the presets have it.
        "special": "leading",
        "seed": seed,
    }
    try:
        if method in ("sae", "cross-sae"):
            return SaeConfig.model_validate(common | _sparse(_LATENTS if codes is None else codes))
        plain = common | {"codes": _CODES if codes is None else codes, "held_out_share": READING.held_out_share}
        if method == "kmeans":
            return KMeansConfig.model_validate(plain | {"spherical": False, "iterations": 300, "tolerance": 5e-4})
        if method == "agglomerative":
            return AgglomerativeConfig.model_validate(plain | {"rows": 20_000})
        return (PcaConfig if method == "pca" else MeanDifferenceConfig).model_validate(plain)
    except ValidationError as error:
        raise ConfigError(wrong_setting(error)) from error


def _sparse(latents: int) -> dict[str, Frozen | None]:
    return {
        "source": None,
        # Gao et al. (2024): 1/32 of the loss of the dead latents' prediction.
        "encoder": SparseEncoder(
            kind="sparse",
            activation="topk",
            normalization="site",
            latents=latents,
            k=min(32, latents),
            aux_k=256,
            aux_weight=1 / 32,
            dead_after=50_000,
            epochs=16,
            rows_per_batch=1024,
        ),
        "optimizer": DESCENT.model_copy(update={"name": "adam", "lr": 6e-3, "weight_decay": 0.0}),
        "fit": READING,
    }
