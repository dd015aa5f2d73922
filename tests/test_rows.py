"""Rows of data: every known form, and a reason for every row that cannot be used."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from distillm_ray.config import ChatTemplate, ColumnsConfig, DataConfig, PlainTemplate
from distillm_ray.data.rows import RowError, parse_row, split_turns, with_response
from distillm_ray.data.templates import Renderer
from distillm_ray.data.tokenizing import raw_table, tokenize_rows
from tests import make


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "why", "response": "so"},
        {"instruction": "why", "input": "", "output": "so"},
        {"instruction": "why", "context": None, "response": "so", "category": "x"},
        {"messages": [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]},
        {"prompt": "why", "references": ["so"]},
    ],
)
def test_every_column_form_gives_the_same_example(row: dict[str, Any]) -> None:
    example = parse_row(row, require_responses=True)
    assert [(turn.role, turn.content) for turn in example.turns] == [("user", "why")]
    assert (example.text, example.references) == ("why", ("so",))


def test_context_follows_the_instruction_and_several_responses_are_kept() -> None:
    row = {"id": 7, "instruction": "why", "input": "sky", "output": ["so", "yes"]}
    example = parse_row(row, require_responses=True)
    assert (example.text, example.references) == ("why\n\nsky", ("so", "yes"))
    assert (example.example_id, example.context) == ("7", "sky")


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        ([1], "malformed", "a row must be an object, got list"),
        ({"question": "why"}, "malformed", "columns must be .*; got question"),
        ({"prompt": "why"}, "malformed", "no response: one of response, responses"),
        ({"prompt": "  ", "response": "so"}, "empty", "prompt is empty"),
        ({"prompt": "why", "response": ""}, "empty", "response is empty"),
        ({"prompt": "why", "response": []}, "empty", "response is an empty list"),
        ({"prompt": "why", "response": 3}, "malformed", "response must be text, got int"),
        ({"prompt": "why \ud83d"}, "malformed", "prompt has an unpaired surrogate at character 5"),
        ({"messages": [{"role": "user"}]}, "malformed", r"messages\[0\]\.content must be text"),
        (
            {"messages": [{"role": "user", "content": "why"}]},
            "malformed",
            "last message must be the assistant's, got role 'user'",
        ),
        (
            {"messages": [{"role": "assistant", "content": "so"}]},
            "malformed",
            "must follow a user's message",
        ),
    ],
)
def test_a_bad_row_is_refused_with_its_reason(row: Any, kind: str, message: str) -> None:
    with pytest.raises(RowError, match=message) as caught:
        parse_row(row, require_responses=True)
    assert caught.value.kind == kind


def test_prompts_alone_are_enough_if_no_response_is_required() -> None:
    assert parse_row({"prompt": "why", "topic": "x"}, require_responses=False).references == ()


# ---- columns that say the same, and columns that do not -----------------------------------------

FINISHED = "### Instruction:\nRepeat the word.\n\n### Input:\nword0\n\n### Response:\n"
PREPARED = {
    "instruction": "Repeat the word.",
    "input": "word0",
    "output": "word0",
    "prompt": FINISHED,
}


def test_a_finished_prompt_takes_no_input_a_second_time() -> None:
    """The columns that the preparation scripts of DistiLLM and MiniLLM write."""
    example = parse_row(PREPARED, require_responses=True)
    assert [turn.content for turn in example.turns] == [FINISHED]
    assert (example.context, example.references) == ("", ("word0",))
    assert example.finished_prompt


def data(template: ChatTemplate | PlainTemplate) -> DataConfig:
    return DataConfig(train=(Path("a.jsonl"),), template=template)


def test_a_finished_prompt_is_not_wrapped_into_an_instruction_again() -> None:
    tokenizer = make.byte_tokenizer()
    example = parse_row(PREPARED, require_responses=True)
    with pytest.raises(RowError, match=r"a second time; set data\.template\.name=raw"):
        Renderer(tokenizer, data(PlainTemplate())).render(example)
    Renderer(tokenizer, data(PlainTemplate(name="raw"))).render(example)


MESSAGES = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "why", "instruction": "how", "response": "so"},
            r"prompt does not contain the text of instruction.*"
            r"data\.columns={prompt: prompt} for 'why', or data\.columns={prompt: instruction} for"
            r" 'how'",
        ),
        (
            {"prompt": "why", "input": "sky", "response": "so"},
            r"or data\.columns={prompt: prompt, context: input} for 'why\\n\\nsky'",
        ),
        (
            {"instruction": "why", "input": "sky", "context": "sea", "output": "so"},
            r"input and context hold different texts: name one in data\.columns\.context",
        ),
        (
            {"prompt": "why", "response": "so", "output": "no"},
            r"response and output hold different responses: name one in data\.columns\.response",
        ),
        (
            {"messages": MESSAGES, "response": "no"},
            r"messages do not contain the text of response \('no'\): set data\.columns={messages:",
        ),
    ],
)
def test_a_row_that_can_be_read_in_two_ways_is_refused_with_the_key_that_decides(
    row: dict[str, Any], message: str
) -> None:
    with pytest.raises(RowError, match=message) as caught:
        parse_row(row, require_responses=True)
    assert caught.value.kind == "malformed"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "why", "response": "so", "output": "so"},
        {"prompt": "why", "response": "so", "references": ["so", "as"]},
        {"instruction": "why", "input": "sky", "context": "sky", "output": "so"},
        {"messages": MESSAGES, "prompt": "why", "prompt_id": "1"},
        {"prompt": "why ?", "instruction": "why", "input": "", "response": "so"},
    ],
)
def test_columns_that_agree_are_accepted(row: dict[str, Any]) -> None:
    assert parse_row(row, require_responses=True).references[0] == "so"


def test_named_columns_are_the_only_ones_that_are_read() -> None:
    row = {"question": "why", "answer": "so", "prompt": "how", "output": "no", "hint": "sky"}
    columns = ColumnsConfig(prompt="question", context="hint", response="answer")
    example = parse_row(row, require_responses=True, columns=columns)
    assert (example.turns[0].content, example.references) == ("why\n\nsky", ("so",))
    columns = ColumnsConfig(prompt="title", response="answer")
    with pytest.raises(RowError, match="names 'title', the row has question, answer, prompt"):
        parse_row(row, require_responses=True, columns=columns)
    columns = ColumnsConfig(prompt="question", response="reply")
    with pytest.raises(RowError, match="names 'reply', the row has"):
        parse_row(row, require_responses=True, columns=columns)
    columns = ColumnsConfig(messages="conversation")
    row = {"conversation": MESSAGES, "messages": [], "response": "no"}
    assert parse_row(row, require_responses=True, columns=columns).references == ("so",)


def test_named_columns_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"data\.columns\.messages must stand alone"):
        ColumnsConfig(messages="m", prompt="p")
    with pytest.raises(ValidationError, match=r"data\.columns\.prompt is required"):
        ColumnsConfig(response="r")


# ---- nothing is dropped without a word ----------------------------------------------------------


@pytest.mark.parametrize("role", ["system", "tool"])
@pytest.mark.parametrize("content", ["", None])
def test_system_and_tool_messages_may_be_empty(role: str, content: str | None) -> None:
    messages = [{"role": role, "content": content}, *MESSAGES]
    example = parse_row({"messages": messages}, require_responses=True)
    assert [(turn.role, turn.content) for turn in example.turns] == [(role, ""), ("user", "why")]


def test_a_content_of_text_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "wh"}, {"type": "text", "text": "y"}]
    row = {"messages": [{"role": "user", "content": parts}, MESSAGES[1]]}
    assert parse_row(row, require_responses=True).text == "why"


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": [MESSAGES[0], {**MESSAGES[1], "tool_calls": [{}]}]}, "tool_calls"),
        ({"messages": [MESSAGES[0], {**MESSAGES[1], "reasoning_content": "hm"}]}, "reasoning"),
        ({"messages": MESSAGES, "tools": [{"name": "search"}]}, "tools"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "type text, got 'image'",
        ),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(row: dict[str, Any], name: str) -> None:
    with pytest.raises(RowError, match=name):
        parse_row(row, require_responses=True)


# ---- whatever a row holds is named with its line ------------------------------------------------


def tokenized(*payloads: str | bytes, template: str = "{{ messages[0].content }}") -> list[Any]:
    """(kind, reason) of each row."""
    special = ["<unk>", "</s>", "<user>", "<assistant>"]
    tokenizer = make.tokenizer(special, ["why", "so"], end="</s>", chat_template=CHAT)
    config = data(ChatTemplate())
    renderer = Renderer(tokenizer, config)
    tokenizer.chat_template = template
    lines = [one if isinstance(one, bytes) else one.encode() for one in payloads]
    table = tokenize_rows(raw_table(0, list(enumerate(lines, 1))), renderer, config, True)
    return list(zip(table["kind"].to_pylist(), table["reason"].to_pylist(), strict=True))


CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
ROW = {"prompt": "why", "response": "so"}


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (json.dumps({**ROW, "prompt": "why \ud83d"}), "prompt has an unpaired surrogate"),
        (json.dumps({**ROW, "id": "\ud83d"}), "id has an unpaired surrogate"),
        (json.dumps({"\ud83d": 1}), r"got \\ud83d"),
        (
            json.dumps({"messages": [{"role": "us\ud83der", "content": "why"}, MESSAGES[1]]}),
            "role has an unpaired surrogate at character 3",
        ),
        ('{"prompt": ' + "1" * 5000 + "}", "cannot be read as JSON: Exceeds the limit"),
        ("[" * 100_000, "cannot be read as JSON: maximum recursion depth"),
        (json.dumps({**ROW, "id": True}), "id must be text or a whole number, got True"),
        (json.dumps({"messages": [MESSAGES[1], *MESSAGES]}), "."),
        (b"\xff", "not valid UTF-8 at byte 0"),
    ],
)
def test_a_row_that_no_tokenizer_takes_is_malformed_and_the_next_is_read(
    payload: str | bytes, reason: str
) -> None:
    good = json.dumps(ROW)
    (kind, said), (next_kind, _) = tokenized(payload, good, template=CHAT)
    assert next_kind is None
    if reason != ".":
        assert kind == "malformed"
        assert re.search(reason, said)


def test_whatever_a_template_raises_on_one_row_concerns_that_row() -> None:
    template = CHAT.replace("<{{", "{% if m['content'] == 'bad' %}{{ 1 / 0 }}{% endif %}<{{")
    rows = [json.dumps({**ROW, "prompt": text}) for text in ("why", "bad", "why")]
    kinds = tokenized(*rows, template=template)
    assert [kind for kind, _ in kinds] == [None, "malformed", None]
    assert kinds[1][1] == "ZeroDivisionError: division by zero"


# ---- what generate writes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "written"),
    [
        ({"prompt": "why", "response": "no"}, {"prompt": "why", "response": "so"}),
        (
            {"instruction": "why", "input": "sky", "output": "no"},
            {"instruction": "why", "input": "sky", "response": "so"},
        ),
        (
            {"messages": [{"role": "system", "content": "be"}, *MESSAGES]},
            {"messages": [{"role": "system", "content": "be"}, *MESSAGES]},
        ),
        (PREPARED, {"prompt": FINISHED, "response": "so"}),
    ],
)
def test_a_generated_row_has_the_prompt_in_the_columns_that_it_came_in(
    row: dict[str, Any], written: dict[str, Any]
) -> None:
    example = parse_row(row, require_responses=False)
    assert with_response(example.columns, "so", ColumnsConfig()) == written


def test_a_generated_row_keeps_the_names_of_the_users_columns() -> None:
    columns = ColumnsConfig(prompt="question", response="answer")
    example = parse_row({"question": "why"}, require_responses=False, columns=columns)
    row = with_response(example.columns, "so", columns)
    assert row == {"question": "why", "answer": "so"}
    assert parse_row(row, require_responses=True, columns=columns).references == ("so",)


# ---- what would be dropped without a word --------------------------------------------------------


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_column_becomes_the_system_message_and_is_written_back(name: str) -> None:
    row = {name: "be brief", "instruction": "why", "output": "so"}
    example = parse_row(row, require_responses=True)
    assert [(turn.role, turn.content) for turn in example.turns] == [
        ("system", "be brief"),
        ("user", "why"),
    ]
    again = with_response(example.columns, "yes", ColumnsConfig())
    assert parse_row(again, require_responses=True).turns == example.turns
    empty = parse_row({**row, name: " "}, require_responses=True)
    assert [turn.role for turn in empty.turns] == ["user"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "why", "history": [["a", "b"]]}, "history cannot be expressed"),
        ({"prompt": "why", "documents": ["a"]}, "documents cannot be expressed"),
        ({"prompt": "why", "context": {"text": "sky"}}, "context must be text, got dict"),
        ({"prompt": "why", "input": ["sky"]}, "input must be text, got list"),
        ({"prompt": "why", "system": "a", "system_prompt": "b"}, "hold different texts"),
        ({"prompt": "why", "system": {"a": 1}}, "system must be text"),
    ],
)
def test_columns_that_belong_to_the_prompt_are_not_dropped(
    row: dict[str, Any], message: str
) -> None:
    with pytest.raises(RowError, match=message):
        parse_row({**row, "response": "so"}, require_responses=True)


def test_a_history_column_may_be_left_unread_by_choice_or_be_empty() -> None:
    row = {"prompt": "why", "response": "so", "history": [["a", "b"]]}
    named = ColumnsConfig(prompt="prompt", response="response")
    assert len(parse_row(row, require_responses=True, columns=named).turns) == 1
    parse_row({**row, "history": []}, require_responses=True)


def test_messages_must_hold_the_system_column() -> None:
    messages = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]
    with pytest.raises(RowError, match="messages do not contain the text of system"):
        parse_row({"messages": messages, "system": "be brief"}, require_responses=True)


@pytest.mark.parametrize(
    ("part", "value"),
    [("weight", 0), ("weight", 0.5), ("train", False), ("loss", False), ("trainable", False)],
)
def test_an_answer_that_shall_not_be_learned_is_refused(part: str, value: Any) -> None:
    answer = {"role": "assistant", "content": "so", part: value}
    row = {"messages": [{"role": "user", "content": "why"}, answer]}
    with pytest.raises(RowError, match=rf"messages\[1\]\.{part} is .* cannot be expressed"):
        parse_row(row, require_responses=True)
    answer[part] = 1 if part == "weight" else True
    parse_row(row, require_responses=True)


def test_a_name_in_a_message_is_refused() -> None:
    row = {"messages": [{"role": "user", "name": "Ann", "content": "why"}]}
    with pytest.raises(RowError, match=r"messages\[0\]\.name cannot be expressed"):
        parse_row(row, require_responses=False)


@pytest.mark.parametrize("value", [7, 7.0, "7"])
def test_a_whole_number_is_an_id_however_it_is_written(value: Any) -> None:
    row = {"id": value, "prompt": "why", "response": "so"}
    assert parse_row(row, require_responses=True).example_id == "7"


def test_a_response_that_was_cut_off_is_marked() -> None:
    row = {"prompt": "why", "response": "so", "finish_reason": "length"}
    assert parse_row(row, require_responses=True).truncated
    assert not parse_row({**row, "finish_reason": "stop"}, require_responses=True).truncated


def test_a_system_column_is_named_or_refused_where_columns_are_named() -> None:
    row = {"system_prompt": "in French", "question": "Hi?", "response": "Salut."}
    bare = ColumnsConfig(prompt="question", response="response")
    with pytest.raises(RowError, match=r"system_prompt is not read: name it in data\.columns\.sys"):
        parse_row(row, require_responses=True, columns=bare)
    named = bare.model_copy(update={"system": "system_prompt"})
    example = parse_row(row, require_responses=True, columns=named)
    assert [turn.content for turn in example.turns] == ["in French", "Hi?"]
    again = with_response(example.columns, "Oui.", named)
    assert parse_row(again, require_responses=True, columns=named).turns == example.turns
    left_out = bare.model_copy(update={"system": "none"})
    assert len(parse_row(row, require_responses=True, columns=left_out).turns) == 1
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    spoken = ColumnsConfig(messages="talk", system="system")
    both = parse_row({"talk": talk, "system": "s"}, require_responses=True, columns=spoken)
    assert [turn.role for turn in both.turns] == ["system", "user"]


@pytest.mark.parametrize(
    "columns",
    [{"prompt": "text", "response": "text"}, {"prompt": "a", "system": "a"}, {"system": "a"}],
)
def test_columns_that_cannot_be_meant_are_refused(columns: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        ColumnsConfig.model_validate(columns)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Add 15 to the number.", "input": "5"}, "does not contain the text of input"),
        ({"prompt": "Is this a noun?", "input": "is"}, "does not contain the text of input"),
    ],
)
def test_a_part_of_a_word_is_not_the_word(row: dict[str, str], message: str) -> None:
    with pytest.raises(RowError, match=message):
        parse_row({**row, "response": "20"}, require_responses=True)
    parse_row({"prompt": "第一句你好。", "input": "你好", "response": "a"}, require_responses=True)


def test_other_columns_are_compared_with_the_messages_of_their_own_role() -> None:
    talk = [{"role": "user", "content": "Write a cat story"}, {"role": "assistant", "content": "x"}]
    for name, value in (("system", "Write a cat"), ("response", "cat")):
        with pytest.raises(RowError, match=f"messages do not contain the text of {name}"):
            parse_row({"messages": talk, name: value}, require_responses=True)


@pytest.mark.parametrize(
    "name", ["reasoning_content", "thinking", "tool_calls", "images", "chat_template_kwargs"]
)
def test_columns_of_other_kinds_of_data_are_refused_unless_columns_are_named(name: str) -> None:
    row = {"prompt": "why", "response": "so", name: ["x"]}
    with pytest.raises(RowError, match=f"{name} cannot be expressed"):
        parse_row(row, require_responses=True)
    parse_row(row, require_responses=True, columns=ColumnsConfig(prompt="prompt"))


@pytest.mark.parametrize(
    "mark", [{"finish_reason": "LENGTH"}, {"stop_reason": "max_tokens"}], ids=str
)
def test_servers_mark_truncation_in_several_ways(mark: dict[str, str]) -> None:
    row = {"prompt": "why", "response": "so", **mark}
    assert parse_row(row, require_responses=True).truncated
    answer = {"role": "assistant", "content": "so", **mark}
    talk = {"messages": [{"role": "user", "content": "why"}, answer]}
    assert parse_row(talk, require_responses=True).truncated


def test_of_a_split_conversation_only_the_last_answer_was_cut_off() -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    row = {
        "messages": [{"role": role, "content": content} for role, content in turns],
        "finish_reason": "length",
    }
    split = split_turns(parse_row(row, require_responses=True))
    assert [part.truncated for part in split] == [False, True]


def test_a_role_in_capitals_is_refused() -> None:
    row = {"messages": [{"role": "User", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(RowError, match=r"messages\[0\]\.role must be 'user', got 'User'"):
        parse_row(row, require_responses=True)
