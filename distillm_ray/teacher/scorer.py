"""Rollout to TeacherTargets: the frozen teacher, with dynamic batching.

    score(rollout) ──► queue ──► up to max_batch_tokens in one packed row ──► backbone ──► rows at
                                                      the positions that predict loss tokens

Axes: L packed tokens, T loss tokens of one sequence, D hidden size, K top-k, V vocabulary.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distillm_ray.config import TargetsConfig, TeacherConfig
from distillm_ray.dynamic_batching import DynamicBatcher
from distillm_ray.models.directory import check_parallelism
from distillm_ray.models.dtypes import resolve_dtype
from distillm_ray.models.heads import FrozenHead, load_frozen_head
from distillm_ray.models.packed import PackedModel, check_head, load_packed_model
from distillm_ray.remote.inputs import fetched
from distillm_ray.types import (
    HiddenTargets,
    LogitTargets,
    Rollout,
    ScoreReport,
    TeacherTargets,
    TopKTargets,
)

HEAD_ROWS = 256  # positions whose float32 logits are in memory at the same time

Scored: TypeAlias = tuple[ScoreReport, TeacherTargets]


class Scorer:
    """The teacher's backbone, and its head where the targets are not hidden states."""

    def __init__(
        self,
        config: TeacherConfig,
        targets: TargetsConfig,
        *,
        vocabulary_size: int,
        device: torch.device | str,
    ) -> None:
        """Check the settings; `start` loads the model. `vocabulary_size` is the tokenizer's.

        Raises:
            ConfigError: tensor parallelism, which is not supported.
        """
        check_parallelism(config)
        self.config = config
        self.targets = targets
        self.vocabulary_size = vocabulary_size
        self.device = torch.device(device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self._packed: PackedModel | None = None
        self._head: FrozenHead | None = None
        self._batcher: DynamicBatcher[Rollout, Scored] = DynamicBatcher(self._score, self._fits)

    async def start(self) -> None:
        """Load the teacher, check it on a packed row, and start to serve requests.

        Raises:
            ModelError: the teacher cannot be loaded, its head rule is unknown, `check_head`
                refuses it, or no way of running it on packed rows is exact.
        """
        if self.device.type == "cpu":
            torch.set_num_threads(self.config.num_threads)
        await asyncio.to_thread(self._load)
        self._batcher.start()

    @property
    def remark(self) -> str:
        """How the teacher runs packed rows, where that is slower than usual; else empty."""
        return "" if self._packed is None else self._packed.remark

    @property
    def silent_s(self) -> float:
        """Seconds since the running forward pass began; 0 if none runs."""
        return self._batcher.silent_s

    async def stop(self) -> None:
        """Stop after the running forward pass; sequences that still wait are cancelled."""
        await self._batcher.stop()
        self._packed = None

    async def score(self, rollout: Rollout) -> Scored:
        """Return the targets of one sequence, `[num_loss_tokens, ...]`, after its forward pass.

        Raises:
            ValueError: the sequence is longer than a forward pass may be.
        """
        if rollout.num_tokens > self.config.max_batch_tokens:
            raise ValueError(
                f"{rollout.rollout_id}: a sequence must fit into teacher.max_batch_tokens, got"
                f" {rollout.num_tokens} > {self.config.max_batch_tokens} tokens: sequences are"
                " never cut"
            )
        return await self._batcher.call(rollout)

    # ---- implementation -----------------------------------------------------------------------

    def _load(self) -> None:
        packed = load_packed_model(
            fetched(self.config.model),
            role="teacher",
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.config.trust_remote_code,
        )
        head = load_frozen_head(
            fetched(self.config.model),
            vocabulary_size=self.vocabulary_size,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.config.trust_remote_code,
        )
        check_head(packed.model, head, role="teacher")
        self._packed = packed
        self._head = None if self.targets.type == "hidden" else head

    def _fits(self, batch: Sequence[Rollout], rollout: Rollout) -> bool:
        """Whether one forward pass may hold the batch and the rollout."""
        num_tokens = sum(other.num_tokens for other in batch) + rollout.num_tokens
        return num_tokens <= self.config.max_batch_tokens

    @torch.inference_mode()
    def _score(self, rollouts: Sequence[Rollout]) -> list[Scored]:
        """Run one forward pass over all rollouts and cut out the targets of each."""
        assert self._packed is not None, "call start() first"
        started = time.monotonic()
        token_ids_L = np.concatenate(
            [part for rollout in rollouts for part in (rollout.prompt_ids, rollout.response_ids)]
        )
        position_ids_L = np.concatenate([np.arange(rollout.num_tokens) for rollout in rollouts])
        hidden_LD = self._packed.forward(
            torch.from_numpy(token_ids_L).long().to(self.device),
            torch.from_numpy(position_ids_L).to(self.device),
        )
        found: list[TeacherTargets] = []
        start = 0
        for rollout in rollouts:
            rows = torch.from_numpy(rollout.loss_positions).long() + start
            found.append(self._targets(hidden_LD[rows.to(self.device)]))
            start += rollout.num_tokens
        seconds_per_token = (time.monotonic() - started) / start
        return [
            (
                ScoreReport(
                    num_tokens=rollout.num_tokens,
                    nbytes=targets.nbytes,
                    seconds=rollout.num_tokens * seconds_per_token,
                ),
                targets,
            )
            for rollout, targets in zip(rollouts, found, strict=True)
        ]

    def _targets(self, hidden_TD: Tensor) -> TeacherTargets:
        if self.targets.type == "hidden":
            return HiddenTargets(values_TD=to_numpy(hidden_TD))
        assert self._head is not None
        logits = [self._head.logits(rows_TD) for rows_TD in hidden_TD.split(HEAD_ROWS)]
        if self.targets.type == "logits":
            return LogitTargets(values_TV=to_numpy(torch.cat(logits).to(self.dtype)))
        best = [part_TV.log_softmax(-1).topk(self.targets.k, dim=-1) for part_TV in logits]
        return TopKTargets(
            ids_TK=torch.cat([part.indices for part in best]).cpu().numpy().astype(np.int32),
            log_probs_TK=to_numpy(torch.cat([part.values for part in best])),
        )


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """Return a copy in main memory; bfloat16, which numpy lacks, as its bits in uint16."""
    own = tensor.detach().to("cpu", copy=True).contiguous()
    return (own.view(torch.uint16) if own.dtype == torch.bfloat16 else own).numpy()
