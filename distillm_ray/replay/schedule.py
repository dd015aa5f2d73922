"""When the student writes its own training text: phi, the replay ratio, and how phi rises.

DistiLLM (Ko et al., ICML 2024), section 3.2 and Algorithm 1. A pure value: no clock, no I/O.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

from distillm_ray.config import AdaptiveSchedule, FixedSchedule, ScheduleConfig
from distillm_ray.errors import UserError
from distillm_ray.types import Validation

ReferenceRule: TypeAlias = Literal["best", "last_increase", "previous"]
ReplayRatio: TypeAlias = Literal["decreasing", "constant", "increasing", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The SGO probability phi and what it takes to raise it. `increment` 0: phi stays."""

    phi: float
    total_steps: int
    ratio: ReplayRatio
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

    def replay_ratio(self, step: int) -> float:
        """r(t): the share of SGO slots that are generated anew. `none`: all of them."""
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

        phi rises by `increment` when loss >= reference + tolerance, at most to 1. The first
        validation only sets the reference. Raises UserError for a loss that is not a number.
        """
        loss = validation.loss
        if math.isnan(loss):
            cure = (
                "check student.model"
                if validation.step == 0
                else "give the same command with a lower learner.learning_rate to go on from the"
                " last checkpoint, or start another run if that one is broken too"
            )
            raise UserError(
                f"the validation loss must be a number, got nan at step {validation.step}: the"
                f" student's weights are broken; {cure}"
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
        # Rounded, so that ten rises of 0.1 make exactly 1.
        phi = min(1.0, round(self.phi + self.increment, 12)) if rises else self.phi
        return replace(self, phi=phi, reference=reference)

    def resumed_from(self, earlier: Schedule) -> Schedule:
        """These settings with the phi and the reference that an earlier schedule had reached."""
        return replace(self, phi=earlier.phi, reference=earlier.reference)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Schedule:
        """The inverse of `to_dict`."""
        return cls(**values)
