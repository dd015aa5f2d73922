"""Which keys may differ when a run goes on from its checkpoint.

A resumed run promises the slots, prompts and replayed ids of the undisturbed one. A key that is
not listed here is part of that promise, or of what the numbers of the run mean, and is fixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distillm_ray.config import Config
from distillm_ray.errors import RunDirectoryError

MAY_CHANGE = (
    "run.directory",  # the directory may have been moved
    "run.device",
    "run.startup_timeout_s",
    "teacher.actors",
    "teacher.tensor_parallel",
    "teacher.max_batch_tokens",
    "teacher.num_cpus",
    "teacher.num_gpus",
    "teacher.num_threads",
    "student.gradient_checkpointing",
    "loss.implementation",
    "loss.chunk_megabytes",
    "schedule.increment",
    "schedule.tolerance",
    "rollout.engine",
    "rollout.actors",
    "rollout.tensor_parallel",
    "rollout.dtype",
    "rollout.max_in_flight",
    "rollout.logprob_warning",
    "rollout.timeout_s",
    "rollout.num_cpus",
    "rollout.num_gpus",
    "rollout.num_threads",
    "targets.stores",
    "targets.max_bytes",
    "learner.workers",  # within _check_layout
    "learner.zero_stage",  # within _check_layout
    "learner.steps",
    "learner.max_micro_batch_tokens",
    "learner.learning_rate",
    "learner.min_learning_rate_ratio",
    "learner.warmup_steps",
    "learner.weight_decay",
    "learner.adam_betas",
    "learner.adam_epsilon",
    "learner.max_gradient_norm",
    "learner.max_skipped_steps",
    "learner.prefetch_steps",
    "learner.data_timeout_s",
    "learner.max_restarts",
    "learner.num_cpus",
    "learner.num_gpus",
    "learner.num_threads",
    "validation.probe_prompts",
    "evaluation.at_end",
    "checkpoint",
)
"""Dotted keys; a section or union stands for everything below it."""


def check_resume(old: Config, new: Config) -> None:
    """Compare the config of the run with the one it shall go on with.

    The scores before training were computed under the evaluation's settings, so they stay; only
    the evaluation itself may be given up.

    Raises:
        RunDirectoryError: a fixed key differs; every such key is named with both values.
    """
    before = dict(_leaves(old.model_dump(mode="json")))
    after = dict(_leaves(new.model_dump(mode="json")))
    differences = [
        f"  {key}: {_shown(before, key)} in the run, {_shown(after, key)} now"
        for key in sorted(before.keys() | after.keys())
        if _shown(before, key) != _shown(after, key) and not _may_change(key)
    ]
    if differences:
        raise RunDirectoryError(
            f"{old.run.directory} holds a run with other settings, which cannot change when it is"
            " resumed:\n"
            + "\n".join(differences)
            + "\nSet them back, or set run.directory to a new"
            " directory to start another run"
        )
    if new.evaluation.at_end and not old.evaluation.at_end:
        raise RunDirectoryError(
            "evaluation.at_end may be turned off on resume, not on: the student before training was"
            " not evaluated; use `distillm-ray evaluate` when the run is complete"
        )
    _check_layout(old, new)


def _check_layout(old: Config, new: Config) -> None:
    """ZeRO's optimizer state is written per rank and stage.

    Raises:
        RunDirectoryError: DeepSpeed could not load it.
    """
    before, after = old.learner, new.learner
    if before.zero_stage != after.zero_stage and {
        before.zero_stage,
        after.zero_stage,
    } != {1, 2}:
        raise RunDirectoryError(
            f"learner.zero_stage may change on resume between 1 and 2 only, got"
            f" {before.zero_stage} in the run and {after.zero_stage} now: DeepSpeed cannot load"
            f" the optimizer state; set learner.zero_stage={before.zero_stage}"
        )
    if before.workers != after.workers and before.zero_stage > 0:
        raise RunDirectoryError(
            f"learner.workers may change on resume with learner.zero_stage 0 only, got"
            f" {before.workers} in the run and {after.workers} now at stage {before.zero_stage}:"
            f" the optimizer state is split over the ranks; set learner.workers={before.workers}"
        )


def _may_change(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in MAY_CHANGE)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(leaves: Mapping[str, Any], key: str) -> str:
    return repr(leaves[key]) if key in leaves else "absent"
