"""Proof that all ranks and the driver have the same run directory, before the first step.

    rank 0 ── a name that nobody had before ──► every rank writes a file of its own under it
    every rank ── reads the files of all others, and the driver's config ──► all agree, or all raise

On a directory that is not shared, each node would keep its part of every checkpoint, and the first
resume would fail.
"""

from __future__ import annotations

import socket
import time
import uuid
from pathlib import Path
from typing import Protocol, TypeVar

from distillm_ray.errors import RunDirectoryError, StoreError
from distillm_ray.remote.store import RemoteDirectory
from distillm_ray.run_directory import CONFIG_FILE

VISIBLE_S = 60.0  # after which a network file system shows what another node has written
_POLL_S = 0.2
_PREFIX = ".shared-"

Value = TypeVar("Value")


class Ranks(Protocol):
    """A rank among the others."""

    rank: int

    def collect(self, value: Value) -> list[Value]:
        """Every rank's value, in the order of ranks."""
        ...


def check_shared(directory: Path, ranks: Ranks, config_text: str) -> None:
    """Raise on all ranks unless each reads what every other and the driver wrote.

    Args:
        config_text: of the config that the driver has written there.

    Raises:
        RunDirectoryError: with the ranks and nodes that do not share the directory.
    """
    node = socket.gethostname()
    name = ranks.collect(f"{_PREFIX}{uuid.uuid4().hex}")[0]
    problem = ""
    own = directory / f"{name}-{ranks.rank}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        own.write_text(node)
    except OSError as error:
        problem = f"rank {ranks.rank} on {node} cannot write there: {error}"
    nodes = ranks.collect(node)
    expected = {directory / f"{name}-{rank}": other for rank, other in enumerate(nodes)}
    unseen = _unseen(expected | {directory / CONFIG_FILE: config_text})
    if unseen and not problem:
        writer = "the driver"
        if (path := unseen[0]) in expected:
            writer = f"rank {list(expected).index(path)} on {expected[path]}"
        problem = f"rank {ranks.rank} on {node} does not see what {writer} wrote there"
    problems = [one for one in ranks.collect(problem) if one]
    own.unlink(missing_ok=True)
    if problems:
        raise RunDirectoryError(
            f"run.directory must be a directory that all nodes with a learner share, and the"
            f" driver's, got {directory}: {'; '.join(problems)}. Name one on a shared disk, or run"
            " driver and learners on one node"
        )


def check_reached(store: RemoteDirectory, ranks: Ranks) -> None:
    """Raise on all ranks unless each can write to the store and reads what every other wrote.

    Raises:
        RunDirectoryError: with the ranks and nodes that cannot.
    """
    node = socket.gethostname()
    name = ranks.collect(f"{_PREFIX}{uuid.uuid4().hex}")[0]
    problem = ""
    try:
        store.write(f"{name}-{ranks.rank}", node.encode())
    except StoreError as error:
        problem = f"rank {ranks.rank} on {node} cannot write there: {error}"
    nodes = ranks.collect(node)
    try:
        for rank, other in enumerate(nodes):
            if not problem and store.read(f"{name}-{rank}") != other.encode():
                problem = f"rank {ranks.rank} on {node} does not see what rank {rank} wrote there"
    except StoreError as error:
        problem = f"rank {ranks.rank} on {node} cannot read there: {error}"
    problems = [one for one in ranks.collect(problem) if one]
    if problems:
        raise RunDirectoryError(
            f"run.directory must be an address that all nodes with a learner can use, got"
            f" {store.address}: {'; '.join(problems)}. Credentials must be in the environment of"
            " every node, when Ray is started there"
        )
    store.delete(f"{name}-{ranks.rank}")


def _unseen(expected: dict[Path, str]) -> list[Path]:
    """The files that do not have the expected text within `VISIBLE_S`."""
    deadline = time.monotonic() + VISIBLE_S
    while True:
        unseen = [path for path, text in expected.items() if _text(path) != text]
        if not unseen or time.monotonic() > deadline:
            return unseen
        time.sleep(_POLL_S)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None
