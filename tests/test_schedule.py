"""phi, the replay ratio and the three reference rules, on written-out loss sequences."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distillm_ray.config import AdaptiveSchedule, FixedSchedule, ReferenceRule
from distillm_ray.replay.schedule import Schedule
from distillm_ray.types import Validation


def adaptive(**changes: object) -> Schedule:
    config = AdaptiveSchedule.model_validate({"type": "adaptive", **changes})
    return Schedule.from_config(config, total_steps=100)


def phis(schedule: Schedule, losses: list[float]) -> list[float]:
    """phi after each validation."""
    found = []
    for index, loss in enumerate(losses):
        schedule = schedule.after(Validation(step=10 * index, loss=loss, tokens=100))
        found.append(schedule.phi)
    return found


def test_the_replay_ratio_falls_from_one_to_zero_by_default() -> None:
    schedule = adaptive()
    assert [schedule.replay_ratio(step) for step in (0, 25, 50, 100)] == [1.0, 0.75, 0.5, 0.0]


def test_the_replay_ratio_can_be_constant_or_rise() -> None:
    constant, rising = adaptive(replay_ratio="constant"), adaptive(replay_ratio="increasing")
    assert [constant.replay_ratio(step) for step in (0, 25, 100)] == [0.5, 0.5, 0.5]
    assert [rising.replay_ratio(step) for step in (0, 25, 100)] == [0.0, 0.25, 1.0]


def test_the_rollout_rate_is_phi_times_the_replay_ratio() -> None:
    assert adaptive(start=0.8).rollout_rate(25) == pytest.approx(0.6)


def test_without_replay_every_student_output_is_fresh() -> None:
    schedule = Schedule.from_config(FixedSchedule(phi=1.0), total_steps=10)
    assert [schedule.rollout_rate(step) for step in range(10)] == [1.0] * 10


def test_a_fixed_schedule_never_moves() -> None:
    schedule = Schedule.from_config(FixedSchedule(phi=0.3), total_steps=10)
    assert phis(schedule, [1.0, 5.0, 9.0]) == [0.3, 0.3, 0.3]


def test_the_validation_before_training_only_sets_the_reference() -> None:
    rules: list[ReferenceRule] = ["best", "last_increase", "previous"]
    for rule in rules:
        after = adaptive(reference=rule).after(Validation(step=0, loss=3.0, tokens=1))
        assert (after.phi, after.reference) == (0.0, 3.0)


# One loss sequence for the three rules: the lowest loss is 2.0, then it rises.
LOSSES = [4.0, 3.0, 2.0, 2.5, 2.4, 2.6, 3.9, 4.0]


def test_best_raises_phi_when_the_loss_is_not_below_the_lowest_since_the_last_rise() -> None:
    # 2.5 >= 2.0 rises, reference 2.5; 2.4 improves; 2.6 >= 2.4 rises; 3.9 and 4.0 rise.
    expected = [0.0, 0.0, 0.0, 0.1, 0.1, 0.2, 0.3, 0.4]
    assert phis(adaptive(reference="best"), LOSSES) == pytest.approx(expected)


def test_last_increase_raises_phi_when_the_loss_is_not_below_that_of_the_last_rise() -> None:
    # Only 4.0 reaches the loss before training.
    expected = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.1]
    assert phis(adaptive(reference="last_increase"), LOSSES) == pytest.approx(expected)
    # After a rise at 4.0 the reference is 4.0; 3.5 does not reach it, 4.2 does.
    more = phis(adaptive(reference="last_increase"), [3.0, 4.0, 3.5, 4.2, 4.1])
    assert more == pytest.approx([0.0, 0.1, 0.1, 0.2, 0.2])


def test_previous_raises_phi_when_the_loss_is_not_below_the_validation_before() -> None:
    expected = [0.0, 0.0, 0.0, 0.1, 0.1, 0.2, 0.3, 0.4]
    assert phis(adaptive(reference="previous"), LOSSES) == pytest.approx(expected)
    # 2.4 < 2.5 keeps phi, as under `best`. After a fall and a partial recovery the rules differ.
    falling = [3.0, 1.0, 2.0, 1.5, 1.7]
    assert phis(adaptive(reference="previous"), falling) == pytest.approx([0, 0, 0.1, 0.1, 0.2])


def test_best_and_previous_differ_within_the_tolerance() -> None:
    creeping = [2.0, 2.05, 2.1, 2.15]
    best = adaptive(reference="best", tolerance=0.1)
    previous = adaptive(reference="previous", tolerance=0.1)
    assert phis(best, creeping) == pytest.approx([0, 0, 0.1, 0.1])
    assert phis(previous, creeping) == pytest.approx([0, 0, 0, 0])


def test_a_loss_equal_to_the_reference_raises_phi() -> None:
    assert phis(adaptive(), [2.0, 2.0]) == pytest.approx([0.0, 0.1])


def test_a_loss_below_reference_plus_tolerance_does_not_raise_phi() -> None:
    assert phis(adaptive(tolerance=0.25), [2.0, 2.2499]) == [0.0, 0.0]
    assert phis(adaptive(tolerance=0.25), [2.0, 2.25]) == pytest.approx([0.0, 0.1])


def test_ten_rises_of_a_tenth_make_exactly_one_and_no_more() -> None:
    assert phis(adaptive(), [1.0] * 13)[-4:] == [0.9, 1.0, 1.0, 1.0]


def test_an_infinite_loss_raises_phi_and_nan_is_refused_by_name() -> None:
    assert phis(adaptive(), [1.0, float("inf")]) == pytest.approx([0.0, 0.1])
    with pytest.raises(ValueError, match=r"got nan at step 0: .* check student\.model"):
        phis(adaptive(), [float("nan")])
    with pytest.raises(ValueError, match=r"got nan at step 10: .* lower learner\.learning_rate"):
        adaptive().after(Validation(step=10, loss=float("nan"), tokens=1))


@given(
    losses=st.lists(st.floats(0.0, 10.0), max_size=30),
    rule=st.sampled_from(["best", "last_increase", "previous"]),
    start=st.floats(0.0, 1.0),
    increment=st.floats(0.01, 1.0),
    tolerance=st.floats(0.0, 1.0),
)
def test_phi_never_falls_and_follows_the_rules_definition(
    losses: list[float], rule: ReferenceRule, start: float, increment: float, tolerance: float
) -> None:
    schedule = adaptive(reference=rule, start=start, increment=increment, tolerance=tolerance)
    found = phis(schedule, losses)
    # The definitions, computed over the whole history instead of a running reference.
    phi, last_rise = start, 0
    for index, loss in enumerate(losses):
        if index > 0:
            reference = {
                "best": min(losses[last_rise:index]),
                "last_increase": losses[last_rise],
                "previous": losses[index - 1],
            }[rule]
            if loss >= reference + tolerance:
                phi, last_rise = min(1.0, phi + increment), index
        assert found[index] == pytest.approx(phi, abs=1e-9)
    assert all(a <= b <= 1.0 for a, b in zip([start, *found], found, strict=False))


def test_a_schedule_survives_json() -> None:
    schedule = adaptive(reference="previous").after(Validation(step=0, loss=2.5, tokens=1))
    assert Schedule(**json.loads(json.dumps(asdict(schedule)))) == schedule


def test_a_resumed_schedule_keeps_phi_and_reference_and_takes_the_new_total() -> None:
    earlier = adaptive(start=0.4).after(Validation(step=0, loss=2.5, tokens=1))
    longer = Schedule.from_config(AdaptiveSchedule(), total_steps=200).resumed_from(earlier)
    assert (longer.phi, longer.reference, longer.total_steps) == (0.4, 2.5, 200)
