"""Templates, files and splits, with token ids written by hand for a word-level tokenizer."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from transformers import PreTrainedTokenizerFast

from distillm_ray.config import DataConfig
from distillm_ray.data import ray_data
from distillm_ray.data.files import (
    DataFile,
    check_files,
    decode_row,
    find_files,
    read_rows,
)
from distillm_ray.data.rows import Example, RowError, parse_row
from distillm_ray.data.splits import Dataset, hold_out, load_dataset, load_splits
from distillm_ray.data.templates import Renderer
from distillm_ray.data.tokenizing import map_files, tokenize_rows
from distillm_ray.errors import ClusterError, DataError
from tests import make

SPECIAL = ["<unk>", "<user>", "<assistant>", "<system>", "<end>", "</s>"]
WORDS = ["sky", "is", "blue", "why", "yes", "no", "so", "be", "brief", "and", "red"]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
USER, ASSISTANT, SYSTEM, END, EOS = 1, 2, 3, 4, 5
IDS = {word: len(SPECIAL) + index for index, word in enumerate(WORDS)}


def ids_of(words: str) -> list[int]:
    return [IDS[word] for word in words.split()]


def make_tokenizer(chat_template: str | None = CHAT) -> PreTrainedTokenizerFast:
    return make.tokenizer(SPECIAL, WORDS, chat_template=chat_template)


def question(text: str, *responses: str) -> Example:
    row = {"prompt": text, "response": list(responses)}
    return parse_row(row, require_responses=bool(responses))


# ---- files --------------------------------------------------------------------------------------


def write_lines(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_missing_file_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.test: .*nowhere\.jsonl does not exist"):
        check_files(
            DataConfig(
                train=(write_lines(tmp_path / "a.jsonl", {"prompt": "why", "response": "so"}),),
                test=(tmp_path / "nowhere.jsonl",),
            )
        )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a\.jsonl is empty"),
        ("a.csv", "x", r"must be one of \.jsonl.*got \.csv"),
        ("a.jsonl", '{"prompt": "why", "response": "so"}\n{"prompt"\n', r"a\.jsonl:2: not valid"),
        ("a.json", '[{"prompt": "why"}]', r"a\.json:1: the file is one JSON array"),
        ("a.parquet", "no parquet", r"a\.parquet is not a readable parquet file"),
    ],
)
def test_the_check_before_a_run_finds_bad_files(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        check_files(DataConfig(train=(tmp_path / name,)))


def test_bytes_in_a_binary_file_are_read_as_utf_8_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    prompts = pa.array(["Grüße".encode(), b"\xff"], pa.binary())
    pq.write_table(pa.table({"prompt": prompts, "score": [1.0, float("nan")]}), path)
    with path.open("rb") as stream:
        rows = [
            decode_row(payload)
            for _, payload in read_rows(
                stream, DataFile(path=path, name="a.parquet", format="parquet")
            )
        ]
    assert parse_row(rows[0], require_responses=False).text == "Grüße"
    with pytest.raises(RowError, match="prompt must be text, got dict"):
        parse_row(rows[1], require_responses=False)


def test_a_file_listed_twice_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "why", "response": "so"})
    with pytest.raises(DataError, match="is listed twice"):
        check_files(DataConfig(train=(path, tmp_path / "." / "a.jsonl")))


def test_a_little_is_read_without_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = (write_lines(tmp_path / "a.jsonl", {"prompt": "why"}, {"prompt": "is"}),)
    files = find_files(paths, "train")
    renderer = Renderer(make_tokenizer(), config := DataConfig(train=paths))
    rows = partial(tokenize_rows, renderer=renderer, config=config, require_responses=False)
    size = paths[0].stat().st_size
    in_process = ray_data.mapper(stall_timeout_s=60.0, spread_from_bytes=size + 1)
    monkeypatch.delattr(ray.data, "read_datasource")
    assert in_process(files, rows).equals(map_files(files, rows))


def test_only_the_first_rows_of_each_file_are_read_where_that_is_enough(tmp_path: Path) -> None:
    answered = {"prompt": "why", "response": "so"}
    paths = tuple(
        write_lines(tmp_path / name, answered, answered, "{bad") for name in ("a.jsonl", "b.jsonl")
    )
    config = DataConfig(train=paths)
    files = find_files(paths, "train")
    renderer = Renderer(make_tokenizer(), config)
    rows = partial(tokenize_rows, renderer=renderer, config=config, require_responses=True)
    table = map_files(files, rows, max_rows=2)
    assert table["row"].to_pylist() == [1, 2, 1, 2]
    assert table["kind"].to_pylist() == [None] * 4


# ---- Ray Data -----------------------------------------------------------------------------------


def load(
    *paths: Path, needed_by: str | None = "training", tokenizer: Any = None, **changes: Any
) -> Dataset:
    config = DataConfig(train=paths, **changes)
    return load_dataset(
        paths,
        config,
        tokenizer or make_tokenizer(),
        split="train",
        responses_needed_by=needed_by,
        map_files=ray_data.mapper(stall_timeout_s=60.0, spread_from_bytes=0),
    )


class Busy:
    """An actor of another job, which has all CPUs."""

    def start(self) -> None:
        """Return when its process is up."""


@pytest.mark.integration
@pytest.mark.usefixtures("local_ray")
class TestWithRayData:
    def test_rows_become_prompts_and_demonstrations_in_the_files_order(
        self, tmp_path: Path
    ) -> None:
        first = write_lines(
            tmp_path / "a file.jsonl",
            {"prompt": "why", "response": "so"},
            "",
            {"id": "named", "prompt": "why sky", "response": ["yes", "no"]},
        )
        second = tmp_path / "b.parquet"
        pq.write_table(pa.table({"instruction": ["is"], "output": ["blue"]}), second)
        dataset = load(first, second)
        assert [prompt.prompt_id for prompt in dataset.prompts] == ["a file-1", "named", "b-1"]
        prompt, demonstration = dataset.prompts[1], dataset.demonstrations[1]
        assert prompt.references == ("yes", "no")
        assert [ids.tolist() for ids in prompt.reference_ids] == [
            [*ids_of("yes"), END],
            [*ids_of("no"), END],
        ]
        assert prompt.token_ids.dtype == np.int32
        assert (demonstration.rollout_id, demonstration.text) == ("dataset-named", "yes")
        assert demonstration.prompt_ids.tolist() == [USER, *ids_of("why sky"), END, ASSISTANT]
        assert demonstration.response_ids.tolist() == [*ids_of("yes"), END]
        assert dataset.summary() == "train: 3 of 3 rows, 13 prompt and 6 response tokens"

    def test_a_dataset_directory_is_read_by_split(self, tmp_path: Path) -> None:
        from datasets import Dataset as HuggingFaceDataset
        from datasets import DatasetDict

        rows = HuggingFaceDataset.from_dict({"prompt": ["why", "is"], "response": ["so", "yes"]})
        rows.save_to_disk(tmp_path / "one")
        DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "several")
        assert [p.text for p in load(tmp_path / "one").prompts] == ["why", "is"]
        assert [p.text for p in load(tmp_path / "several").prompts] == ["why", "is"]
        with pytest.raises(DataError, match="has no split 'validation', only train, test"):
            check_files(DataConfig(train=(tmp_path / "one",), validation=(tmp_path / "several",)))

    def test_bad_rows_are_refused_with_file_and_line(self, tmp_path: Path) -> None:
        good = {"prompt": "why", "response": "so"}
        path = write_lines(tmp_path / "a.jsonl", good, "", "{bad", good, {"prompt": ""})
        with pytest.raises(DataError) as caught:
            load(path)
        lines = str(caught.value).splitlines()
        assert lines[0].startswith(f"{path}:3: not valid JSON: Expecting property name")
        assert lines[1] == f"{path}:5: prompt is empty"
        assert lines[2] == "data.train: correct these rows, or set data.bad_rows=skip"

    def test_skipped_rows_are_counted_by_kind(self, tmp_path: Path) -> None:
        path = write_lines(
            tmp_path / "a.jsonl",
            "{bad",
            {"prompt": "", "response": "so"},
            {"id": "a", "prompt": "why", "response": "so"},
            {"id": "a", "prompt": "is", "response": "yes"},
            {"id": "b", "prompt": "why sky is blue", "response": "so"},
            {"id": "c", "prompt": "why", "response": "sky is blue"},
        )
        dataset = load(path, bad_rows="skip", max_prompt_tokens=6, max_response_tokens=3)
        assert [prompt.prompt_id for prompt in dataset.prompts] == ["a"]
        assert dataset.num_skipped == {
            "malformed": 1,
            "empty": 1,
            "duplicate": 1,
            "long": 2,
        }
        assert f"{path}:4: id 'a' is already used at {path}:3" in dataset.summary()
        long = f"{path}:6: the response has 4 tokens, data.max_response_tokens is 3"
        assert long in dataset.summary()

    def test_a_long_prompt_is_refused_where_the_config_says_so(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "a.jsonl", {"prompt": "why sky", "response": "so"})
        with pytest.raises(
            DataError, match=r"a\.jsonl:1: the prompt has 5 tokens, data\.max_p.* 4"
        ):
            load(path, long_rows="fail", max_prompt_tokens=4)

    def test_an_empty_data_set_is_refused(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "a.jsonl", "", "")
        with pytest.raises(DataError, match=r"data\.train: no usable row in .*a\.jsonl \(0 rows"):
            load(path)
        path = write_lines(tmp_path / "b.jsonl", {"prompt": "why"})
        with pytest.raises(DataError, match=r"1 rows, 1 of them skipped; the first: .*b\.jsonl:1"):
            load(path, bad_rows="skip")

    def test_a_damaged_file_is_named_without_a_stack_trace(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        words = [f"why {number} " * 20 for number in range(2000)]
        pq.write_table(pa.table({"prompt": words, "response": words}), path, compression="none")
        content = bytearray(path.read_bytes())
        content[1000:9000] = b"\xff" * 8000
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"^.*a\.parquet is not a readable parquet file: .*$"):
            load(path)

    def test_prompts_are_read_without_responses_for_generation(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "a.jsonl", {"id": "x", "topic": "y", "prompt": "why"})
        dataset = load(path, needed_by=None)
        assert [prompt.prompt_id for prompt in dataset.prompts] == ["x"]
        assert not dataset.demonstrations

    def test_prompts_alone_are_enough_where_no_term_trains_on_responses(
        self, tmp_path: Path
    ) -> None:
        path = write_lines(tmp_path / "a.jsonl", {"prompt": "why"}, {"prompt": "is"})
        dataset = load(path, needed_by=None)
        assert not dataset.demonstrations
        assert dataset.rows is dataset.prompts
        assert dataset.summary().endswith("; 2 without a response")
        with pytest.raises(DataError) as caught:
            load(path, needed_by="loss.terms.0 (skew_kl on all)")
        assert str(caught.value).splitlines()[0].startswith(f"{path}:1: the row has no response")
        assert "loss.terms.0 (skew_kl on all) trains on responses" in str(caught.value)

    def test_responses_that_are_not_needed_are_kept_where_they_are_short_enough(
        self, tmp_path: Path
    ) -> None:
        answered = {"prompt": "why", "response": "so"}
        long = {"prompt": "is", "response": "sky is blue"}
        some = load(
            write_lines(tmp_path / "b.jsonl", answered, long),
            needed_by=None,
            max_response_tokens=3,
        )
        assert [one.text for one in some.demonstrations] == ["so"]
        assert some.rows is some.prompts
        assert [prompt.references for prompt in some.prompts] == [("so",), ("sky is blue",)]

    def test_a_split_conversation_gives_a_sequence_for_each_response(self, tmp_path: Path) -> None:
        turns = [("user", "why"), ("assistant", "so"), ("user", "and"), ("assistant", "yes")]
        row = {"id": "x", "messages": [{"role": role, "content": text} for role, text in turns]}
        path = write_lines(tmp_path / "a.jsonl", row, {"prompt": "is", "response": "no"})
        dataset = load(path, conversations="split")
        assert [prompt.prompt_id for prompt in dataset.prompts] == ["x#1", "x#2", "a-2"]
        assert dataset.split_keys[0] == dataset.split_keys[1], "never held out without the other"
        first = [USER, *ids_of("why"), END, ASSISTANT]
        second = [*first, *ids_of("so"), END, USER, *ids_of("and"), END, ASSISTANT]
        for demonstration, prompt, response in zip(
            dataset.demonstrations[:2], (first, second), ("so", "yes"), strict=True
        ):
            assert demonstration.prompt_ids.tolist() == prompt
            assert demonstration.response_ids.tolist() == [*ids_of(response), END]
            assert demonstration.loss_mask.all()
        asked = load(path, conversations="split", needed_by=None)
        assert [prompt.prompt_id for prompt in asked.prompts] == ["x", "a-2"]
        assert asked.prompts[0].token_ids.tolist() == second

    def test_equal_stems_give_different_ids(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            write_lines(tmp_path / name / "a.jsonl", {"prompt": "why", "response": "so"})
        dataset = load(tmp_path / "one" / "a.jsonl", tmp_path / "two" / "a.jsonl")
        assert [prompt.prompt_id for prompt in dataset.prompts] == ["a.0-1", "a.1-1"]

    def test_held_out_prompts_depend_only_on_seed_and_text_and_twins_stay_together(
        self, tmp_path: Path
    ) -> None:
        texts = [f"{a} {b}" for a in WORDS for b in WORDS]
        rows = [{"prompt": text, "response": "so"} for text in texts]
        dataset = load(write_lines(tmp_path / "a.jsonl", *rows, *rows[:40]))
        reversed_dataset = load(write_lines(tmp_path / "b.jsonl", *rows[::-1]))

        def held_out(data: Dataset, seed: int) -> set[str]:
            train, validation = hold_out(data, fraction=0.1, seed=seed)
            texts = {prompt.text for prompt in validation.prompts}
            assert not texts & {prompt.text for prompt in train.prompts}
            assert len(train.prompts) + len(validation.prompts) == len(data.prompts)
            return texts

        chosen = held_out(dataset, 0)
        assert len(chosen) == round(0.1 * len(texts))
        assert held_out(reversed_dataset, 0) == chosen
        assert held_out(dataset, 1) != chosen

    def test_splits_from_files_report_prompts_that_occur_in_both(self, tmp_path: Path) -> None:
        train = write_lines(
            tmp_path / "train.jsonl",
            *({"prompt": word, "response": "so"} for word in ("why", "is")),
        )
        held = write_lines(
            tmp_path / "held.jsonl",
            *({"prompt": word, "response": "yes"} for word in ("is", "no", "and")),
        )
        config = DataConfig(train=(train,), validation=(held,))
        splits = load_splits(
            config,
            make_tokenizer(),
            seed=0,
            map_files=ray_data.mapper(stall_timeout_s=60.0, spread_from_bytes=0),
        )
        assert (len(splits.train.prompts), len(splits.validation.prompts)) == (2, 3)
        assert (splits.num_validation_twins, splits.test) == (1, None)

    def test_a_cluster_without_a_free_cpu_is_reported_by_key(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "a.jsonl", {"prompt": "why", "response": "so"})
        config = DataConfig(train=(path,), validation=(path,))
        map_files = ray_data.mapper(stall_timeout_s=3.0, spread_from_bytes=0)
        remote: Any = ray.remote  # its annotations know only some of its options
        busy = remote(num_cpus=ray.cluster_resources()["CPU"])(Busy).remote()
        ray.get(busy.start.remote())
        try:
            with pytest.raises(
                ClusterError, match=r"no row was read for run\.startup_timeout_s = 3"
            ):
                load_splits(config, make_tokenizer(), seed=0, map_files=map_files)
        finally:
            ray.kill(busy)

    def test_a_single_distinct_prompt_cannot_be_split(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "a.jsonl", {"prompt": "why", "response": "so"})
        with pytest.raises(DataError, match="at least 2 distinct training prompts, got 1"):
            load_splits(DataConfig(train=(path,)), make_tokenizer(), seed=0)


# ---- what would be read twice, or not at all -----------------------------------------------------


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b'{"prompt": "a", "prompt": "b", "response": "c"}', "key 'prompt' stands twice"),
        (b'{"messages": [{"role": "user", "role": "system"}]}', "key 'role' stands twice"),
        (b"{", "must stand on one line"),
        ('{"prompt": "a"}'.encode("utf-16"), "seems to be UTF-16"),
    ],
)
def test_a_line_that_reads_in_two_ways_or_in_none_says_why(payload: bytes, message: str) -> None:
    with pytest.raises(RowError, match=message):
        decode_row(payload)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    texts = pa.array(["a"])
    table = pa.Table.from_arrays([texts, texts, texts], names=["prompt", "response", "prompt"])
    path = tmp_path / "a.parquet"
    pq.write_table(table, path)
    (file,) = find_files([path], "train")
    with path.open("rb") as stream, pytest.raises(DataError, match="two columns named prompt"):
        list(read_rows(stream, file))


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["train.jsonl", "test.jsonl"], ["train.jsonl"]),
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], None),
        (["train-00000-of-00001-d9b93805488c263e.parquet"], None),
        (["train_1.jsonl", "train_2.jsonl"], None),
    ],
)
def test_a_directory_stands_for_the_shards_of_a_split(
    tmp_path: Path, names: list[str], chosen: list[str] | None
) -> None:
    for name in names:
        (tmp_path / name).write_text("{}\n")
    found = [file.path.name for file in find_files([tmp_path], "train")]
    assert found == (chosen or names)


@pytest.mark.parametrize(
    "names",
    [
        ["train.jsonl", "train.parquet"],
        ["train.jsonl", "train_old.jsonl"],
        ["train.jsonl", "training.jsonl"],
        ["train.jsonl", "data/train.jsonl"],
        ["train-00000-of-00003.jsonl"],
        ["train-00000-of-00002.jsonl", "train-00000-of-00003.jsonl"],
        ["train-00000-of-00001.jsonl", "train_2.jsonl"],
    ],
)
def test_a_directory_that_may_hold_rows_twice_is_refused(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "data").mkdir()
    for name in names:
        (tmp_path / name).write_text("{}\n")
    with pytest.raises(DataError, match=r"shards of one data set.*list the files"):
        find_files([tmp_path], "train")


def test_one_long_held_out_response_leaves_the_others_to_compare_with(tmp_path: Path) -> None:
    rows = [{"prompt": "why", "response": "so"}, {"prompt": "sky", "response": "blue " * 9}]
    path = write_lines(tmp_path / "a.jsonl", *rows, {"prompt": "is"})
    config = DataConfig(train=(path,), max_response_tokens=4)
    dataset = load_dataset(
        (path,), config, make_tokenizer(), split="validation", responses_needed_by=None
    )
    assert len(dataset.prompts) == 3
    assert [one.text for one in dataset.demonstrations] == ["so"]
    assert dataset.summary().endswith(
        "; 1 without a response and 1 with a response that is longer than data.max_response_tokens"
        " and is not compared with"
    )
    held_out = hold_out(dataset, fraction=0.4, seed=0)
    assert sum(len(part.demonstrations) for part in held_out) == 1


def test_an_id_that_two_files_share_comes_with_the_remedy(tmp_path: Path) -> None:
    row = {"id": 1, "prompt": "why", "response": "so"}
    paths = tuple(write_lines(tmp_path / name, row) for name in ("a.jsonl", "b.jsonl"))
    with pytest.raises(DataError, match="rename the id columns or leave them out"):
        load_dataset(paths, DataConfig(train=paths), make_tokenizer(), split="train")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dataset_dict.json", "{}"),
        ("dataset_dict.json", "{"),
        ("state.json", '{"_data_files": []}'),
        ("state.json", '{"_data_files": [3]}'),
    ],
)
def test_a_damaged_dataset_directory_is_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{name} is damaged"):
        find_files([tmp_path], "train")


def test_an_arrow_file_that_was_cut_off_between_two_batches_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    table = pa.table({"prompt": ["a", "b"], "response": ["c", "d"]})
    with path.open("wb") as stream, pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    (file,) = find_files([path], "train")
    with path.open("rb") as stream:
        assert len(list(read_rows(stream, file))) == 2
    path.write_bytes(path.read_bytes()[:-8])
    with path.open("rb") as stream, pytest.raises(DataError, match="cut off"):
        list(read_rows(stream, file))
