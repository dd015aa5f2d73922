"""The student before, the student after and the teacher, on the same held-out prompts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from distillm_ray.config import Config
from distillm_ray.data.splits import Splits
from distillm_ray.evaluation.model_scores import (
    evaluation_seeds,
    score_model,
    score_responses,
    served_student,
    served_teacher,
)
from distillm_ray.evaluation.responder import Responder, ServedModel
from distillm_ray.evaluation.responses_file import RESPONSES_FOLDER, write_responses
from distillm_ray.evaluation.results import (
    STUDENT_AFTER,
    STUDENT_BEFORE,
    TEACHER,
    ComparedSample,
    Evaluation,
    ModelScores,
)
from distillm_ray.log.metrics import FILE_NAME, read_records
from distillm_ray.log.records import ValidationRecord
from distillm_ray.models.directory import ModelFacts, check_model_directory
from distillm_ray.run_directory import MODEL_FOLDER
from distillm_ray.types import Device, Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RunEvaluator:
    """Scores the models of a run.

    `prompts` is empty where `evaluation.at_end` is off, or no test prompt has a reference.
    """

    def __init__(
        self,
        config: Config,
        splits: Splits,
        tokenizer: PreTrainedTokenizerBase,
        device: Device,
        interrupt: Callable[[], None],
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._device: Device = device
        self._interrupt = interrupt
        self._end_token_id = splits.train.end_token_id
        limit = config.validation.max_prompts
        self._validation = tuple(splits.validation.demonstrations[:limit])
        test = splits.test or splits.validation
        self.prompts: tuple[Prompt, ...] = ()
        if config.evaluation.at_end:
            answered = (prompt for prompt in test.prompts if prompt.references)
            self.prompts = tuple(islice(answered, config.evaluation.max_prompts))

    def before(self, responder: Responder) -> Evaluation:
        """The student before training; its responses become the samples' first half."""
        scores, responses = score_responses(responder, self.prompts, self._config)
        self._keep(STUDENT_BEFORE, responses)
        shown = self._config.evaluation.num_samples_shown
        return Evaluation(
            models={STUDENT_BEFORE: scores},
            samples=tuple(
                ComparedSample(
                    prompt=prompt.text,
                    reference=prompt.references[0],
                    before=response.text,
                    after="",
                )
                for prompt, response in list(zip(self.prompts, responses[0], strict=True))[:shown]
            ),
            num_prompts=len(self.prompts),
            seeds=evaluation_seeds(self._config),
        )

    def after(
        self, responder: Responder, evaluation: Evaluation, *, version: int
    ) -> Evaluation | None:
        """The trained student, by the generators of the run.

        None if one of them does not hold the weights of `version`, the last step. A generator that
        restarts after the learners have ended cannot get them: the learners own what they
        published.
        """
        scores, responses = score_responses(responder, self.prompts, self._config)
        if any(response.version != version for by_seed in responses for response in by_seed):
            return None
        return self._completed(evaluation, scores, responses, version)

    def exported(self, evaluation: Evaluation, *, version: int) -> Evaluation:
        """The student of step `version`, from `model/`, in the pool of `evaluation.student`."""
        facts = check_model_directory(
            self._config.run.below(MODEL_FOLDER),
            "student",
            trust_remote_code=self._config.student.trust_remote_code,
        )
        scores, responses = self._score(served_student(self._config, facts, self._device))
        return self._completed(evaluation, scores, responses, version)

    def _completed(
        self,
        evaluation: Evaluation,
        scores: ModelScores,
        responses: Sequence[Sequence[Rollout]],
        version: int,
    ) -> Evaluation:
        """With the student after training; the learners computed both losses of the student."""
        self._keep(STUDENT_AFTER, responses)
        losses = {
            record.step: record.loss
            for record in read_records(self._config.run.local_directory / FILE_NAME)
            if isinstance(record, ValidationRecord) and record.text == "dataset"
        }
        if not losses:
            losses = {0: math.nan}
        before = dataclasses.replace(
            evaluation.models[STUDENT_BEFORE], validation_loss=losses[min(losses)]
        )
        after = dataclasses.replace(scores, validation_loss=losses[max(losses)])
        return dataclasses.replace(
            evaluation,
            models={**evaluation.models, STUDENT_BEFORE: before, STUDENT_AFTER: after},
            trained_steps=version,
            samples=tuple(
                dataclasses.replace(sample, after=response.text)
                for sample, response in zip(evaluation.samples, responses[0], strict=False)
            ),
        )

    def teacher(self, evaluation: Evaluation, facts: ModelFacts) -> Evaluation:
        """The teacher, in the pool of `evaluation.teacher`."""
        scores, responses = self._score(served_teacher(self._config, facts, self._device))
        self._keep(TEACHER, responses)
        return dataclasses.replace(evaluation, models={**evaluation.models, TEACHER: scores})

    def _keep(self, model: str, responses: Sequence[Sequence[Rollout]]) -> None:
        path = (
            self._config.run.local_directory / RESPONSES_FOLDER / f"{model.replace(' ', '_')}.jsonl"
        )
        write_responses(path, self.prompts, responses, evaluation_seeds(self._config))

    def _score(self, served: ServedModel) -> tuple[ModelScores, list[list[Rollout]]]:
        return score_model(
            self._config,
            served,
            self.prompts,
            self._validation,
            device=self._device,
            tokenizer=self._tokenizer,
            end_token_id=self._end_token_id,
            interrupt=self._interrupt,
        )
