"""How long a learner waits for the roles that it talks to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from distillm_ray.cluster import services
from distillm_ray.cluster.pools import GENERATOR_CALL_TIMEOUTS
from distillm_ray.cluster.services import ActorServices, Wires
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

    def ask(call: object, what: str, timeout_s: float = services.CALL_TIMEOUT_S) -> list[Any]:
        waited.append(timeout_s)
        return []

    monkeypatch.setattr(services, "_ask", ask)
    remote = SimpleNamespace(remote=lambda *_: None)
    loop = SimpleNamespace(publish=remote, answer=remote)
    wires = Wires(buffer=cast(Any, None), loop=cast(Any, loop), stores=(), metrics=cast(Any, None))
    learner = ActorServices(wires, config, tokenizer=cast(Any, None))
    learner.publish(cast(Any, None))
    learner.start_probe()
    learner.finish_probe()
    assert len(waited) == 2
    assert min(waited) > GENERATOR_CALL_TIMEOUTS * 70.0 + 30.0
