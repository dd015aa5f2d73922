"""Models and data in an object store: each node fetches them once, before the first use.

    s3://BUCKET/KEY ──► list: names, sizes, times = the version ──► CACHE/inputs/DIGEST/NAME

The digest is that of address and version, so a changed object is fetched again, and what others
still use stays. A download appears under its name when it is complete. The driver fixes the version
of every input at its start (`pinned`); a node that finds another one refuses.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from distillm_ray.cache_directory import cache_directory
from distillm_ray.config import Config, RemotePath
from distillm_ray.errors import StoreError
from distillm_ray.files import new_directory
from distillm_ray.remote.store import RemoteDirectory, StoredObject, endpoint

PARALLEL_DOWNLOADS = 8
_FOLDER = "inputs"
_SECTIONS = ("teacher", "student", "data")  # of a config: what they name is read


def pinned(config: Config) -> Config:
    """The config with every input fetched to this node, and its version fixed.

    Raises:
        StoreError: with the key of the input.
    """
    sections = {name: getattr(config, name) for name in _SECTIONS}
    return config.model_copy(
        update={
            name: _pinned(section, f"{name}.")
            for name, section in sections.items()
            if section is not None
        }
    )


def fetched(place: Path | RemotePath) -> Path:
    """The file or directory on this node. A path stays as it is; an object is fetched if needed.

    Other processes of the node wait for the one that fetches.

    Raises:
        StoreError: the store refuses or cannot be reached, nothing is there, or an address whose
            version is fixed has other objects now.
    """
    if isinstance(place, Path):
        return place
    if place.version is not None and (known := _entry(place)).is_dir():
        return known / place.name
    address, objects = _listed(place)
    if place.version is not None and address.version != place.version:
        raise StoreError(
            f"{place} has changed since the run started: its nodes would work with different files;"
            " start the run again"
        )
    entry = _entry(address)
    entry.parent.mkdir(parents=True, exist_ok=True)
    with _locked(entry.with_suffix(".lock")):
        if not entry.is_dir():
            with new_directory(entry, replace=True) as partial:
                _download(address, objects, partial / address.name)
                if _listed(place)[0].version != address.version:
                    raise StoreError(
                        f"{place} changed while it was fetched: wait until it is complete, and"
                        " give the same command again"
                    )
    return entry / address.name


def _pinned(section: BaseModel, prefix: str) -> BaseModel:
    """The section with the addresses in it, and in its sections, fixed."""

    def fixed(value: object, key: str) -> object:
        match value:
            case RemotePath():
                try:
                    address, _ = _listed(value)
                    fetched(address)
                except StoreError as error:
                    raise StoreError(f"{key}: {error}") from error
                return address
            case tuple():
                parts = tuple(fixed(one, f"{key}.{index}") for index, one in enumerate(value))
                same = all(one is other for one, other in zip(parts, value, strict=True))
                return value if same else parts
            case BaseModel():
                return _pinned(value, f"{key}.")
            case _:
                return value

    values = {name: getattr(section, name) for name in type(section).model_fields}
    new = {name: fixed(value, f"{prefix}{name}") for name, value in values.items()}
    changed = {name: value for name, value in new.items() if value is not values[name]}
    return section.model_copy(update=changed) if changed else section


def _listed(place: RemotePath) -> tuple[RemotePath, Mapping[str, StoredObject]]:
    """The address with its version, and its objects; the name of the address itself is empty."""
    directory = RemoteDirectory(place)
    itself = directory.itself()
    objects = {"": itself} if itself is not None else directory.files()
    if not objects:
        raise StoreError(f"{place}: there is no such object, and none below it")
    facts = [(name, one.size, one.modified_ns) for name, one in sorted(objects.items())]
    return place.at(_digest(facts)), objects


def _entry(address: RemotePath) -> Path:
    """The directory that holds this version."""
    digest = _digest([str(address), endpoint(address), address.version])
    return cache_directory() / _FOLDER / digest


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def _download(address: RemotePath, objects: Mapping[str, StoredObject], target: Path) -> None:
    """Fetch objects side by side.

    Raises:
        StoreError: an object is shorter or longer than it was listed.
    """
    directory = RemoteDirectory(address)
    stop = threading.Event()
    with _progress(address, sum(one.size for one in objects.values())) as advance:

        def advance_or_stop(num_bytes: int) -> None:
            if stop.is_set():
                raise StoreError(f"{address}: stopped")
            advance(num_bytes)

        def fetch(name: str) -> None:
            path = target / name if name else target
            directory.download(name, path, advance_or_stop)
            if (size := path.stat().st_size) != objects[name].size:
                raise StoreError(
                    f"{directory.address.child(name) if name else address} must have"
                    f" {objects[name].size:,} bytes, got {size:,}: it changed while it was fetched;"
                    " give the same command again"
                )

        with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
            try:
                for done in as_completed([pool.submit(fetch, name) for name in objects]):
                    done.result()
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)


class _Advance:
    """Tells a progress bar about bytes, from any thread."""

    def __init__(self, progress: Progress, address: RemotePath, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task(f"fetching {address}", total=total)

    def __call__(self, num_bytes: int) -> None:
        self._progress.advance(self._task, num_bytes)


@contextmanager
def _progress(address: RemotePath, total: int) -> Iterator[_Advance]:
    """A bar on a terminal; elsewhere one line, on stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"fetching {address}: {total:,} bytes", file=sys.stderr, flush=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns,
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        yield _Advance(progress, address, total)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for the processes of this node that fetch the same. The lock ends with its process."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
