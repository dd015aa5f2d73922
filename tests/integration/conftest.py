"""Fixtures of the integration tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.actors import kill_all


@pytest.fixture(autouse=True)
def _no_actor_is_left() -> Iterator[None]:
    yield
    kill_all()
