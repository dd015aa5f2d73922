"""The schedule: phi, psi, the replay ratio, and when phi rises.

phi is the probability that a slot of the global batch takes a student-generated output (SGO), and
psi the probability that it takes a fresh one, which is not replayed. DistiLLM (Ko et al., ICML
2024), section 3.2 and Algorithm 1. Pure: no clock, no I/O.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from distillm_ray.config import (
    AdaptiveSchedule,
    FixedReplayRatio,
    FixedSchedule,
    PairedSchedule,
    ReferenceRule,
    ScheduleConfig,
)
from distillm_ray.errors import UserError
from distillm_ray.types import Validation


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """phi and the state that decides when it rises. With `increment` 0 phi is constant.

    Example:
        >>> schedule = Schedule(phi=0.0, total_steps=100, ratio="decreasing", increment=0.1)
        >>> schedule = schedule.after(Validation(step=0, loss=2.0, tokens=900))
        >>> schedule.phi, schedule.reference  # the first validation sets the reference
        (0.0, 2.0)
        >>> schedule = schedule.after(Validation(step=50, loss=2.5, tokens=900))
        >>> schedule.phi, schedule.reference  # 2.5 >= 2.0
        (0.1, 2.5)
        >>> schedule.replay_ratio(50), schedule.rollout_rate(50)  # 1 - 50/100, phi times that
        (0.5, 0.05)
    """

    phi: float
    total_steps: int
    ratio: FixedReplayRatio
    increment: float = 0.0
    tolerance: float = 0.0
    rule: ReferenceRule = "best"
    reference: float | None = None  # loss to compare with; None before the first validation

    @classmethod
    def from_config(cls, config: ScheduleConfig, *, total_steps: int) -> Schedule:
        """The schedule before the first validation."""
        match config:
            case AdaptiveSchedule():
                return cls(
                    phi=config.start,
                    total_steps=total_steps,
                    ratio=config.replay_ratio,
                    increment=config.increment,
                    tolerance=config.tolerance,
                    rule=config.reference,
                )
            case FixedSchedule():
                return cls(phi=config.phi, total_steps=total_steps, ratio=config.replay_ratio)
            case PairedSchedule():  # every slot has a fresh student output, beside the data's
                return cls(phi=1.0, total_steps=total_steps, ratio="none")

    def replay_ratio(self, step: int) -> float:
        """r(t): the share of SGO slots that are fresh. With `none` all of them are."""
        assert 0 <= step <= self.total_steps, f"step {step} of {self.total_steps}"
        match self.ratio:
            case "decreasing":
                return 1.0 - step / self.total_steps
            case "constant":
                return 0.5
            case "increasing":
                return step / self.total_steps
            case "none":
                return 1.0

    def rollout_rate(self, step: int) -> float:
        """psi = phi * r(t): the probability that a slot takes a fresh SGO."""
        return self.phi * self.replay_ratio(step)

    def after(self, validation: Validation) -> Schedule:
        """The schedule that holds from draw `validation.step` on.

        phi rises by `increment`, at most to 1, if loss >= reference + tolerance. The first
        validation only sets the reference.

        Raises:
            UserError: the loss is NaN.
        """
        loss = validation.loss
        if math.isnan(loss):
            remedy = (
                "check student.model"
                if validation.step == 0
                else "repeat the command with a lower learner.learning_rate to resume from the last"
                " checkpoint, or start a new run if that checkpoint is broken too"
            )
            raise UserError(
                f"the validation loss must be a number, got nan at step {validation.step}: the"
                f" student's weights are broken; {remedy}"
            )
        if self.increment == 0.0:
            return self
        if self.reference is None:
            return replace(self, reference=loss)
        rises = loss >= self.reference + self.tolerance
        match self.rule:
            case "best":
                reference = loss if rises else min(self.reference, loss)
            case "last_increase":
                reference = loss if rises else self.reference
            case "previous":
                reference = loss
        # Rounded so that ten rises of 0.1 give exactly 1.
        phi = min(1.0, round(self.phi + self.increment, 12)) if rises else self.phi
        return replace(self, phi=phi, reference=reference)

    def resumed_from(self, earlier: Schedule) -> Schedule:
        """These settings with the phi and the reference of an earlier schedule."""
        return replace(self, phi=earlier.phi, reference=earlier.reference)
