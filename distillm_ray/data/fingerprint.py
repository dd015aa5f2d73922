"""A digest for each row of a run's data, so that a resumed run reads what it began with.

The digests cover what is trained on, the corpus included: token ids and loss mask. A row that was
edited, added or removed, and a template that renders differently, are named by file and line before
any model loads.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from distillm_ray.data.corpus import Corpus
from distillm_ray.data.sequences import ID_COLUMNS
from distillm_ray.data.splits import Dataset, Splits
from distillm_ray.errors import DataError
from distillm_ray.files import write_atomically

FILE = "data_digest.npz"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Digests:
    """Of one list of files."""

    name: str  # its key in `data`
    unit: Literal["rows", "pieces"]  # what has a digest
    files: tuple[str, ...]
    places: NDArray[np.int64]
    values: NDArray[np.uint32]


def keep_or_compare(directory: Path, splits: Splits, *, resumed: bool) -> None:
    """Write the digests of a new run; compare those of a resumed one.

    Raises:
        DataError: names the first row that is not the one that the run began with.
    """
    path = directory / FILE
    if not resumed or not path.exists():
        write_atomically(path, _to_bytes(splits))
        return
    with np.load(path, allow_pickle=False) as saved:
        for part in _digests(splits):
            _compare(part, saved)


def digests(dataset: Dataset) -> NDArray[np.uint32]:
    """CRC-32 of each prompt with its demonstration and references."""
    table = dataset.prompts.table.select(ID_COLUMNS)  # without texts
    learned = iter(dataset.demonstrations.over(table))  # in the order of the prompts
    one = next(learned, None)
    values = np.zeros(len(dataset.prompts), dtype=np.uint32)
    for index, prompt in enumerate(dataset.prompts.over(table)):
        arrays = [prompt.token_ids, *prompt.reference_ids]
        if one is not None and one.prompt_id == prompt.prompt_id:
            arrays += [one.prompt_ids, one.response_ids, one.loss_mask]
            one = next(learned, None)
        values[index] = _digest(arrays)
    return values


def corpus_digests(corpus: Corpus) -> NDArray[np.uint32]:
    """CRC-32 of each piece."""
    values = (_digest([one.prompt_ids, one.response_ids]) for one in corpus.pieces)
    return np.fromiter(values, dtype=np.uint32, count=len(corpus.pieces))


def _digest(arrays: Sequence[NDArray[Any]]) -> int:
    value = 0
    for array in arrays:
        value = zlib.crc32(len(array).to_bytes(8, "little"), value)
        value = zlib.crc32(array.tobytes(), value)
    return value


def _digests(splits: Splits) -> list[_Digests]:
    datasets = [splits.train, splits.validation, *([splits.test] if splits.test else [])]
    found = [
        _Digests(
            name=dataset.split,
            unit="rows",
            files=dataset.files,
            places=dataset.places,
            values=digests(dataset),
        )
        for dataset in datasets
    ]
    if (corpus := splits.corpus) is not None:
        found.append(
            _Digests(
                name="corpus",
                unit="pieces",
                files=corpus.files,
                places=corpus.places,
                values=corpus_digests(corpus),
            )
        )
    return found


def _to_bytes(splits: Splits) -> bytes:
    file = io.BytesIO()
    arrays = {}
    for part in _digests(splits):
        arrays[f"{part.name}_digests"] = part.values
        arrays[f"{part.name}_places"] = part.places
    np.savez(file, **arrays)
    return file.getvalue()


def _compare(part: _Digests, saved: Any) -> None:
    """`saved` is an npz file, which numpy does not type."""
    if f"{part.name}_digests" not in saved:
        return  # files that the run did not have; check_resume compares the config
    old, new = saved[f"{part.name}_digests"], part.values
    old_places, new_places = saved[f"{part.name}_places"], part.places
    length = min(len(old), len(new))
    differs = (old[:length] != new[:length]) | (old_places[:length] != new_places[:length]).any(1)
    changed = np.flatnonzero(differs)
    if not len(changed) and len(old) == len(new):
        return
    first = int(changed[0]) if len(changed) else length
    places = new_places if first < len(new) else old_places
    file, row = (int(value) for value in places[first][:2])
    name = part.files[file]
    if len(old) != len(new):
        what = f"data.{part.name} had {len(old)} usable {part.unit} then and has {len(new)} now"
    else:
        what = f"{len(changed)} of {len(new)} {part.unit} differ"
    raise DataError(
        f"data.{part.name}: {name}:{row} is not the row that the run began with ({what}): a resumed"
        " run must draw from the same data; put the file back, or set run.directory to a new"
        " directory to start another run"
    )
