"""From a draw to packed rows: token weights, the split over ranks, loss positions.

A row is whole sequences one after the other, without padding. The weight of a token is fixed here,
over the global batch, so that no split into ranks and micro-batches can change the loss.

Where sequences run out before every rank has its micro-batch (three full rows on two ranks), a
filler takes the place: the shortest sequence once more, all of its token weights 0. It costs its
forward pass and adds nothing. `is_filler` tells it.

Axes: L packed tokens, N loss positions of a row, S sequences of a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import Literal, TypeAlias

import numpy as np

from distillm_ray.packing import split
from distillm_ray.types import (
    Draw,
    DrawFacts,
    Float32Array,
    HiddenTargets,
    Int32Array,
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

Normalize: TypeAlias = Literal["source", "tokens", "sequence"]


def loss_positions(rollout: Rollout) -> Int32Array:
    """Positions of the sequence that predict its loss tokens, `[num_loss_tokens]`.

    Token i of the response is predicted one position before it: len(prompt) - 1 + i.
    """
    offsets = np.flatnonzero(rollout.loss_mask)
    return (len(rollout.prompt_ids) - 1 + offsets).astype(np.int32)


def token_weights(rollouts: Sequence[Rollout], normalize: Normalize) -> tuple[Float32Array, ...]:
    """Each sequence's weights, `[num_loss_tokens]`; over all sequences they sum to 1.

    `source`: slots of the source / slots, spread evenly over the source's loss tokens; `tokens`:
    one mean over all loss tokens; `sequence`: the mean of the sequences' means. A sequence without
    a loss token does not count as a slot. Raises ValueError if there is no loss token at all.
    """
    counts = [rollout.num_loss_tokens for rollout in rollouts]
    slots = sum(count > 0 for count in counts)
    if slots == 0:
        raise ValueError(
            f"a global batch must have a token under the loss, got {len(rollouts)} sequences"
            " without one: there is nothing to learn from"
        )
    slots_of, tokens_of = Counter(), Counter()
    for rollout, count in zip(rollouts, counts, strict=True):
        slots_of[rollout.source] += count > 0
        tokens_of[rollout.source] += count
    total = sum(counts)
    weights = []
    for rollout, count in zip(rollouts, counts, strict=True):
        if count == 0:
            weight = 0.0
        else:
            match normalize:
                case "source":
                    source = rollout.source
                    weight = slots_of[source] / slots / tokens_of[source]
                case "tokens":
                    weight = 1.0 / total
                case "sequence":
                    weight = 1.0 / slots / count
        weights.append(np.full(count, weight, dtype=np.float64).astype(np.float32))
    return tuple(weights)


def plan_step(
    draw: Draw, *, num_ranks: int, max_micro_batch_tokens: int, normalize: Normalize
) -> StepPlan:
    """Split a draw: for each rank the same number of micro-batches, nearly equal tokens.

    Raises ValueError for a sequence longer than a micro-batch, or a draw without loss tokens.
    """
    weights = token_weights([drawn.rollout for drawn in draw.sequences], normalize)
    is_data = [drawn.shelf is Shelf.DATASET for drawn in draw.sequences]
    data_share = sum(float(weight.sum()) for weight in compress(weights, is_data))
    sequences = [
        PlannedSequence(
            rollout=drawn.rollout,
            shelf=drawn.shelf,
            age=drawn.age,
            token_weights=weight,
            cross_entropy_weights=weight / data_share if data else np.zeros_like(weight),
        )
        for drawn, weight, data in zip(draw.sequences, weights, is_data, strict=True)
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

    Every loss token weighs 1, a filler's 0: the weights' sum is the number of tokens.
    """
    ones = [np.ones(rollout.num_loss_tokens, dtype=np.float32) for rollout in demonstrations]
    sequences = [
        PlannedSequence(
            rollout=rollout,
            shelf=Shelf.DATASET,
            age=0,
            token_weights=weights,
            cross_entropy_weights=weights,
        )
        for rollout, weights in zip(demonstrations, ones, strict=True)
    ]
    return _plan(sequences, num_ranks, max_micro_batch_tokens)


def is_filler(sequence: PlannedSequence) -> bool:
    """Whether a sequence is there only so that its rank has something to compute."""
    return not sequence.token_weights.any()


def draw_facts(plan: StepPlan) -> DrawFacts:
    """The facts of a whole step, over all ranks; fillers are left out."""
    ages: dict[Shelf, list[int]] = {shelf: [] for shelf in Shelf}
    ids: dict[Shelf, list[str]] = {shelf: [] for shelf in Shelf}
    for rank in plan.ranks:
        for micro_batch in rank:
            for sequence in micro_batch.sequences:
                if is_filler(sequence):
                    continue
                ages[sequence.shelf].append(sequence.age)
                ids[sequence.shelf].append(sequence.rollout.rollout_id)
    return DrawFacts(
        phi=plan.phi,
        psi=plan.psi,
        mix=plan.mix,
        fresh_ages=tuple(ages[Shelf.FRESH]),
        replay_ages=tuple(ages[Shelf.REPLAY]),
        rollout_ids={shelf.value: tuple(sorted(ids[shelf])) for shelf in Shelf},
    )


def pack(micro_batch: MicroBatchPlan, targets: Mapping[str, TeacherTargets] | None) -> LearnerBatch:
    """One row of whole sequences. `targets`: by rollout id, every sequence's; None: no teacher.

    Raises ValueError if a sequence's targets are missing or belong to another response.
    """
    sequences = micro_batch.sequences
    assert sequences, "a micro-batch needs a sequence"
    rollouts = [sequence.rollout for sequence in sequences]
    lengths = [rollout.num_tokens for rollout in rollouts]
    boundaries = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    positions = [
        loss_positions(rollout) + start
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
        token_weights_N=np.concatenate([sequence.token_weights for sequence in sequences]),
        cross_entropy_weights_N=np.concatenate(
            [sequence.cross_entropy_weights for sequence in sequences]
        ),
        sequence_index_N=np.repeat(
            np.arange(len(rollouts), dtype=np.int32), [len(part) for part in positions]
        ),
        rollout_ids=tuple(rollout.rollout_id for rollout in rollouts),
        shelves=tuple(sequence.shelf for sequence in sequences),
        ages=tuple(sequence.age for sequence in sequences),
        targets=None if targets is None else _stack(rollouts, targets),
        behaviour_logprobs_N=_behaviour_logprobs(rollouts),
    )


def _plan(
    sequences: Sequence[PlannedSequence], num_ranks: int, max_tokens: int
) -> tuple[tuple[MicroBatchPlan, ...], ...]:
    lengths = [sequence.rollout.num_tokens for sequence in sequences]
    ranks = split(lengths, num_ranks=num_ranks, max_tokens=max_tokens)
    shortest = sequences[lengths.index(min(lengths))]
    zeros = np.zeros_like(shortest.token_weights)
    filler = replace(shortest, token_weights=zeros, cross_entropy_weights=zeros)
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


def _stack(rollouts: Sequence[Rollout], targets: Mapping[str, TeacherTargets]) -> TeacherTargets:
    """The rollouts' targets one after the other, `[N, ...]`."""
    found: list[TeacherTargets] = []
    for rollout in rollouts:
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


def _num_rows(targets: TeacherTargets) -> int:
    match targets:
        case HiddenTargets():
            return len(targets.values_TD)
        case LogitTargets():
            return len(targets.values_TV)
        case TopKTargets():
            return len(targets.ids_TK)
