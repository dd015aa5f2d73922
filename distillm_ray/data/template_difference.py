"""Whether two models render the same prompt differently, for a warning at the start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distillm_ray.config import ChatTemplate, DataConfig
from distillm_ray.data.decoding import decode_ids
from distillm_ray.data.rows import Example, RowError, Turn
from distillm_ray.data.templates import Renderer
from distillm_ray.errors import DataError
from distillm_ray.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def template_difference(
    prompt: Prompt,
    config: DataConfig,
    student: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
    *,
    name: str,
) -> str:
    """A warning with both texts if the words of `prompt` are rendered differently; else empty.

    Args:
        name: of the other model, at the start of the warning.
    """
    if isinstance(config.template, ChatTemplate) and not other.chat_template:
        return (
            f"warning: {name} has no chat template: it gets prompts in the student's, which it may"
            " never have seen"
        )
    example = Example(
        example_id=None,
        turns=(Turn(role="user", content=prompt.text),),
        instruction=prompt.text,
        context="",
        references=(),
    )
    ours = _rendered(example, config, student)
    theirs = _rendered(example, config, other)
    if ours == theirs:
        return ""
    return (
        f"warning: {name} has another chat template than the student: it knows {prompt.prompt_id}"
        f" as {theirs!r}, and gets it as the student does, {ours!r}"
    )


def _rendered(example: Example, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return decode_ids(tokenizer, Renderer(tokenizer, config).render(example).prompt_ids)
    except (DataError, RowError) as error:
        return f"({error})"
