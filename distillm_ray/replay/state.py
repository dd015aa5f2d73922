"""What a checkpoint keeps of the replay buffer: token ids and numbers, as npz and JSON.

Teacher targets are not in it: they are a cache. No pickle.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distillm_ray.types import FinishReason, Prompt, Rollout, Source

FORMAT = 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BufferState:
    """The buffer as of draw `step`: this draw and later ones are not in it."""

    step: int
    identity: dict[str, int]  # what a resumed run must have in common with the saved one
    schedule: dict[str, Any]
    last_validation: int
    first_ordinal: int
    dataset_position: int
    fresh_counts: dict[int, int]  # step -> fresh slots promised to it
    outstanding: tuple[tuple[int, str, int, int], ...]  # ordinal, prompt id, min_version, attempt
    finished: tuple[Rollout, ...]
    replay: tuple[Rollout, ...]  # oldest first
    lost: int
    duplicates: int
    late: int

    def to_bytes(self) -> bytes:
        """One npz file."""
        meta = {
            "format": FORMAT,
            "step": self.step,
            "identity": self.identity,
            "schedule": self.schedule,
            "last_validation": self.last_validation,
            "first_ordinal": self.first_ordinal,
            "dataset_position": self.dataset_position,
            "fresh_counts": sorted(self.fresh_counts.items()),
            "outstanding": self.outstanding,
            "num_finished": len(self.finished),
            "lost": self.lost,
            "duplicates": self.duplicates,
            "late": self.late,
        }
        rollouts = [*self.finished, *self.replay]
        meta["rollouts"] = [_describe(rollout) for rollout in rollouts]
        file = io.BytesIO()
        np.savez(
            file,
            allow_pickle=False,
            meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8),
            prompt_ids=_flat([rollout.prompt_ids for rollout in rollouts], np.int32),
            response_ids=_flat([rollout.response_ids for rollout in rollouts], np.int32),
            loss_mask=_flat([rollout.loss_mask for rollout in rollouts], np.bool_),
            logprobs=_flat(
                [rollout.logprobs for rollout in rollouts if rollout.logprobs is not None],
                np.float32,
            ),
        )
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> BufferState:
        """The inverse of `to_bytes`. Raises ValueError for another format."""
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            meta = json.loads(file["meta"].tobytes())
            if meta["format"] != FORMAT:
                raise ValueError(
                    f"a saved buffer must have format {FORMAT}, got {meta['format']}: it was"
                    " written by another version of distillm-ray; resume with that version"
                )
            rollouts = _rollouts(
                meta["rollouts"],
                prompt_ids=file["prompt_ids"],
                response_ids=file["response_ids"],
                loss_mask=file["loss_mask"],
                logprobs=file["logprobs"],
            )
        num_finished = meta["num_finished"]
        return cls(
            step=meta["step"],
            identity=meta["identity"],
            schedule=meta["schedule"],
            last_validation=meta["last_validation"],
            first_ordinal=meta["first_ordinal"],
            dataset_position=meta["dataset_position"],
            fresh_counts=dict(meta["fresh_counts"]),
            outstanding=tuple(tuple(entry) for entry in meta["outstanding"]),
            finished=tuple(rollouts[:num_finished]),
            replay=tuple(rollouts[num_finished:]),
            lost=meta["lost"],
            duplicates=meta["duplicates"],
            late=meta["late"],
        )


def _describe(rollout: Rollout) -> dict[str, Any]:
    """Everything but the arrays, and their lengths."""
    return {
        "rollout_id": rollout.rollout_id,
        "prompt_id": rollout.prompt_id,
        "source": rollout.source.value,
        "version": rollout.version,
        "finish_reason": rollout.finish_reason.value,
        "ordinal": rollout.ordinal,
        "text": rollout.text,
        "prompt_tokens": len(rollout.prompt_ids),
        "response_tokens": len(rollout.response_ids),
        "has_logprobs": rollout.logprobs is not None,
    }


def _flat(arrays: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype=dtype), *arrays]).astype(dtype, copy=False)


class _Reader:
    """Hands out the next pieces of a flat array, as copies that outlive it."""

    def __init__(self, flat: NDArray[Any]) -> None:
        self._flat = flat
        self._offset = 0

    def take(self, count: int) -> NDArray[Any]:
        self._offset += count
        return self._flat[self._offset - count : self._offset].copy()


def _rollouts(
    descriptions: Sequence[dict[str, Any]],
    *,
    prompt_ids: NDArray[Any],
    response_ids: NDArray[Any],
    loss_mask: NDArray[Any],
    logprobs: NDArray[Any],
) -> list[Rollout]:
    prompts, responses = _Reader(prompt_ids), _Reader(response_ids)
    masks, scores = _Reader(loss_mask), _Reader(logprobs)
    return [
        Rollout(
            rollout_id=one["rollout_id"],
            prompt_id=one["prompt_id"],
            prompt_ids=prompts.take(one["prompt_tokens"]),
            response_ids=responses.take(one["response_tokens"]),
            loss_mask=masks.take(one["response_tokens"]),
            source=Source(one["source"]),
            version=one["version"],
            finish_reason=FinishReason(one["finish_reason"]),
            logprobs=scores.take(one["response_tokens"]) if one["has_logprobs"] else None,
            ordinal=one["ordinal"],
            text=one["text"],
        )
        for one in descriptions
    ]


def digest(prompts: Sequence[Prompt], demonstrations: Sequence[Rollout]) -> int:
    """Of all token ids in order: other data of the same size is other data."""
    value = 0
    for prompt in prompts:
        value = zlib.crc32(prompt.token_ids.tobytes(), value)
    for demonstration in demonstrations:
        value = zlib.crc32(demonstration.response_ids.tobytes(), value)
    return value
