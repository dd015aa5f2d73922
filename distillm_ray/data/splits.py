"""From files to prompts and demonstrations, in the files' order.

Rows carry their file and line, so that messages can name them and the result does not depend on
how Ray Data divides the work, or on whether it does the work at all.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distillm_ray.config import Config, DataConfig
from distillm_ray.data.corpus import Corpus, load_corpus
from distillm_ray.data.files import DataFile, Split, find_files
from distillm_ray.data.problems import NUM_SHOWN, RowProblem, listed, refused, remedy
from distillm_ray.data.rows import NO_RESPONSE, RowProblemKind
from distillm_ray.data.templates import Renderer
from distillm_ray.data.tokenizing import (
    MapFiles,
    iterate,
    map_files,
    tokenize_rows,
    unique_stems,
)
from distillm_ray.errors import DataError
from distillm_ray.types import FinishReason, Int32Array, Prompt, Rollout, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dataset:
    """One split. Where responses are required, `demonstrations[i]` belongs to `prompts[i]`.

    Elsewhere prompts may lack one, or have one that is too long to be learned.
    """

    split: Split
    prompts: tuple[Prompt, ...]
    demonstrations: tuple[Rollout, ...]
    split_keys: tuple[bytes, ...]  # equal for prompts with equal text
    files: tuple[str, ...]  # as the user wrote them
    places: NDArray[np.int64]  # `[N, 3]`: index into `files`, row, turn of a split conversation
    columns: tuple[dict[str, Any], ...]  # each row's own prompt; empty if responses are required
    num_last_only: int  # conversations of which the last response is learned
    end_token_id: int  # ends every response; generators must stop at it
    num_skipped: dict[RowProblemKind, int]
    skipped: tuple[RowProblem, ...]  # the first few

    @property
    def rows(self) -> tuple[Rollout, ...] | tuple[Prompt, ...]:
        """The demonstrations, or the prompts where some have none: what models see first."""
        complete = len(self.demonstrations) == len(self.prompts)
        return self.demonstrations if complete else self.prompts

    def summary(self) -> str:
        """One line of counts, and one for each of the first skipped rows."""
        num_kept = len(self.prompts)
        num_prompt_tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        num_response_tokens = sum(len(rollout.response_ids) for rollout in self.demonstrations)
        skipped = ", ".join(f"{count} {kind}" for kind, count in self.num_skipped.items())
        head = (
            f"{self.split}: {num_kept} of {num_kept + sum(self.num_skipped.values())} rows,"
            f" {num_prompt_tokens} prompt and {num_response_tokens} response tokens"
            + (f"; skipped: {skipped}" if skipped else "")
        )
        if missing := num_kept - len(self.demonstrations):
            bare = sum(not prompt.references for prompt in self.prompts)
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

    def load(paths: Sequence[Path], split: Split) -> Dataset:
        return load_dataset(
            paths,
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
    known = set(train.split_keys)
    return Splits(
        train=train,
        validation=validation,
        test=test,
        num_validation_twins=sum(key in known for key in validation.split_keys),
        corpus=corpus,
    )


def load_dataset(
    paths: Sequence[Path],
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
    files = find_files(paths, split)
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
    distinct = sorted(
        set(dataset.split_keys),
        key=lambda key: hashlib.blake2b(key, salt=seed.to_bytes(16, "little")).digest(),
    )
    if len(distinct) < 2:
        raise DataError(
            f"data.validation_fraction needs at least 2 distinct training prompts, got"
            f" {len(distinct)}: none can be held out; name files in data.validation"
        )
    num_held_out = min(max(1, round(fraction * len(distinct))), len(distinct) - 1)
    held_out = set(distinct[:num_held_out])
    return (
        _part(dataset, "train", [key not in held_out for key in dataset.split_keys]),
        _part(dataset, "validation", [key in held_out for key in dataset.split_keys]),
    )


# ---- rows into messages -------------------------------------------------------------------------


def _collect(
    table: pa.Table,
    files: Sequence[DataFile],
    renderer: Renderer,
    config: DataConfig,
    split: Split,
    responses_needed_by: str | None,
) -> Dataset:
    stems = unique_stems(files)
    first_with_id: dict[str, str] = {}
    problems: list[RowProblem] = []
    prompts: list[Prompt] = []
    demonstrations: list[Rollout] = []
    split_keys: list[bytes] = []
    columns: list[dict[str, Any]] = []
    places: list[tuple[int, int, int]] = []
    num_last_only = 0
    source = Source(config.responses) if split == "train" else Source.DATASET
    for row in iterate(table):
        position = files[row["file"]].position(row["row"])
        prompt_id = row["id"] or f"{stems[row['file']]}-{row['row']}"
        if row["turn"]:
            prompt_id = f"{prompt_id}#{row['turn']}"
        if row["kind"] is not None:
            problems.append(RowProblem(position=position, kind=row["kind"], reason=row["reason"]))
            continue
        if prompt_id in first_with_id:
            reason = f"id {prompt_id!r} is already used at {first_with_id[prompt_id]}"
            problems.append(RowProblem(position=position, kind="duplicate", reason=reason))
            continue
        first_with_id[prompt_id] = position
        num_last_only += bool(row["last_only"])
        places.append((row["file"], row["row"], row["turn"]))
        prompts.append(_prompt(prompt_id, row))
        split_keys.append(row["split_key"])
        response = row["demonstration_response_ids"]
        if response and len(row["reference_ids"][0]) <= config.max_response_tokens:
            demonstrations.append(_demonstration(prompt_id, row, source))
        if row["columns"] is not None:
            columns.append(json.loads(row["columns"]))
    _refuse(problems, config, split, responses_needed_by)
    if not prompts:
        raise DataError(
            f"data.{split}: no usable row in {', '.join(file.name for file in files)}"
            f" ({table.num_rows} rows, {len(problems)} of them skipped"
            + (f"; the first: {problems[0]})" if problems else ")")
        )
    return Dataset(
        split=split,
        prompts=tuple(prompts),
        demonstrations=tuple(demonstrations),
        split_keys=tuple(split_keys),
        files=tuple(file.name for file in files),
        places=np.array(places, dtype=np.int64).reshape(-1, 3),
        columns=tuple(columns),
        num_last_only=num_last_only,
        end_token_id=renderer.end_token_id,
        num_skipped=dict(Counter(problem.kind for problem in problems)),
        skipped=tuple(problems[:NUM_SHOWN]),
    )


def _refuse(
    problems: Sequence[RowProblem],
    config: DataConfig,
    split: Split,
    responses_needed_by: str | None,
) -> None:
    wrong = refused(problems, config)
    if not wrong:
        return
    lines = listed(wrong)
    if any(problem.kind == "duplicate" for problem in wrong):
        lines.append(
            f"data.{split}: an id names one row of all files together; rename the id columns or"
            " leave them out, because skip would leave out the later rows"
        )
    if responses_needed_by and any(NO_RESPONSE in problem.reason for problem in wrong):
        lines.append(
            f"data.{split}: {responses_needed_by} trains on responses; for rows of prompts alone"
            " use student text only, as method=opd does"
        )
    end = f"data.{split}: correct these rows, or set {remedy(wrong)}"
    raise DataError("\n".join([*lines, end]))


def _prompt(prompt_id: str, row: dict[str, Any]) -> Prompt:
    return Prompt(
        prompt_id=prompt_id,
        token_ids=_int32(row["prompt_ids"]),
        reference_ids=tuple(_int32(ids) for ids in row["reference_ids"]),
        text=row["text"],
        references=tuple(row["references"]),
    )


def _demonstration(prompt_id: str, row: dict[str, Any], source: Source) -> Rollout:
    return Rollout(
        rollout_id=f"{source}-{prompt_id}",
        prompt_id=prompt_id,
        prompt_ids=_int32(row["demonstration_prompt_ids"]),
        response_ids=_int32(row["demonstration_response_ids"]),
        loss_mask=np.array(row["demonstration_loss_mask"], dtype=np.bool_),
        source=source,
        version=0,
        finish_reason=FinishReason.LENGTH if row["truncated"] else FinishReason.STOP,
        text=row["references"][0],
    )


def _int32(ids: Sequence[int]) -> Int32Array:
    return np.array(ids, dtype=np.int32)


def _part(dataset: Dataset, split: Split, keep: Sequence[bool]) -> Dataset:
    """The rows with `keep`. Only the training split keeps the skipped rows."""
    is_train = split == "train"
    prompts = tuple(compress(dataset.prompts, keep))
    names = {prompt.prompt_id for prompt in prompts}
    return Dataset(
        split=split,
        prompts=prompts,
        demonstrations=tuple(one for one in dataset.demonstrations if one.prompt_id in names),
        split_keys=tuple(compress(dataset.split_keys, keep)),
        files=dataset.files,
        places=dataset.places[np.array(keep, dtype=np.bool_)],
        columns=tuple(compress(dataset.columns, keep)),
        num_last_only=dataset.num_last_only if is_train else 0,
        end_token_id=dataset.end_token_id,
        num_skipped=dataset.num_skipped if is_train else {},
        skipped=dataset.skipped if is_train else (),
    )
