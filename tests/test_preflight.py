"""What is refused before anything starts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from distillm_ray import preflight
from distillm_ray.cluster import placement
from distillm_ray.config import (
    Config,
    CrossEntropy,
    GeneratorPoolConfig,
    LossConfig,
    TargetsConfig,
    TransformersEngine,
    VllmEngine,
)
from distillm_ray.config.files import dump_config
from distillm_ray.errors import ConfigError, RunDirectoryError
from distillm_ray.evaluation.results import STUDENT_AFTER, Evaluation, ModelScores
from distillm_ray.learner.checkpoint import CheckpointDirectory, CheckpointMeta
from distillm_ray.models.directory import ModelFacts
from distillm_ray.preflight import (
    Preflight,
    check,
    check_engines,
    check_library,
    check_run_directory,
    missing_evaluations,
    train_engines,
)
from distillm_ray.teacher.target_key import TargetIdentity
from tests import make


def make_config(directory: Path) -> Config:
    return make.config(run={"directory": directory}, learner={"steps": 4})


def test_a_run_directory_inside_of_an_uploaded_working_directory_is_refused(
    tmp_path: Path,
) -> None:
    """A relative `run.directory` in a Ray job lies there."""
    uploaded = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    uploaded.mkdir(parents=True)
    with pytest.raises(RunDirectoryError, match="give an absolute path") as caught:
        check_run_directory(make_config(uploaded / "runs" / "one"))
    assert "deletes after the job" in str(caught.value)


def test_a_target_library_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    def config(library: Path) -> Config:
        return make.config(
            targets={"library": library}, teacher={"model": "/m", "dtype": "float32"}
        )

    uploaded = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    with pytest.raises(RunDirectoryError, match=r"^targets\.library must outlive the job"):
        check_library(config(uploaded / "targets"))
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match=r"targets\.library: .* \(.*/file is a file\)"):
        check_library(config(tmp_path / "file" / "targets"))
    check_library(config(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    check_library(make.config())


def test_a_new_and_an_empty_directory_begin_a_run(tmp_path: Path) -> None:
    assert check_run_directory(make_config(tmp_path / "new")) is None
    assert check_run_directory(make_config(tmp_path)) is None
    (tmp_path / "config.yaml.tmp").touch()  # a job was killed while it wrote its first file
    assert check_run_directory(make_config(tmp_path)) is None


def test_a_directory_with_other_files_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunDirectoryError, match="not a distillm-ray run; refusing to overwrite it"):
        check_run_directory(make_config(tmp_path))
    with pytest.raises(RunDirectoryError, match="it is a file"):
        check_run_directory(make_config(tmp_path / "thesis.tex"))


def test_fewer_steps_than_the_run_has_completed_are_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run")
    directory = config.run.local_directory
    directory.mkdir()
    (directory / "config.yaml").write_text(dump_config(config))
    checkpoints = CheckpointDirectory(directory / "checkpoints", keep=2)
    checkpoints.prepare(6)
    meta = CheckpointMeta(step=6, phi=0.0, validation=None)
    checkpoints.commit(meta, b"")
    with pytest.raises(RunDirectoryError, match=r"learner\.steps must be at least .* got 4 < 6"):
        check_run_directory(config)


def test_a_run_whose_only_checkpoint_is_damaged_is_refused_by_name(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run")
    directory = config.run.local_directory
    directory.mkdir()
    (directory / "config.yaml").write_text(dump_config(config))
    checkpoints = CheckpointDirectory(directory / "checkpoints", keep=2)
    for step in (1, 2):
        checkpoints.prepare(step)
        checkpoints.commit(CheckpointMeta(step=step, phi=0.0, validation=None), b"")
    (directory / "checkpoints" / "step-00000002" / "buffer.bin").unlink()
    latest = check_run_directory(config)
    assert latest is not None and latest.meta.step == 1
    (directory / "checkpoints" / "step-00000001" / "buffer.bin").unlink()
    with pytest.raises(RunDirectoryError, match=r"can be resumed: .*step-00000001 is damaged"):
        check_run_directory(config)


def test_a_scorer_on_several_devices_is_refused_before_anything_starts(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    assert config.teacher is not None
    teacher = config.teacher.model_copy(update={"tensor_parallel": 2})
    with pytest.raises(ConfigError, match=r"raise teacher\.actors"):
        check(config.model_copy(update={"teacher": teacher}))


def test_every_pool_of_the_run_is_checked_for_vllm_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path)
    assert list(train_engines(config)) == ["rollout", "evaluation.student", "evaluation.teacher"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"set rollout\.engine\.type=transformers"):
        check(config)
    teacher = GeneratorPoolConfig(engine=VllmEngine())
    other = GeneratorPoolConfig(engine=TransformersEngine())
    with pytest.raises(ConfigError, match=r"^evaluation\.teacher\.engine\.type is vllm"):
        check_engines({"rollout": other, "evaluation.teacher": teacher})
    check_engines({"rollout": other})


def test_a_teacher_that_is_not_evaluated_needs_no_pool_and_is_not_missing(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    evaluation = config.evaluation.model_copy(update={"teacher": None})
    config = config.model_copy(update={"evaluation": evaluation})
    assert list(train_engines(config)) == ["rollout", "evaluation.student"]
    names = [phase.name for phase in placement.train_phases(config, "cpu")]
    assert "evaluation of the student" in names
    assert not any("teacher" in name for name in names)
    Evaluation(models={STUDENT_AFTER: ModelScores()}).write(tmp_path)
    assert missing_evaluations(config) == ()


def test_without_at_end_and_rollouts_no_engine_is_needed() -> None:
    config = make.config(
        teacher=None,
        loss={"terms": [{"type": "cross_entropy"}]},
        schedule={"type": "fixed", "phi": 0.0},
        evaluation={"at_end": False},
    )
    assert train_engines(config) == {}


def facts(path: Path) -> ModelFacts:
    return cast(ModelFacts, SimpleNamespace(path=path))


def test_the_identity_of_targets_holds_a_dtype_that_only_a_scorer_can_resolve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "model_identity", lambda path: f"digest of {path.name}")
    found = Preflight(teacher=facts(Path("big")), student=facts(Path("small")), vocabulary_size=9)
    config = make_config(tmp_path)
    identity = found.target_identity(config, "cpu")
    assert identity == TargetIdentity(teacher="digest of big", kind="hidden", dtype="auto on cpu")
    top_k = config.model_copy(update={"targets": TargetsConfig(type="top_k", k=7)})
    identity = found.target_identity(top_k, "cuda")
    assert identity is not None and (identity.k, identity.dtype) == (7, "auto on cuda")
    sft = config.model_copy(update={"loss": LossConfig(terms=(CrossEntropy(),))})
    assert found.target_identity(sft, "cpu") is None
