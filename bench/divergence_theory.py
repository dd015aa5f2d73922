"""What the skew buys, on the logits of the quickstart's teacher and student.

    python bench/divergence_theory.py [--student DIR]

Left and middle: how large the gradient coefficients of DistiLLM's section 3.1 get as alpha grows.
For skew KL it is (1 - alpha) p / q~ at ids that the teacher samples (alpha = 0: forward KL), for
skew reverse KL |log(q / p~) + 1 - alpha q / p~| at ids that the student samples (alpha = 0: reverse
KL). Right: Theorem 1, the error of estimating skew KL from n samples of each side, as in the
paper's figure 3. With alpha = 0 the estimate is +inf as soon as a sampled id was not sampled by the
other side; the share of such estimates is in the JSON.

Axes: N positions, V vocabulary, R repetitions.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from _common import RESULTS, commit, write
from _quickstart import STUDENT, TEACHER, load_positions
from torch import Tensor

from distillm_ray.loss.divergences import forward_kl, skew_kl

mpl.use("Agg")
from matplotlib import pyplot as plt

ALPHAS = (0.0, 0.01, 0.1, 0.3, 0.5)
SAMPLE_SIZES = (10, 30, 100, 300, 1000, 3000, 10_000)
REPETITIONS = 8
COLORS = ("#555555", "#a63603", "#e6550d", "#3182bd", "#08519c")


def coefficients(log_p_NV: Tensor, log_q_NV: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Sizes of the coefficients at sampled ids, of skew KL and of skew reverse KL; float64."""
    generator = torch.Generator().manual_seed(0)
    teacher_ids = torch.multinomial(log_p_NV.exp(), 64, replacement=True, generator=generator)
    student_ids = torch.multinomial(log_q_NV.exp(), 64, replacement=True, generator=generator)
    p, q = (log_NV.gather(-1, teacher_ids).double().exp() for log_NV in (log_p_NV, log_q_NV))
    skew = (1 - alpha) * p / (alpha * p + (1 - alpha) * q)
    p, q = (log_NV.gather(-1, student_ids).double().exp() for log_NV in (log_p_NV, log_q_NV))
    mixture = (1 - alpha) * p + alpha * q
    reverse = (torch.log(q / mixture) + 1 - alpha * q / mixture).abs()
    return skew.flatten(), reverse.flatten()


def empirical(probabilities_NV: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
    """`[N, V]` log-frequencies of so many samples; ids that were not sampled have -inf."""
    ids = torch.multinomial(probabilities_NV, num_samples, replacement=True, generator=generator)
    counts_NV = torch.zeros_like(probabilities_NV).scatter_add_(
        -1, ids, torch.ones_like(ids, dtype=probabilities_NV.dtype)
    )
    return counts_NV.log()


def estimation(log_p_NV: Tensor, log_q_NV: Tensor) -> list[dict[str, Any]]:
    """Root mean square error of the divergence of empirical distributions, by n and alpha."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for num_samples in SAMPLE_SIZES:
        samples = [
            (
                empirical(log_p_NV.exp(), num_samples, generator),
                empirical(log_q_NV.exp(), num_samples, generator),
            )
            for _ in range(REPETITIONS)
        ]
        for alpha in ALPHAS:
            true_N = divergence(log_p_NV, log_q_NV, alpha)
            values_RN = torch.stack([divergence(p, q, alpha) for p, q in samples])
            finite_RN = values_RN.isfinite()
            errors = (values_RN - true_N)[finite_RN]
            rows.append(
                {
                    "alpha": alpha,
                    "samples": num_samples,
                    "rms_error": (errors**2).mean().sqrt().item() if len(errors) else None,
                    "infinite_share": 1 - finite_RN.double().mean().item(),
                    "true_mean": true_N.mean().item(),
                }
            )
    return rows


def divergence(log_p_NV: Tensor, log_q_NV: Tensor, alpha: float) -> Tensor:
    """Skew KL, and its limit."""
    if alpha == 0.0:
        return forward_kl(log_q_NV, log_p_NV)
    return skew_kl(log_q_NV, log_p_NV, alpha)


def draw(sizes: dict[float, tuple[Tensor, Tensor]], rows: list[dict[str, Any]], path: Path) -> None:
    """The three panels."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    titles = ("skew KL, teacher's samples", "skew reverse KL, student's samples")
    for panel, title in enumerate(titles):
        for color, alpha in zip(COLORS, ALPHAS, strict=True):
            values = sizes[alpha][panel].clamp_min(1e-3).sort().values
            share = torch.linspace(1, 1 / len(values), len(values))
            axes[panel].loglog(values, share, color=color, label=f"alpha = {alpha:g}")
        axes[panel].set(title=title, xlabel="size of the coefficient", ylim=(1e-4, 1.3))
        axes[panel].set_ylabel("share of samples above")
    for color, alpha in zip(COLORS, ALPHAS, strict=True):
        of_alpha = [row for row in rows if row["alpha"] == alpha and row["infinite_share"] < 0.5]
        axes[2].loglog(
            [row["samples"] for row in of_alpha],
            [row["rms_error"] for row in of_alpha],
            "o-",
            markersize=3,
            color=color,
        )
    axes[2].set(
        title="Theorem 1: estimating skew KL",
        xlabel="samples of each side",
        ylabel="root mean square error, nats",
    )
    axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Teacher and student of the quickstart, commit {commit()}", fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, default=TEACHER)
    parser.add_argument("--student", type=Path, default=STUDENT)
    parser.add_argument("--positions", type=int, default=48)
    arguments = parser.parse_args()
    positions = load_positions(arguments.positions, arguments.teacher, arguments.student)
    log_p_NV = torch.log_softmax(positions.teacher_head.logits(positions.teacher_hidden_ND), -1)
    log_q_NV = torch.log_softmax(positions.student_head.logits(positions.student_hidden_ND), -1)
    sizes = {alpha: coefficients(log_p_NV, log_q_NV, alpha) for alpha in ALPHAS}
    quantiles = torch.tensor([0.5, 0.9, 0.99, 0.999, 1.0], dtype=torch.float64)
    summary = [
        {
            "alpha": alpha,
            "quantiles": quantiles.tolist(),
            "skew_kl": torch.quantile(skew, quantiles).tolist(),
            "skew_reverse_kl": torch.quantile(reverse, quantiles).tolist(),
        }
        for alpha, (skew, reverse) in sizes.items()
    ]
    rows = estimation(log_p_NV, log_q_NV)
    RESULTS.mkdir(exist_ok=True)
    draw(sizes, rows, RESULTS / "divergence_theory.png")
    for entry in summary:
        print(entry)
    print(write("divergence_theory", {"coefficients": summary, "estimation": rows}))


if __name__ == "__main__":
    main()
