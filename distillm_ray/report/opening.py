"""What a user is told before a run spends anything: rows read, remarks on the config, warnings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distillm_ray.config import Config
from distillm_ray.config.remarks import remarks_on
from distillm_ray.data.splits import Splits
from distillm_ray.data.template_difference import template_difference
from distillm_ray.models.tokenizers import load_tokenizer
from distillm_ray.remote.inputs import fetched

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def opening_lines(config: Config, splits: Splits, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Lines for the screen; `tokenizer` is the student's."""
    lines = [*splits.describe(), *remarks_on(config)]
    if config.learner.epochs is not None:
        lines.append(
            f"{config.learner.num_steps} steps: learner.epochs = {config.learner.epochs:g} times"
            f" {len(splits.train.prompts):,} rows in batches of {config.learner.batch_size}, at"
            " most learner.steps"
        )
    if config.teacher is not None:
        teacher = load_tokenizer(
            fetched(config.teacher.model), trust_remote_code=config.teacher.trust_remote_code
        )
        warning = template_difference(
            splits.train.prompts[0], config.data, tokenizer, teacher, name="the teacher"
        )
        lines += [warning] if warning else []
    return lines
