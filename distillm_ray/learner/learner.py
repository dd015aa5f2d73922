"""One rank of the learner: a DeepSpeed engine around the student and its distillation head.

One optimizer step, for every rank at once:

    for each micro-batch:  forward ──► sum of token_weights x value ──► x num_ranks ──► backward
    step():                gradients averaged over ranks ──► clipped ──► optimizer
    one all-reduce:        what the step looked like, for the log

The token weights refer to the global batch, so the sum over micro-batches and ranks is the loss;
the factor num_ranks undoes DeepSpeed's average. DeepSpeed counts no accumulation steps: `step()`
is the boundary.

Axes: L packed tokens, N loss positions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from distillm_ray.config import LearnerConfig, LossConfig, StudentConfig, cpu_threads
from distillm_ray.learner.deepspeed_engine import (
    build_optimizer,
    engine_config,
    join_group,
    random_state,
    set_random_state,
)
from distillm_ray.learner.host_memory import return_freed_memory
from distillm_ray.learner.step_statistics import StepStatistics
from distillm_ray.learner.student_model import PackedStudent, load_student
from distillm_ray.loss.distillation_head import install_distillation_head
from distillm_ray.loss.head_loss import DivergenceTerm, HeadLoss, LossRequest
from distillm_ray.loss.teacher_tensors import teacher_tensors
from distillm_ray.models.dtypes import resolve_dtype
from distillm_ray.models.heads import FrozenHead
from distillm_ray.types import Bucket, LearnerBatch, TrainStep
from distillm_ray.weights.export import export_model
from distillm_ray.weights.gather import gather

_ENGINE_TAG = "engine"
_EXPORT_ELEMENTS = 1_000_000_000  # of one exported file


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """A step as the log wants it, and how far the engine's log-probabilities were off."""

    train: TrainStep
    logprob_gap: float  # mean |engine - learner| over fresh tokens of age 0; NaN without any


def learning_rate_at(step: int, config: LearnerConfig) -> float:
    """Linear warm-up, then a cosine down to `min_learning_rate_ratio` of the peak.

    `step` is 0-based: the first step of a warm-up already moves, the last step of all is the
    lowest.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    decay_steps = max(config.steps - 1 - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / decay_steps, 1.0)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    low = config.min_learning_rate_ratio
    return config.learning_rate * (low + (1.0 - low) * cosine)


class Learner:
    """One rank. Every public method is a collective: all ranks call it, in the same order."""

    def __init__(
        self,
        config: LearnerConfig,
        student: StudentConfig,
        loss: LossConfig,
        *,
        teacher_head: FrozenHead | None,
        vocabulary_size: int,
        device: torch.device,
        seed: int,
        persistence_threshold: int = 100_000,
    ) -> None:
        """Load the student and build the engine.

        `vocabulary_size` is the tokenizer's; rows of the head beyond it are never predicted.
        ZeRO-3 keeps parameters below `persistence_threshold` elements whole on every rank.

        Raises:
            ModelError: the student cannot be loaded.
            ConfigError: the student's dtype and the ZeRO stage do not go together.
        """
        self._config = config
        self._loss = loss
        self._student = student
        self._teacher_head = None if teacher_head is None else teacher_head.to(device)
        self.device = device
        if device.type == "cpu":
            torch.set_num_threads(cpu_threads(config))
        join_group(device)
        self.rank = dist.get_rank()
        self.num_ranks = dist.get_world_size()
        torch.manual_seed(seed + self.rank)
        model = load_student(student, device=device, zero_stage=config.zero_stage)
        self._dtype = resolve_dtype(student.dtype, device)
        install_distillation_head(
            model,
            vocabulary_size=vocabulary_size,
            implementation=loss.implementation,
            memory_bytes=None if loss.chunk_megabytes is None else loss.chunk_megabytes * 2**20,
        )
        self._model = model
        self._gradient_norm = math.nan
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = build_optimizer(config, trainable)
        if config.zero_stage == 0:
            self._optimizer.register_step_pre_hook(self._clip_or_skip)
        self._engine, *_ = deepspeed.initialize(
            model=PackedStudent(model),
            optimizer=self._optimizer,
            config=engine_config(config, self._dtype, persistence_threshold=persistence_threshold),
        )

    # ---- training --------------------------------------------------------------------------------

    def train_step(
        self, batches: Sequence[LearnerBatch], step: int, *, wait_seconds: float = 0.0
    ) -> StepOutcome:
        """One optimizer step on this rank's micro-batches; `step` is 0-based.

        A non-finite loss or gradient on any rank leaves the parameters of all ranks as they were.
        """
        started = time.monotonic()
        learning_rate = learning_rate_at(step, self._config)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.train()
        statistics = StepStatistics(self.device)
        for batch in batches:
            answer = self._forward(batch, training=True)
            # NaN times a non-finite loss: its gradient is NaN, by which every rank skips the step.
            poison = torch.where(answer.loss.detach().isfinite(), 1.0, math.nan)
            self._engine.backward(answer.loss * poison * self.num_ranks)
            statistics.add(batch, answer, self._token_losses(batch, answer))
        self._engine.step()
        if self.device.type == "cpu":
            return_freed_memory()
        norm = self._global_gradient_norm()
        totals = statistics.reduce(wait_seconds)
        train = TrainStep(
            step=step + 1,
            loss=totals.loss,
            loss_by_shelf=totals.loss_by_shelf,
            learning_rate=learning_rate,
            gradient_norm=norm,
            tokens=totals.tokens,
            loss_tokens=totals.loss_tokens,
            positions=totals.positions,
            seconds=time.monotonic() - started + wait_seconds,
            wait_seconds=totals.wait_seconds,
            skipped=not math.isfinite(norm),
            infinite_tokens=totals.infinite_tokens,
            rank_token_imbalance=totals.rank_token_imbalance,
        )
        return StepOutcome(train=train, logprob_gap=totals.logprob_gap)

    def validation_loss(self, batches: Sequence[LearnerBatch]) -> tuple[float, int]:
        """Sum of the cross-entropy over all ranks' tokens that weigh 1, in nats; their number."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in batches:
            log_probs_N = self._forward(batch, training=False).log_probs_N
            assert log_probs_N is not None
            counts_N = self._to_device(batch.token_weights_N, torch.float32) > 0
            total[0] -= log_probs_N[counts_N].double().sum()
            total[1] += counts_N.sum()
        dist.all_reduce(total)
        loss_sum, num_tokens = total.tolist()
        return loss_sum, int(num_tokens)

    def token_logprobs(self, batch: LearnerBatch) -> NDArray[np.float32]:
        """`[N]`, log-probability of each label at temperature 1."""
        log_probs_N = self._forward(batch, training=False).log_probs_N
        assert log_probs_N is not None
        return log_probs_N.float().cpu().numpy()

    # ---- weights and state -----------------------------------------------------------------------

    def gather_weights(self, dtype: torch.dtype) -> Iterator[Bucket]:
        """Buckets of the student's weights on rank 0, empty ones elsewhere; iterate to the end."""
        return gather(self._model, dtype, keep=self.rank == 0)

    def save(self, directory: Path) -> None:
        """Model, optimizer and random state. `directory` is the same on all ranks."""
        self._engine.save_checkpoint(str(directory), tag=_ENGINE_TAG, save_latest=False)
        torch.save(random_state(self.device), directory / f"random-{self.rank:05d}.pt")

    def load(self, directory: Path) -> None:
        """The inverse of `save`, under the same ZeRO stage (1 and 2 are the same)."""
        path, _ = self._engine.load_checkpoint(str(directory), tag=_ENGINE_TAG)
        assert path is not None, f"DeepSpeed found nothing to load in {directory}"
        random_path = directory / f"random-{self.rank:05d}.pt"
        if random_path.exists():  # another number of ranks starts with new streams
            set_random_state(torch.load(random_path, weights_only=False), self.device)

    def export(self, directory: Path) -> None:
        """A Hugging Face directory that transformers and vLLM load as is, LoRA merged."""
        keep = self.rank == 0
        buckets = gather(self._model, self._dtype, keep=keep, bucket_elements=_EXPORT_ELEMENTS)
        if keep:
            export_model(buckets, self._student.model, directory, self._dtype)
        else:
            for _ in buckets:
                pass
        self.barrier()

    # ---- agreement -------------------------------------------------------------------------------

    def agree(self, flag: bool) -> bool:
        """What rank 0 says."""
        value = torch.tensor([int(flag)], device=self.device)
        dist.broadcast(value, src=0)
        return bool(value.item())

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks."""
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.all_reduce(torch.zeros(1, device=self.device))

    # ---- inside ----------------------------------------------------------------------------------

    def _forward(self, batch: LearnerBatch, *, training: bool) -> HeadLoss:
        """The engine's forward pass on one row. Arrays are copied: they may be shared memory."""
        token_ids_L = self._to_device(batch.token_ids_L, torch.int64)
        position_ids_L = self._to_device(batch.position_ids_L, torch.int64)
        positions_N = self._to_device(batch.loss_positions_N, torch.int64)
        if training:
            return self._engine(token_ids_L, position_ids_L, positions_N, self._request(batch))
        self._engine.eval()
        request = LossRequest(labels_N=self._to_device(batch.labels_N, torch.int64))
        with torch.no_grad():
            return self._engine(token_ids_L, position_ids_L, positions_N, request)

    def _request(self, batch: LearnerBatch) -> LossRequest:
        loss = self._loss
        token_weights_N = self._to_device(batch.token_weights_N, torch.float32)
        terms: tuple[DivergenceTerm, ...] = ()
        teacher = None
        if loss.needs_teacher:
            assert loss.divergence is not None
            assert batch.targets is not None, f"no teacher targets for {batch.rollout_ids}"
            weighted_N = loss.divergence_weight * token_weights_N
            terms = (DivergenceTerm(divergence=loss.divergence, weights_N=weighted_N),)
            teacher = teacher_tensors(batch.targets, self._teacher_head, self.device)
        cross_entropy_N = None
        if loss.cross_entropy_weight > 0.0:
            weights_N = self._to_device(batch.cross_entropy_weights_N, torch.float32)
            cross_entropy_N = loss.cross_entropy_weight * weights_N
        return LossRequest(
            terms=terms,
            teacher=teacher,
            labels_N=self._to_device(batch.labels_N, torch.int64),
            cross_entropy_weights_N=cross_entropy_N,
            temperature=loss.temperature,
        )

    def _token_losses(self, batch: LearnerBatch, answer: HeadLoss) -> Tensor:
        """`[N]`, each token's loss without its weight; infinite ones stay infinite."""
        assert answer.log_probs_N is not None
        losses_N = torch.zeros_like(answer.log_probs_N)
        for values_N in answer.divergences:
            losses_N = losses_N + self._loss.divergence_weight * values_N
        if self._loss.cross_entropy_weight > 0.0:
            is_data_N = self._to_device(batch.cross_entropy_weights_N, torch.float32) > 0
            entropy_N = -answer.log_probs_N
            losses_N = losses_N + self._loss.cross_entropy_weight * entropy_N.where(is_data_N, 0.0)
        return losses_N

    def _to_device(self, array: NDArray[Any], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.array(array, copy=True)).to(self.device, dtype)

    def _clip_or_skip(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        """ZeRO-0 has no optimizer of DeepSpeed's that clips, tells the norm and skips.

        Runs after the all-reduce: every rank sees the same gradients.
        """
        parameters = [item for group in optimizer.param_groups for item in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self._config.max_gradient_norm)
        self._gradient_norm = float(norm)
        if not math.isfinite(self._gradient_norm):
            optimizer.zero_grad(set_to_none=True)

    def _global_gradient_norm(self) -> float:
        """Before clipping; infinite where DeepSpeed skipped the step."""
        if self._config.zero_stage == 0:
            return self._gradient_norm
        norm = self._engine.get_global_grad_norm()
        assert norm is not None
        return float(norm)
