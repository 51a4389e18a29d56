"""What all tests share: no network, one thread, a small cache, tiny models."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import clvq
import hypothesis
import pytest
import torch

from .caches import make_cache

TOLD = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the long form of the fault tests, and nothing else")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "soak: a fault test with a long form")
    config.addinivalue_line("markers", "llm: asks a real language model behind a real server on this machine")
    config.addinivalue_line("markers", "browser: drives the pages in a real headless Chromium")
    config.stash[TOLD] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--soak"):
        others = [item for item in items if item.get_closest_marker("soak") is None]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--soak"):
        terminalreporter.section("what was done")
        for line in config.stash[TOLD]:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def soak(request: pytest.FixtureRequest) -> bool:
    """Whether to run the long form of a test; its test is to be marked `soak`."""
    return bool(request.config.getoption("--soak"))


@pytest.fixture(scope="session")
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Adds a line to what `make soak` prints in the end."""
    return request.config.stash[TOLD].append


# A busy machine is slow now and then; that is no failure.
hypothesis.settings.register_profile("clvq", deadline=None)
hypothesis.settings.load_profile("clvq")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # For the processes that tests start; as for tests themselves, below.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Tensors this small are slower on several threads, by far where other work runs beside the tests.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_cache(tmp_path_factory: pytest.TempPathFactory) -> clvq.Cache:
    """A cache of 60 synthetic texts; see `caches.make_cache`."""
    return make_cache(tmp_path_factory.mktemp("cache") / "small")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of tiny random models, each made once; takes what `tiny.make_model` takes."""
    from .tiny import make_model

    @functools.cache
    def made(family: str, **settings: Any) -> Path:
        return make_model(tmp_path_factory.mktemp(family), family, **settings)

    return made


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One browser for all tests of a file."""
    from .study_browser import browser, need_browser

    need_browser()
    with browser(tmp_path_factory.mktemp("desk") / "person") as driver:
        yield driver


@pytest.fixture
def driver(opened: Any) -> Iterator[Any]:
    """That browser with no message of an earlier test, at a desk, by day."""
    from .study_browser import colours, screen

    opened.get_log("browser")
    screen(opened, width=1280)
    colours(opened, "light")
    yield opened
    opened.get("about:blank")
