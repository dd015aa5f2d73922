"""Facts about a generated response, and the filter that decides which are trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from distillm_ray.config import FilterConfig
from distillm_ray.types import FinishReason, Int32Array, Rollout

# A response loops if it ends in an n-gram of up to MAX_NGRAM tokens, repeated at least MIN_REPEATS
# times and over at least MIN_LOOP_TOKENS tokens. The last limit keeps "ha ha ha" a valid response.
MAX_NGRAM = 64
MIN_REPEATS = 4
MIN_LOOP_TOKENS = 32

MAX_REJECTED = 3
"""How often the filter may drop the response of one ordinal. The next one is trained on as it is,
because the schedule has promised its slot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseFacts:
    """Properties of one response that are counted and that the filter reads."""

    empty: bool  # only an end token, which is a legitimate rollout of one token
    looping: bool  # repeats an n-gram to its end
    truncated: bool  # ended by its length limit


def response_facts(rollout: Rollout) -> ResponseFacts:
    """Inspect one response. An end token does not count as part of a loop."""
    stopped = rollout.finish_reason is FinishReason.STOP
    return ResponseFacts(
        empty=stopped and len(rollout.response_ids) == 1,
        looping=_is_looping(rollout.response_ids[:-1] if stopped else rollout.response_ids),
        truncated=rollout.finish_reason is FinishReason.LENGTH,
    )


def response_counts(rollout: Rollout, facts: ResponseFacts) -> dict[str, int]:
    """What one response adds to the log's counters, by their names (`log.records.Counters`)."""
    return {
        "generated_sequences": 1,
        "generated_tokens": len(rollout.response_ids),
        "truncated": facts.truncated,
        "empty": facts.empty,
        "looping": facts.looping,
    }


def verdict(facts: ResponseFacts, config: FilterConfig) -> Literal["looping", "truncated"] | None:
    """Why the filter drops a response; None if it is trained on.

    Example:
        >>> facts = ResponseFacts(empty=False, looping=True, truncated=True)
        >>> verdict(facts, FilterConfig(drop_truncated=True))
        'truncated'
        >>> verdict(facts, FilterConfig()) is None
        True
    """
    if config.drop_looping and facts.looping:
        return "looping"
    if config.drop_truncated and facts.truncated:
        return "truncated"
    return None


def _is_looping(tokens_T: Int32Array) -> bool:
    num_tokens = len(tokens_T)
    for period in range(1, min(MAX_NGRAM, num_tokens // MIN_REPEATS) + 1):
        breaks = np.flatnonzero(tokens_T[period:] != tokens_T[:-period])
        # Everything after the last break repeats with this period, the first n-gram included.
        tail = num_tokens - (int(breaks[-1]) + 1 if len(breaks) else 0)
        if tail >= max(MIN_REPEATS * period, MIN_LOOP_TOKENS):
            return True
    return False
