"""Whether `distillm-ray plan` predicts what runs take: seconds and CPU-seconds a step.

    python bench/model.py [--quick] [--steps 12] [--stages FILE]

The quickstart's models and config (135M into 106M, batch 12, vLLM). The stage times are measured
once, as `distillm-ray plan` does it; then the quickstart trains for a few steps at each phi, with
evaluation off, and the simulation of the same steps stands beside what was measured. The window
begins after the first steps, as in `throughput.py`. Needs an idle machine and about eight minutes.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from _common import REPOSITORY, write
from _processes import COORDINATION
from _runs import product
from _speed import WARM_UP, Measured, run_ours
from rich.console import Console
from rich.table import Table

from distillm_ray import preflight
from distillm_ray.config.files import load_config
from distillm_ray.plan.plan import outcome_of, read_splits, run_data
from distillm_ray.plan.servers import ROLES
from distillm_ray.plan.simulation import Counts, Outcome
from distillm_ray.plan.stages import Stages, read_stages

CONFIG = Path("configs/quickstart.yaml")
FOLDER = REPOSITORY / "runs" / "bench" / "model"
PHIS, QUICK_PHIS = (0.0, 0.2, 1.0), (0.2,)
GOAL = 0.2  # the largest relative error


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted against measured steps.")
    parser.add_argument("--quick", action="store_true", help=f"only phi {QUICK_PHIS[0]:g}")
    parser.add_argument("--steps", type=int, default=12, help=f"the first {WARM_UP} do not count")
    parser.add_argument("--stages", type=Path, help="stage times that were measured before")
    arguments = parser.parse_args()
    if arguments.steps % 4 or arguments.steps <= WARM_UP:
        parser.error(f"--steps must be a multiple of 4 above {WARM_UP}")
    given = arguments.stages and arguments.stages.absolute()
    os.chdir(REPOSITORY)  # the config's paths start here
    if not Path("models/smollm2-106m-init").exists():
        raise SystemExit("the quickstart's models are missing: `make quickstart` prepares them")
    common = (
        f"learner.steps={arguments.steps}",
        f"learner.warmup_steps={WARM_UP}",
        f"validation={{interval: {arguments.steps}, probe_prompts: 0, max_prompts: 8}}",
        f"checkpoint.interval={arguments.steps}",
        "evaluation.at_end=false",
    )
    stages_file = given or FOLDER / "stages.json"
    if given is None:
        tell("measuring the stage times")
        saved = ("--save-stages", str(stages_file))
        product(FOLDER / "plan.log", "plan", str(CONFIG), *common, *saved)
    stages = read_stages(stages_file)
    found: dict[float, tuple[Measured, Outcome]] = {}
    for phi in QUICK_PHIS if arguments.quick else PHIS:
        schedule = f"schedule={{type: fixed, phi: {phi}, replay_ratio: constant}}"
        overrides = (*common, schedule)
        predicted = predict(overrides, stages, phi)
        tell(f"phi {phi:g}: {predicted.seconds:.2f} s a step predicted; running it")
        found[phi] = run_ours(CONFIG, FOLDER / f"phi-{phi:g}", overrides), predicted
        tell(f"phi {phi:g}: {found[phi][0].seconds:.2f} s a step measured")
    show(found)
    errors = [abs(error) for pair in found.values() for error in errors_of(*pair)]
    print(f"largest error {max(errors):.0%}, to reach {GOAL:.0%}")
    write(
        f"model{'_quick' if arguments.quick else ''}",
        {
            "steps": arguments.steps,
            "warm_up": WARM_UP,
            "stages": asdict(stages),
            "largest_error": max(errors),
            "runs": {
                f"{phi:g}": {
                    "measured": asdict(measured),
                    "predicted": {
                        "seconds": outcome.seconds,
                        "cpu_seconds": outcome.core_seconds_per_step,
                        "cpu_by_role": cpu_by_role(outcome),
                        "generated_sequences": outcome.generated_sequences / arguments.steps,
                        "waiting": outcome.waiting,
                        "limiting": outcome.limiting,
                    },
                }
                for phi, (measured, outcome) in found.items()
            },
        },
    )


def predict(overrides: tuple[str, ...], stages: Stages, phi: float) -> Outcome:
    """The simulation of the window that is measured."""
    config = load_config(CONFIG, list(overrides))
    config = preflight.settled(config, datetime.now())
    splits = read_splits(config, preflight.check_models(config))
    data = run_data(config, splits)
    return outcome_of(config, data, stages, Counts.of(config), phi=phi, warm_up=WARM_UP)


def cpu_by_role(outcome: Outcome) -> dict[str, float]:
    """CPU-seconds a step, named as `Measured` names them."""
    steps = len(outcome.step_seconds)
    roles = {f"{role}s": outcome.core_seconds[role] / steps for role in ROLES}
    return {**roles, COORDINATION: outcome.coordination_seconds / steps}


def errors_of(measured: Measured, outcome: Outcome) -> tuple[float, float]:
    """Relative errors of seconds and CPU-seconds."""
    return (
        outcome.seconds / measured.seconds - 1.0,
        outcome.core_seconds_per_step / measured.cpu_seconds - 1.0,
    )


def show(found: dict[float, tuple[Measured, Outcome]]) -> None:
    """Two lines a phi: measured, predicted."""
    table = Table("phi", "", title="a step, after the warm-up")
    for name in ("s", "error", "CPU-s", "error", "learn", "generate", "score", "other", "waits"):
        table.add_column(name, justify="right")
    for phi, (measured, outcome) in found.items():
        used = measured.cpu_by_role
        roles = [used.get(f"{role}s", 0.0) for role in ROLES]
        other = measured.cpu_seconds - sum(roles)
        table.add_row(
            f"{phi:g}",
            "measured",
            f"{measured.seconds:.2f}",
            "",
            f"{measured.cpu_seconds:.2f}",
            "",
            *(f"{value:.2f}" for value in (*roles, other)),
            f"{measured.wait_seconds / measured.seconds:.0%}",
        )
        seconds_error, cpu_error = errors_of(measured, outcome)
        table.add_row(
            "",
            "predicted",
            f"{outcome.seconds:.2f}",
            f"{seconds_error:+.0%}",
            f"{outcome.core_seconds_per_step:.2f}",
            f"{cpu_error:+.0%}",
            *(f"{value:.2f}" for value in cpu_by_role(outcome).values()),
            f"{outcome.waiting:.0%}",
        )
    Console(width=120).print(table)


def tell(text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M')} {text}", flush=True)


if __name__ == "__main__":
    main()
