"""How long a learner waits for the roles that it talks to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from distillm_ray.cluster import orchestrator
from distillm_ray.cluster.orchestrator import OrchestratorClient
from distillm_ray.cluster.rollout import TIMEOUTS_PER_CALL
from distillm_ray.config import Config


def test_a_publish_and_a_probe_wait_longer_than_the_pool_needs_to_replace_a_generator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = Config.model_validate(
        {
            "run": {"directory": "runs/x", "startup_timeout_s": 30.0},
            "teacher": {"model": "models/teacher"},
            "student": {"model": "models/student"},
            "data": {"train": ["data/train.jsonl"]},
            "learner": {"steps": 10, "batch_size": 8},
            "rollout": {"timeout_s": 70.0},
        }
    )
    waited: list[float] = []

    def ask(call: object, what: str, *, timeout_s: float) -> list[Any]:
        waited.append(timeout_s)
        return []

    monkeypatch.setattr(orchestrator, "ask", ask)
    remote = SimpleNamespace(remote=lambda *_: None)
    client = OrchestratorClient(cast(Any, SimpleNamespace(publish=remote)), config)
    client.publish(cast(Any, None))
    client._probe = cast(Any, object())
    client.finish_probe()
    assert len(waited) == 2
    assert min(waited) > TIMEOUTS_PER_CALL * 70.0 + 30.0
