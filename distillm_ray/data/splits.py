"""From files to prompts and demonstrations, in the files' order.

Rows carry their file and line, so that messages can name them and the result does not depend on
how Ray Data divides the work, or on whether it does the work at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from distillm_ray.config import Config, DataConfig, RemotePath
from distillm_ray.data.corpus import Corpus, load_corpus
from distillm_ray.data.files import DataFile, Split, find_files
from distillm_ray.data.problems import Problems, RowProblem
from distillm_ray.data.rows import RowProblemKind
from distillm_ray.data.sequences import (
    ID_COLUMNS,
    TEXT_COLUMNS,
    Demonstrations,
    OwnColumns,
    Prompts,
    response_lengths,
)
from distillm_ray.data.templates import Renderer
from distillm_ray.data.token_table import RowNumbers, TokenTable
from distillm_ray.data.tokenizing import (
    KEY_BYTES,
    MapFiles,
    flags,
    iterate,
    joined,
    line_names,
    map_files,
    places_of,
    tokenize_rows,
)
from distillm_ray.errors import DataError
from distillm_ray.types import Source, TrainingData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dataset:
    """One split. Where responses are required, `demonstrations[i]` belongs to `prompts[i]`.

    Elsewhere prompts may lack one, or have one that is too long to be learned. Both are in the same
    order, and made of the rows of one table.
    """

    split: Split
    prompts: Prompts
    demonstrations: Demonstrations
    split_keys: NDArray[np.bytes_]  # `[N]`, equal for prompts with equal text
    files: tuple[str, ...]  # as the user wrote them
    places: NDArray[np.int64]  # `[N, 3]`: index into `files`, row, turn of a split conversation
    columns: OwnColumns  # of each prompt; empty if responses are required
    num_last_only: int  # conversations of which the last response is learned
    end_token_id: int  # ends every response; generators must stop at it
    num_skipped: dict[RowProblemKind, int]
    skipped: tuple[RowProblem, ...]  # the first few

    @property
    def rows(self) -> Demonstrations | Prompts:
        """The demonstrations, or the prompts where some have none: what models see first."""
        complete = len(self.demonstrations) == len(self.prompts)
        return self.demonstrations if complete else self.prompts

    def summary(self) -> str:
        """One line of counts, and one for each of the first skipped rows."""
        num_kept = len(self.prompts)
        skipped = ", ".join(f"{count} {kind}" for kind, count in self.num_skipped.items())
        head = (
            f"{self.split}: {num_kept} of {num_kept + sum(self.num_skipped.values())} rows,"
            f" {self.prompts.num_tokens} prompt and {self.demonstrations.num_response_tokens}"
            " response tokens" + (f"; skipped: {skipped}" if skipped else "")
        )
        if missing := num_kept - len(self.demonstrations):
            bare = self.prompts.num_without_reference
            why = [f"{bare} without a response"] if bare else []
            if missing > bare:
                why.append(
                    f"{missing - bare} with a response that is longer than data.max_response_tokens"
                    " and is not compared with"
                )
            head += f"; {' and '.join(why)}"
        if self.num_last_only:
            head += (
                f"; of {self.num_last_only} conversations the last response is learned, because the"
                " chat template renders earlier turns differently (data.conversations)"
            )
        return "\n".join([head, *(f"  {problem}" for problem in self.skipped)])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Splits:
    """The data of a run."""

    train: Dataset
    validation: Dataset
    test: Dataset | None
    num_validation_twins: int  # validation prompts whose text is also a training prompt
    corpus: Corpus | None = None

    def describe(self) -> list[str]:
        """What was read, for the user: a line for each split, and a warning about twins."""
        parts = (self.train, self.validation, self.test, self.corpus)
        lines = [part.summary() for part in parts if part is not None]
        if self.num_validation_twins:
            lines.append(
                f"warning: {self.num_validation_twins} validation prompts are also training"
                " prompts, word for word: the validation loss will look better than it is"
            )
        return lines

    def to_draw_from(self) -> TrainingData:
        """What the replay buffer draws from: the ids, without the texts, sharing one table."""
        table = self.train.prompts.table.select(ID_COLUMNS)
        return TrainingData(
            prompts=self.train.prompts.over(table),
            demonstrations=self.train.demonstrations.over(table),
            corpus=self.corpus.pieces if self.corpus is not None else (),
        )


def splits_of(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocabulary_size: int,
    map_files: MapFiles = map_files,
    with_corpus: bool = True,
) -> Splits:
    """`load_splits` for a whole config."""
    return load_splits(
        config.data,
        tokenizer,
        config.run.seed,
        responses_needed_by=config.responses_needed_by,
        map_files=map_files,
        vocabulary_size=vocabulary_size,
        with_corpus=with_corpus,
    )


def load_splits(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    responses_needed_by: str | None = "training",
    map_files: MapFiles = map_files,
    vocabulary_size: int | None = None,
    with_corpus: bool = True,
) -> Splits:
    """Read all splits; without validation files, hold out a part of the training prompts.

    The choice of held-out prompts depends only on their text and the seed; equal prompts stay
    together. `responses_needed_by` names what trains on responses; None: prompts are enough.
    `map_files` decides where the rows are read: in this process, or with Ray Data.
    `vocabulary_size` is the number of ids for which the models have rows; None: all ids have one.
    `with_corpus` is False where nothing is trained.

    Raises:
        DataError: as in `load_dataset`, `hold_out` and `load_corpus`.
    """

    def load(places: Sequence[Path | RemotePath], split: Split) -> Dataset:
        return load_dataset(
            places,
            config,
            tokenizer,
            split=split,
            responses_needed_by=responses_needed_by,
            map_files=map_files,
            vocabulary_size=vocabulary_size,
        )

    train = load(config.train, "train")
    if config.validation:
        validation = load(config.validation, "validation")
    else:
        train, validation = hold_out(train, fraction=config.validation_fraction, seed=seed)
    test = load(config.test, "test") if config.test else None
    corpus = None
    if config.corpus and with_corpus:
        corpus = load_corpus(
            config, tokenizer, map_files=map_files, vocabulary_size=vocabulary_size
        )
    return Splits(
        train=train,
        validation=validation,
        test=test,
        num_validation_twins=int(np.isin(validation.split_keys, train.split_keys).sum()),
        corpus=corpus,
    )


def load_dataset(
    places: Sequence[Path | RemotePath],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: Split,
    responses_needed_by: str | None = "training",
    map_files: MapFiles = map_files,
    vocabulary_size: int | None = None,
) -> Dataset:
    """Read and tokenize the files of one split, in the order of files and rows.

    `config.bad_rows` decides whether rows that are empty, malformed or have a used id fail the run
    or are skipped; `config.long_rows` decides it for rows beyond the token limits.

    Raises:
        DataError: a file is missing or unreadable, rows are refused (by file and line), or no row
            is left.
    """
    files = find_files(places, split)
    renderer = Renderer(tokenizer, config, vocabulary_size=vocabulary_size)
    tokenize = partial(
        tokenize_rows,
        renderer=renderer,
        config=config,
        require_responses=responses_needed_by is not None,
    )
    table = map_files(files, tokenize)
    return _collect(table, files, renderer, config, split, responses_needed_by)


def hold_out(dataset: Dataset, *, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split into the rest and the held-out part, with at least one distinct prompt in each.

    Raises:
        DataError: fewer than two distinct prompts.
    """
    distinct, of_prompt = np.unique(dataset.split_keys, return_inverse=True)
    if len(distinct) < 2:
        raise DataError(
            f"data.validation_fraction needs at least 2 distinct training prompts, got"
            f" {len(distinct)}: none can be held out; name files in data.validation"
        )
    num_held_out = min(max(1, round(fraction * len(distinct))), len(distinct) - 1)
    is_held_out = np.zeros(len(distinct), dtype=np.bool_)
    is_held_out[np.argsort(_salted(distinct, seed))[:num_held_out]] = True
    held_out = is_held_out[of_prompt]
    return _part(dataset, "train", ~held_out), _part(dataset, "validation", held_out)


def _salted(keys: NDArray[np.bytes_], seed: int) -> NDArray[np.bytes_]:
    """A digest of each key. numpy's texts end before their last zero bytes."""
    salt = seed.to_bytes(16, "little")
    digests = (hashlib.blake2b(key.ljust(KEY_BYTES, b"\0"), salt=salt).digest() for key in keys)
    return np.fromiter(digests, dtype="S64", count=len(keys))


# ---- rows into messages -------------------------------------------------------------------------


def _collect(
    table: pa.Table,
    files: Sequence[DataFile],
    renderer: Renderer,
    config: DataConfig,
    split: Split,
    responses_needed_by: str | None,
) -> Dataset:
    table = table.append_column("prompt_id", _prompt_ids(table, files))
    usable, problems = _usable(table, files, config)
    _refuse(problems, split, responses_needed_by)
    if not len(usable):
        raise DataError(
            f"data.{split}: no usable row in {', '.join(file.name for file in files)}"
            f" ({table.num_rows} rows, {problems.total} of them skipped"
            + (f"; the first: {problems.first[0]})" if problems.first else ")")
        )
    kept = TokenTable(table.select([*ID_COLUMNS, *TEXT_COLUMNS]))
    is_learned = response_lengths(kept) > 0
    is_learned &= kept.first_lengths("reference_ids") <= config.max_response_tokens
    has_columns = responses_needed_by is None
    return Dataset(
        split=split,
        prompts=Prompts(kept, usable),
        demonstrations=Demonstrations(
            kept,
            usable[is_learned[usable]],
            Source(config.responses) if split == "train" else Source.DATASET,
        ),
        split_keys=_split_keys(table)[usable],
        files=tuple(file.name for file in files),
        places=places_of(table)[usable],
        columns=OwnColumns(kept, usable if has_columns else usable[:0]),
        num_last_only=int(np.count_nonzero(flags(table["last_only"])[usable])),
        end_token_id=renderer.end_token_id,
        num_skipped=dict(problems.counts),
        skipped=tuple(problems.first),
    )


def _prompt_ids(table: pa.Table, files: Sequence[DataFile]) -> pa.ChunkedArray:
    """The id of each row: its own, or file and line; with the turn of a split conversation."""
    whole = pc.call_function("coalesce", [table["id"], line_names(table, files)])
    is_turn = pa.chunked_array([table["turn"].to_numpy() > 0], pa.bool_())
    return pc.call_function("if_else", [is_turn, joined(whole, "#", table["turn"]), whole])


def _usable(
    table: pa.Table, files: Sequence[DataFile], config: DataConfig
) -> tuple[RowNumbers, Problems]:
    """The rows without a problem. A second row with the same id is one."""
    is_bad = flags(table["kind"].is_valid())
    good = np.flatnonzero(~is_bad)
    ids = table["prompt_id"].filter(pa.array(~is_bad)).dictionary_encode()
    codes = np.concatenate([good[:0], *(chunk.indices.to_numpy() for chunk in ids.chunks)])
    _, first_of_code = np.unique(codes, return_index=True)
    is_first = np.zeros(len(good), dtype=np.bool_)
    is_first[first_of_code] = True
    first_with_id = dict(
        zip(
            good[~is_first].tolist(),
            good[first_of_code[codes[~is_first]]].tolist(),
            strict=True,
        )
    )
    places = places_of(table)
    reasons = iterate(table.select(["kind", "reason"]).filter(pa.array(is_bad)))
    problems = Problems(config)

    def position(row: int) -> str:
        file, line, _ = places[row].tolist()
        return files[file].position(line)

    for row in np.union1d(np.flatnonzero(is_bad), good[~is_first]).tolist():
        if row in first_with_id:
            used = position(first_with_id[row])
            reason = f"id {table['prompt_id'][row].as_py()!r} is already used at {used}"
            problem = RowProblem(position=position(row), kind="duplicate", reason=reason)
        else:
            problem = RowProblem(position=position(row), **next(reasons))
        problems.add(problem)
    return good[is_first], problems


def _split_keys(table: pa.Table) -> NDArray[np.bytes_]:
    """The keys of all rows, in which those without one have some bytes."""
    keys = [
        np.frombuffer(chunk.buffers()[1], dtype=f"S{KEY_BYTES}")[chunk.offset :][: len(chunk)]
        for chunk in table["split_key"].chunks
        if len(chunk)
    ]
    return np.concatenate([np.empty(0, dtype=f"S{KEY_BYTES}"), *keys])


def _refuse(problems: Problems, split: Split, responses_needed_by: str | None) -> None:
    lines = problems.refusal()
    if not lines:
        return
    if "duplicate" in problems.refused_kinds:
        lines.append(
            f"data.{split}: an id names one row of all files together; rename the id columns or"
            " leave them out, because skip would leave out the later rows"
        )
    if responses_needed_by and problems.lacks_response:
        lines.append(
            f"data.{split}: {responses_needed_by} trains on responses; for rows of prompts alone"
            " use student text only, as method=opd does"
        )
    end = f"data.{split}: correct these rows, or set {problems.remedy()}"
    raise DataError("\n".join([*lines, end]))


def _part(dataset: Dataset, split: Split, keep: NDArray[np.bool_]) -> Dataset:
    """The rows with `keep`. Only the training split keeps the skipped rows."""
    is_train = split == "train"
    rows = dataset.prompts.rows[keep]
    return Dataset(
        split=split,
        prompts=dataset.prompts.among(rows),
        demonstrations=dataset.demonstrations.among(rows),
        split_keys=dataset.split_keys[keep],
        files=dataset.files,
        places=dataset.places[keep],
        columns=dataset.columns.among(rows),
        num_last_only=dataset.num_last_only if is_train else 0,
        end_token_id=dataset.end_token_id,
        num_skipped=dataset.num_skipped if is_train else {},
        skipped=dataset.skipped if is_train else (),
    )
