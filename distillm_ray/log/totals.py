"""Sums over the steps of a run, and the target reuse that follows from them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from distillm_ray.log.costs import Role, RoleCost, added
from distillm_ray.log.records import (
    CheckpointRecord,
    CostRecord,
    Counters,
    PublishRecord,
    Record,
    StepRecord,
    ValidationRecord,
)
from distillm_ray.types import TRAINING, Mix


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over the records that are not superseded."""

    steps: int = 0
    last_step: int = 0
    skipped_steps: int = 0
    tokens: int = 0  # trained on: prompts included, fillers left out
    positions: int = 0  # computed by the learners, padding and fillers included
    infinite_tokens: int = 0
    learn_seconds: float = 0.0
    wait_seconds: float = 0.0
    publish_seconds: float = 0.0  # of the learners, as those of the next two
    validate_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    publishes: int = 0
    mix: Mix = field(default_factory=Mix)  # sequences trained on
    untargeted_sequences: int = 0  # trained on without the teacher
    untargeted_tokens: int = 0
    work: Counters = field(default_factory=Counters)
    has_targets: bool = False  # the teacher scored a sequence, or a store held targets
    training_seconds: float = 0.0  # wall-clock that `training_costs` cover
    training_costs: dict[Role, RoleCost] = field(default_factory=dict)
    costs: dict[Role, RoleCost] = field(default_factory=dict)  # of all phases

    @classmethod
    def of(cls, records: Iterable[Record]) -> Totals:
        """The sums over several records."""
        totals = cls()
        for record in records:
            totals = totals.plus(record)
        return totals

    def plus(self, record: Record) -> Totals:
        """The sums with one more record."""
        match record:
            case PublishRecord(seconds=seconds):
                return dataclasses.replace(
                    self,
                    publishes=self.publishes + 1,
                    publish_seconds=self.publish_seconds + seconds,
                )
            case ValidationRecord(seconds=seconds):
                return dataclasses.replace(self, validate_seconds=self.validate_seconds + seconds)
            case CheckpointRecord(seconds=seconds):
                return dataclasses.replace(
                    self, checkpoint_seconds=self.checkpoint_seconds + seconds
                )
            case CostRecord(phase=phase, seconds=seconds, roles=roles):
                totals = dataclasses.replace(self, costs=added(self.costs, roles))
                if phase != TRAINING:
                    return totals
                return dataclasses.replace(
                    totals,
                    training_seconds=self.training_seconds + seconds,
                    training_costs=added(self.training_costs, roles),
                )
            case StepRecord(mix=mix, work=work):
                return dataclasses.replace(
                    self,
                    steps=self.steps + 1,
                    last_step=record.step,
                    skipped_steps=self.skipped_steps + record.skipped,
                    tokens=self.tokens + record.tokens,
                    positions=self.positions + record.positions,
                    infinite_tokens=self.infinite_tokens + record.infinite_tokens,
                    learn_seconds=self.learn_seconds + record.learn_seconds,
                    wait_seconds=self.wait_seconds + record.wait_seconds,
                    mix=Mix(
                        fresh=self.mix.fresh + mix.fresh,
                        replay=self.mix.replay + mix.replay,
                        dataset=self.mix.dataset + mix.dataset,
                        corpus=self.mix.corpus + mix.corpus,
                    ),
                    untargeted_sequences=self.untargeted_sequences + record.untargeted_sequences,
                    untargeted_tokens=self.untargeted_tokens + record.untargeted_tokens,
                    work=self.work.plus(work),
                    has_targets=self.has_targets
                    or work.scored_sequences > 0
                    or record.buffer.target_bytes > 0,
                )
            case _:
                return self

    @property
    def target_reuse_sequences(self) -> float:
        """1 - sequences scored / sequences trained on that a term compares with the teacher.

        Negative where more was scored than trained on, for example again after an eviction.
        NaN before the first step and in a run without teacher targets.
        """
        trained = self.mix.total - self.untargeted_sequences
        return self._reuse(self.work.scored_sequences, trained)

    @property
    def target_reuse_tokens(self) -> float:
        """1 - positions the teacher computed / tokens of these sequences, prompts in both.

        Negative or NaN as `target_reuse_sequences`.
        """
        return self._reuse(self.work.scored_tokens, self.tokens - self.untargeted_tokens)

    def _reuse(self, scored: int, trained: int) -> float:
        return 1 - scored / trained if self.has_targets and trained else math.nan
