"""`distillm-ray init-student`: a student of layers that are named, or chosen by what they do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.progress import Progress

from distillm_ray.config import DataConfig
from distillm_ray.data.splits import load_dataset
from distillm_ray.data.tokenizing import map_files
from distillm_ray.errors import DataError, ModelError, UserError
from distillm_ray.files import write_atomically
from distillm_ray.learner.layer_choice import LayerChoice, LayerChooser
from distillm_ray.models.completeness import check_complete
from distillm_ray.models.directory import check_model_directory
from distillm_ray.models.students import LAYERS_FILE, init_student
from distillm_ray.models.tokenizers import load_tokenizer


def named_student(teacher: Path, out: Path, layers: Sequence[int]) -> list[str]:
    """A student of the named layers; returns a summary.

    Raises:
        ModelError: as in `init_student`.
    """
    if out.exists():
        raise ModelError(f"{out} exists: name a new directory, or remove it first")
    check_complete(check_model_directory(teacher, "teacher"))
    summary = init_student(teacher, out, layers)
    return [
        f"{out}: {len(layers)} layers of {teacher}, {summary.num_parameters / 1e6:.1f} M of"
        f" {summary.num_teacher_parameters / 1e6:.1f} M parameters"
    ]


def chosen_student(
    teacher: Path, out: Path, keep: int, *, by: str, files: Sequence[Path], num_rows: int
) -> list[str]:
    """A student of `keep` layers, chosen on the first `num_rows` rows of `files`.

    The rows are rendered with the chat template, as in training.

    Raises:
        UserError: an argument is wrong; names it.
        ModelError: the teacher cannot be used.
        DataError: the rows cannot be used.
    """
    if by not in ("loss", "influence"):
        raise UserError(f"--by must be loss or influence, got {by!r}")
    if num_rows < 1:
        raise UserError(f"--rows must be at least 1, got {num_rows}")
    if not files:
        raise UserError(
            f"--keep {keep} needs --data: the layers are chosen by the loss of some rows; name a"
            " file of prompts and responses"
        )
    if out.exists():
        raise ModelError(f"{out} exists: name a new directory, or remove it first")
    facts = check_model_directory(teacher, "teacher")
    check_complete(facts)
    if not 1 <= keep <= facts.num_layers:
        raise UserError(
            f"--keep must lie between 1 and {facts.num_layers}, got {keep}: {teacher} has"
            f" {facts.num_layers} layers"
        )
    for file in files:
        if not file.exists():
            raise DataError(f"--data {file} does not exist")
    dataset = load_dataset(
        files,
        DataConfig(train=tuple(files)),
        load_tokenizer(teacher),
        split="train",
        map_files=partial(map_files, max_rows=num_rows),
        vocabulary_size=facts.vocabulary_size,
    )
    chooser = LayerChooser(
        teacher, dataset.demonstrations[:num_rows], vocabulary_size=facts.vocabulary_size
    )
    choice = _choose(chooser, keep, by)
    lines = named_student(teacher, out, choice.kept)
    content = json.dumps({"by": by, **asdict(choice)}, indent=1)
    write_atomically(out / LAYERS_FILE, f"{content}\n".encode())
    unit = "loss without it" if by == "loss" else "influence"
    return [
        f"loss of {len(dataset.demonstrations[:num_rows])} rows with all"
        f" {facts.num_layers} layers: {choice.loss_before:.4f} nats a token",
        *(f"  without layer {one.layer}: {unit} {one.value:.4f}" for one in choice.removed),
        f"loss of the student: {choice.loss_after:.4f}; kept: {','.join(map(str, choice.kept))}",
        *lines,
    ]


def _choose(chooser: LayerChooser, keep: int, by: str) -> LayerChoice:
    if by == "influence":
        return chooser.by_influence(keep)
    with Progress(transient=True) as progress:
        task = progress.add_task("trying to do without each layer", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return chooser.by_loss(keep, show)
