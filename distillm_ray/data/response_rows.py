"""Rows of `distillm-ray generate`: a response beside its prompt, which `train` reads back.

A row holds text, and a model says token ids. Each row is therefore rendered as training will render
it, and is written only if it says what the model said.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from distillm_ray.config import ColumnsConfig
from distillm_ray.data.decoding import decode_ids, spoken
from distillm_ray.data.rows import RowError, parse_row, with_response
from distillm_ray.data.templates import Renderer
from distillm_ray.types import FinishReason, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EMPTY_THOUGHT = re.compile(r"\s*<think>\s*</think>")
_REPLACEMENT = "\ufffd"  # stands for bytes that are no UTF-8


Fault: TypeAlias = Literal["", "empty", "that a row cannot hold"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseRow:
    """A response as a row of data, or why it cannot be one."""

    prompt_id: str
    truncated: bool  # it ended by length
    row: dict[str, Any] | None = None  # set if there is no fault
    fault: Fault = ""
    reason: str = ""  # why a row cannot hold it
    same_ids: bool = True  # its text will be split into the tokens of the model


@dataclass(slots=True, kw_only=True)
class ResponseCounts:
    """How many rows are written, and what became of the other responses."""

    written: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # by reason
    first_refused: str = ""  # the prompt's id and why its row cannot hold the response
    num_other_ids: int = 0  # rows whose text will be split into other tokens than the model's

    def add(self, found: ResponseRow, *, keep_truncated: bool) -> bool:
        """Count one response; returns whether its row is to be written."""
        if found.truncated and not keep_truncated and found.fault != "empty":
            self.left_out["truncated"] += 1
            return False
        if found.fault:
            self.left_out[found.fault] += 1
            if found.reason and not self.first_refused:
                self.first_refused = f"{found.prompt_id}: {found.reason}"
            return False
        self.written += 1
        self.num_other_ids += not found.same_ids
        return True

    def summary(self) -> list[str]:
        """One line of counts, and what a user should know about the rows."""
        total = self.written + self.left_out.total()
        why = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        lines = [
            f"{self.written} responses to {total} prompts" + (f" ({why} left out)" if why else "")
        ]
        if self.first_refused:
            lines.append(f"a row cannot hold what the model said: {self.first_refused}")
        if self.num_other_ids:
            lines.append(
                f"{self.num_other_ids} rows say the same in other tokens than the model did: a"
                " tokenizer splits a text in one way only, and templates trim white space or begin"
                " with an empty thought"
            )
        return lines


def response_row(
    columns: Mapping[str, Any],
    response: Rollout,
    *,
    renderer: Renderer,
    tokenizer: PreTrainedTokenizerBase,
    names: ColumnsConfig,
) -> ResponseRow:
    """The row of a response, if a row can hold it.

    Args:
        columns: the prompt in the columns that it came in.
        renderer: of `train`, for this tokenizer.
    """
    found = partial(
        ResponseRow,
        prompt_id=response.prompt_id,
        truncated=response.finish_reason is FinishReason.LENGTH,
    )
    text = spoken(tokenizer, response)
    if not text.strip():
        return found(fault="empty")
    row = {
        "id": response.prompt_id,
        **with_response(columns, text, names),
        "finish_reason": str(response.finish_reason),
    }
    try:
        same_ids = _reads_back(row, text, response, renderer, tokenizer, names)
    except Exception as error:  # a template is code of the user's model; the rest is kept
        reason = error.reason if isinstance(error, RowError) else f"{type(error).__name__}: {error}"
        return found(fault="that a row cannot hold", reason=reason)
    return found(row=row, same_ids=same_ids)


def _reads_back(
    row: Mapping[str, Any],
    text: str,
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
    if rendered.prompt_ids != response.prompt_ids.tolist():
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
