"""One rank of the learner: a DeepSpeed engine around the student and its distillation head.

One optimizer step, on every rank:

    for each micro-batch:  forward ──► sum of weight x value over terms ──► x num_ranks ──► backward
    step():                gradients averaged over ranks ──► clipped ──► optimizer
    one all-reduce:        the step's statistics, for the log

The weights refer to the global batch, so the sum over micro-batches and ranks is the loss. The
factor num_ranks cancels DeepSpeed's average over ranks. DeepSpeed's own gradient accumulation is
off: `step()` ends the accumulation.

Axes: L packed tokens, N loss positions.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from distillm_ray.config import LearnerConfig, LossConfig, StudentConfig
from distillm_ray.errors import ConfigError
from distillm_ray.learner.deepspeed_engine import (
    engine_config,
    join_group,
    random_state,
    reduces_by_copying,
    set_random_state,
)
from distillm_ray.learner.held_out_loss import cross_entropy_sum, own_text_sum
from distillm_ray.learner.host_memory import FreedMemory
from distillm_ray.learner.optimizer import build_optimizer, learning_rate_at, set_hyperparameters
from distillm_ray.learner.self_check import largest_self_divergence
from distillm_ray.learner.step_statistics import StepStatistics
from distillm_ray.learner.student_model import (
    build_student,
    label_logprobs,
    run_row,
    training_request,
)
from distillm_ray.loss.curriculum import Anchor, first_anchors, next_anchors
from distillm_ray.loss.terms import loss_at
from distillm_ray.models.dtypes import resolve_dtype
from distillm_ray.models.heads import FrozenHead
from distillm_ray.models.row_path import RowPath
from distillm_ray.remote.inputs import fetched
from distillm_ray.types import AdapterBase, Bucket, LearnerBatch, TrainStep
from distillm_ray.weights.export import export_model
from distillm_ray.weights.gather import EXPORT_ELEMENTS, gather
from distillm_ray.weights.gather_adapters import adapted_weights, gather_adapters

Value = TypeVar("Value")

_ENGINE_TAG = "engine"
_ANCHORS_FILE = "anchors.json"  # of the curricula, where there are any


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
        compare_engine: bool = True,
        persistence_threshold: int = 100_000,
    ) -> None:
        """Load the student and build the engine.

        `vocabulary_size` is the tokenizer's; ids of the head beyond it are never predicted.
        `compare_engine`: the engine samples from the student alone, so that its log-probabilities
        should be the learner's.
        ZeRO-3 keeps parameters below `persistence_threshold` elements whole on every rank.

        Raises:
            ModelError: the student cannot be loaded.
            ConfigError: the student's dtype, or how it runs packed rows, and the ZeRO stage do not
                go together.
        """
        self._config = config
        self._loss = loss
        self._anchors = first_anchors(loss.terms)
        self._student = student
        self._compare_engine = compare_engine
        self._teacher_head = None if teacher_head is None else teacher_head.to(device)
        self.device = device
        if device.type == "cpu":
            torch.set_num_threads(config.num_threads)
        join_group(device)
        self.rank = dist.get_rank()
        self.num_ranks = dist.get_world_size()
        torch.manual_seed(seed + self.rank)
        self._dtype = resolve_dtype(student.dtype, device)
        settings = engine_config(config, self._dtype, persistence_threshold=persistence_threshold)
        packed = build_student(
            student,
            loss,
            vocabulary_size=vocabulary_size,
            device=device,
            zero_stage=config.zero_stage,
            engine_settings=settings,
            activation_checkpointing=config.activation_checkpointing,
        )
        self._check_passes(packed.path)
        self.remark = packed.remark
        self._model = packed.model
        self._adapted = adapted_weights(packed.model, fetched(student.model))
        self._gradient_norm = math.nan
        self._freed_memory = FreedMemory()
        trainable = [parameter for parameter in packed.parameters() if parameter.requires_grad]
        self._optimizer = build_optimizer(config, trainable)
        if config.zero_stage == 0:
            self._optimizer.register_step_pre_hook(self._clip_or_skip)
        self._engine, *_ = deepspeed.initialize(
            model=packed, optimizer=self._optimizer, config=settings
        )
        if self.num_ranks == 1 and reduces_by_copying(config.zero_stage, self._dtype):
            self._engine.enable_backward_allreduce = False
        # The weights as they were loaded, which DeepSpeed has copied into buffers of its own.
        self._freed_memory.return_if_grown()

    def _check_passes(self, path: RowPath) -> None:
        """ZeRO-3 gathers weights in every pass, so that all ranks need the same number of passes.

        Raises:
            ConfigError: a row may take one pass for each of its sequences.
        """
        limit, config = path.packs_up_to, self._config
        if config.zero_stage < 3 or self.num_ranks == 1 or limit is None:
            return
        if limit < config.max_micro_batch_tokens:
            raise ConfigError(
                f"learner.zero_stage must be at most 2, got 3 with learner.workers ="
                f" {self.num_ranks}: the student runs {path.describe}, and ranks whose rows have"
                " different numbers of sequences would wait for each other forever"
            )

    # ---- training --------------------------------------------------------------------------------

    def train_step(
        self, batches: Sequence[LearnerBatch], step: int, *, wait_seconds: float = 0.0
    ) -> TrainStep:
        """One optimizer step on this rank's micro-batches; `step` is 0-based.

        A non-finite loss or gradient on any rank leaves the parameters of all ranks unchanged.
        """
        started = time.monotonic()
        learning_rate = learning_rate_at(step, self._config)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.train()
        loss = loss_at(self._loss, step, num_steps=self._config.num_steps)
        statistics = StepStatistics(loss.terms, self.device, compare_engine=self._compare_engine)
        for batch in batches:
            request = training_request(
                batch, loss, self._teacher_head, self.device, anchors=self._anchors
            )
            result = run_row(self._engine, batch, request, self.device)
            # A non-finite loss can have a finite gradient. Times NaN the gradient is NaN as well,
            # and the all-reduce shows it to every rank, so that all of them skip the step.
            poison = torch.where(result.loss.detach().isfinite(), 1.0, math.nan)
            self._engine.backward(result.loss * poison * self.num_ranks)
            statistics.add(batch, result)
        self._engine.step()
        if self.device.type == "cpu":
            self._freed_memory.return_if_grown()
        norm = self._global_gradient_norm()
        totals = statistics.reduce(step + 1, wait_seconds=wait_seconds)
        self._anchors = next_anchors(self._anchors, loss.terms, statistics.gaps)
        return replace(
            totals,
            learning_rate=learning_rate,
            gradient_norm=norm,
            seconds=time.monotonic() - started + wait_seconds,
            skipped=not math.isfinite(norm),
        )

    def self_check(self, batch: LearnerBatch) -> float:
        """The largest divergence of the student from itself at a token of any rank's row."""
        largest = largest_self_divergence(
            self._engine, batch, self._loss, self._teacher_head, self.device
        )
        # NaN must not be lost in a maximum.
        return max(self.collect(largest), key=lambda one: math.inf if math.isnan(one) else one)

    def validation_loss(self, batches: Sequence[LearnerBatch]) -> tuple[float, int]:
        """Sum of the cross-entropy over the loss tokens of all ranks, in nats, and their number.

        Fillers are computed and not counted.
        """
        return self._summed(cross_entropy_sum(self._engine, batches, self.device))

    def own_text_loss(self, batches: Sequence[LearnerBatch]) -> tuple[float, int]:
        """Sum of the divergence over the student's own tokens of all ranks, and their number."""
        return self._summed(
            own_text_sum(self._engine, batches, self._loss, self._teacher_head, self.device)
        )

    def _summed(self, total: Tensor) -> tuple[float, int]:
        dist.all_reduce(total)
        loss_sum, num_tokens = total.tolist()
        return loss_sum, int(num_tokens)

    def token_logprobs(self, batch: LearnerBatch) -> NDArray[np.float32]:
        """`[N]`, log-probability of each label at temperature 1."""
        self._engine.eval()
        return label_logprobs(self._engine, batch, self.device).float().cpu().numpy()

    # ---- weights and state -----------------------------------------------------------------------

    def gather_weights(self, dtype: torch.dtype) -> Iterator[Bucket]:
        """Buckets of the student's weights on rank 0, empty ones elsewhere.

        With `adapter_base` they are those of the adapters alone. Every rank must iterate to the
        end: each bucket is a collective.
        """
        keep = self.rank == 0
        if self._adapted:
            return gather_adapters(self._model, self._adapted, keep=keep)
        return gather(self._model, dtype, keep=keep)

    def adapter_base(self, dtype: torch.dtype) -> AdapterBase | None:
        """What the adapters are to be added to; None if whole weights are gathered."""
        lora = self._student.lora
        if lora is None or not self._adapted:
            return None
        return AdapterBase(
            trained=str(self._dtype).removeprefix("torch."),
            published=str(dtype).removeprefix("torch."),
            scale=lora.alpha / lora.rank,
        )

    def save(self, directory: Path) -> None:
        """Write model, optimizer, random state and the curricula's anchors.

        `directory` is the same on all ranks.
        """
        self._engine.save_checkpoint(str(directory), tag=_ENGINE_TAG, save_latest=False)
        torch.save(random_state(self.device), directory / f"random-{self.rank:05d}.pt")
        if self.rank == 0 and self._loss.curricula:
            anchors = [dataclasses.asdict(anchor) for anchor in self._anchors]
            (directory / _ANCHORS_FILE).write_text(json.dumps(anchors))

    def load(self, directory: Path) -> None:
        """The inverse of `save`, under the same ZeRO stage (1 and 2 load each other's files)."""
        path, _ = self._engine.load_checkpoint(str(directory), tag=_ENGINE_TAG)
        assert path is not None, f"DeepSpeed found nothing to load in {directory}"
        set_hyperparameters(self._optimizer, self._config)
        random_path = directory / f"random-{self.rank:05d}.pt"
        if random_path.exists():  # ranks that the saved run did not have keep their new streams
            set_random_state(torch.load(random_path, weights_only=False), self.device)
        if self._loss.curricula:
            anchors = json.loads((directory / _ANCHORS_FILE).read_text())
            self._anchors = tuple(Anchor(**anchor) for anchor in anchors)

    def export(self, directory: Path, end_token_ids: Sequence[int]) -> None:
        """Write a Hugging Face directory that transformers and vLLM load as is, LoRA merged.

        `end_token_ids` end the responses of the trained model.
        """
        keep = self.rank == 0
        buckets = gather(self._model, self._dtype, keep=keep, bucket_elements=EXPORT_ELEMENTS)
        if keep:
            student = fetched(self._student.model)
            export_model(buckets, student, directory, self._dtype, end_token_ids=end_token_ids)
        else:
            for _ in buckets:
                pass
        self.barrier()

    # ---- agreement -------------------------------------------------------------------------------

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether any rank has it set; the same on every rank."""
        values = torch.tensor([int(flag) for flag in flags], device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return tuple(bool(value) for value in values.tolist())

    def collect(self, value: Value) -> list[Value]:
        """Every rank's value, in the order of ranks."""
        values = [value] * self.num_ranks
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.all_reduce(torch.zeros(1, device=self.device))

    # ---- inside ----------------------------------------------------------------------------------

    def _clip_or_skip(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        """Clip the gradients, record their norm and skip the step if it is not finite.

        At ZeRO-0 no optimizer of DeepSpeed's does this. The hook runs after the all-reduce, so
        every rank sees the same gradients and decides the same.
        """
        parameters = [item for group in optimizer.param_groups for item in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self._config.max_gradient_norm)
        self._gradient_norm = float(norm)
        if not math.isfinite(self._gradient_norm):
            optimizer.zero_grad(set_to_none=True)

    def _global_gradient_norm(self) -> float:
        """The norm before clipping; infinite where DeepSpeed skipped the step."""
        if self._config.zero_stage == 0:
            return self._gradient_norm
        norm = self._engine.get_global_grad_norm()
        assert norm is not None
        return float(norm)
