"""The replay buffer under random but valid orders of events, and each of its rules alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distillm_ray.config import FixedReplayRatio, ReferenceRule
from distillm_ray.errors import DataError
from distillm_ray.replay.buffer import ReplayBuffer
from distillm_ray.replay.draw import EpochOrder, Stream, slot_uniforms
from distillm_ray.replay.schedule import Schedule
from distillm_ray.replay.state import BufferState, digest
from distillm_ray.types import (
    Demand,
    Draw,
    FinishReason,
    Mix,
    Prompt,
    Rollout,
    Shelf,
    Source,
    Validation,
)
from tests import make


def make_prompts(count: int) -> list[Prompt]:
    return [make.prompt(f"p{index}") for index in range(count)]


def make_demonstrations(count: int) -> list[Rollout]:
    return [
        make.rollout(f"dataset-p{index}", prompt_id=f"p{index}", source=Source.DATASET)
        for index in range(count)
    ]


def make_corpus(count: int) -> list[Rollout]:
    return [
        make.rollout(f"c{index}", prompt=[3], response=[4, index], source=Source.CORPUS)
        for index in range(count)
    ]


def rollout_of(demand: Demand, version: int | None = None) -> Rollout:
    """A rollout whose tokens and log-probabilities depend on the ordinal."""
    ordinal = demand.ordinal
    num_tokens = 1 + ordinal % 3
    return make.rollout(
        f"student-{ordinal}",
        prompt_id=demand.prompt_id,
        prompt=demand.prompt_ids,
        response=np.arange(ordinal, ordinal + num_tokens),
        version=demand.min_version if version is None else version,
        finish=FinishReason.LENGTH if ordinal % 2 else FinishReason.STOP,
        logprobs=None if ordinal % 5 == 4 else np.full(num_tokens, -0.25),
        ordinal=ordinal,
        text=f"text {ordinal}",
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """The settings of a run, and its validation losses."""

    phi: float = 0.5
    ratio: FixedReplayRatio = "decreasing"
    increment: float = 0.0
    rule: ReferenceRule = "best"
    batch_size: int = 4
    capacity: int = 12
    min_size: int = 4
    lookahead: int = 2
    sync_interval: int = 1
    validation_interval: int = 4
    total_steps: int = 12
    seed: int = 0
    num_prompts: int = 7
    num_demonstrations: int = 5
    losses: tuple[float, ...] = (1.0,)
    paired: bool = False
    num_pieces: int = 0
    corpus_batch: int = 0

    def buffer(self) -> ReplayBuffer:
        return ReplayBuffer(
            prompts=make_prompts(self.num_prompts),
            demonstrations=make_demonstrations(self.num_demonstrations),
            schedule=Schedule(
                phi=self.phi,
                total_steps=self.total_steps,
                ratio=self.ratio,
                increment=self.increment,
                rule=self.rule,
            ),
            paired=self.paired,
            corpus=make_corpus(self.num_pieces),
            corpus_batch=self.corpus_batch,
            batch_size=self.batch_size,
            capacity=self.capacity,
            min_size=self.min_size,
            lookahead=self.lookahead,
            sync_interval=self.sync_interval,
            validation_interval=self.validation_interval,
            seed=self.seed,
        )

    def validation(self, step: int) -> Validation:
        index = step // self.validation_interval
        return Validation(step=step, loss=self.losses[index % len(self.losses)], tokens=10)


def finish_all(buffer: ReplayBuffer) -> list[Demand]:
    demands = buffer.take_demand()
    for demand in demands:
        buffer.add(rollout_of(demand))
    return demands


def play(
    run: Run, buffer: ReplayBuffer | None = None, *, start: int = 0, stop: int | None = None
) -> list[Draw]:
    """Draw steps start to stop - 1; every demanded rollout finishes at once."""
    buffer = buffer or run.buffer()
    draws = []
    for step in range(start, run.total_steps if stop is None else stop):
        if step % run.validation_interval == 0:
            buffer.report(run.validation(step))
        finish_all(buffer)
        draws.append(buffer.draw(step))
        buffer.advance(step + 1)
    return draws


def slots(draw: Draw) -> list[tuple[str, Shelf]]:
    return [(one.rollout.rollout_id, one.shelf) for one in draw.sequences]


# ---- random orders of events --------------------------------------------------------------------

runs = st.builds(
    lambda batch_size, extra_min, extra_capacity, **other: Run(
        batch_size=batch_size,
        min_size=batch_size + extra_min,
        capacity=batch_size + extra_min + extra_capacity,
        **other,
    ),
    batch_size=st.integers(1, 6),
    extra_min=st.integers(0, 6),
    extra_capacity=st.integers(0, 8),
    phi=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    ratio=st.sampled_from(["decreasing", "constant", "increasing", "none"]),
    increment=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    rule=st.sampled_from(["best", "last_increase", "previous"]),
    lookahead=st.integers(1, 5),
    sync_interval=st.integers(1, 4),
    validation_interval=st.integers(1, 7),
    total_steps=st.integers(1, 24),
    seed=st.integers(0, 2**70),
    num_prompts=st.integers(1, 9),
    num_demonstrations=st.integers(1, 9),
    losses=st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=1, max_size=8).map(tuple),
)


@dataclass
class World:
    """Generators and learners around a buffer; each event is chosen at random."""

    run: Run
    rng: random.Random
    prefetch: int
    restarts: bool
    buffer: ReplayBuffer = field(init=False)
    completed: int = 0
    published: int = 0
    queued: list[Demand] = field(default_factory=list)
    in_flight: list[tuple[Demand, int]] = field(default_factory=list)
    draws: dict[int, Draw] = field(default_factory=dict)
    saved: bytes = b""
    events: int = 0

    def __post_init__(self) -> None:
        self.buffer = self.run.buffer()
        self.saved = self.buffer.state(0)

    def play(self) -> list[Draw]:
        """Run until the last step is completed. If no event is possible, the run is deadlocked."""
        while self.completed < self.run.total_steps:
            events = [event for event in self.possible() for _ in range(WEIGHTS[event])]
            assert events, self.buffer.waiting_for(len(self.draws))
            getattr(self, self.rng.choice(events))()
            self.check()
            self.events += 1
            assert self.events < 20_000, "the run makes no progress"
        return [self.draws[step] for step in range(self.run.total_steps)]

    def possible(self) -> list[str]:
        events = ["ask"] if self.buffer.counters.outstanding > self.known else []
        events += ["start"] if self.queued else []
        if self.in_flight:
            events += ["finish", "lose"]
        next_step = len(self.draws)
        ahead = next_step <= self.completed + self.prefetch
        if next_step < self.run.total_steps:
            ready = self.buffer.ready(next_step)
            assert ready == self.buffer.next_is_ready == (not self.buffer.waiting_for(next_step))
        if next_step < self.run.total_steps and ahead and self.buffer.ready(next_step):
            events += ["draw"]
        due = self.completed // self.run.validation_interval * self.run.validation_interval
        if self.completed == due and self.buffer.last_validation < due:
            events += ["validate"]
        elif next_step > self.completed:
            events += ["train"]
        if events:
            events += ["save"]
        if events and self.restarts and self.events < 500:
            events += ["restart"]
        return events

    @property
    def known(self) -> int:
        return len(self.queued) + len(self.in_flight)

    def ask(self) -> None:
        self.queued += self.buffer.take_demand()
        assert self.known == self.buffer.counters.outstanding

    def start(self) -> None:
        """A generator starts with the newest weights, which must be min_version or newer."""
        demand = self.queued.pop(self.rng.randrange(len(self.queued)))
        assert demand.min_version <= self.published, "a generation waits forever"
        self.in_flight.append((demand, self.published))

    def finish(self) -> None:
        demand, version = self.in_flight.pop(self.rng.randrange(len(self.in_flight)))
        self.buffer.add(rollout_of(demand, version))
        if self.rng.random() < 0.1:
            self.buffer.add(rollout_of(demand, version))

    def lose(self) -> None:
        demand, _ = self.in_flight.pop(self.rng.randrange(len(self.in_flight)))
        self.buffer.lose(demand.ordinal)

    def draw(self) -> None:
        step = len(self.draws)
        self.draws[step] = self.buffer.draw(step)
        assert self.buffer.draw(step) is self.draws[step]

    def validate(self) -> None:
        schedule = self.buffer.report(self.run.validation(self.completed))
        assert schedule is self.buffer.report(self.run.validation(self.completed))
        # A rise of phi may demand weights that were not published because there was no demand.
        self.publish()

    def train(self) -> None:
        """A step is completed; its validation is reported before or after `advance`."""
        self.completed += 1
        if self.completed % self.run.sync_interval == 0:
            self.publish()
        if self.completed % self.run.validation_interval or self.rng.random() < 0.5:
            self.buffer.advance(self.completed)
        else:
            self.validate()

    def publish(self) -> None:
        """Publish weights, only if there is demand for them."""
        if self.buffer.wants_weights:
            self.published = self.completed

    def save(self) -> None:
        self.saved = self.buffer.state(self.completed)

    def restart(self) -> None:
        """All processes die; the run continues from the newest checkpoint."""
        self.buffer = self.run.buffer()
        self.buffer.restore(self.saved)
        self.completed = BufferState.from_bytes(self.saved).step
        self.published = 0
        self.publish()
        self.queued, self.in_flight = [], []
        self.draws = {step: self.draws[step] for step in range(self.completed)}

    def check(self) -> None:
        counters = self.buffer.counters
        assert counters.replay <= self.run.capacity
        drawn = sum(draw.mix.fresh for draw in self.draws.values())
        # Each demanded rollout that is not drawn is in flight or finished.
        assert counters.outstanding + counters.fresh == counters.demanded - drawn
        assert counters.late == 0


WEIGHTS = {
    "ask": 4,
    "start": 6,
    "finish": 6,
    "lose": 1,
    "draw": 6,
    "validate": 6,
    "train": 4,
    "save": 1,
    "restart": 1,
}


@settings(max_examples=150, deadline=None)
@given(run=runs, events=st.integers(0, 2**32), prefetch=st.integers(0, 4), restarts=st.booleans())
def test_no_sequence_of_events_deadlocks_and_each_ordinal_is_fresh_exactly_once(
    run: Run, events: int, prefetch: int, restarts: bool
) -> None:
    world = World(run=run, rng=random.Random(events), prefetch=prefetch, restarts=restarts)
    draws = world.play()

    fresh = fresh_ordinals(draws)
    assert fresh == list(range(len(fresh)))
    counters = world.buffer.counters
    # Every demanded rollout was drawn.
    assert (counters.demanded, counters.outstanding, counters.fresh) == (len(fresh), 0, 0)
    for draw in draws:
        check_draw(run, draw)
    # Neither the order of events nor restarts nor prefetching change the draws.
    assert [slots(draw) for draw in draws] == [slots(draw) for draw in play(run)]


def fresh_ordinals(draws: list[Draw]) -> list[int | None]:
    """The ordinals of the fresh slots, by step and sorted within a step."""
    return [
        ordinal
        for draw in draws
        for ordinal in sorted(
            one.rollout.ordinal
            for one in draw.sequences
            if one.shelf is Shelf.FRESH and one.rollout.ordinal is not None
        )
    ]


def check_draw(run: Run, draw: Draw) -> None:
    bound = run.lookahead + run.sync_interval - 2
    uniforms = slot_uniforms(run.seed, draw.step, run.batch_size)
    mix = dict.fromkeys(Shelf, 0)
    replayed = []
    for u, one in zip(uniforms, draw.sequences, strict=True):
        mix[one.shelf] += 1
        if one.shelf is Shelf.DATASET:
            assert u >= draw.phi
            assert (one.age, one.rollout.source) == (0, Source.DATASET)
            continue
        assert u < draw.phi
        assert one.age == draw.step - one.rollout.version
        if one.shelf is Shelf.FRESH:
            assert 0 <= one.age <= bound
        else:
            assert u >= draw.psi
            replayed.append(one.rollout.rollout_id)
    assert len(set(replayed)) == len(replayed), "a step replays without replacement"
    assert draw.mix == Mix(
        fresh=mix[Shelf.FRESH], replay=mix[Shelf.REPLAY], dataset=mix[Shelf.DATASET]
    )


@settings(max_examples=40, deadline=None)
@given(run=runs.filter(lambda run: run.increment == 0.0))
def test_while_phi_stays_the_demand_equals_a_slot_by_slot_computation(run: Run) -> None:
    buffer = run.buffer()
    seen = 0
    num_fresh: list[int] = []
    num_replay = 0
    for step in range(run.total_steps):
        psi = run.phi * buffer.schedule.replay_ratio(step)
        u = slot_uniforms(run.seed, step, run.batch_size)
        converts = num_replay < run.min_size
        num_fresh.append(sum(1 for x in u if x < psi or (converts and x < run.phi)))
        num_replay = min(run.capacity, num_replay + num_fresh[-1])
    for step in range(run.total_steps):
        if step % run.validation_interval == 0:
            buffer.report(run.validation(step))
        ordinals = [demand.ordinal for demand in finish_all(buffer)]
        # Each publication asks for the steps up to the next one, `lookahead` - 1 ahead.
        published = step - step % run.sync_interval
        window_end = sum(num_fresh[: published + run.sync_interval + run.lookahead - 1])
        assert ordinals == list(range(seen, window_end))
        seen = window_end
        assert buffer.draw(step).mix.fresh == num_fresh[step]
        buffer.advance(step + 1)


@settings(max_examples=40, deadline=None)
@given(run=runs)
def test_every_dataset_sequence_is_announced_before_its_step_and_in_order(run: Run) -> None:
    buffer = run.buffer()
    announced: list[str] = []
    drawn: list[str] = []
    for step in range(run.total_steps):
        if step % run.validation_interval == 0:
            buffer.report(run.validation(step))
        announced += [rollout.rollout_id for rollout in buffer.upcoming_dataset()]
        finish_all(buffer)
        drawn += [name for name, shelf in slots(buffer.draw(step)) if shelf is Shelf.DATASET]
        assert announced[: len(drawn)] == drawn
        buffer.advance(step + 1)
    assert buffer.upcoming_dataset() == []
    size = run.num_demonstrations
    for start in range(0, len(drawn) - size + 1, size):
        assert len(set(drawn[start : start + size])) == size, "an epoch visits each once"


# ---- draws ---------------------------------------------------------------------------------------


def test_a_slots_u_depends_on_seed_step_and_slot_only() -> None:
    u = slot_uniforms(3, 7, 64)
    assert np.array_equal(u, slot_uniforms(3, 7, 64))
    assert np.array_equal(u[:5], slot_uniforms(3, 7, 5))
    assert not np.any(u == slot_uniforms(3, 8, 64))
    assert not np.any(u == slot_uniforms(4, 7, 64))


def test_u_is_uniform_and_uncorrelated_between_slots_and_steps() -> None:
    u = np.stack([slot_uniforms(0, step, 256) for step in range(400)])
    # Kolmogorov-Smirnov: the critical distance at the 1 % level is 1.63 / sqrt(n).
    ordered = np.sort(u.ravel())
    distance = np.abs(ordered - (np.arange(len(ordered)) + 0.5) / len(ordered)).max()
    assert distance < 1.63 / np.sqrt(len(ordered))
    for first, second in ((u[:, :-1], u[:, 1:]), (u[:-1], u[1:])):
        correlation = np.corrcoef(first.ravel(), second.ravel())[0, 1]
        assert abs(correlation) < 4 / np.sqrt(first.size)


@pytest.mark.parametrize("ratio", ["decreasing", "constant", "increasing", "none"])
def test_the_mix_converges_to_psi_phi_minus_psi_and_one_minus_phi(ratio: FixedReplayRatio) -> None:
    run = Run(phi=0.6, ratio=ratio, batch_size=64, min_size=64, capacity=200, total_steps=300)
    draws = play(run)[10:]  # the shelf holds min_size by then
    num_slots = 64 * len(draws)
    psi = np.mean([draw.psi for draw in draws])
    for found, expected in (
        (sum(draw.mix.fresh for draw in draws), psi),
        (sum(draw.mix.replay for draw in draws), 0.6 - psi),
        (sum(draw.mix.dataset for draw in draws), 0.4),
    ):
        assert found / num_slots == pytest.approx(expected, abs=4 * 0.5 / np.sqrt(num_slots))


def test_replay_slots_are_fresh_until_the_shelf_holds_min_size() -> None:
    run = Run(phi=1.0, ratio="increasing", min_size=10, total_steps=1000)
    # psi is nearly 0: the first three steps of 4 convert, then 12 >= 10 are on the shelf.
    draws = play(run, stop=4)
    assert [draw.mix.fresh for draw in draws[:3]] == [4, 4, 4]
    assert draws[3].mix.replay == 4


def test_with_phi_0_nothing_is_demanded() -> None:
    run = Run(phi=0.0)
    draws = play(run)
    assert all(draw.mix == Mix(dataset=4) for draw in draws)
    assert run.buffer().take_demand() == []
    assert not run.buffer().wants_weights


def test_the_replay_shelf_drops_its_oldest_first() -> None:
    run = Run(phi=1.0, ratio="none", batch_size=4, capacity=6)
    buffer = run.buffer()
    play(run, buffer, stop=3)
    replay = BufferState.from_bytes(buffer.state(3)).replay
    assert [rollout.ordinal for rollout in replay] == [6, 7, 8, 9, 10, 11]


def test_replay_samples_uniformly_from_the_shelf() -> None:
    run = Run(phi=1.0, ratio="increasing", min_size=8, capacity=8, total_steps=100_000)
    counts = np.zeros(8)
    draws = play(replace(run, validation_interval=10_000), stop=3000)
    for draw in draws[10:]:
        if draw.mix.fresh == 0:
            for name, _ in slots(draw):
                counts[int(name.removeprefix("student-")) % 8] += 1
    expected = counts.sum() / 8
    assert counts.sum() > 10_000
    assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected))


def test_a_step_takes_the_next_ordinals_in_any_order_of_completion() -> None:
    run = Run(phi=1.0, ratio="none")
    buffer = run.buffer()
    buffer.report(run.validation(0))
    demands = buffer.take_demand()
    assert [demand.ordinal for demand in demands] == list(range(8))
    for demand in reversed(demands[1:]):
        buffer.add(rollout_of(demand))
    assert buffer.waiting_for(0) == "step 0 waits for 1 of its 4 fresh rollouts: ordinals 0"
    with pytest.raises(ValueError, match="ordinals 0"):
        buffer.draw(0)
    buffer.add(rollout_of(demands[0]))
    assert fresh_ordinals([buffer.draw(0)]) == [0, 1, 2, 3]


def test_a_lost_ordinal_is_generated_again_for_the_same_prompt() -> None:
    buffer = Run(phi=1.0).buffer()
    first = buffer.take_demand()
    buffer.lose(2)
    buffer.lose(2)
    (again,) = buffer.take_demand()
    assert (again.ordinal, again.attempt, again.min_version) == (2, 1, 0)
    assert again.prompt_id == first[2].prompt_id


def play_without(
    run: Run, buffer: ReplayBuffer, failing: set[str], *, start: int = 0, stop: int | None = None
) -> list[Draw]:
    """`play`, where every generation of some prompts fails and is given up."""
    draws = []
    for step in range(start, run.total_steps if stop is None else stop):
        if step % run.validation_interval == 0:
            buffer.report(run.validation(step))
        while demands := buffer.take_demand():
            for demand in demands:
                if demand.prompt_id in failing:
                    buffer.give_up(demand.ordinal, demand.prompt_id)
                else:
                    buffer.add(rollout_of(demand))
        draws.append(buffer.draw(step))
        buffer.advance(step + 1)
    return draws


def prompts_of(draws: list[Draw]) -> dict[int | None, str]:
    """The prompt of every ordinal that a step took as fresh."""
    return {
        one.rollout.ordinal: one.rollout.prompt_id
        for draw in draws
        for one in draw.sequences
        if one.shelf is Shelf.FRESH
    }


@pytest.mark.parametrize("paired", [False, True])
def test_other_prompts_take_the_ordinals_of_a_prompt_that_is_given_up(paired: bool) -> None:
    run = Run(phi=1.0 if paired else 0.7, ratio="none" if paired else "decreasing", paired=paired)
    run = replace(run, num_demonstrations=run.num_prompts)
    undisturbed, got = play(run), play_without(run, run.buffer(), {"p2", "p5"})
    assert fresh_ordinals(got) == fresh_ordinals(undisturbed)
    assert [[name for name, _ in slots(draw)] for draw in got if not paired] == [
        [name for name, _ in slots(draw)] for draw in undisturbed if not paired
    ], "shelves, replays and data are those of the undisturbed run"
    expected, prompts = prompts_of(undisturbed), prompts_of(got)
    assert {"p2", "p5"} <= set(expected.values())
    for ordinal, prompt_id in expected.items():
        if prompt_id in ("p2", "p5"):
            assert prompts[ordinal] not in ("p2", "p5")
        else:
            assert prompts[ordinal] == prompt_id


def test_substitutes_do_not_depend_on_the_order_in_which_prompts_are_given_up() -> None:
    run = Run(phi=1.0, ratio="none", num_prompts=4)
    known, late = run.buffer(), run.buffer()
    for prompt_id in ("p3", "p1"):
        known.give_up(0, prompt_id)
    failing = {"p1", "p3"}
    assert prompts_of(play_without(run, known, failing)) == prompts_of(
        play_without(run, late, failing)
    )


def test_a_resumed_run_keeps_the_substitutes() -> None:
    run = Run(phi=0.7, increment=0.1, lookahead=4, capacity=9, total_steps=20)
    undisturbed = play_without(run, run.buffer(), {"p2"})
    buffer = run.buffer()
    play_without(run, buffer, {"p2"}, stop=6)
    in_flight = buffer.take_demand()
    saved = buffer.state(6)
    resumed = run.buffer()
    resumed.restore(saved)
    assert [d.prompt_id for d in resumed.take_demand()] == [d.prompt_id for d in in_flight]
    resumed.restore(saved)
    for draw, expected in zip(play(run, resumed, start=6), undisturbed[6:], strict=True):
        assert slots(draw) == slots(expected)
        assert prompts_of([draw]) == prompts_of([expected])


def test_a_pair_has_the_demonstration_of_a_prompt_that_was_given_up_after_it_finished() -> None:
    run = Run(phi=1.0, ratio="none", paired=True, num_prompts=4, num_demonstrations=4)
    buffer = run.buffer()
    buffer.report(run.validation(0))
    demands = buffer.take_demand()
    done = next(demand for demand in demands if demand.prompt_id == "p2")
    buffer.add(rollout_of(done))
    for demand in demands:
        if demand is not done:
            buffer.lose(demand.ordinal)
    buffer.give_up(done.ordinal, "p2")
    while again := buffer.take_demand():
        for demand in again:
            assert demand.prompt_id != "p2"
            buffer.add(rollout_of(demand))
    sequences = buffer.draw(0).sequences
    learned = sorted(one.rollout.prompt_id for one in sequences if one.shelf is Shelf.DATASET)
    assert learned == sorted(one.rollout.prompt_id for one in sequences if one.shelf is Shelf.FRESH)
    assert "p2" in learned


def test_an_ordinal_in_flight_for_a_prompt_that_is_given_up_elsewhere_may_still_finish() -> None:
    run = Run(phi=1.0, ratio="none", num_prompts=4)
    buffer = run.buffer()
    first, other = [demand for demand in buffer.take_demand() if demand.prompt_id == "p2"][:2]
    buffer.give_up(first.ordinal, "p2")
    (again,) = buffer.take_demand()
    assert (again.ordinal, again.attempt) == (first.ordinal, 1)
    assert again.prompt_id != "p2"
    resumed = run.buffer()
    resumed.restore(buffer.state(0))
    assert {demand.prompt_id for demand in resumed.take_demand()} == {"p0", "p1", "p3"}
    buffer.add(rollout_of(other))
    assert buffer.counters.fresh == 1


def test_a_run_whose_prompts_all_fail_is_refused_by_key() -> None:
    buffer = Run(phi=1.0, num_prompts=2).buffer()
    buffer.give_up(0, "p0")
    with pytest.raises(
        DataError, match=r"data\.train: generators fail at every one of its 2 prompts"
    ):
        buffer.give_up(1, "p1")


def test_a_second_rollout_and_a_loss_after_the_first_change_nothing() -> None:
    buffer = Run(phi=1.0).buffer()
    demand = buffer.take_demand()[0]
    buffer.add(rollout_of(demand))
    buffer.add(rollout_of(demand))
    buffer.lose(demand.ordinal)
    assert buffer.take_demand() == []
    assert (buffer.counters.duplicates, buffer.counters.fresh) == (1, 1)


def test_a_draw_waits_for_the_window_the_validation_and_the_draws_before_it() -> None:
    run = Run(phi=0.0, validation_interval=2, lookahead=3)
    buffer = run.buffer()
    assert buffer.waiting_for(0) == "step 0 waits for the validation after 0 completed steps"
    buffer.report(run.validation(0))
    assert buffer.waiting_for(1) == "step 1 waits for the draw of step 0"
    buffer.draw(0)
    buffer.draw(1)
    assert buffer.waiting_for(2) == "step 2 waits for the validation after 2 completed steps"
    buffer.report(run.validation(2))
    assert buffer.ready(2)
    narrow = replace(run, lookahead=1, validation_interval=9).buffer()
    narrow.report(run.validation(0))
    narrow.draw(0)
    assert narrow.waiting_for(1) == (
        "step 1 waits for step 0 to be completed (rollout.lookahead 1, rollout.sync_interval 1)"
    )
    with pytest.raises(ValueError, match=r"must lie in \[2, 12\), got 1"):
        buffer.draw(1)
    with pytest.raises(ValueError, match=r"got 12"):
        buffer.ready(12)


def test_a_run_that_ends_early_may_validate_after_the_next_draw_which_its_state_undoes() -> None:
    run = Run(phi=0.6, validation_interval=9, lookahead=3)
    undisturbed = play(run)
    buffer = run.buffer()
    play(run, buffer, stop=2)
    finish_all(buffer)
    buffer.draw(2)  # made ahead, while step 1 was trained on
    buffer.report(run.validation(2))
    again = run.buffer()
    again.restore(buffer.state(2))
    assert again.last_validation == 2
    rest = play(run, again, start=2)
    assert [slots(draw) for draw in rest] == [slots(draw) for draw in undisturbed[2:]]


def test_a_validation_on_schedule_comes_before_the_draw_that_it_decides() -> None:
    run = Run(phi=0.6, validation_interval=2, lookahead=3)
    buffer = run.buffer()
    play(run, buffer, stop=2)
    with pytest.raises(ValueError, match="waits for the validation after 2 completed steps"):
        buffer.draw(2)


def test_a_rise_of_phi_demands_the_additional_ordinals_at_once() -> None:
    run = Run(increment=0.5, losses=(1.0, 2.0), validation_interval=2, lookahead=4, total_steps=40)
    run = replace(run, phi=0.0, batch_size=8, min_size=8, capacity=8)
    buffer = run.buffer()
    assert all(draw.mix.fresh == 0 for draw in play(run, buffer, stop=2))
    assert buffer.take_demand() == []
    assert buffer.report(run.validation(2)).phi == 0.5
    demands = buffer.take_demand()
    assert demands
    assert all(demand.min_version == 2 for demand in demands)
    assert not buffer.ready(2)
    fresh = 0
    for demand in demands:
        buffer.add(rollout_of(demand))
    for step in (2, 3):
        fresh += buffer.draw(step).mix.fresh
    assert buffer.counters.fresh == len(demands) - fresh


def test_a_rise_of_phi_leaves_every_demanded_rollout_in_its_window() -> None:
    """A higher phi fills the replay shelf earlier, which ends conversions of later steps.

    The rollouts demanded for those conversions then go to replay slots, smallest u first.
    """
    surplus = 0
    for seed in range(60):
        run = Run(
            phi=0.5,
            increment=0.5,
            ratio="increasing",  # psi is nearly 0, so only converted slots are fresh
            losses=(1.0, 2.0, 0.0),
            batch_size=6,
            min_size=6,
            lookahead=5,
            validation_interval=1,
            total_steps=1000,
            seed=seed,
        )
        buffer = run.buffer()
        demanded = buffer.counters.demanded
        draws = play(run, buffer, stop=5)
        assert sum(draw.mix.fresh for draw in draws) >= demanded
        assert buffer.counters.late == 0
        on_shelf = 0
        for draw in draws:
            u = np.sort(slot_uniforms(seed, draw.step, 6))
            fresh = sorted(
                slot_uniforms(seed, draw.step, 6)[slot]
                for slot, one in enumerate(draw.sequences)
                if one.shelf is Shelf.FRESH
            )
            assert fresh == u[: len(fresh)].tolist()
            surplus += on_shelf >= 6 and len(fresh) > np.count_nonzero(u < draw.psi)
            on_shelf += len(fresh)
    assert surplus > 0, "no seed led to this case"


def test_a_rollout_older_than_the_bound_is_trained_on_and_counted() -> None:
    run = Run(phi=1.0, ratio="none", lookahead=1, sync_interval=1)
    buffer = run.buffer()
    buffer.report(run.validation(0))
    finish_all(buffer)
    buffer.draw(0)
    buffer.advance(1)
    for demand in buffer.take_demand():
        assert demand.min_version == 1
        buffer.add(rollout_of(demand, version=0))
    draw = buffer.draw(1)
    assert [one.age for one in draw.sequences] == [1, 1, 1, 1]
    assert buffer.counters.late == 4
    assert BufferState.from_bytes(buffer.state(1)).late == 0


def test_strictly_on_policy_runs_have_age_zero() -> None:
    run = Run(phi=1.0, ratio="none", lookahead=1, sync_interval=1)
    assert all(one.age == 0 for draw in play(run) for one in draw.sequences)


def test_weights_are_wanted_while_a_generation_can_still_start() -> None:
    run = Run(phi=1.0, ratio="none", lookahead=2, total_steps=3)
    buffer = run.buffer()
    wanted = []
    for step in range(3):
        wanted.append(buffer.wants_weights)
        play(run, buffer, start=step, stop=step + 1)
    assert wanted == [True, True, False]


def test_prompts_and_data_are_shuffled_independently_and_again_in_each_epoch() -> None:
    prompts = EpochOrder(seed=1, stream=Stream.PROMPTS, size=50)
    data = EpochOrder(seed=1, stream=Stream.DEMONSTRATIONS, size=50)
    first, second = prompts.indices(0, 50), prompts.indices(50, 100)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first != data.indices(0, 50)
    assert prompts.indices(130, 135) == prompts.indices(100, 150)[30:35]


# ---- pairs ---------------------------------------------------------------------------------------

paired_runs = runs.map(
    lambda run: replace(
        run, paired=True, phi=1.0, ratio="none", increment=0.0, num_demonstrations=run.num_prompts
    )
)


@settings(max_examples=60, deadline=None)
@given(
    run=paired_runs,
    events=st.integers(0, 2**32),
    prefetch=st.integers(0, 4),
    restarts=st.booleans(),
)
def test_a_pair_is_a_fresh_rollout_and_the_demonstration_of_its_prompt(
    run: Run, events: int, prefetch: int, restarts: bool
) -> None:
    draws = World(run=run, rng=random.Random(events), prefetch=prefetch, restarts=restarts).play()
    fresh = fresh_ordinals(draws)
    assert fresh == list(range(run.total_steps * run.batch_size))
    for draw in draws:
        size = run.batch_size
        assert (draw.mix.fresh, draw.mix.replay, draw.mix.dataset) == (size, 0, size)
        pairs = list(zip(draw.sequences[::2], draw.sequences[1::2], strict=True))
        assert len(pairs) == size
        for demonstration, rollout in pairs:
            assert (demonstration.shelf, rollout.shelf) == (Shelf.DATASET, Shelf.FRESH)
            assert demonstration.rollout.prompt_id == rollout.rollout.prompt_id
            assert demonstration.age == 0
    assert [slots(draw) for draw in draws] == [slots(draw) for draw in play(run)]


@settings(max_examples=40, deadline=None)
@given(run=paired_runs)
def test_the_demonstration_of_a_pair_is_announced_before_its_step(run: Run) -> None:
    buffer = run.buffer()
    announced: list[str] = []
    for step in range(run.total_steps):
        if step % run.validation_interval == 0:
            buffer.report(run.validation(step))
        announced += [one.rollout_id for one in buffer.upcoming_dataset()]
        finish_all(buffer)
        draw = buffer.draw(step)
        buffer.advance(step + 1)
        size = run.batch_size
        drawn = [one.rollout.rollout_id for one in draw.sequences[::2]]
        assert announced[step * size : (step + 1) * size] == drawn


# ---- the corpus ----------------------------------------------------------------------------------


def pieces(draw: Draw) -> list[str]:
    return [one.rollout.rollout_id for one in draw.sequences if one.shelf is Shelf.CORPUS]


@pytest.mark.parametrize("paired", [False, True])
def test_every_step_adds_the_next_pieces_of_a_corpus_that_is_shuffled_anew_each_epoch(
    paired: bool,
) -> None:
    run = Run(num_demonstrations=7, num_pieces=5, corpus_batch=2, seed=3)
    run = replace(run, paired=True, phi=1.0, ratio="none") if paired else run
    draws = play(run)
    for draw in draws:
        assert draw.mix.corpus == 2
        assert draw.mix.responses == (8 if paired else 4)
        assert draw.mix.total == len(draw.sequences) == draw.mix.responses + 2
        # After the slots, and of no age.
        assert [one.shelf for one in draw.sequences[-2:]] == [Shelf.CORPUS] * 2
        assert [one.age for one in draw.sequences[-2:]] == [0, 0]
    visits = [name for draw in draws for name in pieces(draw)]
    order = EpochOrder(seed=3, stream=Stream.CORPUS, size=5)
    assert visits == [f"c{index}" for index in order.indices(0, 24)]
    epochs = [visits[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(epoch) == [f"c{index}" for index in range(5)] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_a_corpus_changes_no_slot() -> None:
    for draw, plain in zip(play(Run(num_pieces=5, corpus_batch=3)), play(Run()), strict=True):
        assert slots(draw)[:4] == slots(plain)


def test_a_resumed_run_draws_the_pieces_of_the_undisturbed_one() -> None:
    run = Run(num_pieces=5, corpus_batch=3, lookahead=3)
    undisturbed = play(run)
    buffer = run.buffer()
    play(run, buffer, stop=5)
    finish_all(buffer)
    buffer.draw(5)  # ahead of the checkpoint
    resumed = run.buffer()
    resumed.restore(buffer.state(5))
    assert [pieces(draw) for draw in play(run, resumed, start=5)] == [
        pieces(draw) for draw in undisturbed[5:]
    ]


@pytest.mark.parametrize("paired", [False, True])
def test_the_pieces_of_the_open_steps_are_announced_once_and_again_after_a_restore(
    paired: bool,
) -> None:
    run = Run(num_demonstrations=7, num_pieces=5, corpus_batch=2, total_steps=4)
    run = replace(run, paired=True, phi=1.0, ratio="none") if paired else run
    drawn = [pieces(draw) for draw in play(run)]

    def announced(buffer: ReplayBuffer) -> list[str]:
        found = buffer.upcoming_dataset()
        return [one.rollout_id for one in found if one.source is Source.CORPUS]

    buffer = run.buffer()
    assert announced(buffer) == [*drawn[0], *drawn[1]]
    assert announced(buffer) == []
    play(run, buffer, stop=1)
    assert announced(buffer) == drawn[2]
    buffer.restore(buffer.state(1))
    assert announced(buffer) == [*drawn[1], *drawn[2]]


def test_a_corpus_and_its_share_of_a_batch_come_together() -> None:
    for change in ({"num_pieces": 3}, {"corpus_batch": 3}):
        with pytest.raises(ValueError, match="come together, got"):
            replace(Run(), **change).buffer()


# ---- checkpoints ---------------------------------------------------------------------------------


def test_a_saved_state_resumes_with_the_same_slots_and_tokens() -> None:
    run = Run(
        phi=0.7, increment=0.1, lookahead=4, capacity=9, total_steps=20, validation_interval=5
    )
    undisturbed = play(run)
    buffer = run.buffer()
    play(run, buffer, stop=6)
    finish_all(buffer)
    before = buffer.state(6)
    for step in (6, 7, 8):
        buffer.draw(step)
    ahead = buffer.state(6)

    for saved in (before, ahead):
        resumed = run.buffer()
        resumed.restore(saved)
        for draw, expected in zip(play(run, resumed, start=6), undisturbed[6:], strict=True):
            assert slots(draw) == slots(expected)
            for one, other in zip(draw.sequences, expected.sequences, strict=True):
                assert same(one.rollout, other.rollout)


def same(one: Rollout, other: Rollout) -> bool:
    """Every field equal, arrays bit for bit."""
    fields = Rollout.__dataclass_fields__
    return all(
        np.array_equal(a, b) and a.dtype == b.dtype if isinstance(a, np.ndarray) else a == b
        for a, b in ((getattr(one, name), getattr(other, name)) for name in fields)
    )


def test_requests_in_flight_at_a_checkpoint_are_demanded_again() -> None:
    run = Run(phi=1.0, ratio="none", lookahead=2)
    buffer = run.buffer()
    demands = buffer.take_demand()
    buffer.lose(1)
    buffer.add(rollout_of(demands[3]))
    resumed = run.buffer()
    resumed.restore(buffer.state(0))
    again = resumed.take_demand()
    assert [(demand.ordinal, demand.attempt) for demand in again] == [
        (0, 0), (1, 1), (2, 0), (4, 0), (5, 0), (6, 0), (7, 0),
    ]  # fmt: skip
    assert [d.prompt_id for d in again[:3]] == [d.prompt_id for d in demands[:3]]


def test_the_state_of_a_step_outside_of_the_window_is_refused() -> None:
    run = Run(phi=0.0)
    buffer = run.buffer()
    play(run, buffer, stop=2)
    for step in (1, 3):
        with pytest.raises(ValueError, match=rf"must lie in \[2, 2\], got {step}"):
            buffer.state(step)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"batch_size": 3}, "learner.batch_size"),
        ({"num_prompts": 8}, "prompts"),
        ({"num_demonstrations": 8}, "data-set responses"),
        ({"num_pieces": 4}, "pieces of the corpus"),
        ({"corpus_batch": 3}, r"data\.corpus_batch"),
        ({"num_pieces": 0, "corpus_batch": 0}, "digest of the data"),
    ],
)
def test_another_runs_state_is_refused_by_name(change: dict[str, int], name: str) -> None:
    run = Run(num_pieces=5, corpus_batch=2)
    other = replace(run, **change)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=f"^{name} must be that of the saved buffer"):
        other.buffer().restore(run.buffer().state(0))


def test_the_state_of_other_data_of_the_same_size_is_refused() -> None:
    run = Run()
    buffer = run.buffer()
    state = BufferState.from_bytes(buffer.state(0))
    identity = {**state.identity, "digest of the data": 0}
    with pytest.raises(ValueError, match=r"^digest of the data must be that of the saved buffer"):
        buffer.restore(replace(state, identity=identity).to_bytes())
    edited = make_demonstrations(3)
    edited[1] = replace(edited[1], response_ids=edited[1].response_ids + 1)
    assert digest([], edited) != digest([], make_demonstrations(3))


def test_the_digest_covers_masks_and_the_borders_between_sequences() -> None:
    one = make_demonstrations(1)[0]
    hidden = replace(one, loss_mask=np.array([False, True]))
    assert digest([], [one]) != digest([], [hidden])

    def prompts(*lengths: int) -> list[Prompt]:
        return [
            replace(prompt, token_ids=np.full(length, 5, dtype=np.int32))
            for prompt, length in zip(make_prompts(len(lengths)), lengths, strict=True)
        ]

    assert digest(prompts(1, 2), []) != digest(prompts(2, 1), [])


def test_other_prompts_than_the_saved_ones_are_refused() -> None:
    run = Run(phi=1.0)
    data = BufferState.from_bytes(run.buffer().state(0))
    ordinal, _, version, attempt = data.outstanding[0]
    changed = replace(data, outstanding=((ordinal, "another prompt", version, attempt),))
    with pytest.raises(ValueError, match="the prompts must be those of the saved buffer"):
        run.buffer().restore(changed.to_bytes())


@settings(max_examples=40, deadline=None)
@given(run=runs, stop=st.integers(0, 10), total=st.integers(1, 30), lookahead=st.integers(1, 6))
def test_total_steps_and_lookahead_may_change_on_resume(
    run: Run, stop: int, total: int, lookahead: int
) -> None:
    stop = min(stop, run.total_steps)
    buffer = run.buffer()
    draws = play(run, buffer, stop=stop)
    changed = replace(run, total_steps=max(total, stop), lookahead=lookahead)
    resumed = changed.buffer()
    resumed.restore(buffer.state(stop))
    draws += play(changed, resumed, start=stop)
    fresh = fresh_ordinals(draws)
    assert fresh == list(range(len(fresh)))
    assert resumed.counters.demanded == len(fresh)


def test_a_shelf_smaller_than_min_size_or_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="got 4 <= 4 <= 3: a step could not replay"):
        Run(capacity=3).buffer()
    with pytest.raises(
        ValueError, match="needs prompts, and data-set responses unless phi is 1, got 0"
    ):
        Run(num_prompts=0).buffer()
