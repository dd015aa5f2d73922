"""Which keys may differ when a run is resumed from its checkpoint.

A resumed run draws the slots, prompts and replayed ids of the undisturbed one. Every key that this
promise, or the meaning of the run's numbers, depends on is fixed; `config/` marks the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from distillm_ray.config import RESUMABLE, Config, Section
from distillm_ray.errors import RunDirectoryError


def check_resume(old: Config, new: Config) -> None:
    """Compare the config of the run with the one to resume it with.

    `evaluation.at_end` may be turned off only: the scores before training cannot be computed later.

    Raises:
        RunDirectoryError: a fixed key differs; every such key is named with both values.
    """
    differences = [
        f"  {key}: {_shown(before)} in the run, {_shown(after)} now"
        for key, before, after in _fixed_differences(old, new)
    ]
    if differences:
        raise RunDirectoryError(
            f"{old.run.directory} holds a run with other settings, which cannot change when it is"
            " resumed:\n"
            + "\n".join(differences)
            + "\nSet them back, or set run.directory to a new directory to start another run"
        )
    if new.evaluation.at_end and not old.evaluation.at_end:
        raise RunDirectoryError(
            "evaluation.at_end may be turned off on resume, not on: the student was not evaluated"
            " before training; use `distillm-ray evaluate` when the run is complete"
        )
    _check_layout(old, new)


def _fixed_differences(
    old: Section, new: Section, prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Key and both values of every fixed field that differs."""
    for name, field in type(old).model_fields.items():
        before, after = getattr(old, name), getattr(new, name)
        key = f"{prefix}{name}"
        if RESUMABLE in field.metadata or before == after:
            continue
        if isinstance(before, Section) and type(before) is type(after):
            yield from _fixed_differences(before, after, f"{key}.")
        else:
            yield key, before, after


def _shown(value: Any) -> str:
    """A value as the config file spells it."""
    match value:
        case None:
            return "absent"
        case Section():
            return repr(value.model_dump(mode="json"))
        case tuple() | list():
            return f"[{', '.join(_shown(item) for item in value)}]"
        case _:
            return repr(value if isinstance(value, bool | int | float) else str(value))


def _check_layout(old: Config, new: Config) -> None:
    """ZeRO writes the optimizer state per rank and stage.

    Raises:
        RunDirectoryError: DeepSpeed could not load it.
    """
    before, after = old.learner, new.learner
    stages = {before.zero_stage, after.zero_stage}
    if len(stages) > 1 and stages != {1, 2}:
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
