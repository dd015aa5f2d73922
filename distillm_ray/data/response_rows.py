"""Rows of `distillm-ray generate`: a response beside its prompt, which `train` reads back.

A row holds text, and a model says token ids. Each row is therefore rendered as training will render
it, and is written only if it says what the model said.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distillm_ray.config import ColumnsConfig
from distillm_ray.data.decoding import decode_ids, spoken
from distillm_ray.data.rows import RowError, parse_row, with_response
from distillm_ray.data.templates import Renderer
from distillm_ray.types import FinishReason, Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>")
_REPLACEMENT = "\ufffd"  # stands for bytes that are no UTF-8


@dataclass(slots=True, kw_only=True)
class ResponseRows:
    """Rows to write, and what became of the other responses."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)  # by reason
    first_refused: str = ""  # the prompt's id and why its row cannot hold the response
    num_other_ids: int = 0  # rows whose text will be split into other tokens than the model's

    def summary(self) -> Iterator[str]:
        """One line of counts, and what a user should know about the rows."""
        total = len(self.rows) + self.left_out.total()
        why = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        yield f"{len(self.rows)} responses to {total} prompts" + (
            f" ({why} left out)" if why else ""
        )
        if self.first_refused:
            yield f"a row cannot hold what the model said: {self.first_refused}"
        if self.num_other_ids:
            yield (
                f"{self.num_other_ids} rows say the same in other tokens than the model did: a"
                " tokenizer splits a text in one way only, and templates trim white space or begin"
                " with an empty thought"
            )


def response_rows(
    prompts: Sequence[Prompt],
    columns: Sequence[Mapping[str, Any]],
    responses: Sequence[Rollout],
    *,
    renderer: Renderer,
    tokenizer: PreTrainedTokenizerBase,
    names: ColumnsConfig,
    keep_truncated: bool,
) -> ResponseRows:
    """A row for each response that ended and that a row can hold, in order.

    Args:
        columns: the prompts in the columns that they came in.
        renderer: of `train`, for this tokenizer.
        keep_truncated: also responses that ended by length; they are learned without an end token.
    """
    written = ResponseRows()
    for prompt, own, response in zip(prompts, columns, responses, strict=True):
        truncated = response.finish_reason is FinishReason.LENGTH
        text = spoken(tokenizer, response)
        if not text.strip():
            written.left_out["empty"] += 1
            continue
        if truncated and not keep_truncated:
            written.left_out["truncated"] += 1
            continue
        row = {
            "id": prompt.prompt_id,
            **with_response(own, text, names),
            "finish_reason": str(response.finish_reason),
        }
        try:
            same_ids = _reads_back(row, text, prompt, response, renderer, tokenizer, names)
        except Exception as error:  # a template is code of the user's model; the rest is kept
            reason = (
                error.reason if isinstance(error, RowError) else f"{type(error).__name__}: {error}"
            )
            written.left_out["that a row cannot hold"] += 1
            written.first_refused = written.first_refused or f"{prompt.prompt_id}: {reason}"
            continue
        written.rows.append(row)
        written.num_other_ids += not same_ids
    return written


def _reads_back(
    row: Mapping[str, Any],
    text: str,
    prompt: Prompt,
    response: Rollout,
    renderer: Renderer,
    tokenizer: PreTrainedTokenizerBase,
    names: ColumnsConfig,
) -> bool:
    """Whether training learns exactly the ids of the response; they must say the same at least.

    Raises:
        RowError: training would learn another text, or would refuse the row.
    """
    rendered = renderer.render(parse_row(row, require_responses=True, columns=names))
    if rendered.prompt_ids != prompt.token_ids.tolist():
        raise RowError("malformed", "its prompt is rendered to other ids")
    (learned,) = rendered.reference_ids
    said = response.response_ids.tolist()
    if learned == said:
        return True
    if _REPLACEMENT in text:
        raise RowError("malformed", "the response has bytes that are not valid UTF-8")
    if response.finish_reason is FinishReason.STOP:
        # The model may have stopped at another of its end tokens.
        learned, said = learned[:-1], said[:-1]
    if _words(decode_ids(tokenizer, learned)) != _words(decode_ids(tokenizer, said)):
        raise RowError(
            "malformed", f"{text!r} would be learned as {decode_ids(tokenizer, learned)!r}"
        )
    return False


def _words(text: str) -> str:
    """What is said, without what templates write around it."""
    return _EMPTY_THOUGHT.sub("", text, count=1).strip()
