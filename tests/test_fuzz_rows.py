"""Random rows and templates: all of a row's content in the token ids, or a refusal by line.

`HYPOTHESIS_PROFILE=random pytest tests/test_fuzz_rows.py` tries 20,000 of each with a random seed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from distillm_ray.config import ChatTemplate, ColumnsConfig, DataConfig, PlainTemplate
from distillm_ray.data.decoding import decode_ids
from distillm_ray.data.response_rows import response_row
from distillm_ray.data.templates import Renderer
from distillm_ray.data.tokenizing import raw_table, tokenize_rows
from distillm_ray.types import FinishReason
from tests import make

pytestmark = pytest.mark.timeout(3600)  # 20,000 random examples take minutes

# ---- templates -----------------------------------------------------------------------------------


def chat(content: str = "{{ m['content'] }}", *, opening: str = "", head: str = "") -> str:
    """ChatML with another way to write an assistant's content, or another generation prompt."""
    return (
        f"{head}{{% for m in messages %}}<|im_start|>{{{{ m['role'] }}}}\n"
        f"{{% if m['role'] == 'assistant' %}}{content}"
        "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
        f"{{% if add_generation_prompt %}}<|im_start|>assistant\n{opening}{{% endif %}}"
    )


ANSWER = "{{ m['content'].split('</think>')[-1].lstrip('\\n') }}"
TEMPLATES = {
    "ChatML": chat(),
    "trims": chat("{{ m['content'] | trim }}"),
    "drops thoughts": chat(ANSWER),
    "opens a thought": chat(opening="<think>\n"),
    "opens a thought and drops it": chat(ANSWER, opening="<think>\n"),
    "drops earlier thoughts": chat(
        f"{{% if loop.last %}}{{{{ m['content'] }}}}{{% else %}}{ANSWER}{{% endif %}}"
    ),
    "writes an empty thought": chat(f"<think>\n\n</think>\n\n{ANSWER}"),
    "writes the date": chat(head="<|im_start|>system\n{{ strftime_now('%Y-%m-%d') }}<|im_end|>\n"),
    "drops the system's message": chat().replace(
        "for m in messages", "for m in messages if m['role'] != 'system'"
    ),
    "fails on some rows": chat(head="{% if messages[0]['content'] == 'x' %}{{ 1 / 0 }}{% endif %}"),
}
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@functools.cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    return make.byte_tokenizer(CONTROL, chat_template=TEMPLATES.get(name))


@functools.cache
def rendering(name: str, reasoning: str, conversations: str) -> tuple[Renderer, DataConfig]:
    chosen = (
        PlainTemplate.model_validate({"name": name}) if name not in TEMPLATES else ChatTemplate()
    )
    config = DataConfig.model_validate(
        {
            "train": [Path("a.jsonl")],
            "template": chosen,
            "reasoning": reasoning,
            "conversations": conversations,
            "time": datetime(2026, 11, 25),
            "max_prompt_tokens": 10_000,
            "max_response_tokens": 10_000,
        }
    )
    made = tokenizer(name)
    return Renderer(made, config, vocabulary_size=len(made)), config


SETTINGS = st.tuples(
    st.sampled_from([*TEMPLATES, "raw", "instruction"]),
    st.sampled_from(["fail", "keep", "drop"]),
    st.sampled_from(["auto", "all", "last", "split"]),
)

# ---- rows ----------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        *CONTROL,
        *("<think>", "</think>", "<think>\nwe add\n</think>\n\n", "\n", " ", "\r\n", "\t", "\x00"),
        *(
            "\x1c",
            "\x85",
            "\u2028",
            "\ufeff",
            "\ud83d",
            "\ude00",
            "é",
            "e\u0301",
            "日本",
            "\U0001f600",
        ),
        *("{{ 1 / 0 }}", "{% raw %}", "### Response:\n", "ZQXplaceholderXQZ", "x", "4", "a b"),
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=4), max_size=4).map("".join)
PLAIN = st.text("abc xyz.,\n", min_size=1, max_size=12).filter(str.strip)
ODD = st.sampled_from([None, True, 0, -1, 1.5, float("nan"), 10**400, [], {}, [[]], "", " "])
ROLES = st.sampled_from(
    ["user", "assistant", "system", "tool", "User", "developer", "", "us\ud83d"]
)
CONTENTS = (
    TEXTS
    | PLAIN
    | ODD
    | st.lists(
        st.fixed_dictionaries(
            {"type": st.sampled_from(["text", "image_url"]), "text": TEXTS | ODD}
        ),
        max_size=2,
    )
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": ROLES, "content": CONTENTS},
        optional={"name": TEXTS, "tool_calls": ODD, "reasoning_content": TEXTS, "x": ODD},
    ),
    max_size=4,
)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Turns in an order that most templates accept."""
    texts = PLAIN | TEXTS
    turns = (
        [{"role": "system", "content": draw(texts | st.just(""))}] if draw(st.booleans()) else []
    )
    for _ in range(draw(st.integers(1, 3))):
        turns += [
            {"role": "user", "content": draw(texts)},
            {"role": "assistant", "content": draw(texts)},
        ]
    return turns


RESPONSES = TEXTS | PLAIN | st.lists(TEXTS | PLAIN | ODD, max_size=2) | ODD
ROWS = st.one_of(
    st.builds(lambda messages: {"messages": messages}, conversations()),
    st.fixed_dictionaries({"prompt": PLAIN | TEXTS, "response": PLAIN | TEXTS}),
    st.fixed_dictionaries(
        {"instruction": PLAIN | TEXTS, "output": PLAIN | TEXTS},
        optional={"input": PLAIN | TEXTS, "system": PLAIN | TEXTS},
    ),
    st.fixed_dictionaries(
        {},
        optional={
            "id": TEXTS | ODD,
            "prompt": TEXTS | PLAIN | ODD,
            "instruction": TEXTS | PLAIN | ODD,
            "input": TEXTS | PLAIN | ODD,
            "context": TEXTS | ODD,
            "response": RESPONSES,
            "output": RESPONSES,
            "references": RESPONSES,
            "messages": MESSAGES | conversations() | ODD,
            "tools": ODD,
            "system": TEXTS | ODD,
            "history": ODD,
            "other": TEXTS | ODD,
        },
    ),
)


def written(row: Any) -> bytes:
    """A row as a line of JSON."""
    try:
        return json.dumps(row).encode()
    except ValueError:  # an integer of more than 4,300 digits
        return b'{"prompt": ' + b"9" * 5000 + b"}"


# ---- properties ----------------------------------------------------------------------------------


def tokenized(
    payload: bytes, settings: tuple[str, str, str], *, require_responses: bool = True
) -> list[dict[str, Any]]:
    renderer, config = rendering(*settings)
    table = tokenize_rows(raw_table(0, [(1, payload)]), renderer, config, require_responses)
    return table.to_pylist()


def contents(row: dict[str, Any]) -> Iterator[str]:
    """Every text of a row that a model should see or say.

    Not alternative responses, and not the reasoning of earlier turns, which templates may drop.
    """
    for name in ("system", "prompt", "instruction", "input", "context"):
        if isinstance(row.get(name), str):
            yield row[name]
    messages: list[dict[str, Any]] = row.get("messages") or []
    for index, message in enumerate(messages):
        content = message["content"]
        text = "".join(part["text"] for part in content) if isinstance(content, list) else content
        if isinstance(text, str):
            earlier = message["role"] == "assistant" and index + 1 < len(messages)
            yield text.rpartition("</think>")[2] if earlier else text


def check_ids(
    row: dict[str, Any], sequence: dict[str, Any], settings: tuple[str, str, str]
) -> None:
    """The ids of one sequence belong together, end as generation ends, and lose nothing."""
    renderer, _ = rendering(*settings)
    coder = tokenizer(settings[0])
    prompt, responses = sequence["demonstration_prompt_ids"], sequence["demonstration_response_ids"]
    mask, references = sequence["demonstration_loss_mask"], sequence["reference_ids"]
    if not prompt:  # the demonstration is the prompt with its first reference
        prompt, responses = sequence["prompt_ids"], references[0]
        mask = [True] * len(responses)
    ids = prompt + responses
    assert ids == sequence["prompt_ids"] + references[0]
    assert len(mask) == len(responses)
    assert mask[0]
    assert all(0 <= one < len(coder) for one in ids)
    end = renderer.end_token_id
    for reference in references:
        assert reference.index(end) == len(reference) - 1
        assert len(reference) > 1
    learned = [one for one, counts in zip(responses, mask, strict=True) if counts]
    assert learned[-1] == end
    stops = [index for index, one in enumerate(responses) if one == end and mask[index]]
    assert all(index + 1 == len(mask) or not mask[index + 1] for index in stops)
    whole = decode_ids(coder, ids)
    if sequence["turn"] or settings[1] == "drop":
        return
    for text in contents(row):
        if "think>" in text:  # templates write white space around thoughts
            assert "".join(text.split()) in "".join(whole.split())
        else:
            assert text.strip() in whole


@given(row=ROWS, settings=SETTINGS)
@example(row={"prompt": "a", "response": "b", "id": "\ud83d"}, settings=("ChatML", "fail", "auto"))
@example(row={"prompt": "a", "response": "b", "instruction": []}, settings=("raw", "fail", "auto"))
@example(
    row={"prompt": "a", "response": "<think></think>"},
    settings=("writes an empty thought", "fail", "auto"),
)
@example(row={"p\ud83d": "a"}, settings=("ChatML", "fail", "auto"))
@example(
    row={"prompt": "add", "response": "we add\n</think>\n\n2"},
    settings=("opens a thought", "fail", "auto"),
)
@example(row={"prompt": "x", "response": "b"}, settings=("fails on some rows", "fail", "auto"))
def test_a_row_is_refused_or_all_of_its_content_is_rendered(
    row: dict[str, Any], settings: tuple[str, str, str]
) -> None:
    for sequence in tokenized(written(row), settings):
        if sequence["kind"] is None:
            check_ids(json.loads(written(row)), sequence, settings)
        else:
            assert sequence["kind"] in ("empty", "malformed", "long")
            assert sequence["reason"].strip()
            assert sequence["prompt_ids"] is None


@given(
    payload=st.binary(max_size=40) | st.recursive(ODD | TEXTS, st.lists, max_leaves=4).map(written)
)
@example(payload=b"[" * 100_000)
@example(payload=b'{"prompt": ' + b"9" * 5000 + b"}")
@example(payload=b'{"messages": [[]]}')
@example(payload=b'{"prompt": "a"\x00}')
@example(payload=b"\xff")
def test_a_line_that_is_no_row_is_refused(payload: bytes) -> None:
    (sequence,) = tokenized(payload, ("ChatML", "fail", "auto"))
    assert sequence["kind"] == "malformed"
    assert sequence["reason"].strip()


@given(
    row=ROWS,
    response=PLAIN | TEXTS,
    cut=st.sampled_from([[], [], [], [130], [200, 201]]),
    truncated=st.booleans(),
    settings=SETTINGS,
)
def test_what_generate_writes_is_trained_on_as_the_model_saw_and_said_it(
    row: dict[str, Any],
    response: str,
    cut: list[int],
    truncated: bool,
    settings: tuple[str, str, str],
) -> None:
    (asked,) = tokenized(written(row), settings, require_responses=False)
    assume(asked["kind"] is None)
    renderer, _ = rendering(*settings)
    coder = tokenizer(settings[0])
    # What a model says are bytes, of which some may be no text.
    ids = [
        *coder(response.encode("utf-8", "surrogatepass").decode("utf-8", "replace"))["input_ids"]
    ]
    said = [*ids, *cut, *([] if truncated else [renderer.end_token_id])]
    assume(said)
    found = response_row(
        json.loads(asked["columns"]),
        make.rollout(
            prompt_id="1",
            prompt=asked["prompt_ids"],
            response=said,
            finish=FinishReason.LENGTH if truncated else FinishReason.STOP,
        ),
        renderer=renderer,
        tokenizer=coder,
        names=ColumnsConfig(),
    )
    if found.row is None:
        spoiled = any(token in response for token in (*CONTROL, "think>", "\ud83d", "\ude00"))
        # A thought that the prompt opened and the response did not close: the row would close it.
        open_thought = settings[0].startswith("opens a thought")
        assert spoiled or cut or open_thought or found.fault == "empty", found.reason
        return
    *_, sequence = tokenized(written(found.row), settings)
    assert sequence["kind"] is None
    assert sequence["prompt_ids"] == asked["prompt_ids"]
    (learned,) = sequence["reference_ids"]
    if not found.same_ids:
        end = renderer.end_token_id
        one, other = (
            decode_ids(coder, ids[:-1] if ids[-1] == end else ids)
            .removeprefix("<think>\n\n</think>\n\n")
            .strip()
            for ids in (learned, said)
        )
        assert one == other
    else:
        assert learned == said


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_ordinary_conversation_is_accepted_by_every_template(name: str) -> None:
    turns = [("user", "add 1 and 1"), ("assistant", "2"), ("user", "and 2"), ("assistant", "4")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (sequence,) = tokenized(written(row), (name, "fail", "auto"))
    assert sequence["kind"] is None
    check_ids(row, sequence, (name, "fail", "auto"))
