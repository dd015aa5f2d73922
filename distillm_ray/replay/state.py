"""The part of the replay buffer that a checkpoint saves: token ids and numbers, as npz and JSON.

Teacher targets are not saved: they are a cache. Nothing is pickled.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distillm_ray.types import FinishReason, Prompt, Rollout, Source

FORMAT = 5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BufferState:
    """The buffer before draw `step`."""

    step: int
    identity: dict[str, int]  # values that a resumed run must share with the saved one
    schedule: dict[str, Any]  # the fields of Schedule
    last_validation: int
    first_ordinal: int
    dataset_position: int
    fresh_counts: dict[int, int]  # step -> fresh rollouts promised to it
    outstanding: tuple[tuple[int, str, int, int], ...]  # ordinal, prompt id, min_version, attempt
    given_up: tuple[str, ...]  # prompt ids
    finished: tuple[Rollout, ...]
    replay: tuple[Rollout, ...]  # oldest first
    duplicates: int
    late: int

    def to_bytes(self) -> bytes:
        """Serialize into one npz file."""
        rollouts = [*self.finished, *self.replay]
        meta = {
            "format": FORMAT,
            "values": {
                field.name: getattr(self, field.name)
                for field in fields(self)
                if field.name not in ("finished", "replay")
            },
            "num_finished": len(self.finished),
            "rollouts": [_describe(rollout) for rollout in rollouts],
        }
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
        """The inverse of `to_bytes`.

        Raises:
            ValueError: the data has another format.
        """
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            meta = json.loads(file["meta"].tobytes())
            if meta["format"] != FORMAT:
                raise ValueError(
                    f"a saved buffer must have format {FORMAT}, got {meta['format']}: it was"
                    " written by another version of distillm-ray; resume with that version"
                )
            rollouts = _rollouts(meta["rollouts"], file)
        values, num_finished = meta["values"], meta["num_finished"]
        # JSON keeps neither integer keys nor tuples.
        values["fresh_counts"] = {int(s): n for s, n in values["fresh_counts"].items()}
        values["outstanding"] = tuple(tuple(entry) for entry in values["outstanding"])
        values["given_up"] = tuple(values["given_up"])
        return cls(
            **values,
            finished=tuple(rollouts[:num_finished]),
            replay=tuple(rollouts[num_finished:]),
        )


def _describe(rollout: Rollout) -> dict[str, Any]:
    """All fields but the arrays, of which only the lengths."""
    return {
        "rollout_id": rollout.rollout_id,
        "prompt_id": rollout.prompt_id,
        "source": rollout.source,
        "version": rollout.version,
        "finish_reason": rollout.finish_reason,
        "ordinal": rollout.ordinal,
        "text": rollout.text,
        "prompt_tokens": len(rollout.prompt_ids),
        "response_tokens": len(rollout.response_ids),
        "has_logprobs": rollout.logprobs is not None,
    }


def _flat(arrays: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype=dtype), *arrays]).astype(dtype, copy=False)


def _pieces(flat: NDArray[Any], lengths: Sequence[int]) -> list[NDArray[Any]]:
    """The inverse of `_flat`. Copies, so that a piece does not keep the whole array alive."""
    *pieces, rest = np.split(flat, np.cumsum(lengths, dtype=np.int64))
    assert rest.size == 0
    return [piece.copy() for piece in pieces]


def _rollouts(descriptions: Sequence[dict[str, Any]], arrays: Any) -> list[Rollout]:
    """Rollouts from their descriptions and the flat arrays of an npz file (untyped in numpy)."""
    num_prompt = [one["prompt_tokens"] for one in descriptions]
    num_response = [one["response_tokens"] for one in descriptions]
    num_logprobs = [one["response_tokens"] * one["has_logprobs"] for one in descriptions]
    return [
        Rollout(
            rollout_id=one["rollout_id"],
            prompt_id=one["prompt_id"],
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            loss_mask=loss_mask,
            source=Source(one["source"]),
            version=one["version"],
            finish_reason=FinishReason(one["finish_reason"]),
            logprobs=logprobs if one["has_logprobs"] else None,
            ordinal=one["ordinal"],
            text=one["text"],
        )
        for one, prompt_ids, response_ids, loss_mask, logprobs in zip(
            descriptions,
            _pieces(arrays["prompt_ids"], num_prompt),
            _pieces(arrays["response_ids"], num_response),
            _pieces(arrays["loss_mask"], num_response),
            _pieces(arrays["logprobs"], num_logprobs),
            strict=True,
        )
    ]


def digest(prompts: Iterable[Prompt], demonstrations: Iterable[Rollout]) -> int:
    """CRC-32 of everything in the data that is trained on: token ids, masks and their lengths."""
    value = 0
    for array in _learned(prompts, demonstrations):
        value = zlib.crc32(len(array).to_bytes(8, "little"), value)
        value = zlib.crc32(array.tobytes(), value)
    return value


def _learned(
    prompts: Iterable[Prompt], demonstrations: Iterable[Rollout]
) -> Iterator[NDArray[Any]]:
    for prompt in prompts:
        yield prompt.token_ids
    for rollout in demonstrations:
        yield from (rollout.prompt_ids, rollout.response_ids, rollout.loss_mask)
