"""Decides how a causal LM runs a packed row, and proves at start that it is exact.

The ways, from the fastest:

    attention                     a row is                             for
    --------------------------    ---------------------------------    --------------------------
    varlen kernel                 one pass; one launch a layer         plain attention on a GPU
    one sequence at a time        one pass; attention in pieces        most models
    what transformers chooses     one pass under a block mask          classes with own attention
    what transformers chooses     a pass for each of its sequences     convolutions, recurrences

A way is taken if no sequence sees another one (other tokens in some sequences change nothing in the
rest, exactly), if the row gives what each sequence gives alone, and if that agrees with the eager
attention of transformers, which computes soft caps and sinks explicitly.

Axes: L packed tokens, D hidden size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from distillm_ray.errors import ModelError
from distillm_ray.models.packed_attention import (
    BY_SEQUENCE,
    KNOWN_LAYERS,
    UnknownAttention,
    supports_by_sequence,
)
from distillm_ray.models.partitioned import is_partitioned, whole_in_forward, whole_shape
from distillm_ray.models.varlen_attention import VARLEN, why_not_varlen

# Lengths of the sequences that are checked; every second one gets other tokens. A convolution leaks
# into the first few positions of a sequence, and a fresh model leaks so little that bfloat16 may
# round one leak away: many boundaries show it.
CHECKED_LENGTHS = (21, 3, 3, 3, 3, 3, 3, 3, 3, 26)
# Largest relative difference (L2 norm) that counts as rounding. Another shape of the same product
# is rounded differently, by up to 1e-6 in float32. In bfloat16 the hidden states of random tokens
# differ by 0.12 after the 30 layers of SmolLM2-135M, and a router of experts may decide differently
# for single tokens. A leak is found without a tolerance, and unknown arguments of an attention too.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 0.5}
_NOT_FINITE = "hidden states are not finite"
# Rotary embeddings whose frequencies depend on the largest position of a row.
LENGTH_DEPENDENT_ROPE = ("longrope", "dynamic")


Load = Callable[[str | None], PreTrainedModel]


def tolerance_of(dtype: torch.dtype) -> float:
    """The largest relative difference that rounding explains."""
    return TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])


@dataclass(frozen=True, slots=True, kw_only=True)
class RowProof:
    """Relative differences (L2 norm) of hidden states, measured at the start."""

    from_alone: float  # a row, from each of its sequences alone
    from_eager: float | None  # each sequence alone, from eager attention; None: it is eager
    # Gradients of a row under the varlen kernel, from those that PyTorch derives for the other
    # ways; None: another way, or a model that is not trained.
    gradients: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPath:
    """How a model runs a packed row.

    Args:
        attention: an attention implementation of transformers, `VARLEN` or `BY_SEQUENCE`.
        packs_up_to: a row with a longer sequence runs one sequence a pass; 0: every row does,
            None: no row.
        notes: why faster ways were not taken.
        proof: what was measured; None if nothing was.
    """

    attention: str
    packs_up_to: int | None = None
    notes: tuple[str, ...] = ()
    proof: RowProof | None = None

    @property
    def describe(self) -> str:
        """One line for a user."""
        match self.packs_up_to:
            case None:
                how = "packed rows"
            case 0:
                how = "one sequence a pass"
            case limit:
                how = f"packed rows up to {limit} tokens a sequence, beyond one sequence a pass"
        why = f" ({'; '.join(self.notes)})" if self.notes else ""
        return f"{how}, attention: {self.attention}{why}"


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """The part of a causal LM whose result is the input of the output head."""
    backbone = model.base_model
    # A class with an unusual prefix is its own base_model.
    return backbone if backbone is not model else model.get_submodule("model")


def run_row(
    backbone: nn.Module, token_ids_L: Tensor, position_ids_L: Tensor, path: RowPath
) -> Tensor:
    """The hidden states of a packed row after the final norm, `[L, D]`."""
    starts = torch.nonzero(position_ids_L == 0).flatten().tolist()
    bounds = [*starts, len(position_ids_L)]
    longest = max(end - start for start, end in itertools.pairwise(bounds))
    if path.packs_up_to is None or longest <= path.packs_up_to:
        return _forward(backbone, token_ids_L, position_ids_L, path, bounds)
    parts = [
        _forward(
            backbone,
            token_ids_L[start:end],
            position_ids_L[start:end],
            path,
            (0, end - start),
        )
        for start, end in itertools.pairwise(bounds)
    ]
    return torch.cat(parts)


def _forward(
    backbone: nn.Module,
    token_ids_L: Tensor,
    position_ids_L: Tensor,
    path: RowPath,
    bounds: Sequence[int],
) -> Tensor:
    output = backbone(
        input_ids=token_ids_L[None],
        position_ids=position_ids_L[None],
        use_cache=False,
        **attention_arguments(path.attention, bounds),
    )
    return output.last_hidden_state[0]


def attention_of(model: PreTrainedModel) -> str:
    """The attention implementation in use."""
    return model.config._attn_implementation or "eager"


def soft_cap_of(config: PretrainedConfig) -> float | None:
    """The soft cap of attention scores, which sdpa leaves out."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None)


def attention_arguments(attention: str, bounds: Sequence[int]) -> dict[str, Any]:
    """What a forward pass hands to its attention: the starts of the sequences, and the length."""
    return {"boundaries": tuple(bounds)} if attention in (BY_SEQUENCE, VARLEN) else {}


def choose_path(
    load: Load, config: PretrainedConfig, *, key: str, trained: bool
) -> tuple[PreTrainedModel, RowPath]:
    """The model in evaluation mode, and the first way that is proven exact.

    Args:
        load: loads the model with an attention implementation; None lets transformers choose.
        key: names the model in messages.
        trained: the model will run backward too.

    Raises:
        ModelError: no way is exact, with the reason for each.
    """
    refuse_by_config(config, key)
    model = load(None).eval()
    own = attention_of(model)
    packs_up_to, note = packing_limit(model)
    notes = [note] if note else []
    proof = _Proof(model, load)
    if supports_by_sequence(model) and packs_up_to != 0:
        model.set_attn_implementation(BY_SEQUENCE)
        path = RowPath(attention=BY_SEQUENCE, packs_up_to=packs_up_to, notes=tuple(notes))
        found = proof.of(path)
        if isinstance(found, RowProof):
            path = replace(path, proof=found)
            return model, _with_varlen(model, proof, path, trained) if _is_on_gpu(model) else path
        notes.append(found)
        model.set_attn_implementation(own)
    for limit in dict.fromkeys((packs_up_to, 0)):
        path = RowPath(attention=own, packs_up_to=limit, notes=tuple(notes))
        found = proof.of(path)
        if isinstance(found, RowProof):
            return model, replace(path, proof=found)
        notes.append(found)
    if all(_NOT_FINITE in note for note in notes[-2:]):
        raise ModelError(
            f"{key}: {_NOT_FINITE} of {type(model).__name__}: its weights hold NaN or infinity, or"
            " overflow in this dtype; download them again, or try dtype float32"
        )
    raise ModelError(
        f"{key}: no way of running {type(model).__name__} on rows of several sequences is exact"
        f" ({'; '.join(notes)}): the loss would depend on the row that a sequence is in; use"
        " another model"
    )


def refuse_by_config(config: PretrainedConfig, key: str) -> None:
    """Refuse what transformers is known to compute differently from the model's authors.

    Raises:
        ModelError: names the key of the model's config.
    """
    text: Any = config.get_text_config()
    if text.model_type == "falcon" and getattr(text, "alibi", False):
        raise ModelError(
            f"{key}: alibi must be false in the config of a falcon model, got true: the sdpa and"
            " the eager attention of transformers disagree about it by 5 %, and either may be"
            " wrong; use another model"
        )
    cap = soft_cap_of(config)
    if cap is not None and text.model_type not in ("gemma2", "vaultgemma"):
        raise ModelError(
            f"{key}: attn_logit_softcapping must be null in the config of a {text.model_type}"
            f" model, got {cap}: transformers ignores it there, and the model would run without"
            " its soft cap; use another model"
        )


def packing_limit(model: PreTrainedModel) -> tuple[int | None, str]:
    """`packs_up_to` by the architecture, and its reason; what short sequences may not show."""
    text: Any = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or KNOWN_LAYERS)
    if getattr(model, "_is_stateful", False) or not kinds <= KNOWN_LAYERS:
        unusual = ", ".join(sorted(kinds - KNOWN_LAYERS)) or "recurrent"
        return 0, f"its layers keep state along a row ({unusual})"
    rope: Any = getattr(text, "rope_parameters", None) or {}
    for one in (rope, *rope.values()):  # a model may have a rope for each kind of layer
        if isinstance(one, dict) and one.get("rope_type") in LENGTH_DEPENDENT_ROPE:
            limit = one.get("original_max_position_embeddings")
            limit = limit or getattr(text, "original_max_position_embeddings", None)
            limit = limit or text.max_position_embeddings
            return int(limit), f"rope_type {one['rope_type']} depends on a row's longest sequence"
    return None, ""


def _is_on_gpu(model: PreTrainedModel) -> bool:
    return model.device.type == "cuda"


def _with_varlen(model: PreTrainedModel, proof: _Proof, path: RowPath, trained: bool) -> RowPath:
    """The varlen kernel where it computes what the model needs; else `path` and the reason.

    `path` runs by sequence and is proven: all arguments of the model's attention are known. The
    kernel has a backward pass of its own, which is compared with the one that PyTorch derives.
    """
    note = why_not_varlen(model.device, model.dtype)
    if trained and any(is_partitioned(parameter) for parameter in model.parameters()):
        note = f"{VARLEN}: its backward pass cannot be checked while ZeRO-3 divides the model"
    expected_LD = None
    if trained and not note:
        try:
            expected_LD = proof.gradients(path)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            note = f"{VARLEN}: the backward pass to compare it with fails: {error}"
    if not note:
        model.set_attn_implementation(VARLEN)
        faster = replace(path, attention=VARLEN)
        found = proof.of(faster)
        if isinstance(found, RowProof) and expected_LD is not None:
            found = proof.of_backward(faster, found, expected_LD)
        if isinstance(found, RowProof):
            return replace(faster, proof=found)
        note = found
        model.set_attn_implementation(BY_SEQUENCE)
    return replace(path, notes=(*path.notes, note))


class _Proof:
    """Runs the same row in different ways."""

    def __init__(self, model: PreTrainedModel, load: Load) -> None:
        self._model = model
        embeddings = model.get_input_embeddings()
        assert isinstance(embeddings.weight, Tensor)
        rows = whole_shape(embeddings.weight)[0]
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        lengths = [min(length, context or length) for length in CHECKED_LENGTHS]
        numbers = torch.Generator().manual_seed(0)
        self._ids_L = torch.randint(rows, (sum(lengths),), generator=numbers)
        others_L = torch.randint(rows, self._ids_L.shape, generator=numbers)
        self._changed_L = torch.cat(
            [torch.full((length,), index % 2 == 0) for index, length in enumerate(lengths)]
        )
        self._other_ids_L = torch.where(self._changed_L, others_L, self._ids_L)
        self._positions_L = torch.cat([torch.arange(length) for length in lengths])
        self._eager_LD = self._eager(load)

    def of(self, path: RowPath) -> RowProof | str:
        """The proof of a way, or what is wrong with it. The model has its attention already."""
        name = path.attention
        alone = RowPath(attention=name, packs_up_to=0)
        packs = path.packs_up_to != 0
        try:
            row_LD = self._hidden(self._model, path)
            alone_LD = self._hidden(self._model, alone) if packs else row_LD
            other_LD = self._hidden(self._model, path, self._other_ids_L)
        except UnknownAttention as error:
            return f"{name}: {error}"
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, TypeError, AttributeError) as error:  # the model's own
            return f"{name}: its forward pass fails: {type(error).__name__}: {error}"
        if not row_LD.isfinite().all():
            return f"{name}: {_NOT_FINITE}"
        kept_L = ~self._changed_L
        if not torch.equal(row_LD[kept_L], other_LD[kept_L]):
            return f"{name}: state leaks from one sequence of a row into the next"
        tolerance = tolerance_of(self._model.dtype)
        from_alone = _apart(row_LD, alone_LD)
        if not from_alone <= tolerance:
            return f"{name}: a row differs from each of its sequences alone by {from_alone:.2g}"
        from_eager = None if self._eager_LD is None else _apart(alone_LD, self._eager_LD)
        if from_eager is not None and not from_eager <= tolerance:
            return f"{name}: differs from eager attention by {from_eager:.2g}"
        return RowProof(from_alone=from_alone, from_eager=from_eager)

    def of_backward(self, path: RowPath, proof: RowProof, expected_LD: Tensor) -> RowProof | str:
        """`proof` with the difference from the expected gradients, or what is wrong with them."""
        name = path.attention
        try:
            found_LD = self.gradients(path)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # the kernel's own
            return f"{name}: its backward pass fails: {type(error).__name__}: {error}"
        apart = _apart(found_LD, expected_LD)
        if not apart <= tolerance_of(self._model.dtype):
            return f"{name}: its gradients differ from those of {BY_SEQUENCE} by {apart:.2g}"
        return replace(proof, gradients=apart)

    def _eager(self, load: Load) -> Tensor | None:
        """Eager attention on each sequence alone; None if transformers has no other for it."""
        model, alone = self._model, RowPath(attention="eager", packs_up_to=0)
        own = attention_of(model)
        if own == "eager":
            return None
        model.set_attn_implementation("eager")
        if attention_of(model) != "eager":  # some classes fix it when they are made
            return self._hidden(load("eager").eval(), alone)
        found = self._hidden(model, alone)
        model.set_attn_implementation(own)
        return found

    @torch.no_grad()
    def _hidden(
        self, model: PreTrainedModel, path: RowPath, token_ids_L: Tensor | None = None
    ) -> Tensor:
        """`[L, D]`, float32, in main memory."""
        ids_L = (self._ids_L if token_ids_L is None else token_ids_L).to(model.device)
        positions_L = self._positions_L.to(model.device)
        with whole_in_forward(model):
            return run_row(backbone_of(model), ids_L, positions_L, path).float().cpu()

    def gradients(self, path: RowPath) -> Tensor:
        """`[L, D]`, float32, in main memory: of a random projection, at the input embeddings."""
        found: list[Tensor] = []

        def track(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            found.append(output.detach().requires_grad_())
            return found[-1].clone()  # some models scale it in place

        hook = self._model.get_input_embeddings().register_forward_hook(track)
        ids_L, positions_L = (x.to(self._model.device) for x in (self._ids_L, self._positions_L))
        try:
            hidden_LD = run_row(backbone_of(self._model), ids_L, positions_L, path)
        finally:
            hook.remove()
        numbers = torch.Generator().manual_seed(0)
        to_LD = torch.randn(hidden_LD.shape, generator=numbers).to(hidden_LD.device)
        gradients = torch.autograd.grad((hidden_LD.float() * to_LD).sum(), found)
        return torch.cat([one[0] for one in gradients]).float().cpu()


def _apart(found_LD: Tensor, expected_LD: Tensor) -> float:
    return ((found_LD - expected_LD).norm() / expected_LD.norm().clamp_min(1e-12)).item()
