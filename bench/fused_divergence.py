"""Time and peak memory of a divergence between two models' heads: plain, fused, and peers.

    python bench/fused_divergence.py [--repetitions 5] [--memory-mb 64]

Forward and backward of one loss from hidden states to gradients of hidden states and head. The
floor is the matrix products alone: three of the student, one of the teacher. On a machine with a
GPU it measures the GPU's shapes, else the CPU's. Liger-Kernel and TRL are measured if they are
installed; see bench/README.md.

Axes: N tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import alternate, median, synchronize, write
from rich.console import Console
from rich.table import Table
from torch import Tensor

from distillm_ray.config import (
    AdaptiveKL,
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    TotalVariation,
)
from distillm_ray.loss.fused import DEFAULT_MEMORY_BYTES, fused_loss
from distillm_ray.loss.head_loss import LossRequest, WeightedTerm, plain_loss
from distillm_ray.loss.teacher_tensors import TeacherHidden
from distillm_ray.models.heads import FrozenHead
from distillm_ray.models.logit_rules import LogitRule

CPU_SHAPES = ((1024, 49_152, 576, torch.float32), (1024, 49_152, 576, torch.bfloat16))
GPU_SHAPES = ((8192, 128_256, 4096, torch.bfloat16), (8192, 151_936, 3584, torch.bfloat16))
OTHERS: tuple[Divergence, ...] = (
    ForwardKL(),
    ReverseKL(),
    SkewReverseKL(),
    TotalVariation(),
    AdaptiveKL(),
)


@dataclass(frozen=True)
class Problem:
    """Hidden states and heads of both models."""

    hidden_ND: Tensor
    weight_VD: Tensor
    teacher_hidden_ND: Tensor
    teacher_weight_VD: Tensor

    def request(self, divergence: Divergence) -> LossRequest:
        """The mean of the divergence over the tokens."""
        num_tokens = len(self.hidden_ND)
        weights_N = torch.full((num_tokens,), 1 / num_tokens, device=self.hidden_ND.device)
        return LossRequest(
            terms=(WeightedTerm(term=divergence, weights_N=weights_N),),
            teacher=TeacherHidden(
                values_ND=self.teacher_hidden_ND,
                head=FrozenHead(weight_VD=self.teacher_weight_VD),
            ),
        )

    def ours(
        self, loss: Callable[..., Any], divergence: Divergence, **options: int
    ) -> Callable[[], Tensor]:
        """Forward and backward by plain_loss or fused_loss."""
        request = self.request(divergence)

        def call() -> Tensor:
            self.forget()
            result = loss(
                self.hidden_ND,
                self.weight_VD,
                None,
                rule=LogitRule(),
                vocabulary_size=len(self.weight_VD),
                request=request,
                **options,
            )
            result.loss.backward()
            return result.loss.detach()

        return call

    def products(self) -> None:
        """The floor: what no implementation can leave out."""
        self.forget()
        with torch.no_grad():
            logits_NV = self.hidden_ND @ self.weight_VD.T
            _ = self.teacher_hidden_ND @ self.teacher_weight_VD.T
            _ = logits_NV @ self.weight_VD
            _ = logits_NV.T @ self.hidden_ND

    def forget(self) -> None:
        """Drop the gradients of the last call."""
        self.hidden_ND.grad = None
        self.weight_VD.grad = None


def build(
    num_tokens: int, vocabulary: int, hidden: int, dtype: torch.dtype, device: str
) -> Problem:
    """Random, with logits of the spread that language models have (standard deviation 3)."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    weight_VD, teacher_weight_VD = (
        (normal(vocabulary, hidden) * 3 / hidden**0.5).to(dtype) for _ in range(2)
    )
    return Problem(
        hidden_ND=normal(num_tokens, hidden).to(dtype).requires_grad_(),
        weight_VD=weight_VD.requires_grad_(),
        teacher_hidden_ND=normal(num_tokens, hidden).to(dtype),
        teacher_weight_VD=teacher_weight_VD,
    )


def peers(problem: Problem, notes: dict[str, str]) -> dict[str, Callable[[], Any]]:
    """Jensen-Shannon by the packages on PyPI that have it, as far as they are installed."""
    found: dict[str, Callable[[], Any]] = {}
    device = problem.hidden_ND.device
    no_labels_N = torch.zeros(len(problem.hidden_ND), dtype=torch.int64, device=device)
    heads = (problem.weight_VD, problem.teacher_hidden_ND, problem.teacher_weight_VD)
    if chunked := optional("liger_kernel.chunked_loss", notes):

        def liger_chunked() -> None:
            problem.forget()
            loss = chunked.LigerFusedLinearJSDLoss(
                weight_hard_loss=0.0,
                weight_soft_loss=1.0,
                beta=0.5,
                compiled=device.type == "cuda",
                chunk_size=1024 if device.type == "cuda" else 128,
            )
            loss(problem.hidden_ND, *heads, no_labels_N).backward()

        found["liger chunked_loss JSD"] = liger_chunked
    if device.type == "cpu":
        notes["liger fused linear JSD"] = "not measured: a Triton kernel, needs a GPU"
    elif kernels := optional("liger_kernel.transformers", notes):

        def liger_kernel() -> None:
            problem.forget()
            kernels.LigerFusedLinearJSD(jsd_beta=0.5)(
                problem.hidden_ND,
                problem.weight_VD,
                problem.teacher_hidden_ND,
                problem.teacher_weight_VD,
            ).backward()

        found["liger fused linear JSD"] = liger_kernel
    if chunked_divergence := optional("trl.kernels.chunked_divergence", notes):

        def trl() -> None:
            problem.forget()
            divergence_N, _ = chunked_divergence.ChunkedDivergenceFunction.apply(
                problem.hidden_ND,
                problem.weight_VD,
                None,
                problem.teacher_hidden_ND,
                problem.teacher_weight_VD,
                None,
                0.5,
            )
            divergence_N.mean().backward()

        found["trl chunked divergence JSD"] = trl
    return found


def optional(module: str, notes: dict[str, str]) -> Any:
    """A peer's module, or None with a note."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        notes[module] = f"not measured: {error}"
        return None


def peak_extra_bytes(call: Callable[[], Any], problem: Problem) -> int:
    """Memory that one call takes at its peak beyond what was there before it."""
    problem.forget()
    gc.collect()
    device = problem.hidden_ND.device
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = resident_bytes("VmRSS")
    call()
    return resident_bytes("VmHWM") - before


def resident_bytes(key: str) -> int:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(key))
    return int(line.split()[1]) * 1024


def measure(
    shape: tuple[int, int, int, torch.dtype], device: torch.device, repetitions: int, budget: int
) -> dict[str, Any]:
    """All implementations on one shape."""
    num_tokens, vocabulary, hidden, dtype = shape
    problem = build(num_tokens, vocabulary, hidden, dtype, device.type)
    notes: dict[str, str] = {}
    calls: dict[str, Callable[[], Any]] = {
        "matrix products alone": problem.products,
        "plain skew_kl": problem.ours(plain_loss, SkewKL()),
        "fused skew_kl": problem.ours(fused_loss, SkewKL(), memory_bytes=budget),
        "plain jensen_shannon": problem.ours(plain_loss, JensenShannon()),
        "fused jensen_shannon": problem.ours(fused_loss, JensenShannon(), memory_bytes=budget),
        **peers(problem, notes),
    }
    seconds = alternate(calls, repetitions, device)
    others = {
        name: call
        for other in OTHERS
        for name, call in (
            (f"plain {other.type}", problem.ours(plain_loss, other)),
            (f"fused {other.type}", problem.ours(fused_loss, other, memory_bytes=budget)),
        )
    }
    seconds |= alternate(others, max(1, repetitions // 2), device)
    memory = {
        name: peak_extra_bytes(call, problem)
        for name, call in {**calls, **others}.items()
        if name != "matrix products alone"
    }
    floor = median(seconds["matrix products alone"])
    rows = []
    for name, times in seconds.items():
        plain = plain_of(name)
        rows.append(
            {
                "name": name,
                "seconds": median(times),
                "all_seconds": times,
                "over_floor": median(times) / floor,
                "over_plain": median(times) / median(seconds[plain]) if plain else None,
                "extra_bytes": memory.get(name),
                "memory_over_plain": memory[name] / memory[plain] if plain else None,
            }
        )
    return {
        "tokens": num_tokens,
        "vocabulary": vocabulary,
        "hidden": hidden,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "memory_budget_bytes": budget,
        "rows": rows,
        "notes": notes,
    }


def plain_of(name: str) -> str | None:
    """What an implementation is compared with: the same divergence over all logits at once."""
    package, _, divergence = name.partition(" ")
    if package == "matrix":
        return None
    return f"plain {divergence}" if package in ("plain", "fused") else "plain jensen_shannon"


def show(result: dict[str, Any]) -> None:
    """One table."""
    title = "N = {tokens}, V = {vocabulary}, D = {hidden}, {dtype}, {device}".format(**result)
    table = Table("", "ms", "/ floor", "/ plain", "extra MB", "/ plain", title=title)
    for row in result["rows"]:
        extra = row["extra_bytes"]
        time_ratio, memory_ratio = row["over_plain"], row["memory_over_plain"]
        table.add_row(
            row["name"],
            f"{row['seconds'] * 1e3:.0f}",
            f"{row['over_floor']:.2f}",
            "-" if time_ratio is None else f"{time_ratio:.2f}",
            "-" if extra is None else f"{extra / 1e6:.0f}",
            "-" if memory_ratio is None else f"{memory_ratio:.3f}",
        )
    console = Console(width=100)
    console.print(table)
    for name, note in result["notes"].items():
        console.print(f"{name}: {note}")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--memory-mb", type=int, help="budget of the fused walk's logits")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    budget = DEFAULT_MEMORY_BYTES[device.type]
    if arguments.memory_mb is not None:
        budget = arguments.memory_mb * 2**20
    results = []
    for shape in GPU_SHAPES if device.type == "cuda" else CPU_SHAPES:
        results.append(measure(shape, device, arguments.repetitions, budget))
        show(results[-1])
    print(write(f"fused_divergence_{device.type}", {"shapes": results}))


if __name__ == "__main__":
    main()
