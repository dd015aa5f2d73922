"""What `distillm-ray plan` prints."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from distillm_ray.plan.plan import Plan
from distillm_ray.plan.servers import ROLES
from distillm_ray.plan.simulation import Counts, Outcome


def render(plan: Plan) -> RenderableType:
    """The table over phi, then the advice."""
    unit = "CPU-s/step" if plan.stages.device == "cpu" else "GPU-s/step"
    grown = [row.outcome.counts for row in plan.rows]
    grows = any(
        counts.generators > plan.counts.generators or counts.scorers > plan.counts.scorers
        for counts in grown
    )
    start = " at the start" if grows else ""
    table = Table(title=f"{_counts(plan.counts)}{start}; means of {plan.steps} simulated steps")
    for name in ("phi", "s/step", unit, "fresh/step", "waits for data"):
        table.add_column(name, justify="right")
    if grows:
        table.add_column("generators", justify="right")
        table.add_column("scorers", justify="right")
    for role in ROLES:
        table.add_column(f"{role} busy", justify="right")
    table.add_column("limited by")
    for row in plan.rows:
        outcome = row.outcome
        table.add_row(
            f"{row.phi:g}",
            _number(outcome.seconds),
            _number(row.cost),
            f"{outcome.generated_sequences / plan.steps:.1f}",
            f"{outcome.waiting:.0%}",
            *((str(outcome.counts.generators), str(outcome.counts.scorers)) if grows else ()),
            *(f"{outcome.busy(role):.0%}" if _has(outcome, role) else "–" for role in ROLES),
            outcome.limiting,
        )
    return Group(table, Text("\n".join(_advice(plan, unit))))


def _advice(plan: Plan, unit: str) -> list[str]:
    advice = plan.advice
    if advice is None:
        return ["The budget holds no run: one process of each role already asks for more."]
    assert plan.advised_cost is not None
    outcome = advice.outcome
    asked = f"{advice.gpus:g} GPUs" if plan.stages.device == "cuda" else f"{advice.cpus:g} CPUs"
    lines = [
        f"At phi {plan.advised_phi:g}, {_counts(advice.counts)} ({asked}) balance:"
        f" {_number(outcome.seconds)} s/step, {_number(plan.advised_cost)} {unit}, limited by the"
        f" {outcome.limiting}, {outcome.waiting:.0%} of the time waiting for data."
    ]
    if plan.overrides:
        lines.append(f"Overrides: {' '.join(plan.overrides)}")
    else:
        lines.append("These are the config's own counts.")
    return lines


def _counts(counts: Counts) -> str:
    found = (
        (counts.learners, "learner"),
        (counts.generators, "generator"),
        (counts.scorers, "scorer"),
    )
    return ", ".join(f"{n} {name}{'s' if n > 1 else ''}" for n, name in found if n)


def _has(outcome: Outcome, role: str) -> bool:
    return getattr(outcome.counts, f"{role}s") > 0


def _number(value: float) -> str:
    return f"{value:.3g}"
