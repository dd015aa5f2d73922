"""Finds data files and reads their rows, each with its position in the file.

No Ray here: the check before a run reads the first rows with the same code as Ray Data's tasks.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from distillm_ray.config import DataConfig, RemotePath
from distillm_ray.data.rows import RowError, parse_document, parse_row
from distillm_ray.errors import DataError
from distillm_ray.remote.inputs import fetched

Split: TypeAlias = Literal["train", "validation", "test"]
FileList: TypeAlias = Literal[Split, "corpus"]
"""A key of `data` that lists files."""
Format: TypeAlias = Literal["jsonl", "parquet", "arrow"]

_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of Arrow
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_SHARD = re.compile(r"-(?P<index>\d+)-of-(?P<total>\d+)")
_NUM_ROWS_CHECKED = 3  # per file, before anything starts
_PARQUET_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """One file of rows."""

    path: Path  # absolute, on the driver's node
    name: str  # as the user wrote it
    format: Format
    origin: RemotePath | None = None  # what other nodes fetch it with; None: all have `path`
    below: str = "."  # its place in what is fetched

    def here(self) -> Path:
        """The file on this node.

        Raises:
            StoreError: it cannot be fetched.
        """
        return self.path if self.origin is None else fetched(self.origin) / self.below

    def position(self, row: int) -> str:
        """`FILE:LINE` for messages. Rows of binary formats are counted from 1 too."""
        return f"{self.name}:{row}"


def find_files(places: Sequence[Path | RemotePath], split: FileList) -> tuple[DataFile, ...]:
    """The files of `places`, in order; a directory stands for its files of `split`.

    Of a directory the corpus is the training split.

    Raises:
        StoreError: an object cannot be fetched.
        DataError: a path does not exist, has an unknown extension, is empty, is listed twice, or
            is a directory without files of the split.
    """
    files: list[DataFile] = []
    for place in places:
        path = fetched(place)
        if not path.exists():
            raise DataError(f"data.{split}: {path} does not exist")
        found = _files_of_directory(path, split) if path.is_dir() else [_data_file(path, split)]
        if isinstance(place, RemotePath):
            found = [_from_store(file, path, place) for file in found]
        files += found
    seen: set[Path] = set()
    for file in files:
        if file.path in seen:
            raise DataError(
                f"data.{split}: {file.name} is listed twice: its rows would be read twice"
            )
        seen.add(file.path)
        if file.path.stat().st_size == 0:
            raise DataError(f"data.{split}: {file.name} is empty")
    return tuple(files)


def check_files(
    config: DataConfig, *, require_responses: bool = True, with_corpus: bool = True
) -> None:
    """Check existence, format and first rows of every file, in milliseconds and without Ray.

    `with_corpus` is False where nothing is trained.

    Raises:
        DataError: the first problem found. With `bad_rows: skip` the rows are not checked.
    """

    def parse(row: Any) -> None:
        parse_row(row, require_responses=require_responses, columns=config.columns)

    def parse_text(row: Any) -> None:
        parse_document(row, config.corpus_column)

    lists: tuple[tuple[FileList, tuple[Path | RemotePath, ...], Callable[[Any], None]], ...] = (
        ("train", config.train, parse),
        ("validation", config.validation, parse),
        ("test", config.test, parse),
        ("corpus", config.corpus if with_corpus else (), parse_text),
    )
    for split, places, check in lists:
        for file in find_files(places, split):
            if config.bad_rows == "fail":
                _check_first_rows(file, check)


def read_rows(stream: BinaryIO, file: DataFile) -> Iterator[tuple[int, bytes]]:
    """Yield each row's number, counted from 1, and its JSON; blank lines are counted, not yielded.

    Raises:
        DataError: a binary file is damaged, or its content does not match its extension.
    """
    if file.format == "jsonl":
        for line_number, line in enumerate(stream, start=1):
            stripped = line.removeprefix(b"\xef\xbb\xbf") if line_number == 1 else line
            if stripped.strip():
                yield line_number, stripped
        return
    row_number = 0
    try:
        for batch in _record_batches(stream, file):
            _check_column_names(batch.schema, file.name)
            for row in batch.to_pylist():
                row_number += 1
                yield row_number, json.dumps(row, default=_to_json).encode()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file.name} is not a readable {file.format} file: {error}") from error


def decode_row(payload: bytes) -> Any:
    """Decode one line of JSON.

    Raises:
        RowError: the line is not UTF-8 or not JSON.
    """
    try:
        return json.loads(payload.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        hint = "; the file seems to be UTF-16: convert it" if payload[:2] in _UTF_16 else ""
        raise RowError("malformed", f"not valid UTF-8 at byte {error.start}{hint}") from error
    except json.JSONDecodeError as error:
        spread = payload.strip() in (b"{", b"[", b"[{")
        hint = "; a row must stand on one line (JSONL), this one goes on in the next"
        raise RowError(
            "malformed",
            f"not valid JSON: {error.msg} at column {error.colno}{hint if spread else ''}",
        ) from error
    except (ValueError, RecursionError) as error:  # too many digits, or nested too deeply
        raise RowError("malformed", f"cannot be read as JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that stands twice: the last would win, and nobody knows which is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RowError("malformed", f"the key {twice!r} stands twice in one object")
    return found


def _to_json(value: Any) -> Any:
    """A value that JSON lacks. Bytes become text if they are valid UTF-8, else an object."""
    if not isinstance(value, bytes):
        return str(value)
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return {"bytes": len(value)}


def _record_batches(stream: BinaryIO, file: DataFile) -> Iterator[pa.RecordBatch]:
    if file.format == "parquet":
        yield from pq.ParquetFile(stream).iter_batches(batch_size=_PARQUET_BATCH_ROWS)
    else:
        with pa.ipc.open_stream(stream) as reader:
            yield from reader
        stream.seek(-len(_END_OF_STREAM), os.SEEK_END)
        if stream.read() != _END_OF_STREAM:  # a copy that ends between two batches reads well
            raise DataError(f"{file.name} is cut off: it has no end marker; copy it again")


def _check_column_names(fields: pa.Schema | pa.StructType, name: str) -> None:
    names = [field.name for field in fields]
    twice = sorted({one for one in names if names.count(one) > 1})
    if twice:
        raise DataError(f"{name} has two columns named {', '.join(twice)}: rename one of each")
    for field in fields:
        if pa.types.is_struct(field.type):
            _check_column_names(field.type, name)


def _check_first_rows(file: DataFile, check: Callable[[Any], None]) -> None:
    with file.here().open("rb") as stream:
        rows = read_rows(stream, file)
        for _ in range(_NUM_ROWS_CHECKED):
            item = next(rows, None)
            if item is None:
                break
            number, payload = item
            if number == 1 and file.format == "jsonl" and payload.lstrip()[:1] == b"[":
                raise DataError(
                    f"{file.position(number)}: the file is one JSON array; write one object per"
                    " line (JSONL)"
                )
            try:
                check(decode_row(payload))
            except RowError as error:
                raise DataError(f"{file.position(number)}: {error.reason}") from error


def _data_file(path: Path, split: FileList) -> DataFile:
    if split == "corpus" and path.suffix == ".txt":
        raise DataError(
            f"data.corpus: {path} must be JSONL, Parquet or a Hugging Face dataset directory, got"
            ' .txt: plain text does not say where a document ends; write {"text": …}, one document'
            " a line, into a .jsonl file"
        )
    if path.suffix not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise DataError(
            f"data.{split}: {path} must be one of {known} or a Hugging Face dataset directory, got"
            f" {path.suffix or 'no extension'}"
        )
    return DataFile(path=path.resolve(), name=str(path), format=_FORMATS[path.suffix])


def _from_store(file: DataFile, root: Path, address: RemotePath) -> DataFile:
    """A file that was found in what was fetched to `root`, under the name that it has there."""
    below = file.path.relative_to(root.resolve()).as_posix()
    child = address if below == "." else address.child(below)
    return replace(file, name=str(child), origin=address, below=below)


def _files_of_directory(directory: Path, split: FileList) -> list[DataFile]:
    """Shards of a `save_to_disk` directory, else the files that have the split's name."""
    wanted: Split = "train" if split == "corpus" else split
    if (directory / "dataset_dict.json").is_file():
        splits = _read_description(directory / "dataset_dict.json", "splits")
        if wanted not in splits:
            raise DataError(
                f"data.{split}: {directory} has no split {wanted!r}, only {', '.join(splits)};"
                " name the split's own directory instead"
            )
        return _files_of_directory(directory / wanted, split)
    if (directory / "state.json").is_file():
        listed = _read_description(directory / "state.json", "_data_files")
        shards = [directory / str(item["filename"]) for item in listed]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise DataError(f"data.{split}: {directory} lacks {', '.join(missing)}")
        return [_data_file(shard, split) for shard in shards]
    found = sorted(
        path
        for folder in (directory, directory / "data")
        if folder.is_dir()
        for path in folder.iterdir()
        if path.is_file() and path.suffix in _FORMATS and path.name.startswith(wanted)
    )
    shard = re.compile(rf"{wanted}([-_.]?\d+(-of-\d+(-[0-9a-f]+)?)?)?")
    strange = [path.name for path in found if not shard.fullmatch(path.stem)]
    _check_shards(found, directory, split)
    if strange or len({(path.parent, path.suffix) for path in found}) > 1:
        raise DataError(
            f"data.{split}: {directory} holds more than the shards of one data set"
            f" ({', '.join(str(path.relative_to(directory)) for path in found)}): rows may be in it"
            " twice; list the files that are meant"
        )
    if not found:
        raise DataError(
            f"data.{split}: {directory} is not a Hugging Face dataset directory: it has neither"
            f" state.json nor dataset_dict.json nor files named {wanted}*.jsonl or"
            f" {wanted}*.parquet"
        )
    return [_data_file(path, split) for path in found]


def _read_description(path: Path, key: str) -> list[Any]:
    """A list in a file of `save_to_disk`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))[key]
        if not isinstance(found, list) or not found:
            raise TypeError(f"{key} is not a list with entries")
        if key == "_data_files":
            [item["filename"] for item in found]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    return found


def _check_shards(paths: Sequence[Path], directory: Path, split: FileList) -> None:
    """All shards of `NAME-00000-of-00002`, and no others, must be there."""
    numbered = [match for path in paths if (match := _SHARD.search(path.stem))]
    if not numbered:
        return
    totals = {int(match["total"]) for match in numbered}
    indices = sorted(int(match["index"]) for match in numbered)
    if len(numbered) < len(paths) or len(totals) > 1 or indices != list(range(max(totals))):
        raise DataError(
            f"data.{split}: {directory} must hold all shards of one data set, got"
            f" {', '.join(path.name for path in paths)}: a download is incomplete, or files of two"
            " data sets are mixed; list the files that are meant"
        )
