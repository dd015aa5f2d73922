"""What is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from distillm_ray.config import Config
from distillm_ray.config_files import dump_config
from distillm_ray.errors import ConfigError, RunDirectoryError
from distillm_ray.learner.checkpoint import CheckpointDirectory, CheckpointMeta
from distillm_ray.preflight import check, check_run_directory


def make_config(directory: Path) -> Config:
    return Config.model_validate(
        {
            "run": {"directory": directory},
            "teacher": {"model": "t"},
            "student": {"model": "s"},
            "data": {"train": ["d.jsonl"]},
            "learner": {"steps": 4, "batch_size": 2},
        }
    )


def test_a_run_directory_inside_of_an_uploaded_working_directory_is_refused(
    tmp_path: Path,
) -> None:
    """A relative `run.directory` in a Ray job is one."""
    uploaded = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    uploaded.mkdir(parents=True)
    with pytest.raises(RunDirectoryError, match="give an absolute path") as caught:
        check_run_directory(make_config(uploaded / "runs" / "one"))
    assert "deletes after the job" in str(caught.value)


def test_a_new_and_an_empty_directory_begin_a_run(tmp_path: Path) -> None:
    assert check_run_directory(make_config(tmp_path / "new")) is None
    assert check_run_directory(make_config(tmp_path)) is None
    (tmp_path / "config.yaml.tmp").touch()  # a job was killed while it wrote its first file
    assert check_run_directory(make_config(tmp_path)) is None


def test_a_directory_with_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunDirectoryError, match="it is no run of this program"):
        check_run_directory(make_config(tmp_path))
    with pytest.raises(RunDirectoryError, match="it is a file"):
        check_run_directory(make_config(tmp_path / "thesis.tex"))


def test_a_run_made_shorter_than_what_it_has_done_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run")
    directory = config.run.directory
    directory.mkdir()
    (directory / "config.yaml").write_text(dump_config(config))
    checkpoints = CheckpointDirectory(directory / "checkpoints", keep=2)
    checkpoints.prepare(6)
    meta = CheckpointMeta(step=6, phi=0.0, validation=None)
    checkpoints.commit(meta, b"")
    with pytest.raises(RunDirectoryError, match=r"learner\.steps must be at least .* got 4 < 6"):
        check_run_directory(config)


def test_a_scorer_on_several_devices_is_refused_before_anything_starts(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    teacher = config.teacher.model_copy(update={"tensor_parallel": 2})
    with pytest.raises(ConfigError, match=r"raise teacher\.actors"):
        check(config.model_copy(update={"teacher": teacher}))
