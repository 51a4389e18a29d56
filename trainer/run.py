"""A finished run: concepts of rows, and the concepts' directions."""

import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, Float32, Int64
from safetensors import SafetensorError
from torch import Tensor

from ..cache.files import make_folder, write_file
from ..cache.layout import to_json
from ..cache.reader import Cache
from ..errors import ConfigError, RunMismatch, RunNotFound
from .build import build
from .checkpoint import packed
from .concepts import ConceptModel
from .folder import CONFIG, MODEL, NETWORK, REPORT, TABLES, RunConfig, read_config
from .methods import PlainConfig, TrainedConfig
from .report import Tables
from .sae import SparseAutoencoder, SparseWeights

_ROWS_AT_A_TIME = 8192


class Run:
    """A concept model with what its training rows say of each concept.

    Use `Run.from_pretrained`.
    """

    def __init__(self, description: RunConfig, model: ConceptModel, tables: Tables, report: bytes) -> None:
        self._description = description
        self._model = model.eval()
        self._tables = tables
        self._report = report

    @classmethod
    def from_pretrained(cls, path: Path | str, *, device: torch.device | None = None) -> "Run":
        """The finished run in a folder.

        Parameters
        ----------
        device
            Where rows are assigned; the CPU where it is not given.

        Raises
        ------
        RunNotFound
            Where the folder is not a run, or an unfinished or damaged one.
        FormatVersion
        """
        path = Path(path)
        description = read_config(path)
        if not (path / MODEL).is_file():
            raise RunNotFound(
                f"{path} is an unfinished run; run the `clvq train` command that began it again to finish it"
            )
        try:
            tensors = safetensors.torch.load_file(path / MODEL)
            report = (path / REPORT).read_bytes()
            # Without memory of its own, so that a foreign description cannot ask for more than the file holds.
            with torch.device("meta"):
                model = build(description.config, d_lower=description.d_lower, d_upper=description.d_upper)
            model.load_state_dict(
                {name.removeprefix(NETWORK): value for name, value in tensors.items() if name.startswith(NETWORK)},
                assign=True,
            )
            tables = Tables(
                **{name.removeprefix(TABLES): value for name, value in tensors.items() if name.startswith(TABLES)}
            )
        except (SafetensorError, RuntimeError, TypeError, FileNotFoundError) as error:
            raise RunNotFound(
                f"{path} is damaged: its files do not fit together ({str(error).splitlines()[0]}); "
                "get a whole copy of the run"
            ) from error
        return cls(description, model.to(device or torch.device("cpu")), tables, report)

    @property
    def config(self) -> TrainedConfig | PlainConfig:
        """The settings."""
        return self._description.config

    @property
    def cache_id(self) -> str:
        """The id of the cache that the run was trained on."""
        return self._description.cache_id

    @property
    def held_out_texts(self) -> Int64[np.ndarray, " held_out"]:
        """`text_id`s of the texts that measured."""
        return np.array(self._description.held_out_texts, dtype=np.int64)

    @property
    def concepts(self) -> int:
        """How many concepts there are, unused ones included."""
        return self.config.concepts

    def check_cache(self, cache: Cache) -> None:
        """Make sure that the cache is the one that the run was trained on, or a copy with or without its texts.

        Raises
        ------
        RunMismatch
        """
        if cache.id != self.cache_id and cache.manifest.vectors_id != self._description.vectors_id:
            raise RunMismatch(
                f"the run was trained on the cache {self.cache_id[:12]}…, and {cache.path} is {cache.id[:12]}…: "
                "use the cache that it was trained on, or train again"
            )

    @torch.no_grad()
    def assign(self, lower: Float32[np.ndarray, "row d_lower"]) -> Int64[np.ndarray, " row"]:
        """The concept of each raw row of the lower site; of latents the strongest one."""
        return np.concatenate([np.empty(0, dtype=np.int64), *self._portions(lower, self._model.concept)])

    def _portions(
        self, lower: Float32[np.ndarray, "row d_lower"], ask: Callable[[Tensor], Tensor]
    ) -> Iterator[Int64[np.ndarray, "row *rest"]]:
        device = self._model.lower_mean.device
        for start in range(0, len(lower), _ROWS_AT_A_TIME):
            yield ask(torch.from_numpy(lower[start : start + _ROWS_AT_A_TIME]).to(device, copy=True)).cpu().numpy()

    @property
    def has_latents(self) -> bool:
        """Whether a row may have several concepts at once."""
        return isinstance(self._model, SparseAutoencoder)

    @torch.no_grad()
    def active(self, lower: Float32[np.ndarray, "row d_lower"]) -> Int64[np.ndarray, "row k"]:
        """The latents that are active on each raw row of the lower site, strongest first; −1 where there are fewer.

        Raises
        ------
        ConfigError
            Where the method has no latents.
        """
        model = self._latents()
        empty = np.empty((0, min(model.config.k, model.config.latents)), dtype=np.int64)
        return np.concatenate([empty, *self._portions(lower, model.active)])

    @cached_property
    def encoder_directions(self) -> Float32[np.ndarray, "concept d_lower"]:
        """What each latent listens to, in raw coordinates of the lower site; of any length.

        Raises
        ------
        ConfigError
            Where the method has no latents.
        """
        return self._latents().encoder_directions().cpu().numpy()

    def sparse_weights(self) -> SparseWeights:
        """The sparse autoencoder in raw coordinates, in float64.

        Raises
        ------
        ConfigError
            Where the method has no latents.
        """
        return self._latents().weights()

    def _latents(self) -> SparseAutoencoder:
        if not isinstance(self._model, SparseAutoencoder):
            raise ConfigError(f"{self.config.method} gives a row one concept and has no latents: ask for `assign`")
        return self._model

    @cached_property
    def counts(self) -> Int64[np.ndarray, " code"]:
        """Training rows of each concept."""
        return self._tables.counts.numpy()

    @cached_property
    def lower_mean(self) -> Float32[np.ndarray, " d_lower"]:
        """The mean of the training rows at the lower site."""
        return self._model.lower_mean.cpu().numpy()

    @cached_property
    def concept_means(self) -> Float32[np.ndarray, "code d_lower"]:
        """The mean of each concept's training rows at the lower site; of all rows for a concept without any."""
        return self._tables.concept_means.numpy()

    @cached_property
    def upper_table(self) -> Float32[np.ndarray, "code d_upper"]:
        """The mean of each concept's training rows at the upper site; of all rows for a concept without any."""
        return self._tables.upper_table.numpy()

    def direction(self, concept: int, site: str) -> Float32[np.ndarray, "k d"]:
        """An orthonormal basis of the concept at the lower site, in raw coordinates.

        It is the concept's mean less the mean of all training rows, at unit length, for `pca` and `mean-difference`
        their own direction; empty (k = 0) for a concept without training rows.

        Raises
        ------
        ConfigError
            Where the site is not the lower one, or there is no such concept.
        """
        if site != self.config.lower:
            raise ConfigError(
                f"the concepts of this run live at {self.config.lower}, not at {site}: ask for {self.config.lower}"
            )
        self._check(concept)
        mean = self.lower_mean.astype(np.float64)
        if not self.counts[concept]:
            return _unit(np.zeros_like(mean))
        own = self._directions
        return _unit(self.concept_means[concept] - mean if own is None else own[concept])

    @cached_property
    def _directions(self) -> Float32[np.ndarray, "concept d_lower"] | None:
        found = self._model.directions()
        return None if found is None else found.cpu().numpy()

    @cached_property
    def _published(self) -> Float32[np.ndarray, "concept d_lower"]:
        found = self._model.published()
        return self.concept_means if found is None else found.cpu().numpy()

    def published_direction(self, concept: int) -> Float32[np.ndarray, " d"]:
        """The unit vector that the published, uncentred projection removes.

        The code itself where codes live in the lower site's raw space (`paper`), the decoder's vector of `sae`, the
        encoder's of `cross-sae`, the class' difference of `mean-difference`; otherwise the concept's mean.

        Raises
        ------
        ConfigError
            Where there is no such concept.
        """
        self._check(concept)
        vector = self._published[concept]
        basis = _unit(vector)
        return basis[0] if len(basis) else np.zeros_like(vector)

    def _check(self, concept: int) -> None:
        if not 0 <= concept < self.concepts:
            raise ConfigError(f"there is no concept {concept}: they are numbered 0 to {self.concepts - 1}")

    def save_pretrained(self, path: Path | str) -> None:
        """Write the run into a folder that does not exist yet or is empty.

        Raises
        ------
        ConfigError
            Where the folder is not empty.
        DiskFull
        """
        path = Path(path)
        if path.exists() and any(path.iterdir()):
            raise ConfigError(f"{path} is not empty: give another folder")
        make_folder(path)
        tensors = {f"{NETWORK}{name}": tensor for name, tensor in self._model.state_dict().items()}
        tensors |= {f"{TABLES}{name}": tensor for name, tensor in vars(self._tables).items()}
        write_file(path / CONFIG, to_json(self._description))
        write_file(path / REPORT, self._report)
        write_file(path / MODEL, packed(tensors))

    def push_to_hub(self, repo_id: str, *, token: str | None = None) -> None:
        """Upload the run to a model repository of the Hugging Face Hub, which is created where missing."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.upload_folder(repo_id=repo_id, folder_path=folder)


def _unit(vector: Float[np.ndarray, " d"]) -> Float32[np.ndarray, "k d"]:
    """The vector at unit length as a basis of one; of none where its length is 0."""
    wide = vector.astype(np.float64)
    length = np.linalg.norm(wide)
    basis = wide[None] / length if length > 0 else wide[None][:0]
    return basis.astype(np.float32)
