"""A real browser for the tests of the explorer's pages, and a server that answers for the model."""

import json
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from .study_browser import until

# An address of each view, and what the page calls it once it is drawn.
VIEWS = {
    "#/r0": "overview",
    "#/r0/c/17": "concept:r0:17",
    "#/texts": "texts",
    "#/t/12?run=r0": "text:12",
    "#/compare?a=r0&b=r1": "compare",
    "#/flow": "flow",
}
READY = "return document.documentElement.dataset.ready ?? ''"


def ready(driver: Any) -> str:
    """The view that has been drawn; empty while one is being drawn."""
    return str(driver.execute_script(READY))


def visit(driver: Any, site: str, route: str, view: str) -> None:
    """Open an address as if from a link that was sent, and wait until its view is drawn."""
    driver.get("about:blank")
    driver.get(f"{site}{route}")
    until(lambda: ready(driver) == view)


def address(folder: Path) -> str:
    """The site's page as a file."""
    return (folder / "index.html").as_uri()


def fragment(driver: Any) -> str:
    """What stands behind the # in the address."""
    return str(driver.execute_script("return location.hash"))


def all_text(driver: Any) -> str:
    """All text of the page, folded parts too."""
    return str(driver.execute_script("return document.body.textContent"))


def texts_of(driver: Any, selector: str) -> list[str]:
    """The text of each element, in order."""
    script = "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)"
    return list(driver.execute_script(script, selector))


def click(driver: Any, selector: str) -> None:
    """Click the first such element, wherever it lies."""
    driver.execute_script("document.querySelector(arguments[0]).click()", selector)


def type_into(driver: Any, selector: str, text: str) -> None:
    """Replace a field's content, as by typing."""
    driver.execute_script(
        "const field = document.querySelector(arguments[0]); field.value = arguments[1];"
        "field.dispatchEvent(new Event('input', {bubbles: true}));",
        selector,
        text,
    )


def errors_in(driver: Any) -> list[str]:
    """What the browser complains of since it was asked last."""
    return [line["message"] for line in driver.get_log("browser") if line["level"] in ("SEVERE", "WARNING")]


def theme(driver: Any) -> str:
    """`light` or `dark`, as it is drawn."""
    return str(driver.execute_script("return document.documentElement.dataset.theme"))


class LiveServer:
    """Serves a site, and answers its questions to the model by a function.

    Parameters
    ----------
    folder
        The site.
    answer
        Given the path and the question; returns the status and the answer.
    """

    def __init__(self, folder: Path, answer: Callable[[str, Any], tuple[int, Any]]) -> None:
        asked: list[tuple[str, Any]] = []
        self.asked = asked

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_POST(self) -> None:
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                asked.append((self.path, question))
                status, given = answer(self.path, question)
                body = json.dumps(given).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self._server.daemon_threads = True
        self._thread = Thread(target=self._server.serve_forever)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}/index.html"

    def __enter__(self) -> "LiveServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
