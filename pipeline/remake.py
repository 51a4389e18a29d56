"""Computing parts of a finished cache again, from the model and the texts that it was made from."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from ..cache.extraction import Extraction, Shard
from ..cache.layout import Manifest, differences
from ..errors import ConfigError, ResumeMismatch
from ..progress import SILENT, Progress
from .config import ExtractConfig
from .data import read_texts
from .extract import texts_table
from .forward import channel_scales, make_shard
from .language_model import LanguageModel
from .plan import make_plan
from .source import ModelSource


class Extractor:
    """Makes shards of a cache again; a `clvq.cache.repair.Remake`.

    Parameters
    ----------
    manifest
        Of the cache.
    source
        The model that it was made with.
    data
        The texts that it was made from: file, folder or Hub name.
    load
        Loads the model; called once, where a shard is asked for.

    Raises
    ------
    ConfigError
        Where the cache was not extracted, but made from another one.
    ResumeMismatch
        Where the model or the texts are not those of the cache; each difference is named.
    """

    def __init__(
        self,
        manifest: Manifest,
        source: ModelSource,
        data: str,
        load: Callable[[], LanguageModel],
        *,
        progress: Progress = SILENT,
    ) -> None:
        wanted = Extraction.of(manifest)
        identity = wanted.identity
        if identity.keys() != {"model", "tokenizer", "data", "settings"}:
            raise ConfigError(
                "this cache was made from another cache, not by `clvq extract`: repair that one and make this one "
                "again, or say where a whole copy of this one is"
            )
        config = ExtractConfig.model_validate(identity["settings"])
        chosen = identity["data"]
        texts = read_texts(
            data,
            splits=chosen["splits"],
            text_field=chosen["text_field"],
            label_field=chosen["label_field"],
            keep_fields=chosen["keep_fields"],
            max_texts=chosen["max_texts"],
            subset=chosen.get("subset"),
            seed=config.seed,
        )
        self._plan = make_plan(source, texts, config, progress=progress)
        # Settings that a cache does not name are younger than it, and what they stand for by default was so then.
        settings = config.model_dump(mode="json")
        expected = {**wanted.to_plain(), "parent": None, "identity": {**identity, "settings": settings}}
        lines = [
            line
            for line in differences(expected, self._plan.extraction().to_plain())
            # Weights and texts are compared by their hashes: where they lie does not matter.
            if not line.startswith(("identity.model.name:", "identity.model.commit:"))
        ]
        if lines:
            raise ResumeMismatch(
                f"the model or the data are not those that the cache was made from ({'; '.join(lines[:8])}"
                f"{'; …' if len(lines) > 8 else ''})"
            )
        self._load = load
        self._loaded: LanguageModel | None = None

    @property
    def _model(self) -> LanguageModel:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def shard(self, number: int, progress: Progress) -> Shard:
        """The contents of a shard."""
        return make_shard(self._plan.work(number), self._plan.config, self._model, progress).shard

    def scales(self, progress: Progress) -> dict[str, Float32[np.ndarray, " _d"]]:
        """Site → channel scales."""
        return channel_scales(self._plan.scale_work(), self._plan.config, self._model, progress)

    def texts(self) -> pa.Table:
        """`texts.parquet` without its predictions."""
        return texts_table(self._plan)
