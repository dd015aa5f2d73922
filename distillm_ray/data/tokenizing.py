"""Reads and tokenizes files with Ray Data into one table, each row with its file and line."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data.datasource import FileBasedDatasource
from ray.exceptions import RayTaskError

from distillm_ray.config import DataConfig
from distillm_ray.data.files import DataFile, decode_row, read_rows
from distillm_ray.data.rows import Example, RowError, parse_row
from distillm_ray.data.templates import RenderedExample, Renderer
from distillm_ray.errors import DataError

_ROWS_PER_READ_BLOCK = 4096
_BYTES_PER_TASK = 8 * 2**20  # smaller tasks do not pay for importing transformers in a worker
_BYTES_WITH_PROGRESS_BAR = 64 * 2**20  # less is read in seconds

TOKENIZED = pa.schema(
    [
        ("file", pa.int32()),
        ("row", pa.int64()),
        ("kind", pa.string()),  # of the problem; null if the row is good
        ("reason", pa.string()),
        ("id", pa.string()),
        ("split_key", pa.binary()),  # equal for equal prompts
        ("text", pa.string()),
        ("references", pa.list_(pa.string())),
        ("prompt_ids", pa.list_(pa.int32())),
        ("reference_ids", pa.list_(pa.list_(pa.int32()))),
        ("demonstration_prompt_ids", pa.list_(pa.int32())),
        ("demonstration_response_ids", pa.list_(pa.int32())),
        ("demonstration_loss_mask", pa.list_(pa.bool_())),
    ]
)


class RowsDatasource(FileBasedDatasource):
    """Reads rows as (file, row number, JSON).

    Our own reader because the JSON readers of Ray Data, pyarrow and `datasets` know no line
    numbers and fail a whole file for one bad line, so neither messages with `FILE:LINE` nor
    `data.bad_rows: skip` would work. The first two also refuse a column that holds a text in one
    row and a list of texts in another. Loading only `save_to_disk` directories with `datasets`
    would save ten lines in files.py.
    """

    def __init__(self, files: Sequence[DataFile]) -> None:
        """`file` in the rows is the index into `files`."""
        super().__init__([str(file.path) for file in files])
        self._files = {str(file.path): (index, file) for index, file in enumerate(files)}

    def _read_stream(self, f: Any, path: str) -> Iterator[pa.Table]:
        index, file = self._files[path]
        rows: list[tuple[int, bytes]] = []
        # An Arrow input file does not iterate over lines.
        stream = io.BufferedReader(f) if file.format == "jsonl" else f
        for row in read_rows(stream, file):
            rows.append(row)
            if len(rows) == _ROWS_PER_READ_BLOCK:
                yield _raw_table(index, rows)
                rows = []
        yield _raw_table(index, rows)

    def _open_input_source(self, filesystem: Any, path: str, **open_args: Any) -> Any:
        # Parquet needs a seekable file; the default is an input stream.
        return filesystem.open_input_file(path)


def _raw_table(index: int, rows: Sequence[tuple[int, bytes]]) -> pa.Table:
    return pa.table(
        {
            "file": pa.array([index] * len(rows), pa.int32()),
            "row": pa.array([number for number, _ in rows], pa.int64()),
            "payload": pa.array([payload for _, payload in rows], pa.binary()),
        }
    )


def tokenize_files(
    files: Sequence[DataFile],
    renderer: Renderer,
    config: DataConfig,
    *,
    require_responses: bool,
) -> pa.Table:
    """All rows in the order of files and rows, with the columns of `TOKENIZED`.

    Raises:
        DataError: a file cannot be read.
    """
    num_bytes = sum(file.path.stat().st_size for file in files)
    with _quiet_ray_data(progress_bars=num_bytes >= _BYTES_WITH_PROGRESS_BAR):
        dataset = ray.data.read_datasource(
            RowsDatasource(files), override_num_blocks=max(1, -(-num_bytes // _BYTES_PER_TASK))
        ).map_batches(
            partial(
                tokenize_rows,
                renderer=renderer,
                max_prompt_tokens=config.max_prompt_tokens,
                max_response_tokens=config.max_response_tokens,
                require_responses=require_responses,
            ),
            batch_format="pyarrow",
            batch_size=None,
        )
        try:
            references: list[Any] = dataset.to_arrow_refs()
            tables: list[pa.Table] = ray.get(references)
        except RayTaskError as error:
            if isinstance(error.cause, DataError):
                # The first line only: Ray adds the task's stack trace and notes on retries.
                raise DataError(str(error.cause).splitlines()[0]) from error
            raise
    table = pa.concat_tables([TOKENIZED.empty_table(), *(t for t in tables if t.num_rows)])
    return table.sort_by([("file", "ascending"), ("row", "ascending")])


def tokenize_rows(
    batch: pa.Table,
    renderer: Renderer,
    max_prompt_tokens: int,
    max_response_tokens: int,
    require_responses: bool,
) -> pa.Table:
    """Turn a batch of raw rows into the columns of `TOKENIZED`; runs in Ray Data's tasks."""
    out: list[dict[str, Any]] = []
    for file, row, payload in zip(
        batch["file"].to_pylist(),
        batch["row"].to_pylist(),
        batch["payload"].to_pylist(),
        strict=True,
    ):
        place = {"file": file, "row": row}
        try:
            example = parse_row(decode_row(payload), require_responses=require_responses)
            rendered = renderer.render(example)
            _check_lengths(rendered, max_prompt_tokens, max_response_tokens)
        except RowError as error:
            out.append({**place, "kind": error.kind, "reason": error.reason})
            continue
        out.append({**place, **_columns(example, rendered)})
    return pa.Table.from_pylist(out, schema=TOKENIZED)


def _columns(example: Example, rendered: RenderedExample) -> dict[str, Any]:
    words = repr([(turn.role, turn.content) for turn in example.turns])
    return {
        "id": example.example_id,
        "split_key": hashlib.blake2b(words.encode(), digest_size=16).digest(),
        "text": example.text,
        "references": example.references,
        "prompt_ids": rendered.prompt_ids,
        "reference_ids": rendered.reference_ids,
        "demonstration_prompt_ids": rendered.demonstration_prompt_ids,
        "demonstration_response_ids": rendered.demonstration_response_ids,
        "demonstration_loss_mask": rendered.demonstration_loss_mask,
    }


def _check_lengths(
    rendered: RenderedExample, max_prompt_tokens: int, max_response_tokens: int
) -> None:
    """Check prompt and first reference; a demonstration has the same tokens."""
    if not rendered.prompt_ids:
        raise RowError("empty", "the prompt has no tokens")
    if len(rendered.prompt_ids) > max_prompt_tokens:
        raise RowError(
            "long",
            f"the prompt has {len(rendered.prompt_ids)} tokens, data.max_prompt_tokens is"
            f" {max_prompt_tokens}",
        )
    if rendered.reference_ids and len(rendered.reference_ids[0]) > max_response_tokens:
        raise RowError(
            "long",
            f"the response has {len(rendered.reference_ids[0])} tokens, data.max_response_tokens is"
            f" {max_response_tokens}",
        )


@contextlib.contextmanager
def _quiet_ray_data(*, progress_bars: bool) -> Iterator[None]:
    """Silence the plan and the progress bar that Ray Data shows for every execution."""
    context = ray.data.DataContext.get_current()
    # The second logger warns that the bars are off.
    loggers = [logging.getLogger(name) for name in ("ray.data", "ray.data._internal.progress")]
    levels = [logger.level for logger in loggers]
    before = context.enable_progress_bars
    context.enable_progress_bars = progress_bars
    if not progress_bars:
        loggers[0].setLevel(logging.WARNING)
        loggers[1].setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = before
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
