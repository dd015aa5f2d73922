"""Simulated runs whose steps can be computed by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from distillm_ray.config import Config
from distillm_ray.plan.simulation import Counts, Machine, Outcome, RunData, simulate
from distillm_ray.plan.stages import GenerationTimes, LearningTimes, ScoringTimes, Stages
from distillm_ray.types import Source, TrainingData
from tests import make

ALONE = Machine()
STEP_SECONDS = 2.0
LENGTH = 10  # of the student's responses


def data(rows: int = 400) -> RunData:
    """Rows of two prompt and two response tokens."""
    prompts = [make.prompt(f"p{index}") for index in range(rows)]
    responses = [
        make.rollout(f"r{index}", prompt_id=f"p{index}", source=Source.DATASET)
        for index in range(rows)
    ]
    return RunData(drawn=TrainingData(prompts=prompts, demonstrations=responses))


def config(*, phi: float, teacher: bool = False, ratio: str = "none", **sections: Any) -> Config:
    """Four sequences a step, twenty steps, no validation in between."""
    term = {"on": "all", "type": "skew_kl" if teacher else "cross_entropy"}
    return make.config(
        schedule={"type": "fixed", "phi": phi, "replay_ratio": ratio},
        loss={"terms": [term]},
        learner={"steps": 20, "batch_size": 4, "warmup_steps": 0} | sections.pop("learner", {}),
        validation={"interval": 20},
        checkpoint={"interval": 20},
        **({} if teacher else {"teacher": None}),
        **sections,
    )


def stages(
    *,
    generation: GenerationTimes | None = None,
    scoring: ScoringTimes | None = None,
    **learning: float,
) -> Stages:
    """A learner's step takes two seconds, whatever is in it, unless `learning` says otherwise."""
    times = dict.fromkeys(LearningTimes.__dataclass_fields__, 0.0) | {"step": STEP_SECONDS}
    return Stages(
        device="cpu",
        cores=2,
        learning=LearningTimes(**(times | learning)),
        generation=generation,
        scoring=scoring,
    )


def generation(**times: float) -> GenerationTimes:
    every = dict.fromkeys(("engine_step", "token", "prompt_token", "load"), 0.0)
    return GenerationTimes(**(every | times), response_tokens=(LENGTH,))


def run(
    config: Config,
    stages: Stages,
    *,
    rows: int = 400,
    generators: int = 1,
    machine: Machine = ALONE,
    warm_up: int = 0,
) -> Outcome:
    counts = Counts(
        learners=config.learner.workers,
        generators=generators if config.wants_rollouts else 0,
        scorers=1 if config.loss.needs_teacher else 0,
    )
    return simulate(config, data(rows), stages, counts, machine, warm_up=warm_up)


STRICT = {"lookahead": 1, "sync_interval": 1, "max_staleness": 0}


def test_without_generation_a_step_is_the_learners_own_time() -> None:
    times = stages(step=1.0, row=0.5, token=0.01, loss_token=0.1)
    outcome = run(config(phi=0.0), times)
    # One row of four sequences with four tokens each, two of them of the loss.
    assert outcome.step_seconds == pytest.approx([1.0 + 0.5 + 16 * 0.01 + 8 * 0.1] * 20)
    assert outcome.waiting == 0.0
    assert outcome.busy("learner") == pytest.approx(1.0)
    assert outcome.limiting == "learner"


def test_two_ranks_take_half_of_the_tokens_each() -> None:
    times = stages(step=1.0, token=0.1)
    outcome = run(config(phi=0.0, learner={"workers": 2}), times)
    assert outcome.seconds == pytest.approx(1.0 + 8 * 0.1)
    assert outcome.core_seconds_per_step == pytest.approx(2 * outcome.seconds)


def test_strictly_on_policy_every_part_of_a_step_comes_after_the_other() -> None:
    generating = generation(engine_step=0.1, token=0.05, prompt_token=0.01, load=0.25)
    outcome = run(config(phi=1.0, rollout=STRICT), stages(generation=generating, gather=0.5))
    # Eight prompt tokens are read, then four requests get a token each engine step.
    generated = 8 * 0.01 + LENGTH * (0.1 + 4 * 0.05)
    assert outcome.step_seconds[1:-1] == pytest.approx([0.25 + generated + 2.0 + 0.5] * 18)
    assert outcome.wait_seconds[1:-1] == pytest.approx([0.25 + generated] * 18)
    # The first weights are loaded before the run, and nothing is generated with the last ones.
    assert outcome.step_seconds[0] == pytest.approx(generated + 2.0 + 0.5)
    assert outcome.step_seconds[-1] == pytest.approx(0.25 + generated + 2.0)
    assert outcome.limiting == "generator"


def test_generation_slower_than_the_learner_sets_the_pace() -> None:
    slow = generation(token=0.1)  # 4 responses x 10 tokens x 0.1 s
    outcome = run(config(phi=1.0), stages(generation=slow), warm_up=4)
    assert outcome.seconds == pytest.approx(4.0, rel=0.05)
    assert outcome.limiting == "generator"


def test_more_generators_shorten_a_step_until_the_learner_binds() -> None:
    slow = generation(token=0.2)
    times = stages(generation=slow)
    one, two, eight = (
        run(config(phi=1.0), times, generators=count, warm_up=4).seconds for count in (1, 2, 8)
    )
    assert one == pytest.approx(8.0, rel=0.15)
    assert two == pytest.approx(one / 2, rel=0.15)
    assert eight == pytest.approx(STEP_SECONDS)


def test_more_processes_than_cores_share_them() -> None:
    scoring = ScoringTimes(batch=1.0, token=0.0)
    times = stages(scoring=scoring)
    kd = config(phi=0.0, teacher=True, rollout={"lookahead": 2})
    alone = run(kd, times, warm_up=4)
    both = run(kd, times, machine=Machine(cores=1), warm_up=4)
    # The pass for a later step runs beside the learner.
    assert alone.seconds == pytest.approx(2.0)
    assert both.step_seconds[:-4] == pytest.approx([3.0] * 12)
    assert both.core_seconds_per_step == pytest.approx(both.seconds)


def test_contention_makes_everybody_slower_and_costs_cores() -> None:
    times = stages(scoring=ScoringTimes(batch=2.0, token=0.0))
    kd = config(phi=0.0, teacher=True, rollout={"lookahead": 2})
    outcome = run(kd, times, machine=Machine(cores=2, contention=1.5), warm_up=4)
    assert outcome.step_seconds[:-4] == pytest.approx([3.0] * 12)
    assert outcome.core_seconds_per_step > 4.0


def test_a_sequence_is_scored_at_its_first_visit_only() -> None:
    times = stages(scoring=ScoringTimes(batch=1.0, token=0.0))
    outcome = run(config(phi=0.0, teacher=True), times, rows=4, machine=Machine(cores=1), warm_up=2)
    assert outcome.scored_sequences == 4
    assert outcome.seconds == pytest.approx(STEP_SECONDS)


def test_a_smaller_phi_and_replay_generate_less() -> None:
    times = stages(generation=generation(token=0.01))
    generated = {
        (phi, ratio): run(config(phi=phi, ratio=ratio), times).generated_sequences
        for phi in (0.0, 0.5, 1.0)
        for ratio in ("none", "constant")
    }
    assert generated[0.0, "none"] == generated[0.0, "constant"] == 0
    assert generated[1.0, "none"] == 80
    assert 0 < generated[0.5, "constant"] < generated[0.5, "none"] < 80
    assert generated[1.0, "constant"] < 80


def test_demand_in_bursts_takes_fewer_steps_of_the_engine() -> None:
    times = stages(generation=generation(engine_step=0.1, token=0.001))
    often = {"lookahead": 1, "sync_interval": 1, "max_staleness": 4}
    seldom = {"lookahead": 1, "sync_interval": 4, "max_staleness": 4}
    every, burst = (
        run(config(phi=1.0, rollout=rollout), times, warm_up=4) for rollout in (often, seldom)
    )
    assert burst.generated_sequences == every.generated_sequences == 80
    assert burst.busy_seconds["generator"] < 0.4 * every.busy_seconds["generator"]


def test_validation_and_checkpoints_count_in_the_step_after_them() -> None:
    tree = config(phi=0.0)
    often = tree.model_copy(
        update={
            "validation": tree.validation.model_copy(update={"interval": 10}),
            "checkpoint": tree.checkpoint.model_copy(update={"interval": 5}),
        }
    )
    times = stages(validation_token=0.1, checkpoint=0.75)
    held_out = replace(data(), validation_tokens=30)
    counts = Counts(learners=1, generators=0, scorers=0)
    outcome = simulate(often, held_out, times, counts, ALONE)
    longer = {5: 0.75, 10: 3.0 + 0.75, 15: 0.75}
    expected = [STEP_SECONDS + longer.get(step, 0.0) for step in range(20)]
    assert outcome.step_seconds == pytest.approx(expected)
