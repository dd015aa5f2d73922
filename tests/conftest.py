"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from hypothesis import settings

from tests import object_store

settings.register_profile("fixed", derandomize=True, max_examples=200, deadline=None)
settings.register_profile("random", max_examples=20_000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray for the whole session. It has more CPUs than the machine; test actors ask for 0."""
    ray.init(
        num_cpus=16,
        object_store_memory=150 * 2**20,
        log_to_driver=False,
        include_dashboard=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def store_server() -> Iterator[object_store.ObjectStore]:
    """One object store for the whole session."""
    with object_store.serving() as store:
        yield store


@pytest.fixture
def store(
    store_server: object_store.ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> object_store.ObjectStore:
    """An object store with an empty bucket; the environment names it, and an empty cache."""
    store_server.empty()
    for name, value in store_server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DISTILLM_RAY_CACHE", str(tmp_path / "cache"))
    return store_server
