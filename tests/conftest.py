"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import ray
from hypothesis import settings

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
