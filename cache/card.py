"""`README.md` of a cache: what it holds and how to load it, with the header that the Hub reads."""

import json
from typing import TYPE_CHECKING, Any

from .layout import TEXTUAL_COLUMNS

if TYPE_CHECKING:
    from .layout import Convergence, Manifest


_WITH_TEXTS = """\
The texts in `texts.parquet` keep the licence of the data set that they come from, and activations can be partly turned
back into text: share this cache under the same terms."""
_WITHOUT_TEXTS = """\
This copy was made without its texts: words, token ids and places in the texts were left out too, and the texts' hashes
are salted. **Activations can still be partly turned back into text**: share this cache only where the texts themselves
could be seen."""


def card(manifest: "Manifest") -> bytes:
    """The card as UTF-8 Markdown. Says nothing that depends on when or where the cache was made."""
    # The same manifest gives the same card, whether it was just made or read from its sorted JSON.
    ordered = sorted(manifest.sites.items(), key=lambda item: [part.zfill(20) for part in item[0].split(".")])
    geometry = manifest.geometry
    sites = "\n".join(
        f"| `{name}` | {site.width} | {site.encoding} | "
        f"{site.statistics.norm_quantile(0.05):.3g} / {site.statistics.norm_quantile(0.5):.3g} / "
        f"{site.statistics.norm_quantile(0.95):.3g} | {site.loss.relative_l2:.2g} / {site.loss.median_row:.2g} / "
        f"{site.loss.worst_row:.2g} | {1 - site.loss.mean_cosine:.2g} | {site.loss.lost_share:.2%} |"
        for name, site in ordered
    )
    splits = "\n".join(
        f"| {_plain(name)} | {split.texts:,} | {split.rows:,} |" for name, split in sorted(manifest.splits.items())
    )
    settings = "\n".join(f"| {_plain(name)} | {_plain(value)} |" for name, value in _flat(manifest.identity))
    counts = "\n".join(
        f"| {_plain(name.replace('_', ' '))} | {value:,} |" for name, value in sorted(manifest.counts.items())
    )
    saliency = ""
    if manifest.saliency:
        settings_of: Any = manifest.identity.get("settings", {})
        saliency = _saliency(settings_of if isinstance(settings_of, dict) else {}, manifest.convergence)
    policies = _policies(manifest.identity.get("settings"))
    classes = f"Classes: {_plain(', '.join(manifest.class_names))}.\n\n" if manifest.class_names else ""
    recoded = ""
    if "recoded" in manifest.identity:
        recoded = " The originals are the values of the cache that this one was recoded from."
    made_from = f"\nMade from the cache `{manifest.parent}`.\n" if manifest.parent else ""
    first, width = ordered[0][0], ordered[0][1].width
    text = f"""---
library_name: clvq
tags:
- clvq
- activations
license: unknown
---

# Activations for clvq

Paired activations of a language model: {geometry.rows:,} rows of {geometry.texts:,} texts, each row at all sites below.
{_WITH_TEXTS if set(TEXTUAL_COLUMNS) <= set(manifest.columns) else _WITHOUT_TEXTS}
{made_from}
| site | channels | encoding | norm: 5 %, median, 95 % | error of encoding: all, median row, worst row | 1 − cosine | \
values lost |
|---|---|---|---|---|---|---|
{sites}

The error of encoding is ‖stored − original‖ / ‖original‖, measured while writing; a value is lost where it was not zero
and is stored as zero.{recoded}

| split | texts | rows |
|---|---|---|
{splits}

{policies}{classes}| what happened to the texts | number |
|---|---|
{counts}
{saliency}
## How it was made

| setting | value |
|---|---|
{settings}

## Load it

```python
import clvq

cache = clvq.Cache("this-folder")
rows = cache.rows_of(cache.splits([{json.dumps(min(manifest.splits))}]))
vectors = cache.vectors("{first}", rows[:1000])  # float32 [row, {width}]
```

`activations.zarr` is a plain Zarr v3 group: `zarr.open_group("this-folder/activations.zarr", mode="r")`. An array whose
attribute `encoding` is `bf16` holds the bits of bfloat16 in uint16; one of `int8` is to be multiplied by
`scales/<site>` of its row and `channel_scale/<site>` of its channel. Rows whose `rows/text` is −1 are not in use.
"""
    return text.encode()


def _saliency(settings: dict[str, Any], convergence: "Convergence | None") -> str:
    def of(name: str) -> str:
        return _plain(str(settings.get(name)))

    kind = {"ig": "integrated gradients", "gradient": "gradient × input"}.get(str(settings.get("saliency")), "unknown")
    how = f"{kind} at `{of('saliency_site')}`"
    if convergence is None:
        delta = ""
    else:
        how += f", {of('saliency_steps')} steps, baseline {of('saliency_baseline')}"
        delta = (
            " Their convergence delta, the sum over a text less the difference of the logits, has a magnitude of "
            f"{convergence.median:.2g} in the median of {convergence.texts:,} texts, and of "
            f"{convergence.quantile_95:.2g} at the 95 % quantile."
        )
    return f"\nEach row has a saliency for the predicted class, in units of its logit: {how}.{delta}\n"


_POLICIES = {
    "mark": "have rows of their own kind (column `special`: {kinds})",
    "keep": "have rows that count as rows of the text (`special` is 0, the span in the text empty)",
    "drop": "have no rows",
}


def _policies(settings: Any) -> str:
    """What was done with tokens that are not of the text; nothing of caches that do not say it."""
    if not isinstance(settings, dict):
        return ""
    asked = {"special": ("Special tokens", "1 and 2")}
    if settings.get("task") == "prompt":
        asked["instruction"] = ("Tokens of the prompt around the text", "3")
    said = [
        f"{what} {_POLICIES[chosen].format(kinds=kinds)}."
        for name, (what, kinds) in asked.items()
        if isinstance(chosen := settings.get(name), str) and chosen in _POLICIES
    ]
    return " ".join(said) + "\n\n" if said else ""


def _flat(value: dict[str, Any], name: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, inner in sorted(value.items()):
        full = f"{name}.{key}" if name else key
        if isinstance(inner, dict):
            rows += _flat(inner, full)
        else:
            shown = ", ".join(map(str, inner)) if isinstance(inner, list) else str(inner)
            rows.append((full, shown))
    return rows


def _plain(text: str) -> str:
    """Foreign text as it stands in a table, unable to break out of it or to become markup."""
    one_line = " ".join(text.split())
    return "".join(f"\\{sign}" if sign in "\\|`*_[]<>#&" else sign for sign in one_line)
