"""Prompts and demonstrations in Arrow blocks: the same objects as from lists, and few bytes."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distillm_ray.config import DataConfig
from distillm_ray.data.sequences import ID_COLUMNS, Demonstrations, OwnColumns, Prompts
from distillm_ray.data.splits import Splits, hold_out, load_splits
from distillm_ray.data.token_table import TokenTable
from distillm_ray.data.tokenizing import TOKENIZED, map_files
from distillm_ray.errors import DataError
from distillm_ray.scoring import distinct
from distillm_ray.teacher.target_key import TargetIdentity
from distillm_ray.types import FinishReason, Prompt, Rollout, Source, TrainingData
from tests import make

WORDS = [f"w{index}" for index in range(60)]
SPECIAL = ["<unk>", "<user>", "<assistant>", "<end>"]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)

IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4)


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    """A tokenized row: with any number of references, perhaps with a conversation to learn."""
    row = {
        "prompt_id": draw(st.text(max_size=3)),
        "text": draw(st.text(max_size=5)),
        "columns": '{"prompt": "why"}',
        "truncated": draw(st.booleans()),
        "prompt_ids": draw(IDS),
        "references": draw(st.lists(st.text(max_size=5), max_size=3)),
    }
    row["reference_ids"] = [draw(IDS) for _ in row["references"]]
    own = draw(IDS) if row["references"] and draw(st.booleans()) else []
    row["demonstration_prompt_ids"] = own
    row["demonstration_response_ids"] = draw(IDS) if own else []
    row["demonstration_loss_mask"] = [
        draw(st.booleans()) for _ in row["demonstration_response_ids"]
    ]
    return row


def prompt_of(row: dict[str, Any]) -> Prompt:
    return Prompt(
        prompt_id=row["prompt_id"],
        token_ids=np.array(row["prompt_ids"], dtype=np.int32),
        reference_ids=tuple(np.array(ids, dtype=np.int32) for ids in row["reference_ids"]),
        text=row["text"],
        references=tuple(row["references"]),
    )


def demonstration_of(row: dict[str, Any]) -> Rollout:
    is_own = bool(row["demonstration_prompt_ids"])
    response = row["demonstration_response_ids"] if is_own else row["reference_ids"][0]
    mask = row["demonstration_loss_mask"] if is_own else [True] * len(response)
    return Rollout(
        rollout_id=f"dataset-{row['prompt_id']}",
        prompt_id=row["prompt_id"],
        prompt_ids=np.array(
            row["demonstration_prompt_ids" if is_own else "prompt_ids"], dtype=np.int32
        ),
        response_ids=np.array(response, dtype=np.int32),
        loss_mask=np.array(mask, dtype=np.bool_),
        source=Source.DATASET,
        version=0,
        finish_reason=FinishReason.LENGTH if row["truncated"] else FinishReason.STOP,
        text=row["references"][0],
    )


def plain(value: Any) -> Any:
    """A message in values that compare by content, with the types of its arrays."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.tolist()
    if isinstance(value, tuple | list):
        return [plain(one) for one in value]
    return plain(astuple(value)) if isinstance(value, Prompt | Rollout) else value


def table_of(content: list[dict[str, Any]], sizes: list[int]) -> TokenTable:
    """The rows in blocks of these sizes, and one of the rest."""
    names = [*ID_COLUMNS, "text", "references", "columns"]
    types = {field.name: field.type for field in TOKENIZED} | {"prompt_id": pa.string()}
    table = pa.Table.from_pylist(content, pa.schema([(name, types[name]) for name in names]))
    blocks, start = [], 0
    for size in [*sizes, len(content)]:
        blocks.append(table.slice(start, size))
        start += size
    return TokenTable(pa.concat_tables(blocks))


@given(
    content=st.lists(rows(), min_size=1, max_size=12),
    sizes=st.lists(st.integers(0, 5), max_size=4),
    data=st.data(),
)
def test_a_sequence_over_blocks_is_the_list_of_the_same_objects(
    content: list[dict[str, Any]], sizes: list[int], data: st.DataObject
) -> None:
    table = table_of(content, sizes)
    chosen = sorted(data.draw(st.sets(st.integers(0, len(content) - 1))))
    answered = [row for row in chosen if content[row]["references"]]
    prompts = Prompts(table, np.array(chosen, dtype=np.int64))
    learned = Demonstrations(table, np.array(answered, dtype=np.int64), Source.DATASET)
    prompt_list = [prompt_of(content[row]) for row in chosen]
    learned_list = [demonstration_of(content[row]) for row in answered]
    slices = st.builds(slice, *[st.none() | st.integers(-14, 14)] * 2, st.sampled_from([1, 2]))
    part = data.draw(slices)
    for found, expected in ((prompts, prompt_list), (learned, learned_list)):
        for again in (found, pickle.loads(pickle.dumps(found, protocol=5))):
            assert len(again) == len(expected)
            assert plain(list(again)) == plain(expected)
        assert plain(list(found[part])) == plain(expected[part])
        for index in range(-len(expected), len(expected)):
            assert plain(found[index]) == plain(expected[index])
        with pytest.raises(IndexError):
            found[len(expected)]
    assert prompts.num_tokens == sum(len(one.token_ids) for one in prompt_list)
    assert prompts.num_without_reference == sum(not one.references for one in prompt_list)
    assert learned.num_response_tokens == sum(len(one.response_ids) for one in learned_list)
    assert list(OwnColumns(table, prompts.rows)) == [{"prompt": "why"}] * len(chosen)
    assert plain(list(prompts.among(learned.rows))) == plain(
        [one for one in prompt_list if one.references]
    )


@given(content=st.lists(rows(), min_size=1, max_size=6))
def test_without_texts_the_ids_are_the_same(content: list[dict[str, Any]]) -> None:
    table = table_of(content, [2])
    prompts = Prompts(table, np.arange(len(content)))
    for bare, prompt in zip(prompts.over(table.select(ID_COLUMNS)), prompts, strict=True):
        assert (bare.text, bare.references) == ("", ())
        assert plain([bare.prompt_id, bare.token_ids, bare.reference_ids]) == plain(
            [prompt.prompt_id, prompt.token_ids, prompt.reference_ids]
        )


# ---- splits --------------------------------------------------------------------------------------


def splits_of(path: Path, num_rows: int) -> Splits:
    """Rows of fifty words each."""
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_rows):
            words = [WORDS[index] for index in rng.integers(len(WORDS), size=50)]
            prompt, response = " ".join(words[:25]), " ".join(words[25:])
            file.write(f'{{"prompt": "{prompt}", "response": "{response}"}}\n')
    tokenizer = make.tokenizer(SPECIAL, WORDS, chat_template=CHAT)
    return load_splits(DataConfig(train=(path,)), tokenizer, seed=0, map_files=map_files)


def test_a_row_takes_the_bytes_of_its_tokens_and_texts_and_little_more(tmp_path: Path) -> None:
    splits = splits_of(tmp_path / "a.jsonl", 500)
    train, held_out = splits.train, splits.validation
    assert train.prompts.table is held_out.prompts.table, "the parts of a split share its table"
    tokens = sum(
        part.prompts.num_tokens + part.demonstrations.num_response_tokens
        for part in (train, held_out)
    )
    characters = sum(
        len(one.text) + len(one.references[0]) for part in (train, held_out) for one in part.prompts
    )
    assert train.prompts.table.nbytes <= 4 * tokens + characters + 100 * 500


def test_the_buffer_is_given_ids_alone_and_no_object_for_a_row(tmp_path: Path) -> None:
    def pickled(num_rows: int) -> tuple[int, int, TrainingData]:
        """Bytes of the objects, bytes of their buffers, and what is unpickled."""
        data = splits_of(tmp_path / "a.jsonl", num_rows).to_draw_from()
        buffers: list[pickle.PickleBuffer] = []
        content = pickle.dumps(data, protocol=5, buffer_callback=buffers.append)
        num_bytes = sum(buffer.raw().nbytes for buffer in buffers)
        return len(content), num_bytes, pickle.loads(content, buffers=buffers)

    few, _, _ = pickled(100)
    many, num_bytes, data = pickled(1000)
    assert many < few + 500, "nothing is pickled row by row"
    assert num_bytes <= 4 * 1000 * (2 * 25 + 6) + 120 * 1000
    assert data.demonstrations[0].prompt_id == data.prompts[0].prompt_id
    assert data.prompts[0].text == ""


def test_the_held_out_prompts_are_those_with_the_smallest_salted_digests(tmp_path: Path) -> None:
    train = splits_of(tmp_path / "a.jsonl", 60).train
    keys = [bytes([number]) + b"\1" * 14 + b"\0" for number in range(len(train.prompts))]
    keyed = replace(train, split_keys=np.array(keys))
    salt = (3).to_bytes(16, "little")
    order = sorted(keys, key=lambda key: hashlib.blake2b(key, salt=salt).digest())
    expected = sorted(keys.index(key) for key in order[: round(0.3 * len(keys))])
    _, held_out = hold_out(keyed, fraction=0.3, seed=3)
    assert held_out.prompts.rows.tolist() == train.prompts.rows[expected].tolist()


def test_a_sequence_that_has_the_targets_of_an_earlier_one_is_scored_once(tmp_path: Path) -> None:
    train = splits_of(tmp_path / "a.jsonl", 20).train
    identity = TargetIdentity(teacher="t", kind="hidden", dtype="float32")
    first, again = distinct([train.demonstrations[:8], train.demonstrations[4:12]], identity)
    assert first.rows.tolist() == train.demonstrations.rows[:8].tolist()
    assert again.rows.tolist() == train.demonstrations.rows[8:12].tolist()


def test_parts_of_a_split_keep_prompts_demonstrations_keys_and_places_together(
    tmp_path: Path,
) -> None:
    splits = splits_of(tmp_path / "a.jsonl", 40)
    assert (len(splits.train.prompts), len(splits.validation.prompts)) == (38, 2)
    for part in (splits.train, splits.validation):
        lines = [f"a-{row}" for _, row, _ in part.places.tolist()]
        assert [one.prompt_id for one in part.prompts] == lines
        assert [one.prompt_id for one in part.demonstrations] == lines
    once = hold_out(splits.train, fraction=0.5, seed=1)
    with pytest.raises(DataError, match="at least 2 distinct training prompts, got 1"):
        hold_out(hold_out(splits.validation, fraction=0.5, seed=0)[0], fraction=0.5, seed=0)
    assert sum(len(part.split_keys) for part in once) == 38
