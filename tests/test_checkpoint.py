"""Incomplete and damaged checkpoints are left out; others are found, ordered and pruned."""

import errno
import json
from pathlib import Path

import pytest
import torch

from distillm_ray.errors import RunDirectoryError
from distillm_ray.learner import checkpoint
from distillm_ray.learner.checkpoint import CheckpointDirectory, CheckpointMeta
from distillm_ray.types import Validation


def meta(step: int, loss: float | None = None) -> CheckpointMeta:
    validation = None if loss is None else Validation(step=step, loss=loss, tokens=10)
    return CheckpointMeta(step=step, phi=0.3, validation=validation)


def write(directory: CheckpointDirectory, step: int, loss: float | None = None) -> None:
    directory.prepare(step)
    (directory.partial_path(step) / "learner" / "state").write_bytes(b"weights")
    directory.commit(meta(step, loss), f"buffer of {step}".encode())


def steps(directory: CheckpointDirectory) -> list[int]:
    return [found.meta.step for found in directory.complete()]


def test_a_committed_checkpoint_is_found_with_its_content(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path / "checkpoints", keep=2)
    assert directory.latest() is None
    write(directory, 100, loss=1.5)
    found = directory.latest()
    assert found is not None
    assert found.path.name == "step-00000100"
    assert found.meta == meta(100, 1.5)
    assert found.buffer_state() == b"buffer of 100"
    assert (found.learner_path / "state").read_bytes() == b"weights"


def test_unknown_keys_of_the_meta_data_are_ignored() -> None:
    text = json.dumps({**json.loads(meta(3, 1.5).to_json()), "zero_stage": 1})
    assert CheckpointMeta.from_json(text) == meta(3, 1.5)


def test_the_newest_checkpoints_and_the_best_one_are_kept(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path, keep=2)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, 2.4)):
        write(directory, step, loss)
    assert steps(directory) == [2, 4, 5]
    best = directory.best()
    assert best is not None and best.meta.step == 2


def test_without_validation_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path, keep=1)
    for step in (1, 2, 3):
        write(directory, step)
    assert steps(directory) == [3]


def test_a_partial_checkpoint_is_ignored_and_removed_by_the_next_one(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path, keep=2)
    write(directory, 1)
    directory.prepare(2)
    (directory.partial_path(2) / "learner" / "state").write_bytes(b"half")
    restarted = CheckpointDirectory(tmp_path, keep=2)
    assert steps(restarted) == [1]
    write(restarted, 3)
    assert steps(restarted) == [1, 3]
    assert not directory.partial_path(2).exists()


def test_a_directory_without_meta_data_is_ignored(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path, keep=2)
    write(directory, 1)
    (tmp_path / "step-00000002").mkdir()
    assert steps(directory) == [1]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("learner/state", "learner/state must have 7 bytes and"),
        ("buffer.bin", "buffer.bin must have 11 bytes and"),
        ("meta.json", "meta.json must have"),
        ("manifest.json", "manifest.json or meta.json cannot be read"),
    ],
)
@pytest.mark.parametrize("damage", ["removed", "cut off"])
def test_a_damaged_checkpoint_is_passed_over_by_name_for_the_one_before(
    tmp_path: Path, name: str, said: str, damage: str
) -> None:
    directory = CheckpointDirectory(tmp_path, keep=2)
    write(directory, 1)
    write(directory, 2)
    path = tmp_path / "step-00000002" / name
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:3])
    assert steps(directory) == [1]
    (found,) = directory.damaged()
    assert found.startswith(f"{tmp_path}/step-00000002 is damaged: {said}")
    write(directory, 2)  # when the run has come to its step again, it is replaced
    assert (steps(directory), directory.damaged()) == ([1, 2], [])


def test_a_checkpoint_lists_what_all_ranks_wrote(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path, keep=2)
    directory.prepare(1)
    (directory.partial_path(1) / "learner" / "state").write_bytes(b"weights")
    directory.commit(meta(1), b"buffer", [{"learner/state": 7}, {"learner/state": 7}])
    manifest = json.loads((tmp_path / "step-00000001" / "manifest.json").read_text())
    assert set(manifest) == {"learner/state", "buffer.bin", "meta.json"}
    assert (manifest["learner/state"], manifest["buffer.bin"]) == (7, 6)


def test_a_file_that_rank_0_does_not_see_commits_nothing_and_names_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_VISIBLE_S", 0.0)
    directory = CheckpointDirectory(tmp_path, keep=2)
    write(directory, 1)
    directory.prepare(2)
    elsewhere = {"learner/random-00001.pt": 5}
    with pytest.raises(RunDirectoryError) as caught:
        directory.commit(meta(2), b"buffer", [{}, elsewhere])
    assert "run.directory must be a directory that all nodes with a learner share" in str(
        caught.value
    )
    assert "lacks learner/random-00001.pt" in str(caught.value)
    assert "rank 1 has it" in str(caught.value)
    assert steps(directory) == [1]


def test_a_complete_checkpoint_of_the_same_step_is_kept(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path, keep=2)
    write(directory, 1, loss=1.0)
    write(directory, 1, loss=2.0)
    found = directory.latest()
    assert found is not None and found.meta == meta(1, 1.0)
    assert not directory.partial_path(1).exists()


def test_a_full_disk_keeps_the_previous_checkpoint_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = CheckpointDirectory(tmp_path, keep=2)
    write(directory, 1)

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    directory.prepare(2)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunDirectoryError) as caught:
        directory.commit(meta(2), b"buffer")
    assert "no space left for the checkpoint of step 2" in str(caught.value)
    assert "step-00000001 remains valid" in str(caught.value)
    assert not directory.partial_path(2).exists()
    assert steps(directory) == [1]


def test_torchs_error_for_a_full_device_is_reported_as_a_full_disk(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path, keep=2)
    directory.prepare(1)
    with (
        pytest.raises(RunDirectoryError, match="there is no earlier one"),
        directory.removing_partial_on_failure(1),
    ):
        torch.save({"weights": torch.zeros(10_000_000)}, "/dev/full")
    assert not directory.partial_path(1).exists()


def test_other_errors_propagate_and_leave_no_partial_directory(tmp_path: Path) -> None:
    directory = CheckpointDirectory(tmp_path, keep=2)
    directory.prepare(1)
    with (
        pytest.raises(RuntimeError, match="out of luck"),
        directory.removing_partial_on_failure(1),
    ):
        raise RuntimeError("out of luck")
    assert not directory.partial_path(1).exists()
