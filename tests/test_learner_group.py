"""How the learners' failures end a run, without Ray Train."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import RayActorError
from ray.train import PreemptionInfo
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

from distillm_ray.cluster.actors import BufferLost
from distillm_ray.cluster.learner import LearnerGroup, LearnerJob
from distillm_ray.cluster.placement import learners as learners_spec
from distillm_ray.config import Config
from distillm_ray.errors import ModelError, RunFailed
from tests import make


def group(
    config: Config,
    fit: Callable[[], None],
    newest_checkpoint: Callable[[], int] = lambda: 0,
    say: Callable[[str], None] = print,
) -> LearnerGroup:
    """A learner group with a function in place of Ray Train."""
    job = cast(Any, SimpleNamespace(config=config))
    learners = LearnerGroup(cast(Any, None), job, print, newest_checkpoint, say)
    trainer = SimpleNamespace(fit=fit)
    cast(Any, learners)._trainer = lambda: trainer
    return learners


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (
            WorkerGroupError("all", {0: BufferLost("died"), 1: RuntimeError("peer gone")}),
            r"^the replay buffer died, .* learner\.max_restarts = 3 times, .*failure\.txt",
        ),
        (
            WorkerGroupError("all", {1: RuntimeError("no memory\nat all")}),
            r"^rank 1 of the learners failed: RuntimeError: no memory\. The learners",
        ),
        (ControllerError(RuntimeError("lost")), r"^the controller of the learners failed: "),
    ],
)
def test_a_failure_that_restarts_do_not_fix_ends_the_run_with_a_message(
    tmp_path: Path, failure: Exception, said: str
) -> None:
    def fit() -> None:
        raise failure

    config = make.config(run={"directory": tmp_path})
    learners = group(config, fit)
    learners.start()
    learners.join(60)
    with pytest.raises(RunFailed, match=said):
        learners.raise_failure()
    assert str(failure) in (tmp_path / "failure.txt").read_text(), "with its traceback"


def test_a_user_error_of_a_rank_is_raised_unchanged(tmp_path: Path) -> None:
    fits: list[int] = []

    def fit() -> None:
        fits.append(1)
        raise WorkerGroupError("all", {0: RuntimeError("peer gone"), 1: ModelError("student: no")})

    learners = group(make.config(run={"directory": tmp_path}), fit)
    learners.start()
    learners.join(60)
    with pytest.raises(ModelError, match=r"^student: no$"):
        learners.raise_failure()
    assert len(fits) == 1, "a restart does not fix it"


def test_failures_with_progress_in_between_end_no_run(tmp_path: Path) -> None:
    """A machine is lost after every checkpoint, twenty times."""
    checkpoint = 0

    def fit() -> None:
        nonlocal checkpoint
        checkpoint += 100
        if checkpoint < 2000:
            raise WorkerGroupError("all", {0: RuntimeError("preempted")})

    config = make.config(run={"directory": tmp_path}, learner={"max_restarts": 1})
    said: list[str] = []
    learners = group(config, fit, lambda: checkpoint, said.append)
    learners.start()
    learners.join(60)
    learners.raise_failure()
    assert checkpoint == 2000
    assert len(said) == 19
    assert said[0] == "rank 0 of the learners failed: RuntimeError: preempted; back to step 100"


def test_failures_at_the_same_checkpoint_end_the_run_at_the_limit(tmp_path: Path) -> None:
    fits: list[int] = []

    def fit() -> None:
        fits.append(1)
        raise RayActorError

    config = make.config(run={"directory": tmp_path}, learner={"max_restarts": 2})
    learners = group(config, fit, lambda: 100)
    learners.start()
    learners.join(60)
    with pytest.raises(RunFailed, match=r"the same checkpoint learner\.max_restarts = 2 times"):
        learners.raise_failure()
    assert len(fits) == 3


def lost_node(*, preempted: bool) -> WorkerGroupError:
    death = RayActorError("a1", "its node is gone", preempted=preempted)
    return WorkerGroupError("one", {1: WorkerHealthCheckFailedError("a health check", death)})


@pytest.mark.parametrize(
    "failure",
    [
        lost_node(preempted=True),
        PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"n": [1]}), True),
    ],
    ids=["of a rank", "of the group"],
)
def test_any_number_of_preemptions_is_survived(tmp_path: Path, failure: Exception) -> None:
    failures, said = [failure] * 5, list[str]()

    def fit() -> None:
        if failures:
            raise failures.pop()

    config = make.config(run={"directory": tmp_path}, learner={"max_restarts": 0})
    learners = group(config, fit, say=said.append)
    learners.start()
    learners.join(60)
    learners.raise_failure()
    assert len(said) == 5


def test_the_first_failure_after_a_notice_is_the_preemption_and_the_next_one_counts(
    tmp_path: Path,
) -> None:
    said = list[str]()
    started = threading.Event()

    def fit() -> None:
        started.wait(60)
        raise lost_node(preempted=False)

    config = make.config(run={"directory": tmp_path}, learner={"max_restarts": 0})
    learners = group(config, fit, say=said.append)
    learners.start()
    learners.expect_loss_of("n1")
    started.set()
    learners.join(60)
    with pytest.raises(RunFailed):
        learners.raise_failure()
    (one,) = said
    assert "after the notice that a node will be taken away; back to step 0" in one


def test_each_attempt_has_a_number_and_its_workers_are_where_the_generators_are_now(
    tmp_path: Path,
) -> None:
    config = make.config(
        run={"directory": tmp_path, "placement": "colocated"},
        learner={"workers": 2},
        rollout={"actors": 2},
    )
    job = LearnerJob(
        config=config,
        device="cpu",
        wires=cast(Any, None),
        vocabulary_size=8,
        end_token_ids=(1,),
        validation=cast(Any, None),
        held_out_prompts=(),
        probe_prompts=(),
    )
    places = iter([[{"node": "a"}, {"node": "a"}], [{"node": "b"}, {"node": "a"}]])
    learners = LearnerGroup(
        learners_spec(config, "cpu"), job, print, lambda: 0, print, lambda: next(places)
    )
    for number, nodes in ((1, ["a", "a"]), (2, ["b", "a"])):
        trainer = cast(Any, learners._trainer())
        assert trainer.train_loop_config["job"].attempt == number
        assert [one["node"] for one in trainer.scaling_config.label_selector] == nodes
