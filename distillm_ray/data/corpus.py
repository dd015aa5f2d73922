"""The corpus: plain documents, tokenized as they are and cut into sequences to train on.

    row of a file ──► text ──► tokens, end token ──► pieces of at most a sequence's length

A piece is a `Rollout` without a speaker: its first token stands for the prompt, and the loss covers
the others. That first token is the one that the tokenizer begins a text with (BOS), before every
piece; where it has none, it is the first token of the piece itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distillm_ray.config import DataConfig
from distillm_ray.data.files import decode_row, find_files
from distillm_ray.data.problems import Problems, RowProblem
from distillm_ray.data.rows import RowError, RowProblemKind, parse_document
from distillm_ray.data.templates import Renderer
from distillm_ray.data.token_table import Block, RowSequence, TokenTable
from distillm_ray.data.tokenizing import (
    MapFiles,
    flags,
    iterate,
    joined,
    line_names,
    map_files,
    places_of,
)
from distillm_ray.errors import DataError
from distillm_ray.types import FinishReason, Rollout, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PIECES = pa.schema(
    [
        ("file", pa.int32()),
        ("row", pa.int64()),
        ("piece", pa.int32()),  # of the document, from 0
        ("kind", pa.string()),  # of the problem; null if the row is good
        ("reason", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("ends", pa.bool_()),  # the last token is the document's end token
    ]
)


class Pieces(RowSequence[Rollout]):
    """The pieces of a table."""

    def _make(self, block: Block, row: int) -> Rollout:
        name, ids = block.text("name", row), block.ids("token_ids", row)
        ends = block.value("ends", row)
        return Rollout(
            rollout_id=f"{Source.CORPUS}-{name}",
            prompt_id=name,
            prompt_ids=ids[:1],
            response_ids=ids[1:],
            loss_mask=np.ones(len(ids) - 1, dtype=np.bool_),
            source=Source.CORPUS,
            version=0,
            finish_reason=FinishReason.STOP if ends else FinishReason.LENGTH,
        )

    @property
    def num_tokens(self) -> int:
        """Of all pieces."""
        return int(self.table.lengths("token_ids")[self.rows].sum())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Corpus:
    """Pieces of documents, in the order of files and rows."""

    pieces: Pieces
    num_documents: int
    files: tuple[str, ...]  # as the user wrote them
    places: NDArray[np.int64]  # `[N, 3]`: index into `files`, row, piece of the document
    end_token_id: int  # ends every document
    num_skipped: dict[RowProblemKind, int]
    skipped: tuple[RowProblem, ...]  # the first few

    def summary(self) -> str:
        """One line of counts, and one for each of the first skipped rows."""
        skipped = ", ".join(f"{count} {kind}" for kind, count in self.num_skipped.items())
        head = (
            f"corpus: {self.num_documents} documents in {len(self.pieces)} pieces,"
            f" {self.pieces.num_tokens} tokens{f'; skipped: {skipped}' if skipped else ''}"
        )
        return "\n".join([head, *(f"  {problem}" for problem in self.skipped)])


def load_corpus(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    map_files: MapFiles = map_files,
    vocabulary_size: int | None = None,
) -> Corpus:
    """Read and cut the documents of `data.corpus`.

    `config.bad_rows` decides whether a document that is empty or malformed fails the run or is
    skipped. The arguments are those of `splits.load_splits`.

    Raises:
        DataError: a file is missing or unreadable, documents are refused (by file and line), the
            tokenizer has no end token, or no piece is left.
    """
    files = find_files(config.corpus, "corpus")
    renderer = Renderer(tokenizer, config, vocabulary_size=vocabulary_size)
    end_token_id = renderer.document_end_token_id
    table = map_files(files, partial(cut_rows, renderer=renderer, config=config))
    is_bad = flags(table["kind"].is_valid())
    problems = Problems(config)
    for row in iterate(table.filter(pa.array(is_bad))):
        position = files[row["file"]].position(row["row"])
        problems.add(RowProblem(position=position, kind=row["kind"], reason=row["reason"]))
    if wrong := problems.refusal():
        end = f"data.corpus: correct these documents, or set {problems.remedy()}"
        raise DataError("\n".join([*wrong, end]))
    pieces, places = np.flatnonzero(~is_bad), places_of(table)[~is_bad]
    if not len(pieces):
        named = ", ".join(file.name for file in files)
        first = f"; the first: {problems.first[0]}" if problems.first else ""
        raise DataError(
            f"data.corpus: no usable document in {named} ({problems.total} documents"
            f" skipped{first})"
        )
    table = table.append_column("name", joined(line_names(table, files), ".", table["piece"]))
    return Corpus(
        pieces=Pieces(TokenTable(table.select(["name", "token_ids", "ends"])), pieces),
        num_documents=len(np.unique(places[:, :2], axis=0)),
        files=tuple(file.name for file in files),
        places=places,
        end_token_id=end_token_id,
        num_skipped=dict(problems.counts),
        skipped=tuple(problems.first),
    )


def cut_rows(batch: pa.Table, renderer: Renderer, config: DataConfig) -> pa.Table:
    """Turn a batch of raw rows into the columns of `PIECES`, a row for each piece."""
    out: list[dict[str, Any]] = []
    max_tokens = config.max_prompt_tokens + config.max_response_tokens
    for file, row, payload in zip(
        batch["file"].to_pylist(),
        batch["row"].to_pylist(),
        batch["payload"].to_pylist(),
        strict=True,
    ):
        place = {"file": file, "row": row, "piece": 0}
        try:
            text = parse_document(decode_row(payload), config.corpus_column)
            ids = renderer.document_ids(text)
        except RowError as error:
            out.append({**place, "kind": error.kind, "reason": error.reason})
            continue
        for index, piece, ends in cut(ids, renderer.bos_ids, max_tokens=max_tokens):
            out.append({**place, "piece": index, "token_ids": piece, "ends": ends})
    return pa.Table.from_pylist(out, schema=PIECES)


def cut(
    ids: Sequence[int], bos_ids: Sequence[int], *, max_tokens: int
) -> Iterator[tuple[int, list[int], bool]]:
    """Each piece of a document: its number, its tokens, and whether the document ends in it.

    A piece of a single token is left out: nothing stands before the token to predict it from.

    Example:
        >>> list(cut([5, 6, 7, 8, 3], [], max_tokens=2))
        [(0, [5, 6], False), (1, [7, 8], False)]
        >>> list(cut([5, 6, 7, 3], [1], max_tokens=3))
        [(0, [1, 5, 6], False), (1, [1, 7, 3], True)]
    """
    size = max_tokens - len(bos_ids)
    for index, start in enumerate(range(0, len(ids), size)):
        piece = [*bos_ids, *ids[start : start + size]]
        if len(piece) >= 2:
            yield index, piece, start + size >= len(ids)
