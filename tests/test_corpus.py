"""Documents of a corpus: how they are read, tokenized and cut, and what is refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distillm_ray.config import DataConfig
from distillm_ray.data import ray_data
from distillm_ray.data.corpus import Corpus, cut_rows, load_corpus
from distillm_ray.data.files import check_files, find_files
from distillm_ray.data.fingerprint import keep_or_compare
from distillm_ray.data.splits import Splits, load_splits
from distillm_ray.data.templates import Renderer
from distillm_ray.data.tokenizing import map_files
from distillm_ray.errors import DataError
from distillm_ray.types import FinishReason, Source
from tests import make

SPECIAL = ["<unk>", "<user>", "<assistant>", "<end>", "</s>"]
EOS = SPECIAL.index("</s>")
WORDS = [f"w{index}" for index in range(20)]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def tokenizer(*, end: str = "</s>", bos: bool = False) -> Any:
    """One id a word: `w0` has id 5. With `bos`, texts begin with `<user>`, which stands for BOS."""
    made = make.tokenizer(SPECIAL, WORDS, end=end, chat_template=CHAT)
    if bos:
        from tokenizers.processors import TemplateProcessing

        made.bos_token = "<user>"
        made.backend_tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]
            single="<user> $A", special_tokens=[("<user>", 1)]
        )
    return made


def write(path: Path, *texts: Any) -> Path:
    rows = [one if isinstance(one, dict) else {"text": one} for one in texts]
    path.write_text("\n\n".join(map(json.dumps, rows)))  # rows stand in lines 1, 3, 5, …
    return path


def settings(path: Path, **changes: Any) -> DataConfig:
    """Pieces of at most six tokens."""
    train = path.parent / "train.jsonl"
    train.write_text('{"prompt": "w1", "response": "w2"}\n{"prompt": "w3", "response": "w4"}\n')
    values = {"train": (train,), "corpus": (path,), "max_prompt_tokens": 4}
    return DataConfig(**{**values, "max_response_tokens": 2, **changes})


def load(path: Path, *, bos: bool = False, **changes: Any) -> Corpus:
    return load_corpus(settings(path, **changes), tokenizer(bos=bos))


def ids(*numbers: int) -> list[int]:
    """The ids of the words with these numbers."""
    return [len(SPECIAL) + number for number in numbers]


def test_a_document_is_cut_into_pieces_whose_first_token_stands_for_the_prompt(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "texts.jsonl", "w0 w1 w2 w3 w4 w5 w6 w7", "w9 w8")
    corpus = load(path)
    shown = [
        (one.rollout_id, one.prompt_ids.tolist(), one.response_ids.tolist(), one.finish_reason)
        for one in corpus.pieces
    ]
    assert shown == [
        ("corpus-texts-1.0", ids(0), ids(1, 2, 3, 4, 5), FinishReason.LENGTH),
        ("corpus-texts-1.1", ids(6), [*ids(7), EOS], FinishReason.STOP),
        ("corpus-texts-3.0", ids(9), [*ids(8), EOS], FinishReason.STOP),
    ]
    for piece in corpus.pieces:
        assert piece.source is Source.CORPUS
        assert piece.loss_mask.all()
        assert (piece.version, piece.logprobs) == (0, None)
        assert piece.response_ids.dtype == piece.prompt_ids.dtype == np.int32
    assert corpus.places.tolist() == [[0, 1, 0], [0, 1, 1], [0, 3, 0]]
    assert corpus.summary() == "corpus: 2 documents in 3 pieces, 12 tokens"


def test_every_piece_begins_with_the_token_that_the_tokenizer_begins_a_text_with(
    tmp_path: Path,
) -> None:
    corpus = load(write(tmp_path / "texts.jsonl", "w0 w1 w2 w3 w4 w5 w6 w7"), bos=True)
    assert [one.prompt_ids.tolist() for one in corpus.pieces] == [[1], [1]]
    assert [one.response_ids.tolist() for one in corpus.pieces] == [
        ids(0, 1, 2, 3, 4),
        [*ids(5, 6, 7), EOS],
    ]


def test_a_piece_of_one_token_is_left_out(tmp_path: Path) -> None:
    corpus = load(write(tmp_path / "texts.jsonl", "w0 w1 w2 w3 w4 w5"))  # and an end token
    assert [one.num_tokens for one in corpus.pieces] == [6]
    assert corpus.pieces[0].finish_reason is FinishReason.LENGTH


def test_a_document_as_long_as_a_piece_ends_in_it(tmp_path: Path) -> None:
    [piece] = load(write(tmp_path / "texts.jsonl", "w0 w1 w2 w3 w4")).pieces
    assert piece.response_ids.tolist() == [*ids(1, 2, 3, 4), EOS]
    assert piece.finish_reason is FinishReason.STOP


def test_parquet_directories_and_other_columns_are_read(tmp_path: Path) -> None:
    parquet = tmp_path / "texts.parquet"
    pq.write_table(pa.table({"content": ["w1 w2"], "text": [3]}), parquet)
    [piece] = load(parquet, corpus_column="content").pieces
    assert piece.rollout_id == "corpus-texts-1.0"
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", "w3 w4")
    write(folder / "validation.jsonl", "w5")
    [piece] = load(folder).pieces
    assert piece.prompt_ids.tolist() == ids(3)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            {"body": "w1", "id": 4},
            "a document must have the column 'text', got the columns body, id; name the one",
        ),
        ({"text": 7}, "text must be text, got int"),
        ({"text": None}, "text must be text, got NoneType"),
        ("", "the document is empty"),
        (" \n", "the document is empty"),
        ("w1 </s> w2", "the document contains the control token '</s>' at character 4"),
        ("w1 strange", "the tokenizer changes the document: 'strange' cannot be read back"),
        ("w1 \ud83d", "text has an unpaired surrogate at character 4"),
    ],
    ids=str,
)
def test_a_document_that_cannot_be_used_is_named_or_left_out(
    tmp_path: Path, document: Any, message: str
) -> None:
    path = write(tmp_path / "texts.jsonl", "w0 w1", document)
    with pytest.raises(DataError) as caught:
        load(path)
    assert f"texts.jsonl:3: {message}" in str(caught.value)
    assert str(caught.value).endswith(
        "data.corpus: correct these documents, or set data.bad_rows=skip"
    )
    corpus = load(path, bad_rows="skip")
    assert len(corpus.pieces) == 1
    assert sum(corpus.num_skipped.values()) == 1
    assert message in corpus.summary()


def test_a_document_with_an_id_that_the_model_lacks_is_named(tmp_path: Path) -> None:
    config = settings(write(tmp_path / "texts.jsonl", "w0 w19"))
    with pytest.raises(DataError, match=r"texts\.jsonl:1: it contains 'w19' \(id 24\), for which"):
        load_corpus(config, tokenizer(), vocabulary_size=24)


def test_a_corpus_without_a_usable_document_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "texts.jsonl", "", " ")
    with pytest.raises(DataError, match=r"no usable document in .* \(2 documents skipped; the fir"):
        load(path, bad_rows="skip")
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match=r"data\.corpus: .*none\.jsonl is empty"):
        load(tmp_path / "none.jsonl")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"no usable document in .* \(0 documents skipped\)"):
        load(tmp_path / "blank.jsonl")


def test_plain_text_is_refused_because_it_does_not_say_where_a_document_ends(
    tmp_path: Path,
) -> None:
    (tmp_path / "book.txt").write_text("w1 w2")
    with pytest.raises(DataError, match=r"book\.txt must be JSONL.*got \.txt: plain text does not"):
        load(tmp_path / "book.txt")


def test_a_tokenizer_without_an_end_token_cannot_end_a_document(tmp_path: Path) -> None:
    made = tokenizer()
    made.eos_token = None
    with pytest.raises(DataError, match=r"data\.corpus: the tokenizer of .* has no eos_token"):
        load_corpus(settings(write(tmp_path / "texts.jsonl", "w1")), made)


def test_the_check_before_a_run_reads_the_first_documents(tmp_path: Path) -> None:
    config = settings(write(tmp_path / "texts.jsonl", "w1", {"body": "w2"}))
    with pytest.raises(DataError, match=r"texts\.jsonl:3: a document must have the column 'text'"):
        check_files(config)
    check_files(config, with_corpus=False)
    check_files(config.model_copy(update={"bad_rows": "skip"}))
    missing = config.model_copy(update={"corpus": (tmp_path / "no.jsonl",)})
    with pytest.raises(DataError, match=r"data\.corpus: .*no\.jsonl does not exist"):
        check_files(missing)


# ---- as part of the data of a run ----------------------------------------------------------------


def splits_of(path: Path, **options: Any) -> Splits:
    return load_splits(settings(path), tokenizer(), seed=0, **options)


def test_the_opening_lines_count_documents_pieces_and_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "texts.jsonl", "w0 w1 w2 w3 w4 w5 w6 w7", "w9 w8")
    assert splits_of(path).describe()[-1] == "corpus: 2 documents in 3 pieces, 12 tokens"
    without = splits_of(path, with_corpus=False)
    assert without.corpus is None
    assert not any("corpus" in text for text in without.describe())


def test_a_resumed_run_must_have_the_same_corpus(tmp_path: Path) -> None:
    path = write(tmp_path / "texts.jsonl", "w0 w1", "w2 w3", "w4 w5")
    keep_or_compare(tmp_path, splits_of(path), resumed=False)
    keep_or_compare(tmp_path, splits_of(path), resumed=True)
    write(path, "w0 w1", "w2 w9", "w4 w5")
    with pytest.raises(
        DataError, match=r"data\.corpus: .*texts\.jsonl:3 is not the row .*1 of 3 pieces differ"
    ):
        keep_or_compare(tmp_path, splits_of(path), resumed=True)
    write(path, "w0 w1", "w2 w3")
    with pytest.raises(DataError, match=r":5 is not .*had 3 usable pieces then and has 2 now"):
        keep_or_compare(tmp_path, splits_of(path), resumed=True)
    keep_or_compare(tmp_path, splits_of(path, with_corpus=False), resumed=True)


@pytest.mark.integration
@pytest.mark.usefixtures("local_ray")
def test_ray_data_cuts_the_same_pieces(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", "w0 w1 w2 w3 w4 w5 w6 w7", "", "w9 w8")
    parquet = tmp_path / "b.parquet"
    pq.write_table(pa.table({"text": ["w1 w2", "w3 w4 w5 w6 w7 w8 w9"]}), parquet)
    config = settings(lines, corpus=(lines, parquet))
    files = find_files(config.corpus, "corpus")
    cut = partial(cut_rows, renderer=Renderer(tokenizer(), config), config=config)
    in_process = map_files(files, cut)
    assert in_process.equals(ray_data.mapper(stall_timeout_s=60.0, spread_from_bytes=0)(files, cut))
    assert in_process["piece"].to_pylist() == [0, 1, 0, 0, 0, 0, 1]
