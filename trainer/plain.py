"""Methods without epochs: clusterings of the lower rows, principal components, and means of classes."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from ..cache.reader import Cache
from ..errors import ConfigError
from ..progress import Progress
from .concepts import ConceptModel, on_device
from .data import Texts, blocks
from .kmeans import kmeans
from .methods import AgglomerativeConfig, KMeansConfig, MeanDifferenceConfig, PcaConfig
from .quantizer import Codebook


class PlainModel(ConceptModel):
    """What the methods share: they are fitted in one go, after `place`."""

    def fit(self, cache: Cache, texts: Texts, *, device: torch.device, progress: Progress) -> None:
        """Find the concepts in the training rows.

        Raises
        ------
        ConfigError
            Where the rows do not suit the settings.
        Interrupted
        """
        raise NotImplementedError


class Clusters(PlainModel):
    """Clusters of lower rows by their centroids; a row belongs to the nearest."""

    def __init__(self, config: KMeansConfig | AgglomerativeConfig, *, d_lower: int, d_upper: int) -> None:
        super().__init__(d_lower, d_upper)
        self.config = config
        self.quantizer = Codebook(config.codes, width=d_lower)

    def fit(self, cache: Cache, texts: Texts, *, device: torch.device, progress: Progress) -> None:
        config = self.config
        if isinstance(config, AgglomerativeConfig):
            self.quantizer.start(_ward(cache, config, texts, progress).to(device))
            return
        rows = texts.train_rows(cache, config)

        def lower() -> Iterator[Float32[Tensor, "block d"]]:
            for block in blocks(cache, rows, [config.lower]):
                yield on_device(block[config.lower], device)

        found = kmeans(
            lower,
            codes=config.codes,
            iterations=config.iterations,
            seed=config.seed,
            device=device,
            spherical=config.spherical,
            tolerance=config.tolerance,
            progress=progress,
        )
        self.quantizer.start(found.centroids)

    def concept(self, lower: Float[Tensor, "row d_lower"]) -> Int64[Tensor, " row"]:
        return self.quantizer.nearest(lower)

    def vectors(self) -> Float[Tensor, "concept d"]:
        return self.quantizer.codebook


def _ward(cache: Cache, config: AgglomerativeConfig, texts: Texts, progress: Progress) -> Float32[Tensor, "code d"]:
    """Means of the clusters of a sample of rows."""
    from sklearn.cluster import AgglomerativeClustering

    if config.codes > config.rows:
        raise ConfigError(f"rows = {config.rows} is fewer than the {config.codes} codes: set it higher")
    places = texts.train_rows(cache, config).places()
    sample = np.sort(np.random.default_rng(config.seed).permutation(places)[: config.rows])
    progress.begin("Ward's clustering", len(sample), "row")
    progress.check()
    rows = cache.vectors(config.lower, sample).astype(np.float64)
    # Under a mean far larger than the deviations the distances would lose their digits.
    mean = rows.mean(axis=0)
    labels = AgglomerativeClustering(n_clusters=config.codes, linkage="ward").fit_predict(rows - mean)
    sums = np.zeros((config.codes, rows.shape[1]))
    np.add.at(sums, labels, rows - mean)
    progress.advance(len(sample))
    means = sums / np.bincount(labels, minlength=config.codes)[:, None] + mean
    return torch.from_numpy(means.astype(np.float32))


class Components(PlainModel):
    """Principal components; a row's concept is the one that makes up most of its deviation from the mean.

    Concepts 2i and 2i + 1 are the two signs of component i; they share a direction.
    """

    components: Float[Tensor, "component d_lower"]

    def __init__(self, config: PcaConfig, *, d_lower: int, d_upper: int) -> None:
        super().__init__(d_lower, d_upper)
        self.config = config
        if config.codes // 2 > d_lower:
            raise ConfigError(
                f"{config.lower} has {d_lower} channels, and so many components: use --codes {2 * d_lower} or fewer"
            )
        self.register_buffer("components", torch.zeros(config.codes // 2, d_lower))

    def fit(self, cache: Cache, texts: Texts, *, device: torch.device, progress: Progress) -> None:
        rows = texts.train_rows(cache, self.config)
        mean = self.lower_mean.double()
        products = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=device)
        progress.begin("principal components", rows.rows, "row")
        for block in blocks(cache, rows, [self.config.lower]):
            progress.check()
            wide = on_device(block[self.config.lower], device).double() - mean
            products += wide.T @ wide
            progress.advance(len(wide))
        axes = torch.linalg.eigh(products)[1].T.flip(0)[: len(self.components)]
        # An axis has no sign of its own; without a rule, rounding would choose it.
        largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
        self.components.copy_(axes * largest.sign())

    def concept(self, lower: Float[Tensor, "row d_lower"]) -> Int64[Tensor, " row"]:
        scores = (lower - self.lower_mean) @ self.components.T
        furthest = scores.abs().argmax(dim=1)
        return 2 * furthest + (scores.gather(1, furthest[:, None])[:, 0] < 0)

    def directions(self) -> Float[Tensor, "concept d_lower"]:
        return self.components.repeat_interleave(2, dim=0)


class ClassMeans(PlainModel):
    """The mean of each class's rows less the mean of all; a row's concept is the class that it points to most.

    With two classes both directions are one line, so that removing either is the same.
    """

    differences: Float[Tensor, "class d_lower"]

    def __init__(self, config: MeanDifferenceConfig, *, d_lower: int, d_upper: int) -> None:
        super().__init__(d_lower, d_upper)
        self.config = config
        self.register_buffer("differences", torch.zeros(config.codes, d_lower))

    def fit(self, cache: Cache, texts: Texts, *, device: torch.device, progress: Progress) -> None:
        labels = np.array([-1 if label is None else label for label in cache.texts["label"].to_pylist()])
        found = np.unique(labels[texts.train])
        missing = sorted(set(range(self.config.codes)) - set(found.tolist()))
        if missing:
            raise ConfigError(f"no training text has label {missing[0]}, whose mean is asked for: choose other splits")
        rows, mean = texts.train_rows(cache, self.config), self.lower_mean.double().cpu().numpy()
        sums: Float64[np.ndarray, "class d"] = np.zeros((self.config.codes, len(mean)))
        counts = np.zeros(self.config.codes)
        progress.begin("class means", rows.rows, "row")
        for shard in np.unique(rows.shard).tolist():
            for places, vectors in cache.blocks([self.config.lower], rows.of_shard(shard)):
                progress.check()
                owner = labels[cache.text_index[cache.read_column("text", places)]]
                wide = vectors[self.config.lower] - mean
                for label in range(self.config.codes):
                    sums[label] += wide[owner == label].sum(axis=0)
                    counts[label] += (owner == label).sum()
                progress.advance(len(places))
        if not counts.all():
            raise ConfigError(f"no training row has label {int(np.argmin(counts))}: choose other splits")
        self.differences.copy_(torch.from_numpy(sums / counts[:, None]))

    def concept(self, lower: Float[Tensor, "row d_lower"]) -> Int64[Tensor, " row"]:
        return ((lower - self.lower_mean) @ F.normalize(self.differences, dim=1).T).argmax(dim=1)

    def directions(self) -> Float[Tensor, "concept d_lower"]:
        return self.differences

    def published(self) -> Float[Tensor, "concept d_lower"]:
        return self.differences
