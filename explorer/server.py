"""Serve a site on this machine, with the model where it is at hand, until it is told to stop."""

from collections.abc import Callable, Mapping
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

from ..cache.files import only_writer, sha256_of
from ..cache.reader import Cache
from ..errors import ConfigError, Interrupted, MissingExtra, RunMismatch
from ..evaluation.serving import LOOPBACK, address, listen, local_names, run_app
from ..pipeline.language_model import LanguageModel
from ..trainer.folder import MODEL
from ..trainer.run import Run
from .application import make_app
from .folder import Site
from .live import Live, ReadTyped


def make_live(site: Site, cache: Cache, runs: Mapping[str, Path], model: LanguageModel, read_typed: ReadTyped) -> Live:
    """The live part of a site, by the cache and the runs that it was built from.

    Parameters
    ----------
    runs
        Name → folder, as `explore` was given them.

    Raises
    ------
    ConfigError
        Where the model has no head, or no block lies above a run's lower site.
    RunMismatch
        Where cache or runs are not those of the site.
    """
    given = [[name, sha256_of(path / MODEL)] for name, path in runs.items()]
    if site.settings.get("cache_id") != cache.id or site.settings.get("runs") != given:
        raise RunMismatch(f"{site.path} was built from another cache or other runs: build it again from these")
    if model.task == "none":
        raise ConfigError(
            f"{cache.path} was extracted without predictions, so that no removal can change one: "
            "extract with --task classify or prompt, or serve without the model"
        )
    loaded = {f"r{place}": Run.from_pretrained(path) for place, path in enumerate(runs.values())}
    return Live(cache, loaded, site.text_ids, model, read_typed)


def serve(
    folder: Path,
    live: Live | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8766,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve a site to this machine until SIGINT or SIGTERM.

    Parameters
    ----------
    live
        What answers about the model; without it the pages are served alone.
    port
        0 takes one that is free.
    ready
        Called with the address once requests are taken.

    Raises
    ------
    Interrupted
        Told to stop.
    ConfigError
        Where the host is not of this machine, or the port cannot be used.
    DataNotFound, DataError, FormatVersion, FolderInUse, MissingExtra
    """
    if find_spec("uvicorn") is None or find_spec("starlette") is None:
        raise MissingExtra("serving a site needs starlette and uvicorn: pip install 'clvq[explore]'")
    site = Site.read(folder)
    if host not in LOOPBACK:
        raise ConfigError(
            f"{host!r} could be reached from other machines, and whoever reaches it can run the model: serve on "
            "127.0.0.1; the site without the model is static and any web server can serve it"
        )
    # Shared: several servers may read a site that no one writes.
    with only_writer(folder, shared=True), closing(listen(host, port)) as listener:
        port = listener.getsockname()[1]
        names = local_names(host, port)
        app = make_app(site, live, hosts=names, origins={f"http://{name}" for name in names})

        def tell() -> None:
            if ready is not None:
                ready(address(host, port))

        received = run_app(app, listener, ready=tell)
    if received is not None:
        raise Interrupted(f"stopped by {received.name}", signal_number=received)
