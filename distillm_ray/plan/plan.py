"""`distillm-ray plan`: stage times, a simulation for each phi, and advice on the counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TypeAlias

import torch

from distillm_ray.config import AdaptiveSchedule, Config, FixedSchedule, PairedSchedule
from distillm_ray.data.splits import Splits, splits_of
from distillm_ray.data.tokenizing import map_files
from distillm_ray.errors import UserError
from distillm_ray.models.tokenizers import load_tokenizer
from distillm_ray.plan.advice import Advice, Budget, advise, overrides, resources, settled
from distillm_ray.plan.probe import ProbeData, measure
from distillm_ray.plan.servers import ROLES
from distillm_ray.plan.simulation import Counts, Machine, Outcome, RunData, simulate
from distillm_ray.plan.stages import Stages
from distillm_ray.preflight import Preflight
from distillm_ray.remote.inputs import fetched
from distillm_ray.types import Device, TrainingData

PHIS = (0.0, 0.1, 0.2, 0.5, 1.0)
ADAPTIVE_PHI = 0.5
"""The phi that the advice is for where a schedule will find phi by itself."""

MAX_ROWS = 20_000  # of each file that are read
MAX_STEPS = 200  # that are simulated; a longer run is simulated as one of so many steps
MAX_DRAWN = 20_000  # sequences that a simulation draws, if it then has at least MIN_STEPS
MIN_STEPS = 24
PROBED = 256  # sequences of the training data that the probe may use

Say: TypeAlias = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhiRow:
    """The config's own counts at one phi; of elastic pools, those to which they grow."""

    phi: float
    outcome: Outcome
    cost: float  # CPU-seconds a step, or GPU-seconds where the run has GPUs


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the simulations say."""

    stages: Stages
    steps: int  # simulated
    counts: Counts  # of the config; of a range, what a run starts with
    rows: tuple[PhiRow, ...]
    advised_phi: float
    advice: Advice | None  # None: the budget holds no run
    advised_cost: float | None
    overrides: tuple[str, ...]  # empty: the config's own counts are the advised ones

    def to_json(self) -> str:
        """For other programs."""

        def facts(outcome: Outcome, cost: float | None) -> dict[str, object]:
            return {
                "seconds_per_step": outcome.seconds,
                "device_seconds_per_step": cost,
                "waiting": outcome.waiting,
                "busy": {role: outcome.busy(role) for role in ROLES},
                "limiting": outcome.limiting,
                "generated_sequences_per_step": outcome.generated_sequences / self.steps,
                "scored_sequences_per_step": outcome.scored_sequences / self.steps,
            }

        rows = [
            {
                "phi": row.phi,
                "counts": asdict(row.outcome.counts),
                **facts(row.outcome, row.cost),
            }
            for row in self.rows
        ]
        advice = None
        if self.advice is not None:
            advice = {
                "phi": self.advised_phi,
                "counts": asdict(self.advice.counts),
                "overrides": list(self.overrides),
                "cpus": self.advice.cpus,
                "gpus": self.advice.gpus,
                **facts(self.advice.outcome, self.advised_cost),
            }
        tree = {
            "stages": asdict(self.stages),
            "steps": self.steps,
            "counts": asdict(self.counts),
            "rows": rows,
            "advice": advice,
        }
        return json.dumps(tree, indent=1)


def make_plan(
    config: Config,
    preflight: Preflight,
    stages: Stages | None,
    say: Say,
    *,
    phi: float | None = None,
    cpus: float | None = None,
    gpus: float | None = None,
) -> Plan:
    """Measure what `stages` does not give, and simulate.

    Args:
        preflight: what `preflight.check_models` found.
        say: is told what is being done.
        phi: that the advice is for; None: the config's, or `ADAPTIVE_PHI`.
        cpus, gpus: the budget; None: the measured machine's cores, and the GPUs of the config.

    Raises:
        UserError: the config cannot be planned here, by name.
    """
    if config.is_colocated:
        raise UserError(
            "run.placement must be separate for a plan, got colocated: the simulation has all roles"
            " work at the same time, and knows no turns; plan with run.placement=separate"
        )
    device = stages.device if stages is not None else _device(config)
    phis = possible_phis(config)
    if phi is not None and len(phis) == 1 and phi != phis[0]:
        raise UserError(f"--phi must be {phis[0]:g} with this schedule, got {phi:g}")
    say("reading data")
    splits = read_splits(config, preflight)
    config = config.with_rows(len(splits.train.prompts))
    if stages is None:
        stages = measure_stages(config, preflight, splits, device, say)
    check_stages(config, stages)
    config = shortened(config)
    data = run_data(config, splits)
    own = Counts.of(config)
    cost = partial(device_seconds, config, stages.device)
    rows: list[PhiRow] = []
    for one in phis:
        say(f"simulating phi {one:g}")
        outcome = settled(config, own, partial(outcome_of, config, data, stages, phi=one))
        rows.append(PhiRow(phi=one, outcome=outcome, cost=cost(outcome)))
    if phi is None:
        phi = own_phi(config)
    say(f"searching for counts at phi {phi:g}")
    own_cpus, own_gpus = resources(config, own, stages.device)
    on_gpus = stages.device == "cuda"
    budget = Budget(
        # CPUs are rarely what limits a run on GPUs.
        cpus=cpus or (float("inf") if on_gpus else max(stages.cores, own_cpus)),
        gpus=gpus or own_gpus,
    )
    cores = None if on_gpus else cpus
    run = partial(outcome_of, config, data, stages, phi=phi, cores=cores)
    advice = advise(config, stages.device, budget, run)
    return Plan(
        stages=stages,
        steps=config.learner.num_steps,
        counts=own,
        rows=tuple(rows),
        advised_phi=phi,
        advice=advice,
        advised_cost=None if advice is None else cost(advice.outcome),
        overrides=() if advice is None else tuple(overrides(config, advice.counts)),
    )


# ---- the config ----------------------------------------------------------------------------------


def possible_phis(config: Config) -> tuple[float, ...]:
    """The values of phi that a run of this kind can have."""
    match config.schedule:
        case PairedSchedule():
            return (1.0,)
        case FixedSchedule(phi=phi) if phi in (0.0, 1.0):
            return (phi,)  # its terms or its data may be of one kind of text only
        case FixedSchedule(phi=phi):
            return tuple(sorted({*PHIS, phi}))
        case AdaptiveSchedule(start=start):
            return (1.0,) if start == 1.0 else tuple(sorted({*PHIS, start}))


def own_phi(config: Config) -> float:
    """The phi that the config names, or a middle one where the schedule finds it."""
    match config.schedule:
        case PairedSchedule():
            return 1.0
        case FixedSchedule(phi=phi):
            return phi
        case AdaptiveSchedule(start=start):
            return max(ADAPTIVE_PHI, start)


def with_phi(config: Config, phi: float) -> Config:
    """The config with this phi from the first step to the last."""
    schedule = config.schedule
    if isinstance(schedule, PairedSchedule):
        return config
    fixed = FixedSchedule(type="fixed", phi=phi, replay_ratio=schedule.replay_ratio)
    return config.model_copy(update={"schedule": fixed})


def shortened(config: Config) -> Config:
    """The config with as many steps as are simulated."""
    limit = min(MAX_STEPS, max(MIN_STEPS, MAX_DRAWN // config.learner.batch_size))
    steps = min(config.learner.num_steps, limit)
    learner = config.learner.model_copy(update={"steps": steps, "epochs": None})
    return config.model_copy(update={"learner": learner})


def check_stages(config: Config, stages: Stages) -> None:
    """Refuse stage times that lack a stage of the run.

    Raises:
        UserError: with the stage.
    """
    for name, times, wanted in (
        ("generation", stages.generation, config.wants_rollouts),
        ("scoring", stages.scoring, config.loss.needs_teacher),
    ):
        if wanted and times is None:
            raise UserError(
                f"--stages: the file must have the times of {name}, which this config needs, got"
                " null; measure them again with --save-stages"
            )


def _device(config: Config) -> Device:
    """The device to measure on.

    Raises:
        UserError: the config wants GPUs and this machine has none.
    """
    has_gpu = torch.cuda.is_available()
    if config.run.device == "cuda" and not has_gpu:
        raise UserError(
            "run.device is cuda, but this machine has no GPU to measure on: run the command on a"
            " node that has one, or give --stages with a file that --save-stages wrote there"
        )
    return "cuda" if config.run.device != "cpu" and has_gpu else "cpu"


# ---- the work ------------------------------------------------------------------------------------


def read_splits(config: Config, preflight: Preflight) -> Splits:
    """The data, at most `MAX_ROWS` of each file."""
    tokenizer = load_tokenizer(
        fetched(config.student.model), trust_remote_code=config.student.trust_remote_code
    )
    return splits_of(
        config,
        tokenizer,
        map_files=partial(map_files, max_rows=MAX_ROWS),
        vocabulary_size=preflight.vocabulary_size,
    )


def measure_stages(
    config: Config, preflight: Preflight, splits: Splits, device: Device, say: Say
) -> Stages:
    """The stage times on this machine."""
    data = ProbeData(
        prompts=tuple(splits.train.prompts[:PROBED]),
        demonstrations=tuple(splits.train.demonstrations[:PROBED]),
        end_token_id=splits.train.end_token_id,
    )
    return measure(config, preflight, data, device, say)


def run_data(config: Config, splits: Splits) -> RunData:
    """As much of the data as the simulated steps can draw."""
    most = config.learner.num_steps * config.learner.batch_size
    held_out = splits.validation.demonstrations[: config.validation.max_prompts]
    return RunData(
        drawn=TrainingData(
            prompts=splits.train.prompts[:most],
            demonstrations=splits.train.demonstrations[:most],
            corpus=splits.corpus.pieces if splits.corpus else (),
        ),
        validation_tokens=sum(one.num_tokens for one in held_out),
    )


def outcome_of(
    config: Config,
    data: RunData,
    stages: Stages,
    counts: Counts,
    *,
    phi: float,
    cores: float | None = None,
    warm_up: int = 0,
) -> Outcome:
    """The simulated run at one phi. Without student text there is no generator."""
    fixed = with_phi(config, phi)
    if not fixed.wants_rollouts:
        counts = replace(counts, generators=0)
    machine = Machine.of(stages, cores=cores)
    return simulate(fixed, data, stages, counts, machine, warm_up=warm_up)


def device_seconds(config: Config, device: Device, outcome: Outcome) -> float:
    """GPU-seconds that a step holds, or CPU-seconds that it uses where there are no GPUs."""
    if device == "cpu":
        return outcome.core_seconds_per_step
    _, gpus = resources(config, outcome.counts, device)
    return gpus * outcome.seconds
