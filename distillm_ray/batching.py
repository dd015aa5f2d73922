"""From a draw to packed rows: weights per term, the split over ranks, loss positions.

A row is whole sequences one after the other, without padding. loss/terms.py computes the weight of
every token over the global batch before the split, so the split cannot change the loss.

Every rank runs the same number of micro-batches. Where there are too few sequences for that (three
full rows on two ranks), a filler takes the place of the missing row: the shortest sequence once
more, with `is_filler` set and all weights 0. It costs a forward pass and contributes nothing.

Axes: L packed tokens, N loss positions of a row, S sequences of a row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from distillm_ray.config import LossConfig
from distillm_ray.loss.terms import term_weights
from distillm_ray.packing import split
from distillm_ray.types import (
    Draw,
    DrawFacts,
    Float32Array,
    HiddenTargets,
    LearnerBatch,
    LogitTargets,
    MicroBatchPlan,
    PlannedSequence,
    Rollout,
    Shelf,
    StepPlan,
    TeacherTargets,
    TopKTargets,
)


def plan_step(
    draw: Draw, *, num_ranks: int, max_micro_batch_tokens: int, loss: LossConfig
) -> StepPlan:
    """Split a draw: the same number of micro-batches for each rank, nearly equal tokens.

    Raises:
        ValueError: a sequence is longer than a micro-batch, or the draw has no loss token.

    Example:
        Three data-set sequences fill three rows on two ranks, so one rank gets a filler.

        >>> from distillm_ray.types import DrawnSequence, FinishReason, Mix, Source
        >>> def drawn(name: str) -> DrawnSequence:
        ...     rollout = Rollout(
        ...         rollout_id=name, prompt_id=name, version=0, source=Source.DATASET,
        ...         prompt_ids=np.array([5, 6, 7], dtype=np.int32),
        ...         response_ids=np.array([8, 9], dtype=np.int32),
        ...         loss_mask=np.ones(2, dtype=np.bool_), finish_reason=FinishReason.STOP,
        ...     )
        ...     return DrawnSequence(rollout=rollout, shelf=Shelf.DATASET, age=0)
        >>> draw = Draw(
        ...     step=0, phi=0.0, psi=0.0, mix=Mix(dataset=3),
        ...     sequences=(drawn("a"), drawn("b"), drawn("c")),
        ... )
        >>> plan = plan_step(draw, num_ranks=2, max_micro_batch_tokens=5, loss=LossConfig())
        >>> for index, rank in enumerate(plan.ranks):
        ...     for micro_batch in rank:
        ...         [one] = micro_batch.sequences
        ...         print(index, one.rollout.rollout_id, one.term_weights[0], one.is_filler)
        0 a [0.16666667 0.16666667] False
        0 c [0.16666667 0.16666667] False
        1 b [0.16666667 0.16666667] False
        1 a [0. 0.] True
    """
    weights = term_weights([drawn.rollout for drawn in draw.sequences], loss)
    sequences = [
        PlannedSequence(
            rollout=drawn.rollout,
            shelf=drawn.shelf,
            age=drawn.age,
            term_weights=of_terms,
            needs_targets=loss.compares(drawn.rollout.source),
        )
        for drawn, of_terms in zip(draw.sequences, weights, strict=True)
    ]
    return StepPlan(
        step=draw.step,
        phi=draw.phi,
        psi=draw.psi,
        mix=draw.mix,
        ranks=_plan(sequences, num_ranks, max_micro_batch_tokens),
    )


def plan_validation(
    demonstrations: Sequence[Rollout], *, num_ranks: int, max_micro_batch_tokens: int
) -> tuple[tuple[MicroBatchPlan, ...], ...]:
    """Held-out responses for each rank, the same number of micro-batches everywhere.

    There is one term, in which every loss token weighs 1 and a filler's tokens weigh 0: the sum of
    the weights is the number of tokens.
    """
    sequences = [
        PlannedSequence(
            rollout=rollout,
            shelf=Shelf.DATASET,
            age=0,
            term_weights=(np.ones(rollout.num_loss_tokens, dtype=np.float32),),
        )
        for rollout in demonstrations
    ]
    return _plan(sequences, num_ranks, max_micro_batch_tokens)


def draw_facts(plan: StepPlan, *, with_ids: bool) -> DrawFacts:
    """The facts of a whole step, over all ranks, without its fillers.

    The digest of the draw depends neither on the split over ranks nor on the order of the slots.

    Args:
        with_ids: name every sequence too, some 17 bytes each.
    """
    ages: dict[Shelf, list[int]] = {shelf: [] for shelf in Shelf}
    ids: dict[Shelf, list[str]] = {shelf: [] for shelf in Shelf}
    untargeted: list[Rollout] = []
    for rank in plan.ranks:
        for micro_batch in rank:
            for sequence in micro_batch.sequences:
                if sequence.is_filler:
                    continue
                ages[sequence.shelf].append(sequence.age)
                ids[sequence.shelf].append(sequence.rollout.rollout_id)
                if not sequence.needs_targets:
                    untargeted.append(sequence.rollout)
    by_shelf = {shelf.value: tuple(sorted(ids[shelf])) for shelf in Shelf}
    return DrawFacts(
        phi=plan.phi,
        psi=plan.psi,
        mix=plan.mix,
        fresh_ages=tuple(ages[Shelf.FRESH]),
        replay_ages=tuple(ages[Shelf.REPLAY]),
        untargeted_sequences=len(untargeted),
        untargeted_tokens=sum(rollout.num_tokens for rollout in untargeted),
        draw_digest=_digest(by_shelf),
        rollout_ids=by_shelf if with_ids else {},
    )


def _digest(ids: Mapping[str, Sequence[str]]) -> str:
    text = json.dumps(ids, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def pack(micro_batch: MicroBatchPlan, targets: Mapping[str, TeacherTargets] | None) -> LearnerBatch:
    """One row of whole sequences.

    `targets` holds the teacher targets of every sequence that needs them by rollout id; None: the
    loss has no teacher.

    Raises:
        ValueError: targets that a sequence needs are missing, or belong to another response.
    """
    sequences = micro_batch.sequences
    assert sequences, "a micro-batch needs a sequence"
    rollouts = [sequence.rollout for sequence in sequences]
    lengths = [rollout.num_tokens for rollout in rollouts]
    boundaries = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    positions = [
        rollout.loss_positions + start
        for rollout, start in zip(rollouts, boundaries[:-1], strict=True)
    ]
    return LearnerBatch(
        token_ids_L=np.concatenate(
            [part for rollout in rollouts for part in (rollout.prompt_ids, rollout.response_ids)]
        ).astype(np.int32, copy=False),
        position_ids_L=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        boundaries=boundaries,
        loss_positions_N=np.concatenate(positions),
        labels_N=np.concatenate(
            [rollout.response_ids[rollout.loss_mask] for rollout in rollouts]
        ).astype(np.int32, copy=False),
        term_weights_N=tuple(
            np.concatenate(of_term)
            for of_term in zip(*(sequence.term_weights for sequence in sequences), strict=True)
        ),
        sequence_index_N=np.repeat(
            np.arange(len(rollouts), dtype=np.int32), [len(part) for part in positions]
        ),
        rollout_ids=tuple(rollout.rollout_id for rollout in rollouts),
        shelves=tuple(sequence.shelf for sequence in sequences),
        ages=tuple(sequence.age for sequence in sequences),
        is_filler=tuple(sequence.is_filler for sequence in sequences),
        targets=None if targets is None else _stack(sequences, targets),
        behaviour_logprobs_N=_behaviour_logprobs(rollouts),
    )


def _plan(
    sequences: Sequence[PlannedSequence], num_ranks: int, max_tokens: int
) -> tuple[tuple[MicroBatchPlan, ...], ...]:
    lengths = [sequence.rollout.num_tokens for sequence in sequences]
    ranks = split(lengths, num_ranks=num_ranks, max_tokens=max_tokens)
    shortest = sequences[lengths.index(min(lengths))]
    zeros = tuple(np.zeros_like(weights) for weights in shortest.term_weights)
    filler = replace(shortest, term_weights=zeros, is_filler=True)
    return tuple(
        tuple(
            MicroBatchPlan(sequences=tuple(sequences[index] for index in one) or (filler,))
            for one in rank
        )
        for rank in ranks
    )


def _behaviour_logprobs(rollouts: Sequence[Rollout]) -> Float32Array | None:
    if all(rollout.logprobs is None for rollout in rollouts):
        return None
    return np.concatenate(
        [
            np.full(rollout.num_loss_tokens, np.nan, dtype=np.float32)
            if rollout.logprobs is None
            else rollout.logprobs[rollout.loss_mask]
            for rollout in rollouts
        ]
    ).astype(np.float32, copy=False)


def _stack(
    sequences: Sequence[PlannedSequence], targets: Mapping[str, TeacherTargets]
) -> TeacherTargets | None:
    """The sequences' targets concatenated, `[N, ...]`; None if no sequence needs any.

    The others get a filling, which their weights of 0 keep out of the loss.
    """
    needed = [one.rollout for one in sequences if one.needs_targets]
    if not needed:
        return None
    found: list[TeacherTargets] = []
    for sequence in sequences:
        rollout = sequence.rollout
        if not sequence.needs_targets:
            like = targets.get(needed[0].rollout_id)
            found += [] if like is None else [_filling(like, rollout.num_loss_tokens)]
            continue
        if rollout.rollout_id not in targets:
            raise ValueError(
                f"every sequence of a row needs its teacher targets, got none for"
                f" {rollout.rollout_id}: score it again before packing"
            )
        one = targets[rollout.rollout_id]
        if _num_rows(one) != rollout.num_loss_tokens:
            raise ValueError(
                f"the teacher targets of {rollout.rollout_id} must have a row for each of its"
                f" {rollout.num_loss_tokens} loss tokens, got {_num_rows(one)}: they belong to"
                " another response"
            )
        found.append(one)
    match found[0]:
        case HiddenTargets():
            parts = [one.values_TD for one in found if isinstance(one, HiddenTargets)]
            stacked = HiddenTargets(values_TD=np.concatenate(parts))
        case LogitTargets():
            parts = [one.values_TV for one in found if isinstance(one, LogitTargets)]
            stacked = LogitTargets(values_TV=np.concatenate(parts))
        case TopKTargets():
            pairs = [one for one in found if isinstance(one, TopKTargets)]
            parts = [one.ids_TK for one in pairs]
            stacked = TopKTargets(
                ids_TK=np.concatenate(parts),
                log_probs_TK=np.concatenate([one.log_probs_TK for one in pairs]),
            )
    assert len(parts) == len(found), "a row mixes kinds of teacher targets"
    return stacked


def _filling(like: TeacherTargets, num_rows: int) -> TeacherTargets:
    """Targets of the kind and width of `like` that say nothing: a valid distribution each."""
    match like:
        case HiddenTargets(values_TD=values):
            return HiddenTargets(values_TD=np.zeros((num_rows, values.shape[1]), values.dtype))
        case LogitTargets(values_TV=values):
            return LogitTargets(values_TV=np.zeros((num_rows, values.shape[1]), values.dtype))
        case TopKTargets(ids_TK=ids, log_probs_TK=log_probs):
            shape = (num_rows, ids.shape[1])
            return TopKTargets(
                ids_TK=np.broadcast_to(np.arange(shape[1], dtype=ids.dtype), shape),
                log_probs_TK=np.full(shape, -np.log(2.0 * shape[1]), log_probs.dtype),
            )


def _num_rows(targets: TeacherTargets) -> int:
    match targets:
        case HiddenTargets():
            return len(targets.values_TD)
        case LogitTargets():
            return len(targets.values_TV)
        case TopKTargets():
            return len(targets.ids_TK)
