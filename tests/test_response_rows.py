"""Rows of `generate`: training reads from them what the model said, or they are left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from distillm_ray.config import ChatTemplate, ColumnsConfig, DataConfig, PlainTemplate
from distillm_ray.data.response_rows import ResponseCounts, response_row
from distillm_ray.data.rows import Example, parse_row
from distillm_ray.data.splits import load_dataset
from distillm_ray.data.templates import RenderedExample, Renderer
from distillm_ray.types import FinishReason
from tests import make
from tests.test_faithful_text import CHATML

EOS, START, END = 256, 257, 258


def tokenizer() -> PreTrainedTokenizerFast:
    return make.byte_tokenizer(chat_template=CHATML)


def config(raw: bool) -> DataConfig:
    template = PlainTemplate(name="raw") if raw else ChatTemplate()
    return DataConfig(train=(Path("a.jsonl"),), template=template)


def written(
    *responses: list[int], raw: bool = False, truncated: bool = False, keep: bool = False
) -> tuple[list[dict[str, Any]], ResponseCounts]:
    """The rows of these responses to the prompt `why`, and the counts."""
    made, columns = tokenizer(), {"prompt": "why"}
    renderer = Renderer(made, config(raw))
    ids = renderer.render(parse_row(columns, require_responses=False)).prompt_ids
    rows, counts = [], ResponseCounts()
    for index, response in enumerate(responses):
        found = response_row(
            columns,
            make.rollout(
                prompt_id=f"p{index}",
                prompt=ids,
                response=response,
                finish=FinishReason.LENGTH if truncated else FinishReason.STOP,
            ),
            renderer=renderer,
            tokenizer=made,
            names=ColumnsConfig(),
        )
        if counts.add(found, keep_truncated=keep):
            assert found.row is not None
            rows.append(found.row)
    return rows, counts


def bytes_of(text: str) -> list[int]:
    return list(tokenizer()(text)["input_ids"])


def test_a_leading_space_is_kept_under_the_raw_template() -> None:
    (row,), _ = written([*bytes_of(" Paris"), EOS], raw=True)
    assert row == {"id": "p0", "prompt": "why", "response": " Paris", "finish_reason": "stop"}


def test_white_space_that_a_template_trims_is_counted() -> None:
    rows, counts = written([*bytes_of("so"), END], [*bytes_of("so"), EOS])
    assert (len(rows), counts.written, counts.num_other_ids) == (
        2,
        2,
        1,
    )  # the second stopped at another token


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ([*bytes_of("so"), START, *bytes_of("x"), END], "control token"),
        ([*bytes_of("caf"), 130, END], "not valid UTF-8"),
    ],
)
def test_what_a_row_cannot_hold_is_left_out_with_its_reason(
    response: list[int], reason: str
) -> None:
    rows, found = written([*bytes_of("so"), END], response)
    assert [row["id"] for row in rows] == ["p0"]
    assert found.left_out == {"that a row cannot hold": 1}
    assert found.first_refused.startswith("p1: ")
    assert reason in found.first_refused
    assert "1 responses to 2 prompts (1 that a row cannot hold left out)" in found.summary()


def test_empty_and_truncated_responses_are_left_out_and_counted() -> None:
    assert written([END], [*bytes_of(" "), END])[1].left_out == {"empty": 2}
    assert written(bytes_of("so"), truncated=True)[1].left_out == {"truncated": 1}


@pytest.mark.parametrize("raw", [False, True])
def test_a_truncated_response_that_is_kept_is_learned_without_an_end_token(
    raw: bool, tmp_path: Path
) -> None:
    said = bytes_of("so far and")
    (row,), _ = written(said, raw=raw, truncated=True, keep=True)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    dataset = load_dataset((path,), config(raw), tokenizer(), split="train")
    (learned,) = dataset.demonstrations
    assert learned.response_ids.tolist() == said
    assert learned.finish_reason is FinishReason.LENGTH
    assert np.all(learned.loss_mask)


def test_the_last_answer_of_a_conversation_may_be_truncated() -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d e")]
    row = {
        "messages": [{"role": role, "content": content} for role, content in turns],
        "finish_reason": "length",
    }
    rendered = Renderer(tokenizer(), config(raw=False)).render(
        parse_row(row, require_responses=True)
    )
    learned = [
        index
        for index, in_loss in zip(
            rendered.demonstration_response_ids, rendered.demonstration_loss_mask, strict=True
        )
        if in_loss
    ]
    assert learned == [*bytes_of("b"), END, *bytes_of("d e")]


def test_a_template_that_fails_on_one_response_costs_that_response_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    render = Renderer.render

    def failing(self: Renderer, example: Example) -> RenderedExample:
        if example.references == ("x",):
            raise ZeroDivisionError("of the template")
        return render(self, example)

    monkeypatch.setattr(Renderer, "render", failing)
    rows, found = written([*bytes_of("x"), END], [*bytes_of("so"), END])
    assert [row["id"] for row in rows] == ["p1"]
    assert found.first_refused == "p0: ZeroDivisionError: of the template"
