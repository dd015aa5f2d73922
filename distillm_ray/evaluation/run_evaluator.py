"""The student before, the student after and the teacher on the same held-out prompts.

What the end of a run shows: each model's answers are scored by ROUGE-L and BLEU, and its held-out
loss stands beside them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from distillm_ray.cluster.actor_pool import Actor
from distillm_ray.cluster.cluster import Cluster
from distillm_ray.config import Config
from distillm_ray.data.splits import Splits
from distillm_ray.evaluation import inference
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
from distillm_ray.models.directory import check_model_directory
from distillm_ray.preflight import Preflight
from distillm_ray.run_directory import MODEL_FOLDER
from distillm_ray.types import Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RunEvaluator:
    """Scores the three models of a run; `prompts` is empty where `evaluation.at_end` is off."""

    def __init__(
        self,
        config: Config,
        preflight: Preflight,
        tokenizer: PreTrainedTokenizerBase,
        splits: Splits,
    ) -> None:
        self._config = config
        self._preflight = preflight
        self._tokenizer = tokenizer
        self._end_token_id = splits.train.end_token_id
        limit = config.validation.max_prompts
        self._validation = splits.validation.demonstrations[:limit]
        test = splits.test or splits.validation
        self.prompts: tuple[Prompt, ...] = ()
        if config.evaluation.at_end:
            self.prompts = test.prompts[: config.evaluation.max_prompts]

    def before(self, loop: Actor) -> Evaluation:
        """The student as it came; its answers become the samples' first half."""
        scores, answers = inference.score_answers(
            loop, self.prompts, self._config, tokenizer=self._tokenizer
        )
        shown = self._config.evaluation.num_samples_shown
        return Evaluation(
            models={STUDENT_BEFORE: scores},
            samples=tuple(
                ComparedSample(
                    prompt=prompt.text,
                    reference=prompt.references[0],
                    before=answer.text,
                    after="",
                )
                for prompt, answer in list(zip(self.prompts, answers[0], strict=True))[:shown]
            ),
            num_prompts=len(self.prompts),
            seeds=inference.evaluation_seeds(self._config),
        )

    def after(self, loop: Actor, evaluation: Evaluation) -> Evaluation | None:
        """The trained student, by the generators of the run.

        None where one of them does not hold the last weights: it was restarted after the learners
        were gone, and the weights that they had published with them.
        """
        scores, answers = inference.score_answers(
            loop, self.prompts, self._config, tokenizer=self._tokenizer
        )
        steps = self._config.learner.steps
        if any(answer.version != steps for by_prompt in answers for answer in by_prompt):
            return None
        return self._completed(evaluation, scores, answers[0])

    def exported(self, cluster: Cluster, evaluation: Evaluation) -> Evaluation:
        """The trained student, from `model/`; needs what `inference.score_model` does."""
        scores, answers = inference.score_model(
            cluster,
            self._config,
            check_model_directory(
                self._config.run.directory / MODEL_FOLDER,
                "student",
                trust_remote_code=self._config.student.trust_remote_code,
            ),
            self._config.student,
            self.prompts,
            self._validation,
            tokenizer=self._tokenizer,
            end_token_id=self._end_token_id,
        )
        return self._completed(evaluation, scores, answers[0])

    def _completed(
        self, evaluation: Evaluation, scores: ModelScores, answers: Sequence[Rollout]
    ) -> Evaluation:
        """With the student after training; both losses of the student are the learners'."""
        losses = {
            record.step: record.loss
            for record in read_records(self._config.run.directory / FILE_NAME)
            if isinstance(record, ValidationRecord)
        }
        before = dataclasses.replace(
            evaluation.models[STUDENT_BEFORE], validation_loss=losses[min(losses)]
        )
        after = dataclasses.replace(scores, validation_loss=losses[max(losses)])
        return dataclasses.replace(
            evaluation,
            models={STUDENT_BEFORE: before, STUDENT_AFTER: after},
            samples=tuple(
                dataclasses.replace(sample, after=answer.text)
                for sample, answer in zip(evaluation.samples, answers, strict=False)
            ),
        )

    def teacher(self, cluster: Cluster, evaluation: Evaluation) -> Evaluation:
        """What the student is measured against. See `inference.score_model`."""
        scores, _ = inference.score_model(
            cluster,
            self._config,
            self._preflight.teacher,
            self._config.teacher,
            self.prompts,
            self._validation,
            tokenizer=self._tokenizer,
            end_token_id=self._end_token_id,
        )
        return dataclasses.replace(evaluation, models={**evaluation.models, TEACHER: scores})
