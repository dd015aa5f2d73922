"""Ranks, as threads, that prove to each other that they have the same run directory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from distillm_ray.errors import RunDirectoryError
from distillm_ray.learner import shared_directory
from distillm_ray.learner.shared_directory import check_shared

CONFIG = "run: {}\n"


class Rank:
    """One of several threads that exchange values."""

    def __init__(self, rank: int, values: list[Any], barrier: threading.Barrier) -> None:
        self.rank = rank
        self._values = values
        self._barrier = barrier

    def collect(self, value: Any) -> list[Any]:
        self._values[self.rank] = value
        self._barrier.wait(10)
        values = list(self._values)
        self._barrier.wait(10)
        return values


def check_on(*directories: Path) -> list[str]:
    """What each rank raises; empty where it does not."""
    values, barrier = [None] * len(directories), threading.Barrier(len(directories))

    def check(rank: int) -> str:
        try:
            check_shared(directories[rank], Rank(rank, values, barrier), CONFIG)
        except RunDirectoryError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(directories)) as threads:
        return list(threads.map(check, range(len(directories))))


def written(directory: Path) -> Path:
    """A run directory as the driver leaves it."""
    directory.mkdir()
    (directory / "config.yaml").write_text(CONFIG)
    return directory


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_directory, "VISIBLE_S", 0.3)


def test_ranks_that_share_the_directory_leave_nothing_in_it(tmp_path: Path) -> None:
    shared = written(tmp_path / "run")
    assert check_on(shared, shared, shared) == ["", "", ""]
    assert [path.name for path in shared.iterdir()] == ["config.yaml"]


def test_a_rank_with_a_directory_of_its_own_is_refused_by_key_on_all_ranks(tmp_path: Path) -> None:
    shared = written(tmp_path / "run")
    refusals = check_on(shared, shared, written(tmp_path / "own"))
    for refusal in refusals:
        assert refusal.startswith("run.directory must be a directory that all nodes with a learner")
        assert "rank 2 on" in refusal and "does not see what rank 0 on" in refusal
        assert "rank 0 on" in refusal and "does not see what rank 2 on" in refusal


def test_a_directory_that_the_driver_did_not_write_is_refused(tmp_path: Path) -> None:
    (refusal,) = check_on(tmp_path / "empty")
    assert "rank 0 on" in refusal and "does not see what the driver wrote there" in refusal


@pytest.mark.parametrize("delayed", ["config.yaml", ".shared"])
def test_a_file_that_appears_late_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delayed: str
) -> None:
    shared = written(tmp_path / "run")
    looks: list[Path] = []
    read: Callable[[Path], str | None] = shared_directory._text

    def late(path: Path) -> str | None:
        looks.append(path)
        return None if delayed in path.name and len(looks) < 3 else read(path)

    monkeypatch.setattr(shared_directory, "_text", late)
    assert check_on(shared) == [""]
