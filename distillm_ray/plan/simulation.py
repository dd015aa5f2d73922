"""A discrete-event simulation of a run: the product's own decisions, and stage times for the work.

    demand ──► generators ──► scorers ──► ReplayBuffer ──► draw ──► learners ──► publish ──► advance
                                 ▲                                                 │
                    data-set sequences of the open steps ◄─────────────────────────┘

What is generated, scored, drawn and packed is decided by `ReplayBuffer` and `plan_step`, as in a
run. Here every process is a server whose work lasts as long as its stage times say. On a machine
without GPUs all processes share its cores: if more threads work than there are cores, all of them
slow down alike. On GPUs each process has its own device.

Left out: what messages take, responses to probe prompts, evictions of teacher targets, failures.
phi stays as it is: how a validation loss will develop is not known before the run.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from distillm_ray.batching import plan_step
from distillm_ray.cluster.targets import REQUESTS_PER_SCORER
from distillm_ray.config import Config, TransformersEngine, VllmEngine
from distillm_ray.loss.terms import loss_at
from distillm_ray.plan.servers import ROLES, Generator, Rank, Role, Scorer, Server
from distillm_ray.plan.stages import Stages
from distillm_ray.replay.build import build_buffer
from distillm_ray.types import (
    Demand,
    FinishReason,
    MicroBatchPlan,
    Rollout,
    Source,
    TrainingData,
    Validation,
)

COORDINATION_CORES = 0.15
"""Cores that Ray, the driver and the coordinating actors keep busy on a machine: 0.14 in a run of
bench/throughput.py (DistiLLM, psi 0.2) on two busy cores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Processes of each role."""

    learners: int
    generators: int
    scorers: int

    @classmethod
    def of(cls, config: Config) -> Counts:
        """As the config has them; 0 where a run has none. Of a range, what a run starts with."""
        return cls(
            learners=config.learner.workers,
            generators=config.rollout.fewest if config.wants_rollouts else 0,
            scorers=config.teacher.fewest if config.teacher and config.loss.needs_teacher else 0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """What a run reads: only the lengths matter here."""

    drawn: TrainingData
    validation_tokens: int = 0  # prompts included


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the processes share. Without a limit each has what it needs."""

    cores: float = math.inf
    contention: float = 1.0  # as in `Stages`
    coordination: float = 0.0  # cores that are busy all the time

    @classmethod
    def of(cls, stages: Stages, *, cores: float | None = None) -> Machine:
        """The machine that was measured, or one with so many cores."""
        if stages.device == "cuda":
            return cls()
        return cls(
            cores=stages.cores if cores is None else cores,
            contention=stages.contention,
            coordination=COORDINATION_CORES,
        )

    def share(self, threads: float) -> float:
        """The part of a core that each of so many working threads has.

        Example:
            >>> Machine(cores=2).share(1), Machine(cores=2).share(4)
            (1.0, 0.5)
        """
        return min(1.0, self.cores / (threads + self.coordination))

    def speed(self, threads: float) -> float:
        """What a process gets done in a second beside the others: seconds of its stage times.

        Example:
            >>> machine = Machine(cores=2, contention=1.25)
            >>> machine.speed(1), machine.speed(2), machine.speed(4)
            (1.0, 0.8, 0.4)
        """
        if self.cores <= 1 or math.isinf(self.cores):
            return self.share(threads)
        others = min(max(threads + self.coordination - 1.0, 0.0) / (self.cores - 1.0), 1.0)
        return self.share(threads) / (1.0 + (self.contention - 1.0) * others)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A simulated run. Everything but the totals is of the steps after the warm-up."""

    step_seconds: tuple[float, ...]  # from the end of a step to the end of the next
    wait_seconds: tuple[float, ...]  # the learners' part without data, by step
    core_seconds: dict[Role, float]  # CPU-seconds of the role's processes together
    coordination_seconds: float  # CPU-seconds of Ray and all who coordinate
    busy_seconds: dict[Role, float]  # wall-clock seconds of the role's processes, summed
    counts: Counts
    generated_sequences: int  # of the whole simulation
    scored_sequences: int

    @property
    def seconds(self) -> float:
        """A step's mean."""
        return float(np.mean(self.step_seconds))

    @property
    def core_seconds_per_step(self) -> float:
        """CPU-seconds of all roles."""
        used = sum(self.core_seconds.values()) + self.coordination_seconds
        return used / len(self.step_seconds)

    @property
    def waiting(self) -> float:
        """The share of time that the learners wait for data."""
        return sum(self.wait_seconds) / sum(self.step_seconds)

    def busy(self, role: Role) -> float:
        """The share of time that the role's processes work."""
        count = _count_of(self.counts, role)
        total = count * sum(self.step_seconds)
        return self.busy_seconds[role] / total if count else 0.0

    @property
    def limiting(self) -> Role:
        """The role that another process would help first."""
        if self.waiting < WAITING_MATTERS:
            return "learner"
        others: tuple[Role, Role] = ("generator", "scorer")
        return max(others, key=self.busy)


WAITING_MATTERS = 0.05
"""The share of waiting from which on the learners are not what limits a run."""


def simulate(
    config: Config,
    data: RunData,
    stages: Stages,
    counts: Counts,
    machine: Machine,
    *,
    warm_up: int = 0,
) -> Outcome:
    """Simulate the run of `config` with so many processes, from start to end.

    Args:
        warm_up: steps at the beginning that are not measured.
    """
    assert 0 <= warm_up < config.learner.num_steps
    return _Simulation(config, data, stages, counts, machine).run(warm_up)


# ---- the run -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A step that was drawn."""

    rank_seconds: tuple[float, ...]
    needed: frozenset[str]  # ids of the sequences whose targets it needs


class _Simulation:
    """The state of a simulated run."""

    def __init__(
        self, config: Config, data: RunData, stages: Stages, counts: Counts, machine: Machine
    ) -> None:
        self._config = config
        self._learning = stages.learning
        self._counts = counts
        self._machine = machine
        self._total = config.learner.num_steps
        self._buffer = build_buffer(config, data.drawn)
        self._validation_seconds = (
            data.validation_tokens * stages.learning.validation_token / counts.learners
        )
        self._ranks = [Rank(config.learner.num_threads) for _ in range(counts.learners)]
        self._generators: list[Generator] = []
        if stages.generation is not None:
            self._lengths = stages.generation.response_tokens
            self._generators = [
                Generator(
                    stages.generation,
                    config.rollout.num_threads,
                    max_requests=_requests_at_once(config),
                    keep_in_flight=config.rollout.max_staleness > 0,
                    finished=self._generated,
                )
                for _ in range(counts.generators)
            ]
        self._scorers: list[Scorer] = []
        if stages.scoring is not None and config.teacher is not None:
            self._scorers = [
                Scorer(
                    stages.scoring,
                    config.teacher.num_threads,
                    max_tokens=config.teacher.max_batch_tokens,
                    finished=self._scored,
                )
                for _ in range(counts.scorers)
            ]
        self._servers: list[Server] = [*self._ranks, *self._generators, *self._scorers]
        self._to_generate: deque[Demand] = deque()
        self._to_score: deque[Rollout] = deque()
        self._targets: set[str] = set()  # ids of the sequences that have been scored
        self._asked: set[str] = set()
        self._prepared: dict[int, _Prepared] = {}
        self._next_draw = 0
        self._completed = 0
        self._published = 0
        self._after: deque[Callable[[], None]] = deque()  # what the learners do next
        self._waiting_since: float | None = None
        self._waited = 0.0  # in the present step
        self._now = 0.0
        self._busy: dict[Role, float] = dict.fromkeys(ROLES, 0.0)
        self._cores: dict[Role, float] = dict.fromkeys(ROLES, 0.0)
        self._num_generated = self._num_scored = 0

    def run(self, warm_up: int) -> Outcome:
        """From the first validation to the end of the last step."""
        steps: list[float] = []
        waits: list[float] = []
        start, busy, cores = 0.0, dict(self._busy), dict(self._cores)
        last = 0.0
        self._after.append(self._report)
        while True:
            completed = self._completed
            self._decide()
            if self._completed > completed:
                if completed >= warm_up:
                    steps.append(self._now - last)
                    waits.append(self._waited)
                last, self._waited = self._now, 0.0
                if self._completed == warm_up:
                    start, busy, cores = self._now, dict(self._busy), dict(self._cores)
                if self._completed == self._total:
                    break
            else:
                self._pass_time()
        return Outcome(
            step_seconds=tuple(steps),
            wait_seconds=tuple(waits),
            core_seconds={role: self._cores[role] - cores[role] for role in ROLES},
            coordination_seconds=self._machine.coordination * (self._now - start),
            busy_seconds={role: self._busy[role] - busy[role] for role in ROLES},
            counts=self._counts,
            generated_sequences=self._num_generated,
            scored_sequences=self._num_scored,
        )

    # ---- time ------------------------------------------------------------------------------------

    def _pass_time(self) -> None:
        """Go on to the next event of any process."""
        working = [server for server in self._servers if server.remaining < math.inf]
        assert working, f"step {self._completed} waits for ever: {self._why()}"
        threads = sum(server.threads for server in working)
        speed, share = self._machine.speed(threads), self._machine.share(threads)
        seconds = min(server.remaining for server in working)
        passed = seconds / speed
        self._now += passed
        for server in working:
            self._busy[server.role] += passed
            self._cores[server.role] += passed * share * server.threads
        for server in working:
            server.work(seconds)

    def _why(self) -> str:
        return self._buffer.waiting_for(self._completed) or "its targets"

    # ---- the learners ----------------------------------------------------------------------------

    def _decide(self) -> None:
        """Do all that can be done at this moment, at most to the end of one step."""
        while True:
            self._hand_out()
            self._draw_ahead()
            if not all(rank.idle for rank in self._ranks):
                break
            if not self._after and not self._begin_step():
                break
            if self._after and all(rank.idle for rank in self._ranks):
                completed = self._completed
                self._after.popleft()()
                if self._completed > completed:
                    return
        for scorer in self._scorers:
            scorer.begin()

    def _begin_step(self) -> bool:
        """Train on the next step if its data is there."""
        prepared = self._prepared.get(self._completed)
        if prepared is None or not prepared.needed <= self._targets:
            if self._waiting_since is None:
                self._waiting_since = self._now
            return False
        if self._waiting_since is not None:
            self._waited += self._now - self._waiting_since
            self._waiting_since = None
        del self._prepared[self._completed]
        for rank, seconds in zip(self._ranks, prepared.rank_seconds, strict=True):
            rank.give(seconds)
        self._after.append(self._end_step)
        return True

    def _end_step(self) -> None:
        step = self._completed + 1
        config = self._config
        newest = step // config.rollout.sync_interval * config.rollout.sync_interval
        if self._published < newest and self._generators and self._buffer.wants_weights:
            for rank in self._ranks:
                rank.give(self._learning.gather)
            self._after.append(lambda: self._publish(step))
        self._after.append(self._advance)
        if step % config.validation.interval == 0:
            self._after.append(self._validate)
            self._after.append(self._report)
        if step % config.checkpoint.interval == 0:
            self._after.append(self._checkpoint)

    def _publish(self, version: int) -> None:
        self._published = version
        for generator in self._generators:
            generator.load()

    def _advance(self) -> None:
        self._completed += 1
        self._buffer.advance(self._completed)

    def _validate(self) -> None:
        for rank in self._ranks:
            rank.give(self._validation_seconds)

    def _report(self) -> None:
        self._buffer.report(Validation(step=self._completed, loss=0.0, tokens=1))

    def _checkpoint(self) -> None:
        for rank in self._ranks:
            rank.give(self._learning.checkpoint)

    def _draw_ahead(self) -> None:
        """Draw the coming steps that are ready, as many ahead as the learners prefetch."""
        config = self._config
        end = min(self._completed + 1 + config.learner.prefetch_steps, self._total)
        while self._next_draw < end and self._buffer.ready(self._next_draw):
            step = self._next_draw
            plan = plan_step(
                self._buffer.draw(step),
                num_ranks=self._counts.learners,
                max_micro_batch_tokens=config.learner.max_micro_batch_tokens,
                loss=loss_at(config.loss, step, num_steps=self._total),
            )
            compared = {
                sequence.rollout.rollout_id: sequence.rollout
                for rank in plan.ranks
                for row in rank
                for sequence in row.sequences
                if sequence.needs_targets and self._scorers
            }
            for rollout in compared.values():
                self._ask_for_targets(rollout)
            self._prepared[step] = _Prepared(
                rank_seconds=tuple(self._rank_seconds(rank) for rank in plan.ranks),
                needed=frozenset(compared),
            )
            self._next_draw += 1

    def _rank_seconds(self, rows: Sequence[MicroBatchPlan]) -> float:
        times = self._learning
        rollouts = [sequence.rollout for row in rows for sequence in row.sequences]
        return (
            times.step
            + times.row * len(rows)
            + times.token * sum(rollout.num_tokens for rollout in rollouts)
            + times.loss_token * sum(rollout.num_loss_tokens for rollout in rollouts)
        )

    # ---- generators and scorers ------------------------------------------------------------------

    def _hand_out(self) -> None:
        """Give what is demanded to the process that has the least to do."""
        self._to_generate.extend(self._buffer.take_demand())
        for rollout in self._buffer.upcoming_dataset():
            self._ask_for_targets(rollout)
        while self._to_generate:
            generator = min(self._generators, key=lambda one: one.num_requests)
            if generator.num_requests >= self._config.rollout.max_in_flight:
                break
            demand = self._to_generate.popleft()
            rng = np.random.default_rng((self._config.run.seed, demand.ordinal))
            generator.request(demand, int(rng.choice(self._lengths)))
        while self._to_score:
            scorer = min(self._scorers, key=lambda one: one.num_requests)
            if scorer.num_requests >= REQUESTS_PER_SCORER:
                break
            scorer.request(self._to_score.popleft())

    def _generated(self, demand: Demand, num_tokens: int) -> None:
        self._num_generated += 1
        rollout = Rollout(
            rollout_id=f"student-{demand.ordinal}",
            prompt_id=demand.prompt_id,
            prompt_ids=demand.prompt_ids,
            response_ids=np.zeros(num_tokens, dtype=np.int32),
            loss_mask=np.ones(num_tokens, dtype=np.bool_),
            source=Source.STUDENT,
            version=self._published,
            finish_reason=FinishReason.LENGTH,
            ordinal=demand.ordinal,
        )
        if not self._ask_for_targets(rollout):
            self._buffer.add(rollout)

    def _ask_for_targets(self, rollout: Rollout) -> bool:
        """Have a sequence scored at its first visit; whether its targets are still to come."""
        if not self._scorers or not self._config.loss.compares(rollout.source):
            return False
        name = rollout.rollout_id
        if name not in self._asked:
            self._asked.add(name)
            self._to_score.append(rollout)
        return name not in self._targets

    def _scored(self, rollout: Rollout) -> None:
        self._num_scored += 1
        self._targets.add(rollout.rollout_id)
        if rollout.ordinal is not None:
            self._buffer.add(rollout)


def _requests_at_once(config: Config) -> int:
    """Requests that an engine has in its steps."""
    match config.rollout.engine:
        case VllmEngine(max_num_seqs=limit):
            return limit
        case TransformersEngine(max_batch_size=limit):
            return limit


def _count_of(counts: Counts, role: Role) -> int:
    by_role = {"learner": counts.learners, "generator": counts.generators, "scorer": counts.scorers}
    return by_role[role]
