"""Reads and tokenizes files with Ray Data: `tokenizing.map_files`, spread over a cluster.

A little is read in this process: Ray Data's processes take longer to start.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data.datasource import FileBasedDatasource
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import GetTimeoutError, RayTaskError

from distillm_ray.data.files import DataFile
from distillm_ray.data.tokenizing import (
    MapFiles,
    MapRows,
    map_files,
    places_of,
    raw_batches,
    raw_table,
)
from distillm_ray.errors import ClusterError, DataError, UserError

_BYTES_PER_TASK = 8 * 2**20  # smaller tasks do not pay for loading the tokenizer
_CPUS_OF_READING = 0.1  # a task that reads mostly waits for those that tokenize
_BYTES_WITH_PROGRESS_BAR = 64 * 2**20  # less is read in seconds


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
        # An Arrow input file does not iterate over lines.
        yield from raw_batches(io.BufferedReader(f) if file.format == "jsonl" else f, file, index)

    def _open_input_source(self, filesystem: Any, path: str, **open_args: Any) -> Any:
        # Parquet needs a seekable file; the default is an input stream. The task's node may have
        # another cache than the driver's.
        return filesystem.open_input_file(str(self._files[path][1].here()))


def mapper(*, stall_timeout_s: float, spread_from_bytes: int = _BYTES_PER_TASK) -> MapFiles:
    """`tokenizing.map_files` on a cluster. Needs a connection to Ray and free CPUs.

    It raises ClusterError when nothing was read for `stall_timeout_s`, `run.startup_timeout_s`.

    Args:
        spread_from_bytes: files that are smaller together are read in this process.
    """
    return partial(_map_files, stall_timeout_s=stall_timeout_s, spread_from_bytes=spread_from_bytes)


def _map_files(
    files: Sequence[DataFile],
    map_rows: MapRows,
    *,
    stall_timeout_s: float,
    spread_from_bytes: int,
) -> pa.Table:
    num_bytes = sum(file.path.stat().st_size for file in files)
    if num_bytes < spread_from_bytes:
        return map_files(files, map_rows)
    num_tasks = -(-num_bytes // _BYTES_PER_TASK)
    progress_bars = num_bytes >= _BYTES_WITH_PROGRESS_BAR
    with _settings(progress_bars=progress_bars, stall_timeout_s=stall_timeout_s):
        # Reading has other resources than tokenizing, or Ray Data would do both in a task a file.
        dataset = ray.data.read_datasource(
            RowsDatasource(files),
            override_num_blocks=max(1, min(num_tasks, len(files))),
            num_cpus=_CPUS_OF_READING,
        ).map_batches(map_rows, batch_format="pyarrow", batch_size=None)
        tables = [map_rows(raw_table(0, []))]
        try:
            blocks: Iterable[Any] = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
            for block in blocks:
                if block.num_rows:
                    # A copy: the block's place in the object store is free for the next.
                    tables.append(block.take(np.arange(block.num_rows)))
        except (ExecutionTimeoutError, GetTimeoutError) as error:
            raise ClusterError(
                f"no row was read for run.startup_timeout_s = {stall_timeout_s:g} s: all CPUs of"
                " the cluster are in use, or a node hangs; free a CPU, or raise"
                " run.startup_timeout_s"
            ) from error
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                # The first line only: Ray adds the task's stack trace and notes on retries.
                raise DataError(str(error.cause).splitlines()[0]) from error
            raise
    # Blocks come in any order; each has consecutive rows.
    table = pa.concat_tables(sorted(tables, key=_first_place))
    places = places_of(table)
    assert (np.lexsort(places.T[::-1]) == np.arange(len(places))).all(), "a block mixes rows"
    return table


def _first_place(table: pa.Table) -> tuple[int, ...]:
    return tuple(places_of(table.slice(0, 1)).ravel().tolist())


@contextlib.contextmanager
def _settings(*, progress_bars: bool, stall_timeout_s: float) -> Iterator[None]:
    """Silence the plan and the progress bar that Ray Data shows for every execution, and limit it.

    Ray Data would wait for half an hour for a free CPU. Blocks have the size of a task.
    """
    context = ray.data.DataContext.get_current()
    block_bytes, context.target_max_block_size = context.target_max_block_size, _BYTES_PER_TASK
    # The second logger warns that the bars are off.
    loggers = [logging.getLogger(name) for name in ("ray.data", "ray.data._internal.progress")]
    levels = [logger.level for logger in loggers]
    before = context.enable_progress_bars, context.execution_no_progress_timeout_s
    context.enable_progress_bars = progress_bars
    context.execution_no_progress_timeout_s = stall_timeout_s
    if not progress_bars:
        loggers[0].setLevel(logging.WARNING)
        loggers[1].setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars, context.execution_no_progress_timeout_s = before
        context.target_max_block_size = block_bytes
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
