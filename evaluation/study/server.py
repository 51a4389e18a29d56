"""Serve a study on this machine, until it is told to stop."""

import logging
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from ...cache.files import only_writer
from ...errors import ConfigError, DataNotFound, Interrupted, MissingExtra
from ..serving import LOOPBACK, address, listen, local_names, run_app
from .application import make_app
from .database import Database
from .folder import ANSWERS, Study, read_study

_logger = logging.getLogger(__name__)


def serve(
    folder: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    public_url: str | None = None,
    expose: bool = False,
    annotators: int | None = None,
    ready: Callable[[list[str]], None] | None = None,
) -> None:
    """Serve a study until SIGINT or SIGTERM.

    Parameters
    ----------
    port
        0 takes one that is free.
    public_url
        The address under which people reach the server through a proxy that encrypts.
    expose
        Allow a `host` that other machines can reach. Traffic is not encrypted.
    annotators
        Make links for so many; at least the number planned. Links are never removed.
    ready
        Called with the annotators' links once requests are taken.

    Raises
    ------
    Interrupted
        Told to stop; every answer that was acknowledged is saved.
    ConfigError
        The host, the port or the public URL cannot be used.
    FolderInUse
        The study is being served already.
    DataNotFound, DataError, FormatVersion, DiskFull, MissingExtra
    """
    if find_spec("uvicorn") is None:
        raise MissingExtra("serving a study needs starlette and uvicorn: pip install 'clvq[study]'")
    study = read_study(folder)
    public = None if public_url is None else _checked(public_url)
    _check_host(host, public, expose=expose)
    with only_writer(folder), closing(listen(host, port)) as listener:
        port = listener.getsockname()[1]
        local = local_names(host, port)
        hosts = local if public is None else {*local, urlsplit(public).netloc.lower()}
        origins = {f"http://{name}" for name in local}
        if public is not None:
            origins.add(f"{urlsplit(public).scheme}://{urlsplit(public).netloc}".lower())
        with closing(_database(study)) as database:
            tokens = database.tokens(max(study.settings.annotators, annotators or 0))
            app = make_app(study, database, tokens, hosts=hosts, origins=origins)

            def tell() -> None:
                if ready is not None:
                    ready(_links(tokens, public or address(host, port)))

            received = run_app(app, listener, ready=tell)
    if received is not None:
        raise Interrupted(
            f"stopped by {received.name}; every answer is saved: run the same command again to go on",
            signal_number=received,
        )


def links(folder: Path, base_url: str) -> list[str]:
    """The links of a study that has been served, by number of the annotator.

    Raises
    ------
    DataNotFound, DataError, ConfigError
    """
    study = read_study(folder)
    if not (folder / ANSWERS).exists():
        raise DataNotFound(f"{folder} has no links yet: they are made when it is first served, with `clvq study serve`")
    with closing(_database(study)) as database:
        return _links(database.tokens(), _checked(base_url))


def _database(study: Study) -> Database:
    idle = timedelta(minutes=study.settings.idle_minutes)
    return Database(study.folder / ANSWERS, study.digest, study.pool, idle=idle)


def _links(tokens: list[str], base: str) -> list[str]:
    return [f"{base.rstrip('/')}/a/{token}/" for token in tokens]


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment)
        # Raises where it is no number.
        fine = fine and parts.username is None and (parts.port is None or parts.port > 0)
    except ValueError:
        fine = False
    if not fine:
        raise ConfigError(f"{url!r} is no address of a study: give one like https://study.example.org")
    return url


def _check_host(host: str, public: str | None, *, expose: bool) -> None:
    if host in LOOPBACK:
        return
    if not expose:
        raise ConfigError(
            f"other machines could reach {host}, without encryption: serve on 127.0.0.1 behind a proxy with TLS and "
            "give its address as --public-url, or allow this with --expose"
        )
    if host in ("", "0.0.0.0", "::") and public is None:
        raise ConfigError(f"{host!r} is no address that a link can name: give the one that people use as --public-url")
    _logger.warning("other machines can reach the study at %s, and what they send is not encrypted", host)
