"""Compile a function for an H100 with torch.compile, on a machine without a GPU.

To generate Triton code, Inductor only reads the GPU's properties; a driver is needed only to run
it. Here Inductor reads the properties of an H100. A graph is traced with CPU tensors and passed to
Inductor as if they were CUDA tensors. The generated module then runs over CPU tensors, with its
kernels in Triton's interpreter. Tests can compare the results of the GPU code and count its
allocations and its walks over a row. They cannot measure its speed.

It replaces private names of PyTorch and was written against 2.11 and 2.13.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch._decomp
import torch._dynamo.device_interface
import torch._inductor.async_compile
import torch._inductor.compile_fx
import torch._inductor.config
import torch._inductor.graph
import torch._inductor.scheduler
import torch._subclasses.fake_tensor
from torch import Tensor
from torch._inductor.runtime import triton_helpers

# Triton reads the variable at its first import, which may precede this one.
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make test-kernels)", allow_module_level=True)
triton = pytest.importorskip("triton", reason="Triton is not installed (make test-kernels)")
tl = pytest.importorskip("triton.language")

torch_compile = torch.compile  # tests may patch it
GPU = torch.device("cuda:0")
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65_536,
    shared_memory_per_block=49_152,
    shared_memory_per_block_optin=232_448,
    shared_memory_per_multiprocessor=233_472,
    total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)
# Blocks of the interpreted kernels: rows, elements of a row, elements where there are no rows.
XBLOCK, R0_BLOCK, POINTWISE_BLOCK = 2, 1024, 4096


@dataclass
class Generated:
    """What Inductor has generated for one function, and what calls of it have done."""

    sources: dict[str, str] = field(default_factory=dict)  # of the kernels, by name
    launches: list[str] = field(default_factory=list)  # names of kernels, in order
    allocated: list[tuple[int, torch.dtype]] = field(default_factory=list)  # elements

    def walks(self, name: str) -> int:
        """How often a kernel goes over a row."""
        return self.sources[name].count("for r0_offset in")


def compile_for_h100(
    generated: Generated, function: Callable[..., Any], options: dict[str, Any]
) -> Callable[..., Any]:
    """`torch.compile(function, options=options)` for an H100, to be called with CPU tensors."""

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compiler: Any = partial(_for_gpu, generated)
        with torch._inductor.config.patch(**options):
            return torch._inductor.compile_fx.compile_fx(graph, inputs, inner_compile=compiler)

    return torch_compile(function, backend=backend, fullgraph=True)


def _for_gpu(
    generated: Generated, graph: torch.fx.GraphModule, inputs: Any, **keywords: Any
) -> Callable[[list[Any]], Any]:
    """Inductor's own compiler over the same graph with every tensor on the GPU."""
    for node in graph.graph.nodes:
        _move(node.meta.get("val"))
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": GPU}
    _move(list(inputs))
    with _pretending(generated):
        module = torch._inductor.compile_fx.compile_fx_inner(graph, inputs, **keywords)

    def call(arguments: list[Any]) -> Any:
        with _pretending(generated):
            return module(arguments)

    call._boxed_call = True  # pyright: ignore[reportFunctionMemberAccess]
    return call


def _move(value: Any) -> None:
    """Mark traced tensors as GPU tensors."""
    if isinstance(value, torch._subclasses.fake_tensor.FakeTensor):
        value.fake_device = GPU
    elif isinstance(value, tuple | list):
        for one in value:
            _move(one)


@contextlib.contextmanager
def _pretending(generated: Generated) -> Iterator[None]:
    """The parts of a CUDA device that Inductor and its generated modules read."""
    interface = torch._dynamo.device_interface.CudaInterface
    guards: Any = sys.modules["torch._C._dynamo.guards"]

    def nothing(*_: Any, **__: Any) -> int:
        return 0

    def yes(*_: Any, **__: Any) -> bool:
        return True

    def properties(*_: Any, **__: Any) -> SimpleNamespace:
        return PROPERTIES

    def allocate(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty_strided(size, stride, dtype=dtype)
        generated.allocated.append((tensor.numel(), dtype))
        return tensor

    def kernel(_: Any, name: str, source: str, device_str: str = "cuda") -> _Kernel:
        generated.sources[name] = source
        return _Kernel(name, source, generated.launches)

    of_modules: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", yes),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", nothing),
        (torch.cuda, "set_device", nothing),
        (torch.cuda, "synchronize", nothing),
        (torch.cuda, "get_device_properties", properties),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (torch.cuda, "get_rng_state", lambda *_: torch.zeros(16, dtype=torch.uint8)),
        (torch.cuda, "set_rng_state", nothing),
        (torch.cuda, "_exchange_device", nothing),
        (torch.cuda, "_maybe_exchange_device", nothing),
        (torch.cuda, "_DeviceGuard", lambda _: contextlib.nullcontext()),
        (torch.version, "cuda", "13.0"),
        (torch._C, "_cuda_getCurrentRawStream", nothing),
        (guards, "_empty_strided_cuda", allocate),
        (torch._inductor.scheduler, "has_triton", yes),
        (torch._subclasses.fake_tensor, "init_gpu_context", nothing),
        (torch._inductor.async_compile.AsyncCompile, "triton", kernel),
    ]
    of_interfaces: list[tuple[Any, str, Any]] = [
        (interface, "is_available", yes),
        (interface, "device_count", lambda: 1),
        (interface, "current_device", nothing),
        (interface, "get_compute_capability", lambda *_: 90),
        (interface, "is_triton_capable", yes),
        (interface, "raise_if_triton_unavailable", nothing),
        (interface, "is_bf16_supported", yes),
        (interface, "synchronize", nothing),
        (interface, "get_device_properties", properties),
        (interface.Worker, "get_device_properties", properties),
        (interface.Worker, "current_device", nothing),
    ]
    triton.runtime.driver.set_active(_Driver())
    with contextlib.ExitStack() as stack:
        for where, name, value in of_modules:
            stack.enter_context(mock.patch.object(where, name, value, create=True))
        for where, name, value in of_interfaces:
            stack.enter_context(mock.patch.object(where, name, staticmethod(value), create=True))
        # The regular decomposition looks for a driver.
        logical_not = {
            torch.ops.aten.logical_not.default: lambda one: torch.empty_like(one, dtype=torch.bool)
        }
        stack.enter_context(mock.patch.dict(torch._decomp.decomposition_table, logical_not))
        stack.enter_context(
            torch._inductor.config.patch(force_disable_caches=True, compile_threads=1)
        )
        yield


class _Driver:
    """The part of Triton's driver that a compiler calls."""

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return GPU


# ---- running a kernel ----------------------------------------------------------------------------


@triton.jit
def _abs(x: Any) -> Any:
    return tl.abs(x)


@triton.jit
def _exp(x: Any) -> Any:
    return tl.exp(x)


@triton.jit
def _log(x: Any) -> Any:
    return tl.log(x)


@triton.jit
def _tanh(x: Any) -> Any:
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _max2(x: Any, dim: Any) -> Any:
    return tl.max(x, dim)


# The functions of CUDA's libdevice that generated code calls. The interpreter has none of them.
LIBDEVICE = SimpleNamespace(abs=_abs, exp=_exp, log=_log, tanh=_tanh)


class _Kernel:
    """A generated kernel with the launcher interface that its module calls."""

    def __init__(self, name: str, source: str, launches: list[str]) -> None:
        self._name = name
        self._function = _load(name, source)
        self._launches = launches

    def run(self, *arguments: Any, stream: int) -> None:
        self._launches.append(self._name)
        names: list[str] = self._function.arg_names
        blocks = {"XBLOCK": XBLOCK if "r0_numel" in names else POINTWISE_BLOCK}
        if "R0_BLOCK" in names:
            blocks["R0_BLOCK"] = R0_BLOCK
        num_programs = -(-arguments[names.index("xnumel")] // blocks["XBLOCK"])
        # Elements beyond a row are computed and not used.
        with _patched_once(), np.errstate(all="ignore"):
            self._function[(num_programs,)](*arguments, **blocks)


@contextlib.contextmanager
def _patched_once() -> Iterator[None]:
    """Patch Triton's language once. The interpreter patches it at every call of a helper and never
    restores it, so that each call would take longer than the one before."""
    interpreter = triton.runtime.interpreter
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    nothing = interpreter._LangPatchScope()
    with mock.patch.object(interpreter, "_patch_lang", lambda _: nothing):
        yield
    scope.restore()


def _load(name: str, source: str) -> Any:
    """A kernel's function, without the launcher that needs a driver."""
    source = source.replace("triton_helpers.set_driver_to_gpu()", "")
    source = re.sub(r"@triton_heuristics\.\w+\(.*?\n\)\n", "", source, flags=re.DOTALL)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.py"  # Triton reads the function's file
        path.write_text(source)
        namespace: dict[str, Any] = {"__file__": str(path), "__name__": name}
        exec(compile(source, str(path), "exec"), namespace)
    namespace["libdevice"] = namespace["tl_math"] = LIBDEVICE
    # max2 would be interpreted element by element.
    for replaced, function in (("libdevice", LIBDEVICE), ("max2", _max2)):
        setattr(triton_helpers, replaced, function)
    return namespace[name]
