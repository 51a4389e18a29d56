"""`clvq export`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Json
from .terminal import show


def export(
    run: Annotated[Path, typer.Argument(help="A run of the method sae, or of cross-sae with batchtopk.")],
    out: Annotated[Path, typer.Option(help="Folder to write, in the format of sae-lens.")],
    cache: Annotated[str | None, typer.Option(help="The run's cache, which knows the model's name.")] = None,
    as_json: Json = False,
) -> None:
    """Write a sparse autoencoder so that sae-lens opens it; `clvq train --from` reads it back."""
    from .cache.sharing.remote import open_cache
    from .trainer.run import Run
    from .trainer.sae_lens import write

    cfg = write(Run.from_pretrained(run), out, cache=None if cache is None else open_cache(cache))
    show({"path": out, **cfg}, as_json=as_json, title="sae-lens")
