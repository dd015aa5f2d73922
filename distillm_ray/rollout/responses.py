"""What a response is like, empty, looping or truncated, and which ones are not trained on."""

from __future__ import annotations

from typing import Literal

import numpy as np

from distillm_ray.config import FilterConfig
from distillm_ray.types import FinishReason, Rollout

# A response loops if it ends with an n-gram of up to MAX_NGRAM tokens that is repeated at least
# MIN_REPEATS times over at least MIN_LOOP_TOKENS tokens: "ha ha ha" is an answer, a page is none.
MAX_NGRAM = 64
MIN_REPEATS = 4
MIN_LOOP_TOKENS = 32


def is_empty(rollout: Rollout) -> bool:
    """Nothing but an end token: a legitimate rollout of one token."""
    return rollout.finish_reason is FinishReason.STOP and len(rollout.response_ids) == 1


def is_looping(rollout: Rollout) -> bool:
    """Whether the response repeats an n-gram to its end (an end token does not count)."""
    stopped = rollout.finish_reason is FinishReason.STOP
    tokens_T = rollout.response_ids[:-1] if stopped else rollout.response_ids
    num_tokens = len(tokens_T)
    for period in range(1, min(MAX_NGRAM, num_tokens // MIN_REPEATS) + 1):
        breaks = np.flatnonzero(tokens_T[period:] != tokens_T[:-period])
        # The tail after the last break repeats with this period, its first n-gram included.
        tail = num_tokens - (int(breaks[-1]) + 1 if len(breaks) else 0)
        if tail >= max(MIN_REPEATS * period, MIN_LOOP_TOKENS):
            return True
    return False


def verdict(rollout: Rollout, config: FilterConfig) -> Literal["looping", "truncated"] | None:
    """Why the filter drops a response, or None: it is trained on."""
    if config.drop_looping and is_looping(rollout):
        return "looping"
    if config.drop_truncated and rollout.finish_reason is FinishReason.LENGTH:
        return "truncated"
    return None
