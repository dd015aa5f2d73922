"""How the learners' failures end a run, without Ray Train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from distillm_ray.cluster.actors import BufferLost
from distillm_ray.cluster.learner import LearnerGroup
from distillm_ray.config import Config
from distillm_ray.errors import ModelError, RunFailed
from tests import make


def group(config: Config, fit: Callable[[], None]) -> LearnerGroup:
    """A learner group with a function in place of Ray Train."""
    learners = LearnerGroup(cast(Any, None), cast(Any, SimpleNamespace(config=config)), print)
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
    assert (tmp_path / "failure.txt").read_text() == str(failure)


def test_a_user_error_of_a_rank_is_raised_unchanged(tmp_path: Path) -> None:
    def fit() -> None:
        raise WorkerGroupError("all", {0: RuntimeError("peer gone"), 1: ModelError("student: no")})

    learners = group(make.config(run={"directory": tmp_path}), fit)
    learners.start()
    learners.join(60)
    with pytest.raises(ModelError, match=r"^student: no$"):
        learners.raise_failure()
