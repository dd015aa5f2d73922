"""Two learners on nodes of their own, one of which gets a preemption notice and is taken away."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest

from distillm_ray.log.records import CheckpointRecord, EventRecord, StepRecord
from tests.integration.ray_nodes import finish, running_head
from tests.integration.tiny import LIMIT_S, make_config, marked_processes, records

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(4 * LIMIT_S)]

STEPS = 400
LABEL = "learns"


def test_a_notice_is_answered_by_a_checkpoint_and_the_learners_go_on_elsewhere(
    tmp_path: Path,
) -> None:
    config = make_config(tmp_path, steps=STEPS, batch_size=8)
    run = tmp_path / "run"
    command = (
        *("distillm-ray", "train", config.name, "method=sft", "teacher=null", "schedule.phi=0"),
        *("learner.workers=2", "learner.num_cpus=1", f"learner.node_labels={{{LABEL}: 'yes'}}"),
        *("learner.max_restarts=0", f"checkpoint.interval={STEPS}", f"validation.interval={STEPS}"),
    )
    with running_head() as head, contextlib.ExitStack() as stack:
        nodes = [
            stack.enter_context(head.node(number, f"{LABEL}=yes", notice_s=LIMIT_S))
            for number in (2, 3, 4)
        ]
        job = head.submit("preempted", config.parent, *command)
        deadline = time.monotonic() + LIMIT_S
        while not records(run, StepRecord):
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        learning = [
            node
            for node in nodes
            if any("RayTrainWorker" in process.title for process in marked_processes(node.mark))
        ]
        assert len(learning) == 2, "each learner has a node of its own"
        learning[0].notice()
        while not records(run, CheckpointRecord):
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        learning[0].kill()
        code, output = finish(job, LIMIT_S)
    assert code == 0, output
    assert "will be taken away" in output
    saved = [record.step for record in records(run, CheckpointRecord)]
    assert len(saved) == 2, "at the notice and at the end"
    assert 0 < saved[0] < saved[1] == STEPS
    assert f"after the notice that a node will be taken away; back to step {saved[0]}" in output
    events = [(record.name, record.step) for record in records(run, EventRecord)]
    assert "preemption" in dict(events)
    assert ("resumed", saved[0]) in events
    assert [record.step for record in records(run, StepRecord)] == list(range(1, STEPS + 1))
