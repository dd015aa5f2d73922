from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from distillm_ray.config import Config
from distillm_ray.config.files import parse_config
from distillm_ray.config.remote_path import parse_remote_path
from distillm_ray.errors import RunDirectoryError, StoreError
from distillm_ray.learner.checkpoint import CheckpointDirectory, CheckpointMeta
from distillm_ray.learner.shared_directory import check_reached
from distillm_ray.remote import lease as leases
from distillm_ray.remote.lease import LEASE_FILE, Lease, Owner
from distillm_ray.remote.run_store import opened, upload_directory
from distillm_ray.remote.store import RemoteDirectory
from tests.object_store import BUCKET, ObjectStore

RUN = "runs/one"
ADDRESS = parse_remote_path(f"s3://{BUCKET}/{RUN}")


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SETTLE_S", 0.0)


def config(store: ObjectStore) -> Config:
    tree = {
        "run": {"directory": str(ADDRESS)},
        "teacher": {"model": "teacher"},
        "student": {"model": "student"},
        "data": {"train": ["train.jsonl"]},
        "learner": {"steps": 300, "batch_size": 2},
    }
    return parse_config(tree, name="test")


def checkpoints(copy: Path, *, keep: int = 2) -> CheckpointDirectory:
    """Of a node with this copy of the run directory; no other job has ever had the lease."""
    directory = RemoteDirectory(ADDRESS)
    owner = Owner(token="mine", host="here", boot="now", pid=1)
    directory.write(LEASE_FILE, json.dumps(asdict(owner)).encode())
    return CheckpointDirectory(copy / "checkpoints", keep=keep, store=directory, lease="mine")


def meta(step: int) -> CheckpointMeta:
    return CheckpointMeta(step=step, phi=0.1, validation=None)


def write(folder: CheckpointDirectory, step: int, content: str = "weights") -> dict[str, int]:
    """What the ranks of one node write and upload."""
    folder.prepare(step)
    (folder.partial_path(step) / "learner" / "state").write_text(f"{content} {step}")
    written = folder.written(step)
    folder.upload(step)
    return written


def save(folder: CheckpointDirectory, step: int, content: str = "weights") -> None:
    folder.commit(meta(step), b"buffer", [write(folder, step, content)])


# ---- checkpoints ---------------------------------------------------------------------------------


def test_a_checkpoint_is_loaded_on_a_node_with_an_empty_disk(
    store: ObjectStore, tmp_path: Path
) -> None:
    save(checkpoints(tmp_path / "one"), 100)
    other = checkpoints(tmp_path / "other")
    found = other.latest()
    assert found is not None
    assert found.meta == meta(100)
    other.here(found)
    assert (found.learner_path / "state").read_text() == "weights 100"
    assert found.buffer_state() == b"buffer"
    assert found.path.is_relative_to(tmp_path / "other")


def test_a_node_that_wrote_a_checkpoint_does_not_fetch_it(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints(tmp_path)
    save(folder, 100)
    monkeypatch.setattr(RemoteDirectory, "download", None)
    found = folder.latest()
    assert found is not None
    folder.here(found)
    assert (found.learner_path / "state").read_text() == "weights 100"


@pytest.mark.parametrize("node", ["one", "other"])
def test_a_copy_that_an_earlier_run_left_is_not_taken_for_the_checkpoint(
    store: ObjectStore, tmp_path: Path, node: str
) -> None:
    """The earlier run was at the same address. Its files had the same sizes."""
    save(checkpoints(tmp_path / node), 100, "weighed")
    RemoteDirectory(ADDRESS).delete("")
    save(checkpoints(tmp_path / "one"), 100, "weights")
    folder = checkpoints(tmp_path / node)
    found = folder.latest()
    assert found is not None
    folder.here(found)
    assert (found.learner_path / "state").read_text() == "weights 100"


def test_a_checkpoint_has_the_files_of_all_nodes(store: ObjectStore, tmp_path: Path) -> None:
    first, second = checkpoints(tmp_path / "first"), checkpoints(tmp_path / "second")
    written = [write(first, 100)]
    second.prepare(100)
    (second.partial_path(100) / "learner" / "other state").write_text("of rank 1")
    second.upload(100)
    first.commit(meta(100), b"buffer", [*written, second.written(100)])
    for folder in (first, second):
        found = folder.latest()
        assert found is not None
        folder.here(found)
    for node in ("first", "second"):
        learner = tmp_path / node / "checkpoints" / "step-00000100" / "learner"
        assert (learner / "state").read_text() == "weights 100"
        assert (learner / "other state").read_text() == "of rank 1"


def test_an_upload_that_was_killed_is_not_taken_for_a_checkpoint(
    store: ObjectStore, tmp_path: Path
) -> None:
    save(checkpoints(tmp_path / "one"), 100)
    program = """
import os, signal
from pathlib import Path
from distillm_ray.remote.store import RemoteDirectory
from tests.test_run_store import checkpoints, meta, write
folder = checkpoints(Path(os.environ["COPY"]))
written = write(folder, 200)
upload = RemoteDirectory.upload
def killed(self, source, name):
    if name.endswith("meta.json"):
        os.kill(os.getpid(), signal.SIGKILL)
    upload(self, source, name)
RemoteDirectory.upload = killed
folder.commit(meta(200), b"buffer", [written])
"""
    environment = {**os.environ, "COPY": str(tmp_path / "one")}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    left = f"{RUN}/checkpoints/step-00000200"
    assert store.keys(left) == [f"{left}/buffer.bin", f"{left}/learner/state"]
    resumed = checkpoints(tmp_path / "two")
    found = resumed.latest()
    assert found is not None
    assert found.meta.step == 100
    save(resumed, 300)
    assert store.keys(left) == []


def test_a_file_that_did_not_arrive_whole_makes_no_checkpoint(
    store: ObjectStore, tmp_path: Path
) -> None:
    folder = checkpoints(tmp_path)
    written = write(folder, 100)
    store.put(f"{RUN}/checkpoints/step-00000100/learner/state", "weigh")
    with pytest.raises(StoreError, match="must have learner/state with 11 bytes and does not"):
        folder.commit(meta(100), b"buffer", [written])
    assert folder.latest() is None


def test_a_damaged_checkpoint_is_passed_over_by_name(store: ObjectStore, tmp_path: Path) -> None:
    folder = checkpoints(tmp_path)
    save(folder, 100)
    save(folder, 200)
    store.put(f"{RUN}/checkpoints/step-00000200/learner/state", "")
    latest = folder.latest()
    assert latest is not None
    assert latest.meta.step == 100
    (damage,) = folder.damaged()
    assert damage.startswith(f"{ADDRESS}/checkpoints/step-00000200 is damaged: learner/state")


def test_old_checkpoints_are_deleted_in_the_store_and_in_the_copy(
    store: ObjectStore, tmp_path: Path
) -> None:
    folder = checkpoints(tmp_path, keep=1)
    for step in (100, 200, 300):
        save(folder, step)
    steps = {key.split("/")[3] for key in store.keys(f"{RUN}/checkpoints")}
    assert steps == {"step-00000300"}
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000300"]


def test_a_job_that_lost_the_lease_completes_no_checkpoint(
    store: ObjectStore, tmp_path: Path
) -> None:
    folder = checkpoints(tmp_path)
    written = write(folder, 100)
    other = Owner(token="theirs", host="elsewhere", boot="now", pid=1)
    RemoteDirectory(ADDRESS).write(LEASE_FILE, json.dumps(asdict(other)).encode())
    with pytest.raises(RunDirectoryError, match="was taken by a job on elsewhere"):
        folder.commit(meta(100), b"buffer", [written])
    assert folder.latest() is None


# ---- the other files -----------------------------------------------------------------------------


def test_files_of_a_run_are_uploaded_and_found_again_on_an_empty_disk(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tree = config(store)
    with opened(tree) as session:
        assert session is not None
        copy = tree.run.local_directory
        (copy / "config.yaml").write_text("saved")
        (copy / "plots").mkdir()
        (copy / "plots" / "loss.png").write_text("picture")
        (copy / "ray_train").mkdir()
        (copy / "ray_train" / "state").write_text("of Ray")
        (copy / ".model.partial").mkdir()
        (copy / ".model.partial" / "weights").write_text("half")
        session.push()
        (copy / "metrics.jsonl").write_text("{}\n")
    names = [f"{RUN}/config.yaml", f"{RUN}/metrics.jsonl", f"{RUN}/plots/loss.png"]
    assert store.keys(RUN) == names
    monkeypatch.setenv("DISTILLM_RAY_CACHE", str(tmp_path / "of another machine"))
    with opened(tree):
        copy = tree.run.local_directory
        assert copy.is_relative_to(tmp_path / "of another machine")
        assert (copy / "config.yaml").read_text() == "saved"
        assert (copy / "plots" / "loss.png").read_text() == "picture"


def test_what_was_not_uploaded_is_gone_at_the_next_start(store: ObjectStore) -> None:
    tree = config(store)
    copy = tree.run.local_directory
    copy.mkdir(parents=True)
    (copy / "metrics.jsonl").write_text("of a job that was killed before an upload\n")
    with opened(tree):
        assert list(copy.iterdir()) == []


def test_a_file_that_the_run_removes_is_removed_in_the_store(store: ObjectStore) -> None:
    store.put(f"{RUN}/config.yaml", "saved")
    store.put(f"{RUN}/samples.md", "old")
    tree = config(store)
    with opened(tree):
        (tree.run.local_directory / "samples.md").unlink()
    assert store.keys(RUN) == [f"{RUN}/config.yaml"]


def test_a_model_that_the_driver_uploads_stays(store: ObjectStore) -> None:
    tree = config(store)
    with opened(tree) as session:
        assert session is not None
        (tree.run.local_directory / "config.yaml").write_text("saved")
        (tree.run.local_directory / "model").mkdir()
        (tree.run.local_directory / "model" / "config.json").write_text("{}")
        session.push(models=True)
    assert store.keys(RUN) == [f"{RUN}/config.yaml", f"{RUN}/model/config.json"]


def test_a_failure_in_the_run_uploads_its_log_too(store: ObjectStore) -> None:
    tree = config(store)
    with pytest.raises(RunDirectoryError, match="the disk is full"), opened(tree):
        (tree.run.local_directory / "config.yaml").write_text("saved")
        raise RunDirectoryError("the disk is full")
    assert store.keys(RUN) == [f"{RUN}/config.yaml"]


def test_a_prefix_with_other_objects_is_refused_before_anything_is_copied(
    store: ObjectStore,
) -> None:
    store.put(f"{RUN}/photographs/1.jpg", "not a run")
    tree = config(store)
    with pytest.raises(RunDirectoryError, match=r"holds no config\.yaml"), opened(tree):
        pass
    assert not tree.run.local_directory.exists()
    assert store.keys(RUN) == [f"{RUN}/photographs/1.jpg"]


def test_a_model_appears_with_its_config_last(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store.put(f"{RUN}/model/old.safetensors", "old")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text(name)
    order: list[str] = []
    upload = RemoteDirectory.upload

    def noted(self: RemoteDirectory, source: Path, name: str) -> None:
        order.append(name)
        upload(self, source, name)

    monkeypatch.setattr(RemoteDirectory, "upload", noted)
    upload_directory(RemoteDirectory(ADDRESS), tmp_path, "model")
    assert order[-1] == "model/config.json"
    assert [key.rpartition("/")[2] for key in store.keys(f"{RUN}/model")] == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


# ---- the lease -----------------------------------------------------------------------------------


def held_by(owner: Owner) -> None:
    RemoteDirectory(ADDRESS).write(LEASE_FILE, json.dumps(asdict(owner)).encode())


def test_a_second_job_is_refused_with_the_place_of_the_first(store: ObjectStore) -> None:
    first = Lease(RemoteDirectory(ADDRESS))
    with pytest.raises(RunDirectoryError, match=rf"\(process {os.getpid()}\) is running in s3://"):
        Lease(RemoteDirectory(ADDRESS))
    first.check()
    first.release()
    Lease(RemoteDirectory(ADDRESS)).release()
    assert store.keys(RUN) == []


def test_a_job_that_was_killed_on_this_machine_is_succeeded_at_once(store: ObjectStore) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    held_by(replace(Owner.this_process(), pid=gone.pid))
    Lease(RemoteDirectory(ADDRESS)).release()


def test_a_job_of_another_machine_is_succeeded_when_its_lease_has_expired(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_by(Owner(token="theirs", host="elsewhere", boot="theirs", pid=1))
    with pytest.raises(RunDirectoryError, match="a job on elsewhere"):
        Lease(RemoteDirectory(ADDRESS))
    monkeypatch.setattr(leases, "EXPIRY_S", -1.0)
    lease = Lease(RemoteDirectory(ADDRESS))
    assert json.loads(store.get(f"{RUN}/{LEASE_FILE}"))["token"] == lease.owner.token
    lease.release()


def test_a_lost_lease_ends_the_job_and_is_not_given_back(store: ObjectStore) -> None:
    lease = Lease(RemoteDirectory(ADDRESS))
    assert lease.renew()
    held_by(Owner(token="theirs", host="elsewhere", boot="theirs", pid=1))
    assert not lease.renew()
    with pytest.raises(RunDirectoryError, match="was taken by a job on elsewhere"):
        lease.check()
    lease.release()
    assert json.loads(store.get(f"{RUN}/{LEASE_FILE}"))["token"] == "theirs"


def test_a_store_that_does_not_answer_ends_the_job_only_before_its_lease_expires(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = Lease(RemoteDirectory(ADDRESS))
    with store.refusing_credentials():
        assert lease.renew()
        lease.check()
        monkeypatch.setattr(leases, "EXPIRY_S", leases.RENEWAL_S)
        assert not lease.renew()
    with pytest.raises(StoreError, match="refuses"):
        lease.check()
    lease.release()


# ---- the nodes -----------------------------------------------------------------------------------


class OneRank:
    rank = 0

    def collect(self, value: Any) -> list[Any]:
        return [value]


def test_a_store_that_a_rank_cannot_reach_is_refused_before_the_first_step(
    store: ObjectStore,
) -> None:
    directory = RemoteDirectory(ADDRESS)
    check_reached(directory, OneRank())
    assert store.keys(RUN) == []
    with (
        store.refusing_credentials(),
        pytest.raises(RunDirectoryError, match=r"rank 0 on .* cannot write there: s3://"),
    ):
        check_reached(directory, OneRank())
