"""From settings to the model that they describe."""

from . import network
from .concepts import ConceptModel
from .config import TrainConfig
from .methods import (
    AgglomerativeConfig,
    KMeansConfig,
    MeanDifferenceConfig,
    PcaConfig,
    PlainConfig,
    SaeConfig,
    TrainedConfig,
)
from .plain import ClassMeans, Clusters, Components
from .sae import SparseAutoencoder


def build(config: TrainedConfig | PlainConfig, *, d_lower: int, d_upper: int) -> ConceptModel:
    """The model of the settings, its weights drawn from torch's own generator.

    Raises
    ------
    ConfigError
        Where the settings do not go together.
    """
    match config:
        case TrainConfig():
            return network.build(config, d_lower=d_lower, d_upper=d_upper)
        case SaeConfig():
            return SparseAutoencoder(config, d_lower=d_lower, d_upper=d_upper)
        case KMeansConfig() | AgglomerativeConfig():
            return Clusters(config, d_lower=d_lower, d_upper=d_upper)
        case PcaConfig():
            return Components(config, d_lower=d_lower, d_upper=d_upper)
        case MeanDifferenceConfig():
            return ClassMeans(config, d_lower=d_lower, d_upper=d_upper)
