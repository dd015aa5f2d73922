"""Which weights the scores at the end of a run are of, and how the three models are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from distillm_ray.cluster.cluster import Cluster
from distillm_ray.config import Config, SamplingConfig
from distillm_ray.data.splits import Splits
from distillm_ray.evaluation import inference, run_evaluator
from distillm_ray.evaluation.results import Evaluation
from distillm_ray.evaluation.run_evaluator import RunEvaluator
from distillm_ray.log.metrics import MetricsLog
from distillm_ray.log.records import ValidationRecord
from distillm_ray.models.directory import ModelFacts
from distillm_ray.preflight import Preflight
from distillm_ray.types import FinishReason, Prompt, Rollout, Source

STEPS = 10


def make_prompt(name: str) -> Prompt:
    ids = np.array([1, 2], np.int32)
    return Prompt(
        prompt_id=name, token_ids=ids, reference_ids=(ids,), text=name, references=(f"to {name}",)
    )


PROMPTS = (make_prompt("a"), make_prompt("b"))


class Loop:
    """Answers like generators that hold `versions`: one version a sampling seed."""

    def __init__(self, versions: dict[int, int]) -> None:
        self._versions = versions
        self.answer = SimpleNamespace(remote=self._answer)
        self.start = SimpleNamespace(remote=lambda: None)

    def _answer(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int
    ) -> list[Rollout]:
        version = self._versions[seed]
        return [
            Rollout(
                rollout_id=f"{prompt.prompt_id}-{seed}",
                prompt_id=prompt.prompt_id,
                prompt_ids=prompt.token_ids,
                response_ids=np.array([version], np.int32),
                loss_mask=np.ones(1, np.bool_),
                source=Source.STUDENT,
                version=version,
                finish_reason=FinishReason.STOP,
                text="",
            )
            for prompt in prompts
        ]


class RecordingCluster:
    """What a model was loaded with."""

    def __init__(self) -> None:
        self.trusted: list[bool] = []

    def generators(
        self, model: ModelFacts, source: Source, *, end_token_id: int, trust_remote_code: bool
    ) -> list[Any]:
        self.trusted.append(trust_remote_code)
        return []

    def loop(self, peers: object) -> Loop:
        return Loop({1: STEPS, 2: STEPS})

    def held_out_loss(self, *_: object, trust_remote_code: bool, **__: object) -> float:
        self.trusted.append(trust_remote_code)
        return 0.75


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of the fakes are answered at once; a decoded answer is its version."""

    def decode(_: object, rollout: Rollout) -> str:
        return str(rollout.version)

    monkeypatch.setattr(inference, "ask", lambda answer, *_, **__: answer)
    monkeypatch.setattr(inference, "release", lambda actors: None)
    monkeypatch.setattr(inference, "decode", decode)


@pytest.fixture
def evaluator(tmp_path: Path) -> RunEvaluator:
    config = Config.model_validate(
        {
            "run": {"directory": str(tmp_path)},
            "teacher": {"model": "models/teacher", "trust_remote_code": True},
            "student": {"model": "models/student"},
            "data": {"train": ["data/train.jsonl"]},
            "learner": {"steps": STEPS, "batch_size": 8},
            "evaluation": {"seeds": [1, 2], "sampling": {"temperature": 1.0}},
        }
    )
    log = MetricsLog(tmp_path, commit="", command="", tensorboard=False)
    log.add(ValidationRecord(step=0, loss=4.0, tokens=10, phi=0.0))
    log.add(ValidationRecord(step=STEPS, loss=1.5, tokens=10, phi=0.0))
    log.close()
    data = SimpleNamespace(prompts=PROMPTS, demonstrations=(), end_token_id=2)
    splits = cast(Splits, SimpleNamespace(train=data, validation=data, test=None))
    preflight = cast(Preflight, SimpleNamespace(teacher=SimpleNamespace(vocabulary_size=9)))
    return RunEvaluator(config, preflight, cast(Any, None), splits)


def before(evaluator: RunEvaluator) -> Evaluation:
    return evaluator.before(cast(Any, Loop({1: 0, 2: 0})))


def test_the_student_after_has_the_losses_of_the_log_and_the_last_weights(
    evaluator: RunEvaluator,
) -> None:
    after = evaluator.after(cast(Any, Loop({1: STEPS, 2: STEPS})), before(evaluator))
    assert after is not None
    assert after.models["student before"].validation_loss == 4.0
    assert after.models["student after"].validation_loss == 1.5
    assert [(s.before, s.after) for s in after.samples] == [("0", str(STEPS))] * len(PROMPTS)


@pytest.mark.parametrize("versions", [{1: 0, 2: STEPS}, {1: STEPS, 2: 0}])
def test_a_generator_that_lost_the_last_weights_gives_no_scores(
    evaluator: RunEvaluator, versions: dict[int, int]
) -> None:
    assert evaluator.after(cast(Any, Loop(versions)), before(evaluator)) is None


def test_the_exported_student_is_scored_in_their_place(
    evaluator: RunEvaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Path] = []

    def check(path: Path, *_: object, **__: object) -> Any:
        checked.append(path)
        return SimpleNamespace(vocabulary_size=9)

    monkeypatch.setattr(run_evaluator, "check_model_directory", check)
    cluster = RecordingCluster()
    after = evaluator.exported(cast(Cluster, cluster), before(evaluator))
    assert checked == [tmp_path / "model"]
    assert after.models["student after"].validation_loss == 1.5
    assert cluster.trusted == [False, False]


def test_a_teacher_with_code_of_its_own_is_trusted_by_its_generators_too(
    evaluator: RunEvaluator,
) -> None:
    cluster = RecordingCluster()
    complete = evaluator.teacher(cast(Cluster, cluster), before(evaluator))
    assert cluster.trusted == [True, True]
    assert complete.models["teacher"].validation_loss == 0.75
