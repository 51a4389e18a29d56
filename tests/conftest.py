"""What all tests share: no network, one thread, a small cache, tiny models."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clvq
import hypothesis
import pytest
import torch

from .caches import make_cache

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
