"""`README.md` of a cache: what it holds and how to load it, with the header that the Hub reads."""

from typing import TYPE_CHECKING

from pydantic import JsonValue

if TYPE_CHECKING:
    from .layout import Manifest


def card(manifest: "Manifest") -> bytes:
    """The card as UTF-8 Markdown. Says nothing that depends on when or where the cache was made."""
    geometry = manifest.geometry
    sites = "\n".join(
        f"| `{name}` | {site.width} | {site.encoding} | "
        f"{site.statistics.norm_quantile(0.05):.3g} / {site.statistics.norm_quantile(0.5):.3g} / "
        f"{site.statistics.norm_quantile(0.95):.3g} |"
        for name, site in manifest.sites.items()
    )
    splits = "\n".join(f"| {name} | {split.texts:,} | {split.rows:,} |" for name, split in manifest.splits.items())
    settings = "\n".join(f"| {name} | {value} |" for name, value in _flat(manifest.identity))
    counts = "\n".join(f"| {name.replace('_', ' ')} | {value:,} |" for name, value in manifest.counts.items())
    classes = f"Classes: {', '.join(manifest.class_names)}.\n\n" if manifest.class_names else ""
    first, width = next((name, site.width) for name, site in manifest.sites.items())
    text = f"""---
library_name: clvq
tags:
- clvq
- activations
license: unknown
---

# Activations for clvq

Paired activations of a language model: {geometry.rows:,} rows of {geometry.texts:,} texts, each row at all sites below.
The texts in `texts.parquet` keep the licence of the data set that they come from, and activations can be partly turned
back into text: share this cache under the same terms.

| site | channels | encoding | norm: 5 %, median, 95 % |
|---|---|---|---|
{sites}

| split | texts | rows |
|---|---|---|
{splits}

{classes}| what happened to the texts | number |
|---|---|
{counts}

## How it was made

| setting | value |
|---|---|
{settings}

## Load it

```python
import clvq

cache = clvq.Cache("this-folder")
rows = cache.rows_of(cache.splits(["{next(iter(manifest.splits))}"]))
vectors = cache.vectors("{first}", rows[:1000])  # float32 [row, {width}]
```

`activations.zarr` is a plain Zarr v3 group: `zarr.open_group("this-folder/activations.zarr", mode="r")`. An array whose
attribute `encoding` is `bf16` holds the bits of bfloat16 in uint16. Rows whose `rows/text` is −1 are not in use.
"""
    return text.encode()


def _flat(value: dict[str, JsonValue], name: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, inner in value.items():
        full = f"{name}.{key}" if name else key
        if isinstance(inner, dict):
            rows += _flat(inner, full)
        else:
            shown = ", ".join(map(str, inner)) if isinstance(inner, list) else str(inner)
            # Foreign strings must not break out of the table.
            rows.append((full, shown.replace("|", "\\|").replace("\n", " ")))
    return rows
