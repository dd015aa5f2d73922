"""Signs that on-policy training runs away."""

import math
from typing import Any

import pytest

from distillm_ray.log.health import WINDOW, HealthWatch
from distillm_ray.log.records import Counters, EventRecord, StepRecord
from distillm_ray.log.tensorboard import scalars
from distillm_ray.log.totals import Totals


def step(
    number: int,
    *,
    tokens: int = 30,
    truncated: int = 0,
    looping: int = 0,
    empty: int = 0,
    responses: int = 10,
    entropy: float = 2.0,
    teacher: float = 2.0,
) -> StepRecord:
    return StepRecord(
        step=number,
        loss=1.0,
        student_entropy=entropy,
        teacher_entropy=teacher,
        work=Counters(
            generated_sequences=responses,
            generated_tokens=tokens * responses,
            truncated=truncated,
            looping=looping,
            empty=empty,
        ),
    )


def watched(steps: list[StepRecord]) -> list[EventRecord]:
    watch, found = HealthWatch(), []
    for one in steps:
        watch, events = watch.after(one)
        found += events
    return found


def run(**late: Any) -> list[EventRecord]:
    """A healthy window, then three windows with these figures."""
    healthy = [step(number) for number in range(WINDOW)]
    return watched([*healthy, *(step(WINDOW + n, **late) for n in range(3 * WINDOW))])


def test_a_healthy_run_is_not_warned() -> None:
    assert run() == []
    assert run(tokens=100) == []  # longer, but responses still end by themselves
    assert run(truncated=9) == []  # cut off, but not longer than at the start
    assert run(entropy=0.1, teacher=0.1) == []  # the teacher is as certain
    assert run(looping=2, empty=2) == []


@pytest.mark.parametrize(
    ("late", "name", "said"),
    [
        ({"tokens": 90, "truncated": 8}, "length explosion", "responses have grown from 30 to"),
        ({"entropy": 0.3}, "entropy collapse", "entropy has fallen from 2.00 to"),
        ({"looping": 5}, "looping responses", "of the responses repeat themselves"),
        ({"empty": 5}, "empty responses", "of the responses are empty"),
    ],
)
def test_each_sign_is_told_once_with_its_numbers_and_advice(
    late: dict[str, Any], name: str, said: str
) -> None:
    (event,) = run(**late)
    assert event.name == name
    assert said in event.detail
    assert any(word in event.detail for word in ("set ", "lower ", "look at"))


def test_the_numbers_of_a_whole_window_are_its_own() -> None:
    early = [step(number) for number in range(WINDOW)]
    # The first window that is warned of is the one in which the mean crosses the limit.
    late = [step(WINDOW + n, tokens=90, truncated=10) for n in range(WINDOW)]
    (event,) = watched([*early, *late])
    # k late steps of 20: the mean is 30 + 3 k > 60 and the share k / 20 > 1/2 from k = 11 on.
    assert event.step == WINDOW + 10
    assert "from 30 to 63 tokens, and 55% end" in event.detail


def test_steps_without_student_text_are_not_looked_at() -> None:
    silent = [step(n, responses=0, entropy=math.nan, teacher=math.nan) for n in range(5 * WINDOW)]
    assert watched(silent) == []
    watch = HealthWatch()
    for one in silent:
        watch, _ = watch.after(one)
    assert watch == HealthWatch()


def test_tensorboard_has_the_shares_of_the_responses() -> None:
    record = step(1, tokens=40, truncated=5, looping=1, empty=2)
    values = dict(scalars(record, Totals.of([record])))
    assert values["health/response_tokens"] == 40
    assert (values["health/truncated"], values["health/looping"], values["health/empty"]) == (
        *(0.5, 0.1),
        0.2,
    )
    assert values["health/student_entropy"] == 2.0
    without = dict(scalars(step(1, responses=0), Totals()))
    assert "health/response_tokens" not in without
