"""The learners as the driver sees them: what they are told, and how they end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from distillm_ray.cluster.buffer_actor import BufferLost
from distillm_ray.cluster.resources import Device
from distillm_ray.cluster.services import Wires
from distillm_ray.config import Config
from distillm_ray.errors import RunFailed, UserError
from distillm_ray.types import Prompt

FAILURE_FILE = "failure.txt"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LearnerJob:
    """Everything a Ray Train worker is told."""

    config: Config
    device: Device
    wires: Wires
    vocabulary_size: int
    validation: Any  # reference to the held-out demonstrations
    probe_prompts: tuple[Prompt, ...]


class Learners(threading.Thread):
    """Ray Train's `fit` blocks; the driver has a log to show meanwhile."""

    def __init__(self, fit: Callable[[], None], config: Config) -> None:
        """`fit` returns when all ranks have ended."""
        super().__init__(daemon=True, name="learners")
        self._fit = fit
        self._max_restarts = config.learner.max_restarts
        self._directory = config.run.directory
        self._failure: BaseException | None = None

    def run(self) -> None:
        """See `threading.Thread`."""
        try:
            self._fit()
        except BaseException as error:
            self._failure = error  # for the driver's thread

    def raise_failure(self) -> None:
        """What the learners ended with, if it was a failure. Only after their end.

        Raises:
            UserError: what a rank raised for the user's eyes.
            RunFailed: restarts could not mend it; all that is known is in the run's failure.txt.
        """
        assert not self.is_alive()
        match self._failure:
            case None:
                return
            case WorkerGroupError() as failure:
                causes = {
                    rank: error.__cause__ or error
                    for rank, error in failure.worker_failures.items()
                }
                for cause in causes.values():
                    if isinstance(cause, UserError):
                        raise cause from failure
                rank, cause = next(iter(causes.items()))
                what = f"rank {rank} of the learners failed: {_in_a_line(cause)}"
                if isinstance(cause, BufferLost):
                    what = "the replay buffer died, for want of memory perhaps"
            case TrainingFailedError() | RayActorError() as failure:
                what = f"the controller of the learners failed: {_in_a_line(failure)}"
            case other:
                raise other
        path = self._directory / FAILURE_FILE
        path.write_text(str(failure), encoding="utf-8")
        raise RunFailed(
            f"{what}. The learners may go back to their checkpoint learner.max_restarts ="
            f" {self._max_restarts} times, for whatever reason, and have. What Ray knows is in"
            f" {path} and in the logs of the nodes; the same command resumes from the last"
            " checkpoint"
        ) from failure


def _in_a_line(error: BaseException) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"
