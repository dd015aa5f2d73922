"""Which weights are scored at the end of a run, and how the three models are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from distillm_ray.config import Config, SamplingConfig
from distillm_ray.data.splits import Splits
from distillm_ray.evaluation import run_evaluator
from distillm_ray.evaluation.responder import Responder, ServedModel
from distillm_ray.evaluation.results import Evaluation, ModelScores
from distillm_ray.evaluation.run_evaluator import RunEvaluator
from distillm_ray.log.metrics import MetricsLog
from distillm_ray.log.records import ValidationRecord
from distillm_ray.models.directory import ModelFacts
from distillm_ray.types import Prompt, Rollout, Source
from tests import make

STEPS = 10


PROMPTS = tuple(make.prompt(name, text=name, references=(f"to {name}",)) for name in ("a", "b"))


def responses(prompts: Sequence[Prompt], version: int, seed: int) -> list[Rollout]:
    return [
        make.rollout(
            f"{prompt.prompt_id}-{seed}",
            prompt_id=prompt.prompt_id,
            response=[version],
            version=version,
            text=str(version),
        )
        for prompt in prompts
    ]


class FakeResponder:
    """Responds like generators that hold `versions`: one version for each sampling seed."""

    def __init__(self, versions: dict[int, int]) -> None:
        self._versions = versions

    def respond(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int
    ) -> list[Rollout]:
        return responses(prompts, self._versions[seed], seed)


def responder(versions: dict[int, int]) -> Responder:
    return cast(Responder, FakeResponder(versions))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServedModel]:
    """Records the models that are scored from their directories."""
    found: list[ServedModel] = []

    def score_model(
        config: Config, served: ServedModel, prompts: Sequence[Prompt], *_: object, **__: object
    ) -> tuple[ModelScores, list[list[Rollout]]]:
        found.append(served)
        return ModelScores(validation_loss=0.75), [
            responses(prompts, STEPS, seed) for seed in (1, 2)
        ]

    monkeypatch.setattr(run_evaluator, "score_model", score_model)
    return found


@pytest.fixture
def evaluator(tmp_path: Path) -> RunEvaluator:
    config = make.config(
        run={"directory": str(tmp_path)},
        teacher={"trust_remote_code": True},
        learner={"steps": STEPS},
        rollout={"actors": 7, "dtype": "float32"},
        evaluation={
            "seeds": [1, 2],
            "sampling": {"temperature": 1.0},
            "student": {"actors": 2},
            "teacher": {"actors": 3, "num_cpus": 4},
        },
    )
    log = MetricsLog(tmp_path, commit="", command="", tensorboard=False)
    log.add(ValidationRecord(step=0, loss=4.0, tokens=10, phi=0.0))
    log.add(ValidationRecord(step=STEPS, loss=1.5, tokens=10, phi=0.0))
    log.close()
    data = SimpleNamespace(prompts=PROMPTS, demonstrations=(), end_token_id=2)
    splits = cast(Splits, SimpleNamespace(train=data, validation=data, test=None))
    return RunEvaluator(config, splits, cast(Any, None), "cpu", lambda: None)


def before(evaluator: RunEvaluator) -> Evaluation:
    return evaluator.before(responder({1: 0, 2: 0}))


def test_the_trained_student_has_the_losses_of_the_log_and_the_last_weights(
    evaluator: RunEvaluator,
) -> None:
    after = evaluator.after(responder({1: STEPS, 2: STEPS}), before(evaluator), version=STEPS)
    assert after is not None
    assert after.models["student before"].validation_loss == 4.0
    assert after.models["student after"].validation_loss == 1.5
    assert after.trained_steps == STEPS
    # A run that went on has another student, and its earlier score is not that one's.
    assert after.of_step(STEPS) is after
    assert "student after" not in after.of_step(STEPS + 1).models
    assert [(s.before, s.after) for s in after.samples] == [("0", str(STEPS))] * len(PROMPTS)


@pytest.mark.parametrize("versions", [{1: 0, 2: STEPS}, {1: STEPS, 2: 0}])
def test_a_generator_that_lost_the_last_weights_gives_no_scores(
    evaluator: RunEvaluator, versions: dict[int, int]
) -> None:
    assert evaluator.after(responder(versions), before(evaluator), version=STEPS) is None


def test_the_exported_student_is_scored_instead_of_the_generators_weights(
    evaluator: RunEvaluator,
    served: list[ServedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked: list[Path] = []

    def check(path: Path, *_: object, **__: object) -> Any:
        checked.append(path)
        return SimpleNamespace(vocabulary_size=9)

    monkeypatch.setattr(run_evaluator, "check_model_directory", check)
    after = evaluator.exported(before(evaluator), version=STEPS)
    assert checked == [tmp_path / "model"]
    assert after.models["student after"].validation_loss == 1.5
    [student] = served
    assert (student.pool.actors, student.spec.count) == (2, 2)
    assert not student.model.trust_remote_code


def test_the_teacher_is_scored_with_its_own_pool_and_trust_setting(
    evaluator: RunEvaluator, served: list[ServedModel]
) -> None:
    facts = cast(ModelFacts, SimpleNamespace(vocabulary_size=9))
    complete = evaluator.teacher(before(evaluator), facts)
    assert complete.models["teacher"].validation_loss == 0.75
    [teacher] = served
    assert teacher.facts is facts
    assert (teacher.pool.actors, teacher.spec.count, teacher.spec.cpus) == (3, 3, 4)
    assert teacher.source is Source.TEACHER
    assert teacher.model.trust_remote_code
