"""The replay buffer's actor: what learners and orchestrator see when it dies and is restored."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray

from distillm_ray.cluster import buffer as buffer_module
from distillm_ray.cluster.actors import BufferLost
from distillm_ray.cluster.buffer import BufferActor, ReplayProducer
from distillm_ray.cluster.learner import Links
from distillm_ray.cluster.log import AsyncLog
from distillm_ray.config import Config
from distillm_ray.errors import ClusterError, RunDirectoryError
from distillm_ray.types import DrawFacts, TrainingData, TrainStep, Validation
from tests import make
from tests.integration.actors import (
    Actor,
    events,
    get,
    kill_and_await_restart,
    remote,
    remote_log,
    remote_stores,
    small_config,
    start_links,
)
from tests.integration.fakes import FakeScorer

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]


def data_of(names: Sequence[str]) -> ray.ObjectRef[TrainingData]:
    """A reference to a prompt and a data-set response for every name."""
    demonstrations = [make.rollout(f"dataset-{name}") for name in names]
    prompts = [make.prompt(name) for name in names]
    return ray.put(TrainingData(prompts=prompts, demonstrations=demonstrations))


def remote_buffer(config: Config) -> Actor:
    return remote(BufferActor, config, max_task_retries=-1)


def test_a_checkpoint_of_other_data_is_refused_by_name(tmp_path: Path) -> None:
    config = small_config(tmp_path)

    def links_over(names: list[str]) -> Links:
        links, _ = start_links(config, [], [], buffer=remote_buffer(config), data=data_of(names))
        return links

    saved = links_over(["a", "b"])
    saved.orchestrator.restore(None, 0)
    state = saved.buffer.state(0)
    other = links_over(["a", "b", "c"])
    with pytest.raises(RunDirectoryError, match="must be that of the saved buffer"):
        other.orchestrator.restore(state, 0)
    other.orchestrator.restore(None, 0)


NAMES = ("a", "b", "c", "d")


def test_a_buffer_that_died_raises_in_learners_until_it_is_restored(
    tmp_path: Path,
) -> None:
    config = small_config(tmp_path)
    buffer = remote_buffer(config)
    log = remote_log(tmp_path / "log")
    scorers, stores = [remote(FakeScorer)], remote_stores(1)
    links, orchestrator = start_links(
        config, scorers, stores, buffer=buffer, data=data_of(NAMES), log=log
    )
    running = orchestrator.run.remote()
    links.orchestrator.restore(None, 0)
    links.buffer.report(Validation(step=0, loss=1.0, tokens=1))
    draw(links, 0)
    links.buffer.advance(1)
    state = links.buffer.state(1)
    second = draw(links, 1)

    waiting = buffer.draw.remote(3, 0, 100.0)  # no learner has completed that many steps
    kill_and_await_restart(buffer)
    with pytest.raises(BufferLost, match="have to go back to the last checkpoint"):
        get(waiting)
    calls: list[Callable[[], object]] = [
        lambda: links.buffer.draw(1, 0, 10.0),
        lambda: links.buffer.waiting_for(1),
        lambda: links.buffer.advance(2),
        lambda: links.buffer.state(2),
        lambda: links.buffer.report(Validation(step=2, loss=1.0, tokens=1)),
        lambda: get(orchestrator.report_step.remote(TrainStep(step=2, loss=1.0), second)),
    ]
    for call in calls:
        with pytest.raises(BufferLost):
            call()
    assert not ray.wait([running], timeout=0.5)[0], "the orchestrator must wait for the restore"

    links.orchestrator.restore(state, 1)
    assert draw(links, 1) == second, "the restored buffer continues at the same step"
    links.orchestrator.restore(state, 1)  # a learner died, the buffer did not
    assert [event.name for event in events(log)] == ["rewound", "replay buffer died", "rewound"]
    get(orchestrator.finish.remote())
    get(running)


def draw(links: Links, step: int) -> DrawFacts:
    plan = links.buffer.draw(step, 0, 60.0)
    assert plan is not None, links.buffer.waiting_for(step)
    assert plan.facts is not None
    return plan.facts


async def test_a_frozen_buffer_is_noticed_by_the_orchestrator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffer_module, "_WORK_TIMEOUT_S", 0.5)
    monkeypatch.setattr(buffer_module, "CALL_TIMEOUT_S", 2.0)
    actor = remote_buffer(small_config(tmp_path))
    pid = get(actor.__ray_call__.remote(lambda _: os.getpid()))
    nothing: Any = None
    log = AsyncLog(None)
    producer = ReplayProducer(actor, nothing, log, restore_limit_s=2.0)
    assert (await producer.work()).demand == (), "it waits for its restore"
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(ClusterError, match=r"no reply within .* s: the replay buffer"):
            await producer.work()
        with pytest.raises(ClusterError, match=r"buffer's restore \(run\.startup_timeout_s\)"):
            await producer.restore(None, 0)
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_restored_buffer_ignores_work_of_an_earlier_incarnation(tmp_path: Path) -> None:
    config = small_config(tmp_path, schedule={"type": "fixed", "phi": 1.0})
    buffer = remote_buffer(config)

    def restore(incarnation: int) -> bool:
        call = buffer.restore.remote(incarnation, None, data_of(NAMES))
        return get(call)

    assert not restore(1)
    before = get(buffer.work.remote(60.0))
    kill_and_await_restart(buffer)
    prompt_id = before.demand[0].prompt_id
    response = make.rollout("student-0", ordinal=0, prompt_id=prompt_id)
    get([buffer.add.remote(1, response), buffer.lose.remote(1, 1)])
    work = buffer.work.remote(60.0)
    assert not ray.wait([work], timeout=0.5)[0]
    assert restore(2)
    after = get(work)
    assert (before.incarnation, after.incarnation) == (1, 2)
    demands = [[(one.ordinal, one.attempt) for one in work.demand] for work in (before, after)]
    assert demands[0] == demands[1] != []
    get([buffer.add.remote(1, response), buffer.lose.remote(1, 1)])
    counters = get(buffer.counters.remote(2))
    assert (counters.fresh, counters.duplicates) == (0, 0)
    with pytest.raises(BufferLost):
        get(buffer.counters.remote(1))
    get(buffer.add.remote(2, response))
    assert get(buffer.counters.remote(2)).fresh == 1
