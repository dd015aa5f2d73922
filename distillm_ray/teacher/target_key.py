"""The address of a sequence's teacher targets: a digest of everything that they depend on.

Whoever has the same tokens scored by the same teacher shares the targets: replays, epochs, seeds
and runs. Everything else about a rollout (its id, version, source, text) is left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from distillm_ray.types import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetIdentity:
    """What all targets of one teacher have in common."""

    teacher: str  # digest of the teacher, `models.identity.model_identity`
    kind: Literal["hidden", "top_k", "logits"]
    k: int | None = None  # of top_k; None for the other kinds
    dtype: str  # that the teacher computes in: "bfloat16" or "float32"

    def __post_init__(self) -> None:
        """Two identities are equal exactly if their targets are."""
        assert (self.k is not None) == (self.kind == "top_k"), f"k = {self.k} for {self.kind}"


def target_key(identity: TargetIdentity, rollout: Rollout) -> str:
    """32 hexadecimal digits; equal for equal teacher, kind, dtype, tokens and loss mask.

    Prompt and response enter separately: the same tokens with the boundary elsewhere have targets
    at other positions.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(identity, rollout):
        # Length first, so that no two sequences of parts give the same bytes.
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _parts(identity: TargetIdentity, rollout: Rollout) -> Iterator[bytes]:
    yield identity.teacher.encode()
    yield identity.kind.encode()
    yield str(identity.k).encode()
    yield identity.dtype.encode()
    yield rollout.prompt_ids.astype("<i4").tobytes()
    yield rollout.response_ids.astype("<i4").tobytes()
    yield rollout.loss_mask.astype(np.uint8).tobytes()
