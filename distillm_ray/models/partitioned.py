"""Models whose parameters ZeRO-3 divides among the ranks while they are loaded.

    safetensors file ──► one parameter ──► its partition on every rank ──► the next parameter

A rank never holds more than its share of the model, one parameter on its way, and during a forward
pass one layer. transformers' own integration (`HfDeepSpeedConfig`) reads the whole checkpoint on
every rank and creates buffers in the dtype of the weights, so it is not used.

Everything here is a collective: all ranks load the same models and run the same passes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook


@contextmanager
def partitioned_loading(
    engine_settings: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device
) -> Iterator[None]:
    """Inside, a parameter is partitioned as soon as a module gets it; those on meta are left.

    Args:
        engine_settings: DeepSpeed's, of stage 3.
        dtype: floating-point parameters are converted to it.
    """
    import deepspeed  # noqa: PLC0415  takes seconds, and only ZeRO-3 partitions

    # DeepSpeed hands out the function that partitions with a parameter that it has partitioned.
    seed: Any = nn.Linear(1, 1, bias=False)
    deepspeed.zero.Init(module=seed, config_dict_or_path=dict(engine_settings))
    partition = seed.weight.convert_to_zero_parameters

    def partition_new(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if parameter.is_meta or is_partitioned(parameter):
            return
        # A copy: what safetensors returns may be pages of the file, which the broadcast from rank 0
        # would turn into private ones that live as long as the file is open.
        target = dtype if parameter.is_floating_point() else parameter.dtype
        parameter.data = parameter.data.to(device, target, copy=True)
        partition([parameter])

    hook = register_module_parameter_registration_hook(partition_new)
    try:
        # Otherwise transformers' threads read ahead, in the end the whole model.
        with mock.patch.dict(os.environ, {"HF_DEACTIVATE_ASYNC_LOAD": "1"}):
            yield
    finally:
        hook.remove()


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 manages the tensor. It may be whole at the moment."""
    return hasattr(tensor, "ds_id")


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of the whole tensor; a partitioned one has an empty shape itself."""
    return tuple(tensor.ds_shape if is_partitioned(tensor) else tensor.shape)  # pyright: ignore[reportAttributeAccessIssue]


def whole(tensors: Sequence[Tensor]) -> AbstractContextManager[object]:
    """Inside the block no tensor is partitioned."""
    divided = [tensor for tensor in tensors if is_partitioned(tensor) and _is_divided(tensor)]
    if not divided:
        return nullcontext()
    import deepspeed  # noqa: PLC0415  a local run has no DeepSpeed

    return deepspeed.zero.GatheredParameters(divided)


@contextmanager
def whole_in_forward(model: nn.Module) -> Iterator[None]:
    """Inside the block a layer is whole while its forward pass runs, as in DeepSpeed's engine.

    For passes before there is an engine. A layer is an entry of the model's outermost lists, or
    another module with parameters of its own.
    """
    if not any(is_partitioned(parameter) for parameter in model.parameters()):
        yield
        return
    gathered: dict[nn.Module, AbstractContextManager[object]] = {}

    def gather(module: nn.Module, args: object) -> None:
        gathered[module] = whole(list(units[module]))
        gathered[module].__enter__()

    def divide(module: nn.Module, args: object, result: object) -> None:
        gathered.pop(module).__exit__(None, None, None)

    units = dict(_units(model))
    hooks = [unit.register_forward_pre_hook(gather) for unit in units]
    hooks += [unit.register_forward_hook(divide) for unit in units]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for one in reversed(gathered.values()):  # of a pass that failed
            one.__exit__(None, None, None)


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, Iterable[nn.Parameter]]]:
    """Modules that are gathered at once, and their parameters."""
    if own := list(module.parameters(recurse=False)):
        yield module, own
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            for layer in child:
                yield layer, list(layer.parameters())
        else:
            yield from _units(child)


def _is_divided(tensor: Any) -> bool:
    """Whether this rank has only its part; otherwise the tensor is whole already."""
    return tensor.ds_status.name == "NOT_AVAILABLE"
