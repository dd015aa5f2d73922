"""A table of token ids and texts in Arrow blocks, and sequences of objects made of its rows.

A row costs its bytes and no Python object, so that a data set of a million rows fits beside a run.
Arrays of ids are read-only views of Arrow's buffers. An unpickled table shares its buffers with
whatever it was read from: of one in Ray's object store a node has one copy, whoever reads it.
"""

from __future__ import annotations

import copy
import itertools
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, Self, TypeAlias, TypeVar, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from distillm_ray.types import Int32Array

RowNumbers: TypeAlias = NDArray[np.int64]
T = TypeVar("T")


class _Lists:
    """A block of a column of lists, of numbers or of lists of them."""

    def __init__(self, column: pa.ListArray) -> None:
        self.offsets: NDArray[np.int32] = column.offsets.to_numpy()
        values = column.values
        nested = pa.types.is_list(values.type)
        self.values: Any = _Lists(values) if nested else values.to_numpy(zero_copy_only=False)

    def __getitem__(self, row: int) -> NDArray[Any]:
        return self.values[self.offsets[row] : self.offsets[row + 1]]


class Block:
    """Consecutive rows of a table. Of a column that the table lacks, every value is empty."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.num_rows: int = batch.num_rows
        self._columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        self._lists: dict[str, _Lists] = {}

    def value(self, name: str, row: int) -> Any:
        """A single value, as Arrow gives it."""
        return self._columns[name][row].as_py()

    def text(self, name: str, row: int) -> str:
        """A text."""
        return self.value(name, row) if name in self._columns else ""

    def texts(self, name: str, row: int) -> tuple[str, ...]:
        """A list of texts."""
        return tuple(self.value(name, row)) if name in self._columns else ()

    def ids(self, name: str, row: int) -> Int32Array:
        """A list of ids, or of marks for them."""
        return self.lists(name)[row]

    def several_ids(self, name: str, row: int) -> tuple[Int32Array, ...]:
        """A list of lists of ids."""
        lists = self.lists(name)
        start, stop = lists.offsets[row : row + 2].tolist()
        return tuple([lists.values[index] for index in range(start, stop)])

    def first_ids(self, name: str, row: int) -> Int32Array:
        """The first of a list of lists of ids, which must not be empty."""
        lists = self.lists(name)
        return lists.values[lists.offsets[row]]

    def lists(self, name: str) -> _Lists:
        """The numpy views of a column of lists, made at its first use."""
        if name not in self._lists:
            self._lists[name] = _Lists(self._columns[name])
        return self._lists[name]


class TokenTable:
    """Arrow blocks, of which single rows are read."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.blocks = [Block(batch) for batch in table.to_batches() if batch.num_rows]
        sizes = [block.num_rows for block in self.blocks]
        self._starts = list(itertools.accumulate(sizes[:-1], initial=0))

    def __reduce__(self) -> tuple[type[TokenTable], tuple[pa.Table]]:
        return TokenTable, (self.table,)

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        return self.table.nbytes

    def select(self, names: Sequence[str]) -> TokenTable:
        """The same rows with these columns only; nothing is copied."""
        return TokenTable(self.table.select(names))

    def locate(self, row: int) -> tuple[Block, int]:
        """The block of a row, and its number there."""
        index = bisect_right(self._starts, row) - 1
        return self.blocks[index], row - self._starts[index]

    def lengths(self, name: str) -> RowNumbers:
        """How many ids each row has."""
        return self._joined([np.diff(block.lists(name).offsets) for block in self.blocks])

    def first_lengths(self, name: str) -> RowNumbers:
        """How many ids the first list of each row has; -1 where there is no list."""
        return self._joined([_first_lengths(block.lists(name)) for block in self.blocks])

    def _joined(self, parts: Sequence[NDArray[Any]]) -> RowNumbers:
        return np.concatenate([np.empty(0, dtype=np.int64), *parts])


class RowSequence(Sequence[T]):
    """Objects that are made of rows of a table each time when they are asked for."""

    def __init__(self, table: TokenTable, rows: RowNumbers) -> None:
        """`rows` are their numbers in the table, ascending."""
        self.table = table
        self.rows = rows

    @abstractmethod
    def _make(self, block: Block, row: int) -> T: ...

    def among(self, rows: RowNumbers) -> Self:
        """Those that are made of one of these rows."""
        return self._of(self.rows[np.isin(self.rows, rows, assume_unique=True)])

    def over(self, table: TokenTable) -> Self:
        """The same of another table's rows."""
        other = copy.copy(self)
        other.table = table
        return other

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Self: ...

    def __getitem__(self, index: int | slice) -> T | Self:
        if isinstance(index, slice):
            return self._of(self.rows[index])
        return self._make(*self.table.locate(int(self.rows[index])))

    def __iter__(self) -> Iterator[T]:
        for row in self.rows:
            yield self._make(*self.table.locate(int(row)))

    def _of(self, rows: RowNumbers) -> Self:
        part = copy.copy(self)
        part.rows = rows
        return part


def _first_lengths(lists: _Lists) -> NDArray[np.int64]:
    starts, stops = lists.offsets[:-1], lists.offsets[1:]
    lengths = np.append(np.diff(lists.values.offsets), -1)  # a last row may begin past the end
    return np.where(starts < stops, lengths[starts], -1)
