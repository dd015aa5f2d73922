"""What the driver's waits end with: work that returns, a stop request, a failure."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any, cast

import pytest

from distillm_ray.errors import DataError, RunFailed, UserError
from distillm_ray.types import TRAINING, RunStatus
from distillm_ray.watch import Stopped, Watch


class View:
    """Counts ticks and keeps the phases."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.ticks = 0

    def start(self, phase: str) -> None:
        self.phases.append(phase)

    def tick(self) -> None:
        self.ticks += 1


class Control:
    """Run control without an actor."""

    def __init__(self) -> None:
        self.failure: str | None = None
        self.updates: list[tuple[str, bool]] = []

    def update(self, phase: str, *, stop: bool) -> RunStatus:
        self.updates.append((phase, stop))
        return RunStatus(phase=phase, stop=stop, failure=self.failure)


class Group:
    """Learners that have ended with `error`, or still run if there is none."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def is_alive(self) -> bool:
        return self.error is None

    def raise_failure(self) -> None:
        assert self.error is not None
        raise self.error


@pytest.fixture
def watch() -> Watch:
    return Watch(cast(Any, View()))


def stop_request() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_phase_is_shown_told_to_run_control_and_timed(watch: Watch) -> None:
    control = Control()
    watch.control = cast(Any, control)
    with watch.phase("reading data"):
        pass
    assert cast(Any, watch.view).phases == ["reading data"]
    assert control.updates == [("reading data", False)]
    assert watch.phase_seconds.keys() == {"reading data"}


def test_the_result_of_work_is_returned_and_its_error_raised(watch: Watch) -> None:
    assert watch.wait_for(lambda: 7) == 7

    def bad() -> int:
        raise DataError("rows.jsonl, line 3: not JSON")

    with pytest.raises(DataError, match="line 3"):
        watch.wait_for(bad)


def test_a_stop_request_ends_the_wait_for_work_that_does_not_return(watch: Watch) -> None:
    forever = threading.Event()
    with watch.signals(), pytest.raises(Stopped), watch.phase("reading data"):
        watch.wait_for(lambda: (stop_request(), forever.wait()))
    forever.set()


def test_a_stop_request_ends_the_next_phase_but_not_the_training(watch: Watch) -> None:
    control = Control()
    watch.control = cast(Any, control)
    with watch.signals():
        stop_request()
        with watch.phase(TRAINING):
            watch.interrupt()  # the learners write a checkpoint
        with pytest.raises(Stopped), watch.phase("evaluating the teacher"):
            pytest.fail("the phase began")
    assert control.updates[0] == (TRAINING, True)


def test_a_failure_that_a_role_reported_is_raised_in_every_phase(watch: Watch) -> None:
    control = Control()
    watch.control = cast(Any, control)
    control.failure = "teacher.dtype is wrong"
    for phase in ("evaluating the student before training", TRAINING):
        with pytest.raises(UserError, match=r"teacher\.dtype is wrong"), watch.phase(phase):
            pytest.fail("the phase began")


@pytest.mark.parametrize("error", [UserError("zero_stage"), RunFailed("rank 1 failed")])
def test_learners_that_end_before_training_end_the_wait_with_their_error(
    watch: Watch, error: Exception
) -> None:
    watch.group = cast(Any, Group())
    watch.interrupt()
    watch.group = cast(Any, Group(error))
    with pytest.raises(type(error), match=str(error)):
        watch.interrupt()


def test_handlers_are_put_back_after_the_run(watch: Watch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with watch.signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_interrupt_ends_the_driver_at_once(watch: Watch) -> None:
    with watch.signals(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigtimedwait([], 1)
