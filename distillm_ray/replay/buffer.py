"""The replay buffer: shelves of sequences, and the sequences that each step takes.

    advance(completed) ──► demand opens ──► take_demand() ──► (generate, score) ──► add(rollout)
    report(validation) ──► phi rises ──────────┘  ▲                                     │
                                                  └───────── lose(ordinal) ◄────────────┤
    draw(step) ◄── fresh ordinals finished, validation reported ◄───────────────────────┘

Pure logic for a single caller; no method waits. Which shelf a slot takes is a function of seed,
step and slot, so the fresh rollouts of a step are known, and demanded, before its draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain

import numpy as np

from distillm_ray.replay.draw import promise_fresh, slot_uniforms
from distillm_ray.replay.schedule import Schedule
from distillm_ray.replay.shelves import Shelves, Taken
from distillm_ray.replay.state import BufferState, digest
from distillm_ray.replay.window import Window
from distillm_ray.types import BufferCounters, Demand, Draw, Mix, Prompt, Rollout, Validation


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Made:
    """A draw of a step that is not completed, with what undoes it."""

    draw: Draw
    taken: Taken
    late_before: int


class ReplayBuffer:
    """Decides the sequences of each step for all ranks at once.

    The rules stand in docs/architecture.md, "One step, exactly".

    Example:
        A batch of four with phi 0.5, of which two slots happen to take student outputs.

        >>> from dataclasses import replace
        >>> from distillm_ray.types import FinishReason, Source
        >>> ids = np.array([5, 6], dtype=np.int32)
        >>> prompt = Prompt(
        ...     prompt_id="p", token_ids=ids, reference_ids=(), text="", references=()
        ... )
        >>> response = Rollout(
        ...     rollout_id="dataset-p",
        ...     prompt_id="p",
        ...     prompt_ids=ids,
        ...     response_ids=ids,
        ...     loss_mask=np.array([True, True]),
        ...     source=Source.DATASET,
        ...     version=0,
        ...     finish_reason=FinishReason.STOP,
        ... )
        >>> buffer = ReplayBuffer(
        ...     prompts=[prompt],
        ...     demonstrations=[response],
        ...     schedule=Schedule(phi=0.5, total_steps=10, ratio="none"),
        ...     batch_size=4,
        ...     capacity=8,
        ...     min_size=4,
        ...     lookahead=1,
        ...     sync_interval=1,
        ...     validation_interval=10,
        ...     seed=4,
        ... )
        >>> buffer.report(Validation(step=0, loss=2.0, tokens=2)).phi
        0.5
        >>> buffer.waiting_for(0)
        'step 0 waits for 2 of its 2 fresh rollouts: ordinals 0, 1'
        >>> for demand in buffer.take_demand():
        ...     buffer.add(replace(response, source=Source.STUDENT, ordinal=demand.ordinal))
        >>> buffer.draw(0).mix
        Mix(fresh=2, replay=0, dataset=2, corpus=0)
        >>> buffer.advance(1)
        >>> buffer.counters.replay  # the fresh ones, after their one use as fresh
        2
    """

    def __init__(
        self,
        *,
        prompts: Sequence[Prompt],
        demonstrations: Sequence[Rollout],
        schedule: Schedule,
        paired: bool = False,
        corpus: Sequence[Rollout] = (),
        corpus_batch: int = 0,
        batch_size: int,
        capacity: int,
        min_size: int,
        lookahead: int,
        sync_interval: int,
        validation_interval: int,
        seed: int,
    ) -> None:
        """Open the demand of the first steps.

        Args:
            paired: every slot takes a fresh rollout and the data's response to the same prompt.
            corpus_batch: sequences of `corpus` that every step takes besides its slots.
            capacity: sequences on the replay shelf.
            min_size: sequences that the replay shelf must hold before a slot replays one.
            sync_interval: steps between two publications of weights.

        Raises:
            ValueError: the sizes contradict each other, or prompts or responses are missing.
        """
        if not batch_size <= min_size <= capacity:
            raise ValueError(
                "batch_size <= min_size <= capacity must hold, got"
                f" {batch_size} <= {min_size} <= {capacity}: a step could not replay its whole"
                " batch without replacement, or the shelf would never begin to replay"
            )
        if not prompts or not (demonstrations or (schedule.phi == 1.0 and not paired)):
            raise ValueError(
                "a replay buffer needs prompts, and data-set responses unless phi is 1, got"
                f" {len(prompts)} and {len(demonstrations)}: a slot could never be filled"
            )
        if bool(corpus) != (corpus_batch > 0):
            raise ValueError(
                "a corpus and corpus_batch come together, got"
                f" {len(corpus)} sequences and {corpus_batch}: nothing could be drawn"
            )
        self._schedule = schedule
        self._paired = paired
        self._batch_size = batch_size
        self._capacity = capacity
        self._min_size = min_size
        self._window = Window(lookahead, sync_interval)
        self._validation_interval = validation_interval
        self._total_steps = schedule.total_steps
        self._seed = seed
        self._identity = {
            "seed": seed,
            "learner.batch_size": batch_size,
            "prompts": len(prompts),
            "data-set responses": len(demonstrations),
        }
        if corpus:
            self._identity |= {
                "data.corpus_batch": corpus_batch,
                "pieces of the corpus": len(corpus),
            }
        self._identity["digest of the data"] = digest(prompts, chain(demonstrations, corpus))

        self._shelves = Shelves(
            prompts,
            demonstrations,
            paired=paired,
            corpus=corpus,
            corpus_batch=corpus_batch,
            batch_size=batch_size,
            capacity=capacity,
            seed=seed,
        )
        self._corpus_batch = corpus_batch
        self._announced_corpus = 0  # steps whose corpus was returned by `upcoming_dataset`
        self._ordinals = self._shelves.ordinals
        self._completed = 0
        self._next_step = 0
        self._last_validation = -1
        self._late = 0
        self._fresh_counts: dict[int, int] = {}  # by open step: not completed, in the window
        self._made: dict[int, _Made] = {}
        self._open_demand()

    # ---- called by the orchestrator -------------------------------------------------------------

    def take_demand(self) -> list[Demand]:
        """Demanded ordinals that were not returned yet, or were lost since."""
        return self._ordinals.take()

    def add(self, rollout: Rollout) -> None:
        """Add a finished rollout whose teacher targets are stored.

        A second rollout for the same ordinal is ignored and counted.
        """
        self._ordinals.finish(rollout)

    def lose(self, ordinal: int) -> None:
        """Report that an ordinal's generation failed; the next `take_demand` returns it again."""
        self._ordinals.lose(ordinal)

    def give_up(self, ordinal: int, prompt_id: str) -> tuple[str, ...]:
        """Report that no generation of a prompt succeeds; returns all that the run has given up.

        The next `take_demand` returns the ordinal with another prompt. Later ordinals of this
        prompt take another one too; each stays what it is on resume.

        Raises:
            DataError: no other prompt is left.
        """
        self._ordinals.give_up(ordinal, prompt_id)
        return self._ordinals.given_up

    def upcoming_dataset(self) -> list[Rollout]:
        """Data-set and corpus sequences that the open steps will draw, each visit returned once.

        Scored ahead of their step, so that the draw does not wait for the teacher.
        """
        steps = self._undrawn_steps()
        first = max(self._announced_corpus, steps.start)
        self._announced_corpus = max(first, steps.stop)
        corpus = [
            one
            for step in range(first, self._announced_corpus)
            for one in self._shelves.corpus_of(step)
        ]
        if self._paired:
            return self._shelves.announce_pairs() + corpus
        num_slots = sum(self._batch_size - self._num_student(step) for step in steps)
        return self._shelves.announce(num_slots) + corpus

    @property
    def wants_weights(self) -> bool:
        """Whether a generation can still start with newly published weights, at the current phi."""
        return self._schedule.phi > 0.0 and (
            self._ordinals.num_open > 0 or self._window.end(self._completed) < self._total_steps
        )

    # ---- called by the learners -----------------------------------------------------------------

    def ready(self, step: int) -> bool:
        """Whether `draw(step)` can be called now. Cheap: the same work for any batch size.

        Raises:
            ValueError: the step is completed, or the run does not have it.
        """
        if step in self._made:
            return True
        return not self._closed(step) and self._ordinals.complete(self._fresh_counts[step])

    @property
    def next_is_ready(self) -> bool:
        """Whether the step after the newest draw can be drawn; False after the last step."""
        return self._next_step < self._total_steps and self.ready(self._next_step)

    def waiting_for(self, step: int) -> str:
        """The reason why `draw(step)` cannot be called yet, for a log; empty if it can.

        Raises:
            ValueError: the step is completed, or the run does not have it.
        """
        if step in self._made:
            return ""
        closed = self._closed(step)
        if closed:
            return closed
        missing = self._ordinals.missing(self._fresh_counts[step])
        if missing:
            named = ", ".join(str(ordinal) for ordinal in missing[:8])
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            return (
                f"step {step} waits for {len(missing)} of its {self._fresh_counts[step]} fresh"
                f" rollouts: ordinals {named}{more}"
            )
        return ""

    def _closed(self, step: int) -> str:
        """The reason why `draw(step)` must wait, whatever is finished; empty if there is none."""
        if not self._next_step <= step < self._total_steps:
            raise ValueError(
                f"a step to draw must lie in [{self._completed}, {self._total_steps}), got {step}:"
                " earlier steps are completed, and the run ends there"
            )
        if step > self._next_step:
            return f"step {step} waits for the draw of step {self._next_step}"
        if step not in self._fresh_counts:
            return (
                f"step {step} waits for step {self._window.opens_after(step) - 1} to be completed"
                f" (rollout.lookahead {self._window.lookahead},"
                f" rollout.sync_interval {self._window.sync_interval})"
            )
        validation = step // self._validation_interval * self._validation_interval
        if self._last_validation < validation:
            return f"step {step} waits for the validation after {validation} completed steps"
        return ""

    def draw(self, step: int) -> Draw:
        """The global batch of a step. Decided once; repeated calls return the same draw.

        Raises:
            ValueError: the step is not ready.
        """
        if step not in self._made:
            if not self.ready(step):
                reason = self.waiting_for(step)
                raise ValueError(f"draw({step}) must wait until it is ready: {reason}")
            self._made[step] = self._make(step)
            self._next_step = step + 1
        return self._made[step].draw

    def report(self, validation: Validation) -> Schedule:
        """Adapt phi from draw `validation.step` on; returns the schedule.

        A repeated report is ignored. The report implies `advance(validation.step)`, so the order of
        the two calls does not matter.

        A rise of phi opens demand for weights of the newest multiple of `sync_interval`, which may
        never have been published because there was no demand before. If `wants_weights` holds after
        a report, publish before the next draw.
        """
        if validation.step <= self._last_validation:
            return self._schedule
        # A run that ends early validates between two intervals, where the next step may be drawn.
        between = validation.step % self._validation_interval != 0
        assert self._next_step == validation.step or (
            between and validation.step < self._next_step
        ), f"validation {validation.step} came before draw {self._next_step}"
        self.advance(validation.step)
        self._last_validation = validation.step
        self._schedule = self._schedule.after(validation)
        self._open_demand()
        return self._schedule

    def advance(self, completed: int) -> None:
        """Move the window to `completed` optimizer steps and drop the draws before it."""
        if completed <= self._completed:
            return
        assert completed <= self._next_step, f"step {completed - 1} was completed but never drawn"
        for step in range(self._completed, completed):
            del self._made[step], self._fresh_counts[step]
        self._completed = completed
        self._open_demand()

    @property
    def schedule(self) -> Schedule:
        """The current schedule."""
        return self._schedule

    @property
    def last_validation(self) -> int:
        """Completed steps at the last validation; -1 before the first."""
        return self._last_validation

    @property
    def counters(self) -> BufferCounters:
        """Sizes and totals, for the log."""
        return BufferCounters(
            fresh=self._ordinals.num_finished,
            replay=self._shelves.num_replay,
            outstanding=self._ordinals.num_open,
            demanded=self._ordinals.end,
            duplicates=self._ordinals.duplicates,
            late=self._late,
        )

    # ---- checkpoints ----------------------------------------------------------------------------

    def state(self, completed: int) -> bytes:
        """Serialize the buffer as it was before draw `completed`; later draws are undone.

        Raises:
            ValueError: `completed` lies before the window or after the next draw.
        """
        if not self._completed <= completed <= self._next_step:
            raise ValueError(
                f"a saved step must lie in [{self._completed}, {self._next_step}], got"
                f" {completed}: the buffer has the state of these steps only"
            )
        assert self._last_validation <= completed
        ahead = [self._made[step] for step in range(completed, self._next_step)]
        drawn = tuple(rollout for made in ahead for rollout in made.taken.fresh)
        position = ahead[0].taken.before if ahead else self._shelves.position
        return BufferState(
            step=completed,
            identity=self._identity,
            schedule=asdict(self._schedule),
            last_validation=self._last_validation,
            first_ordinal=position.first_ordinal,
            dataset_position=position.dataset_position,
            fresh_counts={s: n for s, n in self._fresh_counts.items() if s >= completed},
            outstanding=self._ordinals.outstanding(),
            given_up=self._ordinals.given_up,
            finished=(*drawn, *self._ordinals.finished()),
            replay=position.replay,
            duplicates=self._ordinals.duplicates,
            late=ahead[0].late_before if ahead else self._late,
        ).to_bytes()

    def restore(self, data: bytes) -> None:
        """Go to a saved state. Keeps this buffer's settings; what was in flight is demanded again.

        Raises:
            ValueError: seed, batch size or data differ from those of the saved buffer.
        """
        state = BufferState.from_bytes(data)
        for name, value in self._identity.items():
            saved = state.identity.get(name)
            if saved != value:
                raise ValueError(
                    f"{name} must be that of the saved buffer, got {value} instead of"
                    f" {saved}: the resumed run would draw different sequences"
                )
        self._schedule = self._schedule.resumed_from(Schedule(**state.schedule))
        self._last_validation = state.last_validation
        self._completed = self._next_step = self._announced_corpus = state.step
        self._made.clear()
        # A run that was shortened on resume takes fewer ordinals than were promised.
        self._fresh_counts = {
            step: count for step, count in state.fresh_counts.items() if step < self._total_steps
        }
        self._shelves.restore(dataset_position=state.dataset_position, replay=state.replay)
        self._ordinals.restore(
            first=state.first_ordinal,
            end=state.first_ordinal + sum(self._fresh_counts.values()),
            finished=state.finished,
            outstanding=state.outstanding,
            given_up=state.given_up,
        )
        self._ordinals.duplicates = state.duplicates
        self._late = state.late
        self._open_demand()

    # ---- internals ------------------------------------------------------------------------------

    def _undrawn_steps(self) -> range:
        """The open steps that are not drawn."""
        stop = min(self._window.end(self._completed), self._total_steps)
        return range(self._next_step, max(stop, max(self._fresh_counts, default=-1) + 1))

    def _num_student(self, step: int) -> int:
        """Slots that take a student output, fresh or replayed, at the current phi."""
        uniforms_B = slot_uniforms(self._seed, step, self._batch_size)
        return int(np.count_nonzero(uniforms_B < self._schedule.phi))

    def _open_demand(self) -> None:
        """Promise every open step its fresh rollouts, and demand the missing ordinals.

        Steps take ordinals in order, so a rise of phi moves later ordinals to earlier steps.
        """
        promised = promise_fresh(
            self._undrawn_steps(),
            self._fresh_counts,
            self._schedule,
            seed=self._seed,
            batch_size=self._batch_size,
            num_replay=self._shelves.num_replay,
            min_size=self._min_size,
            capacity=self._capacity,
        )
        self._fresh_counts.update(promised)
        self._ordinals.open_until(
            self._ordinals.first + sum(promised.values()),
            min_version=self._window.version(self._completed),
        )

    def _make(self, step: int) -> _Made:
        num_fresh, num_student = self._fresh_counts[step], self._num_student(step)
        taken = self._shelves.take(step, num_fresh=num_fresh, num_student=num_student)
        draw = Draw(
            step=step,
            phi=self._schedule.phi,
            psi=self._schedule.rollout_rate(step),
            mix=Mix(
                fresh=num_fresh,
                replay=num_student - num_fresh,
                dataset=num_fresh if self._paired else self._batch_size - num_student,
                corpus=self._corpus_batch,
            ),
            sequences=taken.sequences,
        )
        made = _Made(draw=draw, taken=taken, late_before=self._late)
        self._late += sum(step - rollout.version > self._window.max_age for rollout in taken.fresh)
        return made
