"""Files and directories appear complete or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from distillm_ray.files import new_directory, write_atomically


def test_the_content_of_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_previous_content_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.yaml"
    write_atomically(path, b"one")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*config\.yaml"):
        write_atomically(path, b"two")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_appears_when_its_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "models" / "student"
    with new_directory(path) as directory:
        (directory / "config.json").write_text("{}")
        assert not path.exists()
    assert [file.name for file in path.iterdir()] == ["config.json"]
    assert list(path.parent.iterdir()) == [path]


def test_a_failing_block_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_directory(tmp_path / "student") as directory:
        (directory / "config.json").write_text("{}")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_replaced_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for content in ("one", "two"):
        with new_directory(path, replace=True) as directory:
            (directory / content).touch()
    with (
        pytest.raises(OSError, match="not empty"),
        new_directory(path) as directory,
    ):
        (directory / "three").touch()
    assert [file.name for file in path.iterdir()] == ["two"]
    assert list(tmp_path.iterdir()) == [path]


def test_files_left_by_a_killed_writer_are_removed_by_the_next_replacement(tmp_path: Path) -> None:
    killed = new_directory(tmp_path / "model", replace=True)
    (killed.__enter__() / "half").touch()
    with new_directory(tmp_path / "model", replace=True):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_everything_is_synced_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name
        synced.append((name, (tmp_path / "model").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    with new_directory(tmp_path / "model") as directory:
        (directory / "weights").mkdir()
        (directory / "weights" / "shard").touch()
        new = directory.name
    assert sorted(synced[:3]) == sorted([("shard", False), ("weights", False), (new, False)])
    assert synced[3:] == [(tmp_path.name, True)]
