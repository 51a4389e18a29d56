"""What is to be written into a cache: all of it, and one shard of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped
from pydantic import JsonValue

from .layout import FORMAT, ROW_COLUMNS, VERSION, Geometry, Manifest, SiteLayout


@dataclass(frozen=True)
class Shard:
    """The contents of one shard: its rows in use, from the first place on, and its texts in use."""

    number: int
    sites: Mapping[str, Float32[np.ndarray, "row d"]]
    rows: Mapping[str, Shaped[np.ndarray, " row"]]
    texts: int
    logits: Float32[np.ndarray, "text class"] | None = None
    convergence: Float32[np.ndarray, " text"] | None = None
    """What `texts/convergence_delta` holds; there where the rows have the saliency columns."""


@dataclass(frozen=True)
class Extraction:
    """What is to be written: everything that must be equal for work to go on in the same folder."""

    # JSON; pydantic's recursive type for it cannot be checked at run time from another module.
    identity: dict[str, Any]
    geometry: Geometry
    sites: dict[str, SiteLayout]
    classes: int | None
    columns: tuple[str, ...] = tuple(ROW_COLUMNS)
    parent: str | None = None
    """Id of the cache that this one is made from, where it is not extracted."""

    @classmethod
    def of(cls, manifest: Manifest) -> "Extraction":
        """What a finished cache was made as."""
        sites = {name: SiteLayout(width=site.width, encoding=site.encoding) for name, site in manifest.sites.items()}
        return cls(
            manifest.identity, manifest.geometry, sites, manifest.classes, manifest.columns, parent=manifest.parent
        )

    def to_plain(self) -> dict[str, JsonValue]:
        """As it stands in `unfinished.json`."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "identity": self.identity,
            "geometry": self.geometry.model_dump(mode="json"),
            "sites": {name: site.model_dump(mode="json") for name, site in self.sites.items()},
            "classes": self.classes,
            "columns": list(self.columns),
            "parent": self.parent,
        }
