"""Rollout to TeacherTargets: the frozen teacher, one forward pass over what has queued.

    score(rollout) ──► queue ──► up to max_batch_tokens in one packed row ──► body ──► rows at the
                                                          positions that predict loss tokens

Packing: one row, position ids that restart with every sequence, no attention mask and no cache is
what transformers reads as separate sequences. With the cache on it would not.

Axes: L packed tokens, T loss tokens of one sequence, D hidden size, K top-k, V vocabulary.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from distillm_ray.batching import loss_positions
from distillm_ray.config import TargetsConfig, TeacherConfig, cpu_threads
from distillm_ray.dynamic_batching import DynamicBatcher
from distillm_ray.errors import ModelError
from distillm_ray.models.directory import check_parallelism
from distillm_ray.models.dtypes import resolve_dtype
from distillm_ray.models.heads import FrozenHead, load_frozen_head
from distillm_ray.models.packed_attention import attend_sequence_by_sequence, packed_arguments
from distillm_ray.types import (
    HiddenTargets,
    LogitTargets,
    Rollout,
    ScoreReport,
    TeacherTargets,
    TopKTargets,
)

HEAD_ROWS = 256  # positions whose logits exist at the same time
CHECKED_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerCounters:
    """Since the scorer was made."""

    sequences: int = 0
    tokens: int = 0  # computed by the body, prompts included
    batches: int = 0
    busy_seconds: float = 0.0  # in the forward pass


class Scorer:
    """The teacher's body (and its head, where the targets are not hidden states)."""

    def __init__(
        self,
        config: TeacherConfig,
        targets: TargetsConfig,
        *,
        vocabulary_size: int,
        device: torch.device | str,
    ) -> None:
        """Nothing heavy happens before `start`. `vocabulary_size`: the tokenizer's.

        Raises ConfigError for what is not built.
        """
        check_parallelism(config)
        self.config = config
        self.targets = targets
        self.vocabulary_size = vocabulary_size
        self.device = torch.device(device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.counters = ScorerCounters()
        self._body: nn.Module | None = None
        self._head: FrozenHead | None = None
        self._batcher: DynamicBatcher[Rollout, _Scored] = DynamicBatcher(self._score, self._fits)

    async def start(self) -> None:
        """Load the teacher and check that its body and head are what its logits are made of.

        Raises ModelError: no safetensors, an unknown rule after the head, or something between
        body and head.
        """
        if self.device.type == "cpu":
            torch.set_num_threads(cpu_threads(self.config))
        await asyncio.to_thread(self._load)
        self._batcher.start()

    async def stop(self) -> None:
        """End after the running forward pass; sequences that still wait are cancelled."""
        await self._batcher.stop()
        self._body = None

    async def score(self, rollout: Rollout) -> tuple[ScoreReport, TeacherTargets]:
        """Targets of one sequence, `[num_loss_tokens, ...]`; waits for its forward pass.

        Raises ValueError for a sequence that no forward pass may hold.
        """
        if rollout.num_tokens > self.config.max_batch_tokens:
            raise ValueError(
                f"{rollout.rollout_id}: a sequence must fit into teacher.max_batch_tokens, got"
                f" {rollout.num_tokens} > {self.config.max_batch_tokens} tokens: sequences are"
                " never cut"
            )
        return await self._batcher.call(rollout)

    # ---- how ----------------------------------------------------------------------------------

    def _load(self) -> None:
        flash = self.device.type == "cuda" and is_flash_attn_2_available()
        half = self.dtype == torch.bfloat16
        model = AutoModelForCausalLM.from_pretrained(
            self.config.model,
            dtype=self.dtype,
            trust_remote_code=self.config.trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            attn_implementation="flash_attention_2" if flash and half else "sdpa",
        )
        model = cast(PreTrainedModel, cast(Any, model).to(self.device).eval())
        if self.device.type == "cpu":
            attend_sequence_by_sequence(model)
        head = load_frozen_head(
            self.config.model,
            vocabulary_size=self.vocabulary_size,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.config.trust_remote_code,
        )
        _check_head(model, head)
        self._body = model.base_model
        self._head = None if self.targets.type == "hidden" else head

    def _fits(self, batch: Sequence[Rollout], rollout: Rollout) -> bool:
        """Whether one forward pass may hold all of these."""
        num_tokens = sum(other.num_tokens for other in batch) + rollout.num_tokens
        return num_tokens <= self.config.max_batch_tokens

    @torch.inference_mode()
    def _score(self, rollouts: Sequence[Rollout]) -> list[_Scored]:
        """One forward pass, then one set of targets a sequence."""
        assert self._body is not None, "call start() first"
        start = time.perf_counter()
        hidden_LD = _packed_forward(self._body, rollouts, self.device)
        all_targets = []
        offset = 0
        for rollout in rollouts:
            rows = torch.from_numpy(loss_positions(rollout)).long() + offset
            all_targets.append(self._targets(hidden_LD[rows.to(self.device)]))
            offset += rollout.num_tokens
        seconds = time.perf_counter() - start
        self.counters = replace(
            self.counters,
            sequences=self.counters.sequences + len(rollouts),
            tokens=self.counters.tokens + offset,
            batches=self.counters.batches + 1,
            busy_seconds=self.counters.busy_seconds + seconds,
        )
        return [
            (
                ScoreReport(
                    rollout_id=rollout.rollout_id,
                    num_tokens=rollout.num_tokens,
                    nbytes=targets.nbytes,
                    seconds=seconds * rollout.num_tokens / offset,
                ),
                targets,
            )
            for rollout, targets in zip(rollouts, all_targets, strict=True)
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


_Scored = tuple[ScoreReport, TeacherTargets]


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """A copy of its own in main memory; bfloat16 as its bits in uint16, which numpy can hold."""
    own = tensor.detach().to("cpu", copy=True).contiguous()
    return (own.view(torch.uint16) if own.dtype == torch.bfloat16 else own).numpy()


def _packed_forward(body: nn.Module, rollouts: Sequence[Rollout], device: torch.device) -> Tensor:
    """The body's output for sequences one after the other, `[L, D]`."""
    token_ids_L = np.concatenate(
        [part for rollout in rollouts for part in (rollout.prompt_ids, rollout.response_ids)]
    )
    positions = np.concatenate([np.arange(rollout.num_tokens) for rollout in rollouts])
    position_ids_L = torch.from_numpy(positions)
    output = body(
        input_ids=torch.from_numpy(token_ids_L).long()[None].to(device),
        position_ids=position_ids_L[None].to(device),
        use_cache=False,
        **packed_arguments(body, position_ids_L),
    )
    return output.last_hidden_state[0]


@torch.inference_mode()
def _check_head(model: PreTrainedModel, head: FrozenHead) -> None:
    """Head of the body's output must be the model's logits, up to rounding; else ModelError."""
    vocabulary_size = head.weight_VD.shape[0]
    token_ids = (torch.arange(CHECKED_TOKENS, device=model.device) % vocabulary_size)[None]
    expected_LV = model(input_ids=token_ids, use_cache=False).logits[0, :, :vocabulary_size].float()
    body_output = model.base_model(input_ids=token_ids, use_cache=False)
    found_LV = head.logits(body_output.last_hidden_state[0])
    difference = (found_LV - expected_LV).abs().max().item()
    scale = expected_LV.abs().max().item()
    tolerance = 0.02 if model.dtype == torch.bfloat16 else 1e-4
    if not difference <= tolerance * max(scale, 1.0):
        raise ModelError(
            f"the logits of the teacher ({type(model).__name__}) are not its output head applied to"
            f" its last hidden state: they differ by {difference:g} at a size of {scale:g}. The"
            " divergence would compare with another distribution; this architecture is not"
            " supported"
        )
