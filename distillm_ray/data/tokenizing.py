"""Tokenizes the rows of files into one table, each row with its file and line. No Ray here.

`ray_data.py` maps the same rows with Ray Data.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from distillm_ray.config import DataConfig
from distillm_ray.data.files import DataFile, decode_row, read_rows
from distillm_ray.data.rows import Example, RowError, parse_row, split_turns
from distillm_ray.data.templates import RenderedExample, Renderer

_ROWS_PER_BATCH = 4096
_ROWS_PER_CHUNK = 4096
KEY_BYTES = 16

TOKENIZED = pa.schema(
    [
        ("file", pa.int32()),
        ("row", pa.int64()),
        ("turn", pa.int32()),  # of a conversation that was split, from 1; else 0
        ("kind", pa.string()),  # of the problem; null if the row is good
        ("reason", pa.string()),
        ("id", pa.string()),
        ("split_key", pa.binary(KEY_BYTES)),  # equal for equal prompts
        ("truncated", pa.bool_()),  # the response was cut off
        ("last_only", pa.bool_()),  # the template did not allow to learn the earlier turns
        ("text", pa.string()),
        ("references", pa.list_(pa.string())),
        ("columns", pa.string()),  # JSON: the row's own prompt, if responses are not required
        ("prompt_ids", pa.list_(pa.int32())),
        ("reference_ids", pa.list_(pa.list_(pa.int32()))),
        # Empty where the demonstration is the prompt with its first reference.
        ("demonstration_prompt_ids", pa.list_(pa.int32())),
        ("demonstration_response_ids", pa.list_(pa.int32())),
        ("demonstration_loss_mask", pa.list_(pa.bool_())),
    ]
)


MapRows: TypeAlias = Callable[[pa.Table], pa.Table]
"""Turns a table of `raw_table` into one whose first three columns give the order of its rows."""

MapFiles: TypeAlias = Callable[[Sequence[DataFile], MapRows], pa.Table]
"""`map_files` or `ray_data.map_files`: their tables are equal."""


def map_files(
    files: Sequence[DataFile], map_rows: MapRows, *, max_rows: int | None = None
) -> pa.Table:
    """What `map_rows` makes of all rows, in the order of files and rows.

    `max_rows` of each file are read, None: all.

    Raises:
        DataError: a file cannot be read.
    """
    tables = []
    for index, file in enumerate(files):
        with file.here().open("rb") as stream:
            tables += [map_rows(one) for one in raw_batches(stream, file, index, max_rows=max_rows)]
    return pa.concat_tables(tables)


def iterate(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows of a table, without all of them as Python objects at once."""
    for batch in table.to_batches(max_chunksize=_ROWS_PER_CHUNK):
        yield from batch.to_pylist()


def places_of(table: pa.Table) -> NDArray[np.int64]:
    """The first three columns, `[N, 3]`: they give the order of the rows."""
    names = table.column_names[:3]
    return np.column_stack([table[name].to_numpy() for name in names]).astype(np.int64)


def flags(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    """A column of truth values; null is false."""
    return column.fill_null(False).to_numpy()


def line_names(table: pa.Table, files: Sequence[DataFile]) -> pa.ChunkedArray:
    """`STEM-LINE` of each row."""
    return joined(pa.chunked_array([unique_stems(files)]).take(table["file"]), "-", table["row"])


def joined(left: pa.ChunkedArray, separator: str, right: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts, each with a separator and a number."""
    texts = [left, right.cast(pa.string()), pa.scalar(separator)]
    return pc.call_function("binary_join_element_wise", texts)


def unique_stems(files: Sequence[DataFile]) -> list[str]:
    """A name for each file: its stem, with the file's index where two files share it."""
    stems = Counter(file.path.stem for file in files)
    return [
        file.path.stem if stems[file.path.stem] == 1 else f"{file.path.stem}.{index}"
        for index, file in enumerate(files)
    ]


def raw_batches(
    stream: BinaryIO, file: DataFile, index: int, *, max_rows: int | None = None
) -> Iterator[pa.Table]:
    """The rows of a file as tables of (file, row number, JSON); `index` goes into `file`.

    Raises:
        DataError: the file is damaged.
    """
    rows: list[tuple[int, bytes]] = []
    for row in itertools.islice(read_rows(stream, file), max_rows):
        rows.append(row)
        if len(rows) == _ROWS_PER_BATCH:
            yield raw_table(index, rows)
            rows = []
    yield raw_table(index, rows)


def raw_table(index: int, rows: Sequence[tuple[int, bytes]]) -> pa.Table:
    """Rows of file `index`, each with its number and its JSON."""
    return pa.table(
        {
            "file": pa.array([index] * len(rows), pa.int32()),
            "row": pa.array([number for number, _ in rows], pa.int64()),
            "payload": pa.array([payload for _, payload in rows], pa.binary()),
        }
    )


def tokenize_rows(
    batch: pa.Table, renderer: Renderer, config: DataConfig, require_responses: bool
) -> pa.Table:
    """Turn a batch of raw rows into the columns of `TOKENIZED`."""
    out: list[dict[str, Any]] = []
    for file, row, payload in zip(
        batch["file"].to_pylist(),
        batch["row"].to_pylist(),
        batch["payload"].to_pylist(),
        strict=True,
    ):
        place = {"file": file, "row": row, "turn": 0}
        try:
            example = parse_row(
                decode_row(payload), require_responses=require_responses, columns=config.columns
            )
        except RowError as error:
            out.append({**place, "kind": error.kind, "reason": error.reason})
            continue
        parts = (example,)
        if config.conversations == "split" and require_responses:
            parts = split_turns(example)
        for turn, part in enumerate(parts, start=1 if len(parts) > 1 else 0):
            columns = _rendered(part, renderer, config, require_responses)
            out.append({**place, "turn": turn, "split_key": _split_key(example), **columns})
    return pa.Table.from_pylist(out, schema=TOKENIZED)


def _rendered(
    example: Example, renderer: Renderer, config: DataConfig, require_responses: bool
) -> dict[str, Any]:
    """The columns of one sequence, or what is wrong with it."""
    try:
        rendered = renderer.render(example)
        limit = config.max_response_tokens if require_responses else None
        _check_lengths(rendered, config.max_prompt_tokens, limit)
    except RowError as error:
        return {"kind": error.kind, "reason": error.reason}
    except Exception as error:
        # Template and tokenizer are code of the user's model. Whatever they raise concerns this
        # row, which is named and refused or skipped like any other bad row.
        problem = RowError("malformed", f"{type(error).__name__}: {error}")
        return {"kind": problem.kind, "reason": problem.reason}
    columns = _columns(example, rendered)
    if not require_responses:
        columns["columns"] = json.dumps(dict(example.columns))
    return columns


def _split_key(example: Example) -> bytes:
    """Equal for equal prompts, and for all turns of a conversation."""
    words = repr([(turn.role, turn.content) for turn in example.turns])
    return hashlib.blake2b(words.encode(), digest_size=KEY_BYTES).digest()


def _columns(example: Example, rendered: RenderedExample) -> dict[str, Any]:
    demonstration = rendered.demonstration_prompt_ids, rendered.demonstration_response_ids
    is_own = demonstration != (rendered.prompt_ids, *rendered.reference_ids[:1])
    is_own &= bool(rendered.demonstration_response_ids)
    return {
        "id": example.example_id,
        "text": example.text,
        "references": example.references,
        "truncated": example.truncated,
        "last_only": rendered.last_only,
        "prompt_ids": rendered.prompt_ids,
        "reference_ids": rendered.reference_ids,
        "demonstration_prompt_ids": rendered.demonstration_prompt_ids if is_own else [],
        "demonstration_response_ids": rendered.demonstration_response_ids if is_own else [],
        "demonstration_loss_mask": rendered.demonstration_loss_mask if is_own else [],
    }


def _check_lengths(
    rendered: RenderedExample, max_prompt_tokens: int, max_response_tokens: int | None
) -> None:
    """Check prompt and first reference; a demonstration has the same tokens.

    Without a limit, responses are not trained on.
    """
    if not rendered.prompt_ids or not rendered.demonstration_prompt_ids:
        raise RowError("empty", "the prompt has no tokens")
    if len(rendered.prompt_ids) > max_prompt_tokens:
        raise RowError(
            "long",
            f"the prompt has {len(rendered.prompt_ids)} tokens, data.max_prompt_tokens is"
            f" {max_prompt_tokens}",
        )
    if max_response_tokens is None or not rendered.reference_ids:
        return
    if len(rendered.reference_ids[0]) > max_response_tokens:
        raise RowError(
            "long",
            f"the response has {len(rendered.reference_ids[0])} tokens, data.max_response_tokens is"
            f" {max_response_tokens}",
        )
