"""Which token weighs what in which term of the loss.

The weights of all terms are computed once for the global batch, when it is drawn, and travel with
the sequences. They depend on who wrote a response (`Rollout.source`), never on the shelf that the
response came from, and not on the split into ranks and micro-batches. Pure: no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

from distillm_ray.config import SAMPLED, LossConfig, Skewed, Term
from distillm_ray.types import Float32Array, Rollout, Source

Normalize: TypeAlias = Literal["source", "tokens", "sequence"]

RAMP_SHARE = 0.5
"""Share of the run over which weights move to their `final_weight`: DistiLLM-2's first half."""

# Fields that do not tell terms apart in a name.
_WEIGHTING = {"on", "type", "weight", "final_weight"}
_CURRICULUM = {"curriculum", "min_alpha", "anchor_steps"}


def term_names(terms: Sequence[Term]) -> tuple[str, ...]:
    """A unique name for each term, such as `skew_kl on all`, for logs and reports.

    Terms of the same type on the same text are told apart by their parameters:
    `skew_kl(alpha=0.1) on all`.
    """
    short = [f"{term.type} on {term.on}" for term in terms]
    names = []
    for term, name in zip(terms, short, strict=True):
        if short.count(name) > 1:
            unused = isinstance(term, Skewed) and not term.curriculum
            hidden = _WEIGHTING | _CURRICULUM if unused else _WEIGHTING
            parameters = term.model_dump(exclude=hidden, exclude_none=True)
            values = ", ".join(f"{key}={value}" for key, value in parameters.items())
            name = f"{term.type}({values}) on {term.on}"
        names.append(name)
    return tuple(names)


def loss_at(loss: LossConfig, step: int, *, num_steps: int) -> LossConfig:
    """The loss of one step of a run of `num_steps`: each term with the weight it has there.

    A weight moves linearly from `weight` to `final_weight` over the first half of the run and stays
    there. `step` is 0-based.

    Example:
        >>> loss = LossConfig.model_validate(
        ...     {"terms": [{"type": "skew_kl", "final_weight": 0.5}, {"type": "cross_entropy"}]}
        ... )
        >>> for step in (0, 25, 50, 99):
        ...     print(*(term.weight for term in loss_at(loss, step, num_steps=100).terms))
        1.0 1.0
        0.75 1.0
        0.5 1.0
        0.5 1.0
    """
    if all(term.final_weight is None for term in loss.terms):
        return loss
    share = min(1.0, step / (RAMP_SHARE * num_steps))
    terms = tuple(
        term
        if term.final_weight is None
        else term.model_copy(
            update={"weight": (1.0 - share) * term.weight + share * term.final_weight}
        )
        for term in loss.terms
    )
    return loss.model_copy(update={"terms": terms})


def term_weights(
    rollouts: Sequence[Rollout], loss: LossConfig
) -> tuple[tuple[Float32Array, ...], ...]:
    """For each rollout of the global batch one array per term, `[num_loss_tokens]` each.

    A divergence has the weight that `loss.normalize` gives the token over the whole batch, times
    the term's `weight`, and 0 on text that the term does not cover. So `on: dataset` and
    `on: student` of one divergence add up to `on: all` exactly.

    Cross-entropy and policy gradients have a denominator of their own: the weights that
    `loss.normalize` gives the covered tokens are divided by their sum, so that the term is the mean
    over the covered tokens, times its `weight`. It is 0 in a batch without covered tokens.

    The corpus is normalized apart: its sequences change no weight of a response, and any term on it
    is the mean over the corpus tokens, times its `weight`.

    Raises:
        ValueError: no rollout has a loss token.

    Example:
        Three data-set tokens and one student token, each source with half of the slots.

        >>> from distillm_ray.types import FinishReason
        >>> def rollout(name: str, num_tokens: int, source: Source) -> Rollout:
        ...     ids = np.arange(num_tokens, dtype=np.int32)
        ...     return Rollout(
        ...         rollout_id=name, prompt_id=name, prompt_ids=ids, response_ids=ids, version=0,
        ...         loss_mask=np.ones(num_tokens, dtype=np.bool_), source=source,
        ...         finish_reason=FinishReason.STOP,
        ...     )
        >>> rollouts = [rollout("d", 3, Source.DATASET), rollout("s", 1, Source.STUDENT)]
        >>> loss = LossConfig.model_validate(
        ...     {"terms": [{"type": "skew_kl", "weight": 2.0}, {"type": "cross_entropy"}]}
        ... )
        >>> for skew_kl, cross_entropy in term_weights(rollouts, loss):
        ...     print(skew_kl, cross_entropy)
        [0.33333334 0.33333334 0.33333334] [0.33333334 0.33333334 0.33333334]
        [1.] [0.]
    """
    weights = token_weights(rollouts, loss.normalize)
    by_term = [_weights_in(term, rollouts, weights) for term in loss.terms]
    return tuple(zip(*by_term, strict=True))


def token_weights(rollouts: Sequence[Rollout], normalize: Normalize) -> tuple[Float32Array, ...]:
    """The weight of each rollout's loss tokens before any term, `[num_loss_tokens]`.

    The weights of all responses sum to 1, and so do those of the corpus, each for itself.

    `source`: the slots of the source / all slots, spread evenly over the source's loss tokens.
    `tokens`: one mean over all loss tokens. `sequence`: the mean of the sequences' means. A rollout
    without a loss token does not count as a slot.

    Raises:
        ValueError: no rollout has a loss token.
    """
    counts = [rollout.num_loss_tokens for rollout in rollouts]
    if not any(counts):
        raise ValueError(
            f"a global batch must have a token under the loss, got {len(rollouts)} sequences"
            " without one: there is nothing to learn from"
        )
    slots_of, tokens_of = Counter[Source](), Counter[Source]()
    slots, total = Counter[bool](), Counter[bool]()  # of the responses, of the corpus
    for rollout, count in zip(rollouts, counts, strict=True):
        apart = rollout.source is Source.CORPUS
        slots_of[rollout.source] += count > 0
        tokens_of[rollout.source] += count
        slots[apart] += count > 0
        total[apart] += count
    weights = []
    for rollout, count in zip(rollouts, counts, strict=True):
        if count == 0:
            weight = 0.0
        else:
            source = rollout.source
            apart = source is Source.CORPUS
            match normalize:
                case "source":
                    weight = slots_of[source] / slots[apart] / tokens_of[source]
                case "tokens":
                    weight = 1.0 / total[apart]
                case "sequence":
                    weight = 1.0 / slots[apart] / count
        weights.append(np.full(count, weight, dtype=np.float64).astype(np.float32))
    return tuple(weights)


def _weights_in(
    term: Term, rollouts: Sequence[Rollout], weights: Sequence[Float32Array]
) -> list[Float32Array]:
    """One term's weights for each rollout."""
    covered = [term.covers(rollout.source) for rollout in rollouts]
    share = 1.0
    if isinstance(term, SAMPLED):
        pairs = zip(weights, covered, strict=True)
        share = sum(float(weight.sum()) for weight, is_covered in pairs if is_covered)
    return [
        term.weight * (weight / share) if is_covered else np.zeros_like(weight)
        for weight, is_covered in zip(weights, covered, strict=True)
    ]
