"""Parses one row of a data file into an `Example`, or says why it cannot be used.

Pure and without heavy imports: the check before a run and the Ray Data tasks share this code.
Nothing of a row that a model would read is dropped: what this module cannot express, and what may
be read in two ways, is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from distillm_ray.config import ColumnsConfig

RowProblemKind: TypeAlias = Literal["empty", "malformed", "long", "duplicate"]

INSTRUCTION = "instruction"
PROMPT_COLUMNS = ("prompt", INSTRUCTION)
CONTEXT_COLUMNS = ("input", "context")
SYSTEM_COLUMNS = ("system", "system_prompt")
RESPONSE_COLUMNS = ("response", "responses", "output", "references")

NO_RESPONSE = "the row has no response"

KNOWN_FORMS = (
    "prompt + response, instruction [+ input or context] + output or response (both with system or"
    " system_prompt, where there is one), or messages (several responses: a list of texts); name"
    " other columns in data.columns"
)
# Parts of a conversation that a chat template may render and that a `Turn` cannot hold.
_UNSUPPORTED_OF_MESSAGES = (
    "tool_calls",
    "function_call",
    "reasoning_content",
    "reasoning",
    "thinking",
    "name",
    "tool_call_id",
)
_NOT_LEARNED = ("train", "trainable", "loss")  # of a message; false: its loss is left out
_UNSUPPORTED_OF_ROWS = ("tools", "functions")
_UNSUPPORTED_OF_PROMPTS = (  # unless data.columns names what is read
    *("history", "documents", "images", "chat_template_kwargs"),
    *("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"),
)
# Names and values of what tells that a response was cut off, as model servers write them.
_REASONS = ("finish_reason", "stop_reason")
_TRUNCATED = ("length", "max_tokens")
_ROLES = ("system", "user", "assistant", "tool", "developer")
_MAY_BE_EMPTY = ("system", "tool")  # roles


class RowError(Exception):
    """A row that cannot be used. Its kind decides whether the run fails or skips the row."""

    def __init__(self, kind: RowProblemKind, reason: str) -> None:
        """`reason` is shown after `FILE:LINE: `; what cannot be printed is escaped."""
        reason = reason.encode("utf-8", "backslashreplace").decode()
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
    finished_prompt: bool = False  # the prompt holds an instruction that another column has too
    truncated: bool = False  # its response was cut off, and no end token follows
    columns: Mapping[str, Any] = field(default_factory=dict)  # of the prompt, as the row has them

    @property
    def text(self) -> str:
        """The user's words, for reports."""
        return self.turns[-1].content


def parse_row(
    row: Any, *, require_responses: bool, columns: ColumnsConfig | None = None
) -> Example:
    """Parse one decoded row. `columns` names the columns to read; None: the known names.

    Example:
        >>> row = {"instruction": "Add.", "input": "2 + 2", "output": "4"}
        >>> example = parse_row(row, require_responses=True)
        >>> example.turns
        (Turn(role='user', content='Add.\\n\\n2 + 2'),)
        >>> example.references
        ('4',)

    Raises:
        RowError: `malformed` for unknown columns, wrong types, content that cannot be expressed and
            rows that can be read in two ways; `empty` if the prompt or a response has no text.
    """
    if not isinstance(row, Mapping):
        raise RowError("malformed", f"a row must be an object, got {type(row).__name__}")
    names = columns or ColumnsConfig()
    values = {str(key): value for key, value in row.items() if value is not None}
    example = _example_of(values, names, require_responses=require_responses)
    return replace(example, truncated=example.truncated or _is_truncated(values))


def _example_of(
    values: Mapping[str, Any], names: ColumnsConfig, *, require_responses: bool
) -> Example:
    for name in _UNSUPPORTED_OF_ROWS:
        if values.get(name):
            raise RowError("malformed", _unsupported(name))
    if names == ColumnsConfig():
        for name in _UNSUPPORTED_OF_PROMPTS:
            if values.get(name):
                raise RowError(
                    "malformed",
                    f"{_unsupported(name)}, or name the columns that are read in data.columns",
                )
    example_id = _example_id(values.get("id"))
    messages = names.messages or ("messages" if names == ColumnsConfig() else None)
    if names.messages is not None or messages in values:
        assert messages is not None
        example = _from_messages(
            _named(values, messages),
            messages,
            values,
            example_id,
            names,
            require_responses=require_responses,
        )
        return example if names.messages is None else _with_system(example, values, names)
    if names.prompt is not None:
        example = _from_prompt(
            values,
            names.prompt,
            names.context,
            example_id,
            names,
            require_responses=require_responses,
        )
        return _with_system(example, values, names)
    return _from_known_columns(values, example_id, names, require_responses=require_responses)


def parse_document(row: Any, column: str) -> str:
    """The text of one decoded row of a corpus.

    Raises:
        RowError: `malformed` without the column, or if it holds no text; `empty` if the text has no
            word.
    """
    if not isinstance(row, Mapping):
        raise RowError("malformed", f"a row must be an object, got {type(row).__name__}")
    if column not in row:
        found = ", ".join(map(str, row)) or "none"
        raise RowError(
            "malformed",
            f"a document must have the column {column!r}, got the columns {found}; name the one"
            " with the text in data.corpus_column",
        )
    text = row[column]
    if not isinstance(text, str):
        raise RowError("malformed", f"{column} must be text, got {type(text).__name__}")
    _check_characters(text, column)
    if not text.strip():
        raise RowError("empty", "the document is empty")
    return text


def split_turns(example: Example) -> tuple[Example, ...]:
    """One example for each assistant turn of a conversation, the last one included."""
    split = [
        replace(
            example,
            turns=example.turns[:index],
            instruction=example.turns[index - 1].content,
            references=(turn.content,),
            truncated=False,  # the next message follows it
        )
        for index, turn in enumerate(example.turns)
        if index and turn.role == "assistant"
    ]
    return (*split, example)


def with_response(
    prompt: Mapping[str, Any], response: str, columns: ColumnsConfig
) -> dict[str, Any]:
    """A row's own prompt (`Example.columns`) with `response`; `parse_row` reads it back."""
    row = dict(prompt)
    if messages := columns.messages or ("messages" if "messages" in row else None):
        row[messages] = [*row[messages], {"role": "assistant", "content": response}]
        return row
    return {**row, columns.response or RESPONSE_COLUMNS[0]: response}


# ---- columns ------------------------------------------------------------------------------------


def _from_known_columns(
    values: Mapping[str, Any],
    example_id: str | None,
    names: ColumnsConfig,
    *,
    require_responses: bool,
) -> Example:
    """A row without messages whose columns have the names of known data sets."""
    if not any(name in values for name in PROMPT_COLUMNS):
        found = ", ".join(values) or "none"
        raise RowError("malformed", f"columns must be {KNOWN_FORMS}; got {found}")
    for name in (INSTRUCTION, *CONTEXT_COLUMNS):
        if values.get(name) and not isinstance(values[name], str):
            _text_of(values[name], name)
    contexts = [name for name in CONTEXT_COLUMNS if values.get(name)]
    if len(contexts) == 2 and values[contexts[0]] != values[contexts[1]]:
        raise RowError(
            "malformed",
            "input and context hold different texts: name one in data.columns.context, beside"
            " data.columns.prompt",
        )
    context = contexts[0] if contexts else None
    if "prompt" not in values:
        example = _from_prompt(
            values, INSTRUCTION, context, example_id, names, require_responses=require_responses
        )
        return _with_system(example, values, names)
    prompt = _text_of(values["prompt"], "prompt")
    parts = [
        (name, text)
        for name in (INSTRUCTION, context)
        if name is not None and (text := values.get(name) or "").strip()
    ]
    for name, text in parts:
        if not _contains(prompt, text):
            raise RowError("malformed", _two_readings(prompt, values, name, context))
    example = _from_prompt(
        values, "prompt", None, example_id, names, require_responses=require_responses
    )
    return _with_system(replace(example, finished_prompt=bool(parts)), values, names)


def _with_system(example: Example, values: Mapping[str, Any], names: ColumnsConfig) -> Example:
    """The example with the system message that its own column holds."""
    known = (names.system,) if names.system else SYSTEM_COLUMNS
    found = {name: values[name] for name in known if values.get(name)}
    if names != ColumnsConfig() and names.system is None:
        _refuse_unread(found, names)
        return example
    texts = {text for name, value in found.items() if (text := _text_or_empty(value, name))}
    if not texts:
        return example
    if len(texts) > 1:
        raise RowError(
            "malformed", f"{' and '.join(SYSTEM_COLUMNS)} hold different texts: leave one out"
        )
    (content,) = texts
    if example.turns[0].role == "system":
        if example.turns[0].content.strip() == content.strip():
            return example
        raise RowError(
            "malformed", f"{next(iter(found))} and the system message hold different texts"
        )
    return replace(
        example,
        turns=(Turn(role="system", content=content), *example.turns),
        columns={**example.columns, **found},
    )


def _refuse_unread(system: Mapping[str, Any], names: ColumnsConfig) -> None:
    """Refuse a system message that data.columns does not name: few would want to drop it."""
    taken = {names.messages, names.prompt, names.context, names.response}
    for name in system:
        if name not in taken:
            raise RowError(
                "malformed",
                f"{name} is not read: name it in data.columns.system, or set data.columns.system"
                " to a column that does not exist to leave system messages out",
            )


def _two_readings(prompt: str, values: Mapping[str, Any], other: str, context: str | None) -> str:
    source = INSTRUCTION if INSTRUCTION in values else "prompt"
    joined = str(values[source])
    second = f"data.columns={{prompt: {source}}}"
    if context is not None:
        joined = f"{joined}\n\n{values[context]}"
        second = f"data.columns={{prompt: {source}, context: {context}}}"
    return (
        f"prompt does not contain the text of {other}, so that the row can be read in two ways: set"
        f" data.columns={{prompt: prompt}} for {_shortened(prompt)!r}, or {second} for"
        f" {_shortened(joined)!r}"
    )


def _from_prompt(
    values: Mapping[str, Any],
    prompt: str,
    context: str | None,
    example_id: str | None,
    names: ColumnsConfig,
    *,
    require_responses: bool,
) -> Example:
    """A row of one user turn."""
    instruction = _text_of(_named(values, prompt), prompt)
    given = _text_of(values[context], context) if context and values.get(context) else ""
    given = given if given.strip() else ""
    content = f"{instruction}\n\n{given}" if given else instruction
    own = {prompt: instruction} | ({context: given} if context and given else {})
    return Example(
        example_id=example_id,
        turns=(Turn(role="user", content=content),),
        instruction=instruction,
        context=given,
        references=_references(values, names, require_responses=require_responses),
        columns=own,
    )


def _references(
    values: Mapping[str, Any], names: ColumnsConfig, *, require_responses: bool
) -> tuple[str, ...]:
    """The responses of a row without messages."""
    candidates = (names.response,) if names.response is not None else RESPONSE_COLUMNS
    found = {name: _responses_of(values[name], name) for name in candidates if name in values}
    if not require_responses:
        found = {name: texts for name, texts in found.items() if any(map(str.strip, texts))}
    if not found:
        if require_responses:
            if names.response is not None:
                _named(values, names.response)
            wanted = ", ".join(RESPONSE_COLUMNS)
            raise RowError("malformed", f"{NO_RESPONSE}: one of {wanted} is required")
        return ()
    (first, texts), *others = found.items()
    for name, other in others:
        # A list of references may hold the response as well.
        if other != texts and not set(texts) <= set(other):
            raise RowError(
                "malformed",
                f"{first} and {name} hold different responses: name one in data.columns.response,"
                " beside data.columns.prompt",
            )
    if require_responses and not texts:
        raise RowError("empty", f"{first} is an empty list")
    for index, text in enumerate(texts):
        _text_of(text, first if isinstance(values[first], str) else f"{first}[{index}]")
    return texts


def _responses_of(value: Any, column: str) -> tuple[str, ...]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            if not isinstance(item, str):
                _text_of(item, f"{column}[{index}]")
        return tuple(value)
    if not isinstance(value, str):
        _text_of(value, column)
    return (value,) if value else ("",)


# ---- conversations ------------------------------------------------------------------------------


def _from_messages(
    messages: Any,
    column: str,
    values: Mapping[str, Any],
    example_id: str | None,
    names: ColumnsConfig,
    *,
    require_responses: bool,
) -> Example:
    if not isinstance(messages, list):
        raise RowError("malformed", f"{column} must be a list, got {type(messages).__name__}")
    if not messages:
        raise RowError("empty", f"{column} is an empty list")
    turns = tuple(_turn(message, f"{column}[{index}]") for index, message in enumerate(messages))
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
    if names.messages is None:
        _compare_with_columns(turns, references, values)
    return Example(
        example_id=example_id,
        turns=turns,
        instruction=turns[-1].content,
        context="",
        references=references,
        columns={column: [{"role": turn.role, "content": turn.content} for turn in turns]},
        truncated=bool(references) and _is_truncated(messages[-1]),
    )


def _compare_with_columns(
    turns: Sequence[Turn], references: Sequence[str], values: Mapping[str, Any]
) -> None:
    """Refuse a row whose other columns say something else than its messages."""
    said = {
        "system": [turn.content for turn in turns if turn.role == "system"],
        "user": [turn.content for turn in turns if turn.role not in ("system", "assistant")],
        "assistant": [turn.content for turn in turns if turn.role == "assistant"],
    }
    said["assistant"] += references
    for names, role in (
        (SYSTEM_COLUMNS, "system"),
        ((*PROMPT_COLUMNS, *CONTEXT_COLUMNS), "user"),
        (RESPONSE_COLUMNS, "assistant"),
    ):
        for name in names:
            value = values.get(name)
            for text in value if isinstance(value, list) else [value]:
                if not isinstance(text, str) or not text.strip():
                    continue
                if not any(_contains(content, text) for content in said[role]):
                    raise RowError(
                        "malformed",
                        f"messages do not contain the text of {name} ({_shortened(text)!r}): set"
                        " data.columns={messages: messages} to read the messages alone",
                    )


def _turn(message: Any, name: str) -> Turn:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RowError("malformed", f"{name} must be an object with role and content")
    for part in _UNSUPPORTED_OF_MESSAGES:
        if message.get(part):
            raise RowError("malformed", _unsupported(f"{name}.{part}"))
    role, content = message["role"], message.get("content")
    if role != role.lower() and role.lower() in _ROLES:
        raise RowError("malformed", f"{name}.role must be {role.lower()!r}, got {role!r}")
    if role == "assistant":
        _check_learned(message, name)
    _check_characters(role, f"{name}.role")
    if isinstance(content, list):
        content = _joined(content, f"{name}.content")
    if role in _MAY_BE_EMPTY and (content is None or not str(content).strip()):
        return Turn(role=role, content="")
    return Turn(role=role, content=_text_of(content, f"{name}.content"))


def _check_learned(message: Mapping[str, Any], name: str) -> None:
    """Refuse an answer that the row does not want to be learned, or with another weight."""
    unlearned = [key for key in _NOT_LEARNED if message.get(key) is False]
    if message.get("weight", 1) not in (1, None):
        unlearned.append("weight")
    if unlearned:
        key = unlearned[0]
        raise RowError(
            "malformed",
            f"{name}.{key} is {message[key]!r}, which cannot be expressed: every answer of a"
            f" conversation counts the same; leave out {key}, and set data.conversations=last to"
            " learn the last answer only",
        )


def _joined(parts: Sequence[Any], name: str) -> str:
    """The text of a content in parts, as multimodal data sets write it."""
    for index, part in enumerate(parts):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RowError("malformed", f"{name}[{index}] must have type text, got {kind!r}")
    return "".join(_text_of(part.get("text"), f"{name}.text") for part in parts)


# ---- values -------------------------------------------------------------------------------------


def _example_id(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas writes whole numbers so, where some rows have none
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise RowError("malformed", f"id must be text or a whole number, got {value!r}")
    _check_characters(str(value), "id")
    return str(value)


def _named(values: Mapping[str, Any], name: str) -> Any:
    """The value of a column that data.columns names, or that is known to be there."""
    if name not in values:
        found = ", ".join(values) or "none"
        raise RowError("malformed", f"data.columns names {name!r}, the row has {found}")
    return values[name]


def _text_of(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise RowError("malformed", f"{column} must be text, got {type(value).__name__}")
    if not value.strip():
        raise RowError("empty", f"{column} is empty")
    _check_characters(value, column)
    return value


def _text_or_empty(value: Any, column: str) -> str:
    return "" if isinstance(value, str) and not value.strip() else _text_of(value, column)


def _check_characters(text: str, column: str) -> None:
    """JSON may escape half of a surrogate pair, which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            "malformed", f"{column} has an unpaired surrogate at character {error.start + 1}"
        ) from error


def _is_truncated(values: Mapping[str, Any]) -> bool:
    return any(str(values.get(name)).lower() in _TRUNCATED for name in _REASONS)


def _contains(text: str, part: str) -> bool:
    """Whether `part` stands in `text` as whole words; how white space is written is ignored."""
    words = r"\s+".join(map(re.escape, part.split()))
    # ASCII letters only: some scripts write no space between words.
    return re.search(rf"(?<!(?a:\w)){words}(?!(?a:\w))", text) is not None


def _unsupported(name: str) -> str:
    return (
        f"{name} cannot be expressed: only role and content of a message are trained on, and the"
        " model would learn a response to text that it does not see; write it into the content"
    )


def _shortened(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"
