"""Which of a model's layers a student keeps, by what the layers do on a few rows of data.

`by_loss` removes one layer at a time: the one without which the cross-entropy of the rows is
lowest. `by_influence` ranks layers by how much they change their input (Block Influence of Men et
al., ShortGPT, 2024). Both leave a removed layer's place empty, so that rules by layer number hold.

Axes: L packed tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from distillm_ray.batching import pack, plan_validation
from distillm_ray.config import Dtype
from distillm_ray.errors import ModelError
from distillm_ray.learner.held_out_loss import cross_entropy_sum
from distillm_ray.learner.student_model import PackedStudent
from distillm_ray.loss.distillation_head import install_distillation_head
from distillm_ray.models.dtypes import resolve_dtype
from distillm_ray.models.packed import load_packed_model
from distillm_ray.models.row_path import backbone_of
from distillm_ray.types import LearnerBatch, Rollout

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """A layer that the student lacks, in the order of removal."""

    layer: int
    value: float  # by loss: nats a token without it; by influence: its influence, 0 to 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChoice:
    """The layers that are kept, and why the others are not."""

    kept: tuple[int, ...]
    removed: tuple[Removal, ...]
    loss_before: float  # nats a token, with all layers
    loss_after: float


class LayerChooser:
    """A teacher whose layers can be taken out, on fixed rows."""

    def __init__(
        self,
        model: Path,
        rows: Sequence[Rollout],
        *,
        vocabulary_size: int,
        dtype: Dtype = "auto",
        max_batch_tokens: int = 8192,
        trust_remote_code: bool = False,
    ) -> None:
        """Load the model.

        Raises:
            ModelError: it cannot be loaded, or its backbone has no list of layers.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        packed = load_packed_model(
            model,
            role="teacher",
            dtype=resolve_dtype(dtype, device),
            device=device,
            trust_remote_code=trust_remote_code,
        )
        self._layers = layers_of(packed.model, model)
        install_distillation_head(packed.model, vocabulary_size=vocabulary_size, role="teacher")
        self._student = PackedStudent(packed)
        longest = max(row.num_tokens for row in rows)
        (plans,) = plan_validation(
            rows, num_ranks=1, max_micro_batch_tokens=max(longest, max_batch_tokens)
        )
        self._batches: list[LearnerBatch] = [pack(plan, None) for plan in plans]
        self._device = device
        self._num_results = self._observe_results()

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self._layers)

    def loss(self, without: Sequence[int] = ()) -> float:
        """Cross-entropy of the rows without these layers, token mean in nats."""
        with _skipped([self._layers[index] for index in without], self._num_results):
            total, num_tokens = cross_entropy_sum(
                self._student, self._batches, self._device
            ).tolist()
        return total / num_tokens

    def _observe_results(self) -> int:
        """How many results a layer returns as a tuple; 0: the hidden states alone."""
        found: list[int] = []

        def hook(_: nn.Module, args: Any, output: Any) -> None:
            found.append(len(output) if isinstance(output, tuple) else 0)

        handle = self._layers[0].register_forward_hook(hook)
        try:
            cross_entropy_sum(self._student, self._batches[:1], self._device)
        finally:
            handle.remove()
        return found[0]

    def by_loss(self, keep: int, progress: Callable[[int, int], None] | None = None) -> LayerChoice:
        """Remove the layer that is missed least, again and again, until `keep` are left.

        Args:
            progress: called with the trials done and their total.
        """
        before = self.loss()
        removed: list[Removal] = []
        left = list(range(self.num_layers))
        total = sum(range(keep + 1, self.num_layers + 1))
        done = 0
        while len(left) > keep:
            losses: dict[int, float] = {}
            for layer in left:
                losses[layer] = self.loss([*(one.layer for one in removed), layer])
                done += 1
                if progress is not None:
                    progress(done, total)
            best = min(losses, key=lambda layer: losses[layer])
            removed.append(Removal(layer=best, value=losses[best]))
            left.remove(best)
        return self._choice(before, removed)

    def by_influence(self, keep: int) -> LayerChoice:
        """Remove the layers that change their input least."""
        before = self.loss()
        influences = self.influences()
        order = sorted(range(self.num_layers), key=lambda layer: influences[layer])
        removed = [
            Removal(layer=layer, value=influences[layer])
            for layer in order[: self.num_layers - keep]
        ]
        return self._choice(before, removed)

    def influences(self) -> list[float]:
        """1 - the mean cosine between a layer's input and output, for each layer."""
        sums = torch.zeros(self.num_layers, dtype=torch.float64)
        tokens = 0

        def observe(index: int) -> Callable[..., None]:
            def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                after = output[0] if isinstance(output, tuple) else output
                cosines = torch.cosine_similarity(hidden.float(), after.float(), dim=-1)
                sums[index] += cosines.double().sum().cpu()

            return hook

        handles = [
            layer.register_forward_hook(observe(index), with_kwargs=True)
            for index, layer in enumerate(self._layers)
        ]
        try:
            self.loss()
            tokens = sum(len(batch.token_ids_L) for batch in self._batches)
        finally:
            for handle in handles:
                handle.remove()
        return (1.0 - sums / tokens).tolist()

    def _choice(self, before: float, removed: Sequence[Removal]) -> LayerChoice:
        gone = [one.layer for one in removed]
        return LayerChoice(
            kept=tuple(layer for layer in range(self.num_layers) if layer not in gone),
            removed=tuple(removed),
            loss_before=before,
            loss_after=self.loss(gone),
        )


def layers_of(model: PreTrainedModel, directory: Path) -> list[nn.Module]:
    """The decoder layers of a causal LM's backbone, in order.

    Raises:
        ModelError: the backbone has no list of layers under a usual name.
    """
    backbone = backbone_of(model)
    for name in ("layers", "h"):
        found = getattr(backbone, name, None)
        if isinstance(found, nn.ModuleList):
            return list(found)
    raise ModelError(
        f"{directory}: {type(backbone).__name__} has no list of layers named layers or h, so none"
        " can be left out; name the layers to keep with --layers"
    )


@contextmanager
def _skipped(layers: Sequence[nn.Module], num_results: int) -> Iterator[None]:
    """The layers return their input, in the form of `num_results` in which they return output."""

    def identity(*args: Any, **kwargs: Any) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        return hidden if num_results == 0 else (hidden, *[None] * (num_results - 1))

    for layer in layers:
        layer.forward = identity  # on the instance: the class's is found again when it is deleted
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
