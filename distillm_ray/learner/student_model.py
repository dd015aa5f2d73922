"""The student as the learner trains it: a packed causal LM that returns losses, not logits.

    token ids, position ids ──► backbone ──► hidden states ──► rows at loss positions ──► head, loss

Axes: L packed tokens, N loss positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from distillm_ray.config import (
    ActivationCheckpointing,
    CrossEntropy,
    LoraConfig,
    LossConfig,
    StudentConfig,
)
from distillm_ray.errors import ConfigError, ModelError
from distillm_ray.loss.curriculum import Anchors, anchor_gaps, first_anchors
from distillm_ray.loss.distillation_head import DistillationHead, install_distillation_head
from distillm_ray.loss.head_loss import HeadLoss, LossRequest, WeightedTerm
from distillm_ray.loss.teacher_tensors import teacher_tensors
from distillm_ray.loss.token_health import sampled_positions
from distillm_ray.models.dtypes import resolve_dtype
from distillm_ray.models.heads import FrozenHead
from distillm_ray.models.packed import PackedModel, load_packed_model
from distillm_ray.models.row_path import RowPath
from distillm_ray.remote.inputs import fetched
from distillm_ray.types import LearnerBatch, Shelf


class PackedStudent(nn.Module):
    """Backbone and distillation head under one forward, which DeepSpeed's engine calls."""

    def __init__(self, packed: PackedModel) -> None:
        super().__init__()
        self.model = packed.model
        self._packed = packed

    @property
    def remark(self) -> str:
        """How the student runs packed rows, where that is slower than usual; else empty."""
        return self._packed.remark

    @property
    def path(self) -> RowPath:
        """How the student runs packed rows."""
        return self._packed.path

    def forward(
        self,
        token_ids_L: Tensor,
        position_ids_L: Tensor,
        loss_positions_N: Tensor,
        request: LossRequest,
    ) -> HeadLoss:
        """Return the head's loss for `request` at `loss_positions_N` of one packed row."""
        hidden_LD = self._packed.forward(token_ids_L, position_ids_L)
        head = self.model.get_output_embeddings()
        assert isinstance(head, DistillationHead)
        loss = head(hidden_LD.index_select(0, loss_positions_N), request)
        assert isinstance(loss, HeadLoss)
        return loss


def run_row(
    student: nn.Module, batch: LearnerBatch, request: LossRequest, device: torch.device
) -> HeadLoss:
    """One packed row through a `PackedStudent`, or through DeepSpeed's engine around one."""
    return student(
        _to_device(batch.token_ids_L, torch.int64, device),
        _to_device(batch.position_ids_L, torch.int64, device),
        _to_device(batch.loss_positions_N, torch.int64, device),
        request,
    )


def training_request(
    batch: LearnerBatch,
    loss: LossConfig,
    teacher_head: FrozenHead | None,
    device: torch.device,
    *,
    anchors: Anchors | None = None,
) -> LossRequest:
    """All terms of the loss, with the weights that the batch brings.

    In a row without targets no token has a weight in a term that compares with the teacher.
    Cross-entropy, which needs none, takes the term's place there and adds 0. `anchors` are those of
    the loss's curricula; None: no step was taken yet.
    """
    terms, teacher = loss.terms, None
    if loss.needs_teacher and batch.targets is not None:
        teacher = teacher_tensors(batch.targets, teacher_head, device)
    elif loss.needs_teacher:
        assert not any(
            weights_N.any()
            for term, weights_N in zip(terms, batch.term_weights_N, strict=True)
            if not isinstance(term, CrossEntropy)
        ), f"no teacher targets for {batch.rollout_ids}"
        terms = tuple(term if isinstance(term, CrossEntropy) else CrossEntropy() for term in terms)
    gaps = anchor_gaps(anchors or first_anchors(loss.terms), loss.terms)
    is_student_S = np.array([shelf in (Shelf.FRESH, Shelf.REPLAY) for shelf in batch.shelves])
    counted_S = is_student_S & ~np.array(batch.is_filler)
    positions_S = sampled_positions(counted_S[batch.sequence_index_N])
    return LossRequest(
        terms=tuple(
            WeightedTerm(
                term=term, weights_N=_to_device(weights_N, torch.float32, device), anchor=gap
            )
            for term, weights_N, gap in zip(terms, batch.term_weights_N, gaps, strict=True)
        ),
        teacher=teacher,
        labels_N=_to_device(batch.labels_N, torch.int64, device),
        temperature=loss.temperature,
        behaviour_N=None
        if batch.behaviour_logprobs_N is None
        else _to_device(batch.behaviour_logprobs_N, torch.float32, device),
        sequence_N=_to_device(batch.sequence_index_N, torch.int64, device),
        health_S=None if positions_S is None else positions_S.to(device),
    )


@torch.no_grad()
def label_logprobs(student: nn.Module, batch: LearnerBatch, device: torch.device) -> Tensor:
    """`[N]`, log-probability of each label at temperature 1. The student is in evaluation mode."""
    request = LossRequest(labels_N=_to_device(batch.labels_N, torch.int64, device))
    log_probs_N = run_row(student, batch, request, device).log_probs_N
    assert log_probs_N is not None
    return log_probs_N


def _to_device(array: NDArray[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy: arrays from the object store are shared memory and read-only."""
    return torch.from_numpy(np.array(array, copy=True)).to(device, dtype)


def build_student(
    student: StudentConfig,
    loss: LossConfig,
    *,
    vocabulary_size: int,
    device: torch.device,
    zero_stage: int,
    engine_settings: Mapping[str, Any] | None = None,
    activation_checkpointing: ActivationCheckpointing = "none",
) -> PackedStudent:
    """The student as `load_student` loads it, with a head that returns the losses of `loss`."""
    packed = load_student(
        student,
        device=device,
        zero_stage=zero_stage,
        engine_settings=engine_settings,
        activation_checkpointing=activation_checkpointing,
    )
    install_distillation_head(
        packed.model,
        vocabulary_size=vocabulary_size,
        implementation=loss.implementation,
        memory_bytes=None if loss.chunk_megabytes is None else loss.chunk_megabytes * 2**20,
    )
    return PackedStudent(packed)


def load_student(
    config: StudentConfig,
    *,
    device: torch.device,
    zero_stage: int,
    engine_settings: Mapping[str, Any] | None = None,
    activation_checkpointing: ActivationCheckpointing = "none",
) -> PackedModel:
    """Load the model of `config`, with its adapters and activation checkpointing.

    Args:
        engine_settings: of DeepSpeed; stage 3 needs them, and divides the parameters among the
            ranks while they are loaded.

    Raises:
        ModelError: the directory cannot be loaded, or a LoRA target does not exist in the model.
        ConfigError: bfloat16 under ZeRO stage 0.
    """
    dtype = resolve_dtype(config.dtype, device)
    if dtype == torch.bfloat16 and zero_stage == 0:
        raise ConfigError(
            "learner.zero_stage 0 needs student.dtype: float32, got bfloat16"
            f" (student.dtype: {config.dtype}): DeepSpeed's optimizer for that pair makes a"
            " spurious first step; set learner.zero_stage=1, which costs nothing"
        )
    packed = load_packed_model(
        fetched(config.model),
        role="student",
        dtype=dtype,
        device=device,
        trust_remote_code=config.trust_remote_code,
        partitioned_by=engine_settings if zero_stage == 3 else None,
    )
    model = packed.model
    if config.lora is not None:
        add_adapters(model, config.lora)
    if activation_checkpointing != "none":
        # Non-reentrant checkpointing leaks entries of ZeRO-3's module stack.
        reentrant = zero_stage == 3
        every = 1 if activation_checkpointing == "full" else activation_checkpointing
        layers = model.config.get_text_config().num_hidden_layers
        if every > 1 and every >= layers:
            raise ConfigError(
                f"learner.activation_checkpointing must be less than the student's {layers} layers,"
                f" got {every}; full checkpoints them all"
            )
        try:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant}, every_n_layers=every)
        except ValueError as error:  # a class that cannot
            raise ConfigError(
                f"learner.activation_checkpointing must be none for {type(model).__name__}, got"
                f" {activation_checkpointing}: {error}"
            ) from error
        if reentrant:
            model.enable_input_require_grads()
    return packed


def add_adapters(model: PreTrainedModel, config: LoraConfig) -> None:
    """Put LoRA layers around the backbone's linear layers and freeze everything else.

    Raises:
        ModelError: a target that the model does not have.
    """
    targets = config.target_modules
    modules = dict(model.base_model.named_modules())
    convolutions = {name for name in modules if type(modules[name]).__name__ == "Conv1D"}
    if targets == "all-linear":
        # The output head is no target: tied, it shares its weight with the embedding.
        linear = {name for name in modules if isinstance(modules[name], nn.Linear)}
        names = {name.rpartition(".")[2] for name in linear | convolutions}
    else:
        names = set(targets)
    try:
        inject_adapter_in_model(
            PeftLoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]
                lora_dropout=config.dropout,
                target_modules=sorted(names),
                fan_in_fan_out=bool(convolutions),
            ),
            model,
        )
    except ValueError as error:
        raise ModelError(
            f"student.lora.target_modules {sorted(names)} do not fit the model: {error}"
        ) from error
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and not isinstance(module, LoraLinear):
            raise ModelError(
                f"student.lora.target_modules must name linear layers, got {name}, a"
                f" {type(module).__name__}: its adapter would be trained and never exported; leave"
                " it out"
            )
    if isinstance(model.get_output_embeddings(), LoraLayer):
        raise ModelError(
            "student.lora.target_modules must not name the output head: the loss reads its weight"
            " without an adapter, which would never be trained; leave it out"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
