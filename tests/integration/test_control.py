"""Run control: what the driver and the learners write and read, and what a crash loses."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from distillm_ray.cluster.actors import beside_driver
from distillm_ray.cluster.control import ControlActor, ControlClient
from distillm_ray.types import TRAINING, RunStatus
from tests.integration.actors import Actor, kill_and_await_restart, remote_control

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]


@pytest.fixture
def control() -> Actor:
    return remote_control()


def test_the_driver_and_the_learners_see_the_same_status(control: Actor) -> None:
    driver, learner = ControlClient(control), ControlClient(control)
    assert driver.status() == RunStatus()
    assert driver.update(TRAINING, stop=False) == RunStatus(phase=TRAINING)
    assert learner.wait_for("ordinal 3", 2.5).waited_s == 2.5
    assert driver.status() == RunStatus(phase=TRAINING, waiting="ordinal 3", waited_s=2.5)
    assert learner.wait_for("", 3.0) == RunStatus(phase=TRAINING, waited_s=3.0)
    assert not learner.status().ends


def test_learners_see_which_nodes_will_be_taken_away(control: Actor) -> None:
    driver, learner = ControlClient(control), ControlClient(control)
    driver.update(TRAINING, stop=False, leaving=frozenset({"a1"}))
    assert learner.status().leaving == {"a1"}
    learner.lose(frozenset({"a1"}))
    status = driver.update(TRAINING, stop=False)
    assert (status.leaving, status.losing) == (frozenset(), {"a1"})


def test_a_stop_request_of_the_driver_ends_the_run_in_a_learner(control: Actor) -> None:
    ControlClient(control).update(TRAINING, stop=True)
    status = ControlClient(control).status()
    assert status == RunStatus(phase=TRAINING, stop=True)
    assert status.ends


def test_the_first_failure_is_kept(control: Actor) -> None:
    driver, learner = ControlClient(control), ControlClient(control)
    learner.fail("the disk is full")
    learner.fail("a peer is gone")
    assert driver.update(TRAINING, stop=False) == RunStatus(
        phase=TRAINING, failure="the disk is full"
    )
    assert driver.status().ends


def test_an_update_restores_phase_and_stop_in_a_restarted_actor(control: Actor) -> None:
    driver, learner = ControlClient(control), ControlClient(control)
    driver.update(TRAINING, stop=True)
    kill_and_await_restart(control)
    assert learner.status() == RunStatus()
    assert driver.update(TRAINING, stop=True) == RunStatus(phase=TRAINING, stop=True)
    assert learner.status() == RunStatus(phase=TRAINING, stop=True)


def test_a_coordinating_actor_may_run_on_the_node_of_the_driver_only() -> None:
    """With soft affinity Ray also takes another node, which the run could do without."""
    options: Any = beside_driver(ControlActor)
    strategy = options._default_options["scheduling_strategy"]
    assert strategy.node_id == ray.get_runtime_context().get_node_id()
    assert not strategy.soft
