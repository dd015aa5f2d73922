"""`data`: files, columns, templates and limits."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from distillm_ray.config.fields import (
    Location,
    Number,
    Positive,
    Section,
    moment,
    type_unless_given,
)

# Arguments of transformers' apply_chat_template, and what it defines for the template.
_TEMPLATE_ARGUMENTS = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "strftime_now",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
}


class ChatTemplate(Section):
    """The tokenizer's own chat template."""

    type: Literal["chat"] = "chat"
    system: str | None = None
    variables: dict[str, JsonValue] = Field(
        default_factory=dict
    )  # for the template, as enable_thinking, or tools

    @model_validator(mode="after")
    def _check(self) -> Self:
        taken = sorted(_TEMPLATE_ARGUMENTS & self.variables.keys())
        if taken:
            raise ValueError(
                f"data.template.variables must be names that only the template reads, got"
                f" {', '.join(taken)}: the rendering itself sets them"
            )
        for name in ("tools", "documents"):
            value = self.variables.get(name, [])
            if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
                raise ValueError(
                    f"data.template.variables.{name} must be a list of objects, got {value!r}"
                )
        return self


class PlainTemplate(Section):
    """A named plain template, for base models without a chat template."""

    type: Literal["plain"] = "plain"
    name: Literal["instruction", "raw"] = "instruction"


class ColumnsConfig(Section):
    """Which columns of a row are read. Unset: the names of known data sets are recognized."""

    messages: str | None = None
    prompt: str | None = None
    context: str | None = None  # appended to the prompt, as Alpaca's `input`
    response: str | None = None  # beside `prompt`; unset: the known names
    system: str | None = None  # the system message, beside `prompt` or `messages`

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.messages is not None and (self.prompt or self.context or self.response):
            raise ValueError(
                f"data.columns.messages must stand alone, got {self.messages!r} with another"
                " column: a conversation holds prompt and response"
            )
        named = [name for name in (self.prompt, self.context, self.response, self.system) if name]
        if len(set(named)) < len(named):
            raise ValueError(
                f"data.columns must name a column once, got {', '.join(named)}: a prompt would be"
                " its own response"
            )
        if self.prompt is None and self.messages is None and self.system:
            raise ValueError("data.columns.system needs data.columns.prompt or messages beside it")
        if self.prompt is None and (self.context or self.response):
            raise ValueError(
                "data.columns.prompt is required beside data.columns.context and"
                " data.columns.response: only named columns are read"
            )
        return self


class DataConfig(Section):
    """Files of prompts with responses. JSONL, Parquet or a Hugging Face dataset directory.

    Without `validation`, that fraction of the training prompts is held out, by seed.
    """

    train: tuple[Location, ...] = Field(min_length=1)
    validation: tuple[Location, ...] = ()
    test: tuple[Location, ...] = ()
    validation_fraction: Annotated[Number, Field(gt=0.0, lt=1.0)] = 0.05
    columns: ColumnsConfig = ColumnsConfig()
    template: Annotated[
        ChatTemplate | PlainTemplate, Field(discriminator="type"), type_unless_given("chat")
    ] = ChatTemplate()
    max_prompt_tokens: Positive = 512
    max_response_tokens: Positive = 512
    # What templates see as now; unset: the start of the run.
    time: Annotated[datetime, BeforeValidator(moment)] | None = None
    # Who wrote the responses of `train`; the teacher's come from `distillm-ray generate`.
    responses: Literal["dataset", "teacher"] = "dataset"
    reasoning: Literal["fail", "keep", "drop"] = "fail"  # thoughts that the template drops
    conversations: Literal["auto", "all", "last", "split"] = "auto"
    """Which responses of a conversation are learned: all in one sequence, the last, or each in a
    sequence of its own. `auto` is all where the template renders earlier turns unchanged, else the
    last."""
    # Plain text beside the prompts, for terms with on: corpus. A row is a document.
    corpus: tuple[Location, ...] = ()
    corpus_column: Annotated[str, Field(min_length=1)] = "text"
    # Sequences of the corpus that every step adds to its batch; default: learner.batch_size.
    corpus_batch: Positive | None = None
    bad_rows: Literal["fail", "skip"] = "fail"  # empty or malformed
    long_rows: Literal["fail", "skip"] = "skip"  # longer than the two limits above
