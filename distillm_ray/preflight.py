"""Everything that can be refused in seconds, before a cluster is touched or a file is written."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from distillm_ray.config import Config, GeneratorPoolConfig, VllmEngine
from distillm_ray.config.files import load_config, parse_config
from distillm_ray.config.strict_yaml import parse_yaml
from distillm_ray.data.files import check_files
from distillm_ray.errors import ConfigError, RunDirectoryError, StoreError
from distillm_ray.evaluation.results import STUDENT_AFTER, TEACHER, read_evaluation
from distillm_ray.files import check_writable
from distillm_ray.learner.checkpoint import Checkpoint, CheckpointDirectory
from distillm_ray.learner.resume import check_resume
from distillm_ray.log.metrics import FILE_NAME, read_records
from distillm_ray.log.records import DoneRecord
from distillm_ray.log.stopping import has_ended, spent_without_a_checkpoint
from distillm_ray.models.completeness import check_complete
from distillm_ray.models.directory import (
    ModelFacts,
    check_lengths,
    check_model_directory,
    check_pair,
    check_parallelism,
    check_targets,
)
from distillm_ray.models.identity import model_identity
from distillm_ray.remote.run_store import store_of
from distillm_ray.run_directory import CONFIG_FILE, held
from distillm_ray.teacher.target_key import TargetIdentity
from distillm_ray.types import Device

_RAY_UPLOADS = "runtime_resources"  # Ray's folder for what comes with a job


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Preflight:
    """What the checks found."""

    teacher: ModelFacts | None  # None: the config names none
    student: ModelFacts
    vocabulary_size: int  # ids with rows in both models; rows of the heads beyond are padding

    def target_identity(self, config: Config, device: Device) -> TargetIdentity | None:
        """What all teacher targets of a run have in common; None if it needs none."""
        if config.teacher is None or self.teacher is None or not config.loss.needs_teacher:
            return None
        dtype = config.teacher.dtype
        return TargetIdentity(
            teacher=model_identity(self.teacher.path),
            kind=config.targets.type,
            k=config.targets.k if config.targets.type == "top_k" else None,
            # Only a scorer's processor knows what `auto` stands for.
            dtype=f"auto on {device}" if dtype == "auto" else dtype,
        )


def settled(config: Config, now: datetime) -> Config:
    """The config with what the run in `run.directory` has fixed at its start.

    `data.time`: the user's, else the run's, else now. Chat templates may write the date, and a run
    that is resumed on another day renders as it began. `learner.epoch_rows`: the run's, whose data
    cannot change.

    Raises:
        ConfigError: the run's own config cannot be read.
    """
    saved = saved_config(config)
    data, learner = config.data, config.learner
    if data.time is None:
        time = saved.data.time if saved is not None else None
        data = data.model_copy(update={"time": time or now.replace(microsecond=0)})
    if saved is not None and saved.learner.epoch_rows is not None:
        learner = learner.model_copy(update={"epoch_rows": saved.learner.epoch_rows})
    return config.model_copy(update={"data": data, "learner": learner})


def saved_config(config: Config) -> Config | None:
    """The config that the run in `run.directory` was begun with; None if there is no run.

    Raises:
        ConfigError: it cannot be read.
        StoreError: the store of the run cannot be used.
    """
    if (store := store_of(config)) is None:
        path = config.run.local_directory / CONFIG_FILE
        return load_config(path) if path.is_file() else None
    try:
        content = store.read(CONFIG_FILE)
    except StoreError as error:
        raise StoreError(f"run.directory: {error}") from error
    if content is None:
        return None
    name = str(store.address.child(CONFIG_FILE))
    return parse_config(parse_yaml(content.decode()), name=name)


def check(config: Config) -> Preflight:
    """Check engines, models, data files and run directory.

    Raises:
        UserError: the first of them that cannot work, by name.
    """
    check_engines(train_engines(config))
    found = check_models(config)
    check_files(config.data, require_responses=config.draws_data)
    check_run_directory(config)
    if config.loss.needs_teacher:
        check_library(config)
    if config.run.local_directory.is_dir():
        with held(config.run.local_directory):
            pass
    return found


def check_models(config: Config) -> Preflight:
    """Check the models, alone and as a pair.

    Raises:
        UserError: the first of them that cannot be used, by name.
    """
    teacher = None
    if config.teacher is not None:
        if config.loss.needs_teacher:
            check_parallelism(config.teacher)
        teacher = check_model_directory(
            config.teacher.model, "teacher", trust_remote_code=config.teacher.trust_remote_code
        )
    student = check_model_directory(
        config.student.model, "student", trust_remote_code=config.student.trust_remote_code
    )
    if teacher is not None:
        # The student never samples an id that the teacher has no row for.
        student = replace(student, vocabulary_size=check_pair(teacher, student))
    vocabulary_size = student.vocabulary_size
    check_lengths(config, teacher, student)
    check_targets(config.targets, vocabulary_size)
    if teacher is not None and config.teacher is not None:
        check_complete(teacher, trust_remote_code=config.teacher.trust_remote_code)
    check_complete(student, trust_remote_code=config.student.trust_remote_code)
    return Preflight(teacher=teacher, student=student, vocabulary_size=vocabulary_size)


def check_library(config: Config) -> None:
    """Check that the target library, if the config names one, can be made and written.

    Raises:
        RunDirectoryError: it is a file, lies in a copy that Ray deletes, or cannot be written.
    """
    library = config.targets.library
    if library is None:
        return
    if _RAY_UPLOADS in library.parts:
        raise RunDirectoryError(
            f"targets.library must outlive the job, got {library}, which lies in the copy of"
            " --working-dir that Ray uploaded and deletes after the job; give an absolute path, on"
            " a disk that all nodes share: targets.library=/shared/targets"
        )
    check_writable(library, "targets.library")


def train_engines(config: Config) -> dict[str, GeneratorPoolConfig]:
    """The pools of generators that a run starts in any of its phases, by config section."""
    pools: dict[str, GeneratorPoolConfig] = {}
    if config.wants_generators:
        pools["rollout"] = config.rollout
    if config.evaluation.at_end:
        pools["evaluation.student"] = config.evaluation.student
        if config.evaluates_teacher and config.evaluation.teacher is not None:
            pools["evaluation.teacher"] = config.evaluation.teacher
    return pools


def check_engines(pools: Mapping[str, GeneratorPoolConfig]) -> None:
    """Refuse vLLM where it is not installed, before a phase that needs it begins.

    Raises:
        ConfigError: with the section's key.
    """
    for section, pool in pools.items():
        if isinstance(pool.engine, VllmEngine) and importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                f"{section}.engine.type is vllm, which is not installed here: install it (`make"
                f" setup`), or set {section}.engine.type=transformers"
            )


def check_run_directory(config: Config) -> Checkpoint | None:
    """The newest checkpoint of the run in `run.directory`; None if it has none.

    Raises:
        RunDirectoryError: it belongs to something else or to another run, or cannot be written.
    """
    directory = config.run.local_directory
    if _RAY_UPLOADS in directory.parts:
        raise RunDirectoryError(
            f"run.directory must outlive the job, got {directory}, which lies in the copy of"
            " --working-dir that Ray uploaded and deletes after the job, and the run with it; give"
            " an absolute path, on a disk that all nodes with a learner share:"
            " run.directory=/shared/runs/NAME"
        )
    check_writable(directory, "run.directory")
    saved = saved_config(config)
    if saved is None:
        begun = f"{CONFIG_FILE}.tmp"  # by a job that was killed at its very start
        if directory.is_dir() and any(path.name != begun for path in directory.iterdir()):
            raise RunDirectoryError(
                f"run.directory: {directory} is not empty and holds no {CONFIG_FILE}: not a"
                " distillm-ray run; refusing to overwrite it; choose another directory"
            )
        return None
    check_resume(saved, config)
    checkpoints = CheckpointDirectory.of(config)
    latest = checkpoints.latest()
    damaged = checkpoints.damaged()
    if latest is None and damaged:
        raise RunDirectoryError(
            f"run.directory: no checkpoint of {directory} can be resumed: {'; '.join(damaged)}."
            " Restore the files, remove the checkpoint to start from the beginning, or set"
            " run.directory to a new directory"
        )
    steps = config.learner.known_steps
    if latest is not None and steps is not None and latest.meta.step > steps:
        raise RunDirectoryError(
            f"learner.steps must be at least the steps that the run has done, got"
            f" {steps} < {latest.meta.step}: {latest.path} is beyond the new end;"
            " raise learner.steps, or set run.directory to a new directory to start another run"
        )
    if latest is None and (rule := spent_without_a_checkpoint(config)):
        raise RunDirectoryError(
            f"{rule}, by attempts that left no checkpoint to go on from: the run would end before"
            f" its first step; raise the budget, or set run.directory to a new directory"
        )
    return latest


def is_complete(config: Config) -> bool:
    """Whether the run in `run.directory` has done all its steps, or a rule of `stop` ended it."""
    path = config.run.local_directory / FILE_NAME
    if not path.is_file():
        return False
    latest = CheckpointDirectory.of(config).latest()
    return any(
        isinstance(record, DoneRecord)
        and record.status == "complete"
        # A run that went on after an early end has a later checkpoint.
        and (latest is None or latest.meta.step == record.step)
        and has_ended(config, record.step)
        for record in read_records(path)
    )


def missing_evaluations(config: Config) -> tuple[str, ...]:
    """The models that a run has begun to compare and has no scores of."""
    evaluation = read_evaluation(config.run.local_directory)
    if evaluation is None or not config.evaluation.at_end:
        return ()
    wanted = (STUDENT_AFTER, *((TEACHER,) if config.evaluates_teacher else ()))
    return tuple(name for name in wanted if name not in evaluation.models)
