"""`evaluation.json`: what an evaluation measured, model by model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from distillm_ray.errors import RunDirectoryError
from distillm_ray.files import write_atomically

EVALUATION_FILE = "evaluation.json"
STUDENT_BEFORE, STUDENT_AFTER, TEACHER = "student before", "student after", "teacher"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A metric over sampling seeds: mean and sample standard deviation (0 with one seed).

    `low` and `high` hold the mean with 95 % confidence, had other prompts of the kind been drawn;
    None for BLEU, which has no value for a single prompt.
    """

    mean: float
    std: float = 0.0
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScores:
    """One model's scores on the held-out prompts. None or NaN: not computed."""

    validation_loss: Annotated[
        float, BeforeValidator(lambda value: math.nan if value is None else value)
    ] = math.nan  # nats a token; null in the file is NaN
    rouge_1: Score | None = None  # all but response_tokens: 0 to 100
    rouge_2: Score | None = None
    rouge_l: Score | None = None
    bleu: Score | None = None
    exact_match: Score | None = None
    number_match: Score | None = None  # None unless every reference holds a number
    response_tokens: Score | None = None  # with the end token
    truncated: Score | None = None  # responses that ended by length


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedSample:
    """One held-out prompt with the student's responses before and after training."""

    prompt: str
    reference: str
    before: str
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The content of `evaluation.json`.

    The keys of `models` are `STUDENT_BEFORE`, `STUDENT_AFTER` and `TEACHER` after a run, and the
    model's directory after `distillm-ray evaluate`.
    """

    models: dict[str, ModelScores]
    samples: tuple[ComparedSample, ...] = ()
    num_prompts: int = 0
    seeds: tuple[int, ...] = ()
    trained_steps: int | None = None  # of the student after training

    def of_step(self, step: int) -> Evaluation:
        """Without the student after training, if that was the student of another step."""
        if STUDENT_AFTER not in self.models or self.trained_steps == step:
            return self
        others = {name: scores for name, scores in self.models.items() if name != STUDENT_AFTER}
        return replace(self, models=others)

    def write(self, directory: Path) -> None:
        """Write `evaluation.json` into a directory."""
        content = _EVALUATION.dump_json(self, indent=2)
        write_atomically(directory / EVALUATION_FILE, content + b"\n")


_EVALUATION: TypeAdapter[Evaluation] = TypeAdapter(Evaluation)


def read_evaluation(directory: Path) -> Evaluation | None:
    """The evaluation of a run directory, or None if it has none.

    Raises:
        RunDirectoryError: the file is damaged.
    """
    path = directory / EVALUATION_FILE
    if not path.is_file():
        return None
    try:
        return _EVALUATION.validate_json(path.read_bytes())
    except ValidationError as error:
        raise RunDirectoryError(
            f"{path} is not a valid evaluation ({error.error_count()} problems, the first:"
            f" {error.errors()[0]['msg']}): restore it, or delete it to see the run without it"
        ) from error


def has_trained_student(directory: Path) -> bool:
    """Whether a run directory has the scores of a student after training."""
    try:
        evaluation = read_evaluation(directory)
    except RunDirectoryError:
        return False
    return evaluation is not None and STUDENT_AFTER in evaluation.models
