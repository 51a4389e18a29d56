"""Serving an application on this machine until it is told to stop: the port, the names it goes by, the signals."""

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SHUTDOWN_SECONDS = 5


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections; 0 takes a port that is free.

    Raises
    ------
    ConfigError
        Where the port cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if not 0 <= port <= 65_535:
        raise ConfigError(f"port {port} is none: ports go from 1 to 65,535, and 0 takes one that is free")
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"port {port} of {host} cannot be used ({error}): another server may be using it; give another --port"
        ) from error


def local_names(host: str, port: int) -> set[str]:
    """What the Host header says when a browser of this machine asks."""
    return {f"[{name}]:{port}" if ":" in name else f"{name}:{port}" for name in {*LOOPBACK, host}}


def address(host: str, port: int) -> str:
    """Where a browser of this machine finds the server."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def run_app(
    app: "ASGIApp", listener: socket.socket, *, ready: Callable[[], None] | None = None
) -> signal.Signals | None:
    """Answer requests until SIGINT or SIGTERM; gives the signal that came, where one did.

    Parameters
    ----------
    ready
        Called when requests are taken.
    """
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(
            app,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            # Its lines would hold the secrets of links.
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        )
    )
    with _signals(server) as received:
        if ready is not None:
            ready()
        server.run(sockets=[listener])
    return signal.Signals(received[0]) if received else None


@contextmanager
def _signals(server: "uvicorn.Server") -> Iterator[list[int]]:
    """The signals that came; they stop the server, also before and after it listens to them by itself."""
    received: list[int] = []

    def keep(number: int, frame: FrameType | None) -> None:
        received.append(number)
        server.should_exit = True

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.signal(number, keep) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
