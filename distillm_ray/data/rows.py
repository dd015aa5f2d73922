"""Parses one row of a data file into an `Example`, or says why it cannot be used.

Pure and without heavy imports: the check before a run and the Ray Data tasks share this code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

RowProblemKind: TypeAlias = Literal["empty", "malformed", "long", "duplicate"]

PROMPT_COLUMNS = ("prompt", "instruction")
CONTEXT_COLUMNS = ("input", "context")
RESPONSE_COLUMNS = ("response", "responses", "output", "references")

KNOWN_FORMS = (
    "prompt + response, instruction [+ input or context] + output or response, or messages"
    " (several responses: a list of texts)"
)


class RowError(Exception):
    """A row that cannot be used. Its kind decides whether the run fails or skips the row."""

    def __init__(self, kind: RowProblemKind, reason: str) -> None:
        """`reason` is shown after `FILE:LINE: `."""
        super().__init__(reason)
        self.kind: RowProblemKind = kind
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """The content of a row, independent of its column names."""

    example_id: str | None  # the row's `id` column
    turns: tuple[Turn, ...]  # all messages before the response; the last is not the assistant's
    instruction: str  # the last user turn without its context
    context: str  # Alpaca's `input`, Dolly's `context`; may be empty
    references: tuple[str, ...]  # the responses; empty only if the caller requires none

    @property
    def text(self) -> str:
        """The user's words, for reports."""
        return self.turns[-1].content


def parse_row(row: Any, *, require_responses: bool) -> Example:
    """Parse one decoded row.

    Example:
        >>> row = {"instruction": "Add.", "input": "2 + 2", "output": "4"}
        >>> example = parse_row(row, require_responses=True)
        >>> example.turns
        (Turn(role='user', content='Add.\\n\\n2 + 2'),)
        >>> example.references
        ('4',)

    Raises:
        RowError: `malformed` for unknown columns and wrong types, `empty` if the prompt or a
            response has no text.
    """
    if not isinstance(row, Mapping):
        raise RowError("malformed", f"a row must be an object, got {type(row).__name__}")
    columns = {key: value for key, value in row.items() if value is not None}
    example_id = columns.get("id")
    if example_id is not None and (
        not isinstance(example_id, str | int) or not str(example_id).strip()
    ):
        raise RowError("malformed", f"id must be text or a whole number, got {example_id!r}")
    identity = None if example_id is None else str(example_id)
    if "messages" in columns:
        return _from_messages(columns["messages"], identity, require_responses=require_responses)
    prompt_column = next((name for name in PROMPT_COLUMNS if name in columns), None)
    if prompt_column is None:
        found = ", ".join(map(str, row)) or "none"
        raise RowError("malformed", f"columns must be {KNOWN_FORMS}; got {found}")
    instruction = _text_of(columns[prompt_column], prompt_column)
    context_column = next((name for name in CONTEXT_COLUMNS if columns.get(name)), None)
    context = _text_of(columns[context_column], context_column) if context_column else ""
    references = _references(columns, require_responses=require_responses)
    content = f"{instruction}\n\n{context}" if context.strip() else instruction
    return Example(
        example_id=identity,
        turns=(Turn(role="user", content=content),),
        instruction=instruction,
        context=context if context.strip() else "",
        references=references,
    )


def _text_of(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise RowError("malformed", f"{column} must be text, got {type(value).__name__}")
    if not value.strip():
        raise RowError("empty", f"{column} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON may escape half of a surrogate pair, which no tokenizer accepts.
        raise RowError(
            "malformed", f"{column} has an unpaired surrogate at character {error.start + 1}"
        ) from error
    return value


def _references(columns: Mapping[str, Any], *, require_responses: bool) -> tuple[str, ...]:
    column = next((name for name in RESPONSE_COLUMNS if name in columns), None)
    if column is None:
        if require_responses:
            wanted = ", ".join(RESPONSE_COLUMNS)
            raise RowError("malformed", f"the row has no response: one of {wanted} is required")
        return ()
    value = columns[column]
    if isinstance(value, list):
        if not value and require_responses:
            raise RowError("empty", f"{column} is an empty list")
        return tuple(_text_of(item, f"{column}[{index}]") for index, item in enumerate(value))
    if not require_responses and value == "":
        return ()
    return (_text_of(value, column),)


def _from_messages(messages: Any, example_id: str | None, *, require_responses: bool) -> Example:
    if not isinstance(messages, list):
        raise RowError("malformed", f"messages must be a list, got {type(messages).__name__}")
    if not messages:
        raise RowError("empty", "messages is an empty list")
    turns = tuple(_turn(message, index) for index, message in enumerate(messages))
    references: tuple[str, ...] = ()
    if turns[-1].role == "assistant":
        references = (turns[-1].content,)
        turns = turns[:-1]
    elif require_responses:
        raise RowError(
            "malformed",
            f"the last message must be the assistant's, got role {turns[-1].role!r}",
        )
    if not turns or turns[-1].role in ("assistant", "system"):
        raise RowError("malformed", "an assistant message must follow a user's message")
    return Example(
        example_id=example_id,
        turns=turns,
        instruction=turns[-1].content,
        context="",
        references=references,
    )


def _turn(message: Any, index: int) -> Turn:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RowError("malformed", f"messages[{index}] must be an object with role and content")
    return Turn(
        role=message["role"],
        content=_text_of(message.get("content"), f"messages[{index}].content"),
    )
