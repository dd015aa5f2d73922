"""A digest for each row of a run's data, so that a resumed run reads what it began with.

The digests cover what is trained on: token ids and loss mask. A row that was edited, added or
removed, and a template that renders differently, are named by file and line before any model loads.
"""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distillm_ray.data.splits import Dataset, Splits
from distillm_ray.errors import DataError
from distillm_ray.files import write_atomically

FILE = "data_digest.npz"


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
        for dataset in _datasets(splits):
            _compare(dataset, saved)


def digests(dataset: Dataset) -> NDArray[np.uint32]:
    """CRC-32 of each prompt with its demonstration and references."""
    learned = {one.prompt_id: one for one in dataset.demonstrations}
    values = np.zeros(len(dataset.prompts), dtype=np.uint32)
    for index, prompt in enumerate(dataset.prompts):
        arrays = [prompt.token_ids, *prompt.reference_ids]
        if one := learned.get(prompt.prompt_id):
            arrays += [one.prompt_ids, one.response_ids, one.loss_mask]
        value = 0
        for array in arrays:
            value = zlib.crc32(len(array).to_bytes(8, "little"), value)
            value = zlib.crc32(array.tobytes(), value)
        values[index] = value
    return values


def _datasets(splits: Splits) -> list[Dataset]:
    return [splits.train, splits.validation, *([splits.test] if splits.test else [])]


def _to_bytes(splits: Splits) -> bytes:
    file = io.BytesIO()
    arrays = {}
    for dataset in _datasets(splits):
        arrays[f"{dataset.split}_digests"] = digests(dataset)
        arrays[f"{dataset.split}_places"] = dataset.places
    np.savez(file, **arrays)
    return file.getvalue()


def _compare(dataset: Dataset, saved: Any) -> None:
    """`saved` is an npz file, which numpy does not type."""
    split = dataset.split
    if f"{split}_digests" not in saved:
        return  # a split that the run did not have; check_resume compares the config
    old, new = saved[f"{split}_digests"], digests(dataset)
    old_places, new_places = saved[f"{split}_places"], dataset.places
    length = min(len(old), len(new))
    differs = (old[:length] != new[:length]) | (old_places[:length] != new_places[:length]).any(1)
    changed = np.flatnonzero(differs)
    if not len(changed) and len(old) == len(new):
        return
    first = int(changed[0]) if len(changed) else length
    places = new_places if first < len(new) else old_places
    file, row = (int(value) for value in places[first][:2])
    name = dataset.files[file]
    if len(old) != len(new):
        what = f"the split had {len(old)} usable rows then and has {len(new)} now"
    else:
        what = f"{len(changed)} of {len(new)} rows differ"
    raise DataError(
        f"data.{split}: {name}:{row} is not the row that the run began with ({what}): a resumed run"
        " must draw from the same data; put the file back, or set run.directory to a new directory"
        " to start another run"
    )
