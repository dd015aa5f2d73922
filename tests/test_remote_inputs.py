from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from distillm_ray.cli import app
from distillm_ray.config import Config, RemotePath
from distillm_ray.config.files import dump_config, load_config, parse_config
from distillm_ray.config.remote_path import parse_remote_path
from distillm_ray.data.files import check_files, find_files
from distillm_ray.errors import ConfigError, DataError, StoreError
from distillm_ray.learner.resume import check_resume
from distillm_ray.remote import store as remote_store
from distillm_ray.remote.inputs import fetched, pinned
from distillm_ray.remote.store import RemoteDirectory
from tests.object_store import BUCKET, SECRET, ObjectStore

ROW = json.dumps({"prompt": "a", "response": "b"}) + "\n"
UNUSED_PORT = "http://127.0.0.1:9"


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all objects that were downloaded."""
    names: list[str] = []
    download = RemoteDirectory.download

    def counted(self: RemoteDirectory, name: str, *rest: object) -> None:
        names.append(name)
        download(self, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(RemoteDirectory, "download", counted)
    return names


def address(key: str) -> RemotePath:
    return parse_remote_path(f"s3://{BUCKET}/{key}")


def config(tmp_path: Path, **values: str) -> Config:
    tree = {
        "run": {"directory": str(tmp_path / "run")},
        "teacher": {"model": str(tmp_path / "teacher")},
        "student": {"model": values.get("student", str(tmp_path / "student"))},
        "data": {"train": [values.get("train", str(tmp_path / "train.jsonl"))]},
        "learner": {"steps": 300, "batch_size": 2},
    }
    return parse_config(tree, name="test")


def test_a_prefix_is_fetched_whole_and_only_once(store: ObjectStore, downloads: list[str]) -> None:
    store.put("models/tiny/config.json", "{}")
    store.put("models/tiny/deep/weights", b"w" * 100)
    store.put("models/tiny-2/config.json", "another")
    directory = fetched(address("models/tiny"))
    assert directory.name == "tiny"
    files = {p.relative_to(directory).as_posix(): p for p in directory.rglob("*") if p.is_file()}
    assert files.keys() == {"config.json", "deep/weights"}
    assert files["deep/weights"].read_bytes() == b"w" * 100
    assert fetched(address("models/tiny")) == directory
    assert sorted(downloads) == ["config.json", "deep/weights"]


def test_an_object_is_fetched_as_a_file_of_its_name(store: ObjectStore) -> None:
    store.put("data/train.jsonl", ROW)
    assert fetched(address("data/train.jsonl")).read_text() == ROW


def test_a_changed_object_is_fetched_again_and_what_was_fetched_stays(store: ObjectStore) -> None:
    store.put("data/train.jsonl", "old")
    old = fetched(address("data/train.jsonl"))
    store.put("data/train.jsonl", "newer")
    assert fetched(address("data/train.jsonl")).read_text() == "newer"
    assert old.read_text() == "old"


def test_a_node_refuses_an_object_that_changed_since_the_start_of_the_run(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store.put("data/train.jsonl", "old")
    (place,) = pinned(config(tmp_path, train=str(address("data/train.jsonl")))).data.train
    store.put("data/train.jsonl", "newer")
    monkeypatch.setenv("DISTILLM_RAY_CACHE", str(tmp_path / "of another node"))
    with pytest.raises(StoreError, match="has changed since the run started"):
        fetched(place)


def test_what_is_pinned_and_fetched_needs_no_store(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = str(address("data/train.jsonl")) + f"?endpoint_override={store.url}"
    store.put("data/train.jsonl", ROW)
    found = pinned(config(tmp_path, train=place)).data.train[0]
    monkeypatch.setattr(remote_store, "_filesystem", None)
    assert fetched(found).read_text() == ROW


def test_the_run_directory_is_no_input(store: ObjectStore, tmp_path: Path) -> None:
    store.put("data/train.jsonl", ROW)
    store.put("runs/one/checkpoints/step-00000001/weights", "large")
    tree = config(tmp_path, train=str(address("data/train.jsonl"))).model_dump(mode="json")
    tree["run"]["directory"] = str(address("runs/one"))
    found = pinned(parse_config(tree, name="test"))
    assert found.run.directory == address("runs/one")
    files = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert [name for name in files if not name.endswith(".lock")] == ["train.jsonl"]


def test_a_killed_download_is_not_taken_for_whole(store: ObjectStore, tmp_path: Path) -> None:
    store.put("models/tiny/a", b"a" * 1000)
    store.put("models/tiny/b", b"b" * 1000)
    program = """
import os, signal
from distillm_ray.config.remote_path import parse_remote_path
from distillm_ray.remote import inputs, store
store.CHUNK_BYTES = 100
inputs.PARALLEL_DOWNLOADS = 1
inputs._Advance.__call__ = lambda self, num_bytes: os.kill(os.getpid(), signal.SIGKILL)
inputs.fetched(parse_remote_path(os.environ["ADDRESS"]))
"""
    environment = {**os.environ, "ADDRESS": str(address("models/tiny"))}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    inputs = tmp_path / "cache" / "inputs"
    (left,) = (path for path in inputs.rglob("*") if path.is_file() and path.suffix != ".lock")
    assert left.stat().st_size == 100
    directory = fetched(address("models/tiny"))
    assert (directory / "a").read_bytes() == b"a" * 1000
    assert (directory / "b").read_bytes() == b"b" * 1000
    assert not left.exists()


def test_an_object_that_changes_while_it_is_fetched_is_refused(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store.put("models/tiny/a", b"a" * 1000)
    download = RemoteDirectory.download

    def overtaken(self: RemoteDirectory, *arguments: object) -> None:
        download(self, *arguments)  # type: ignore[arg-type]
        store.put("models/tiny/a", b"a" * 999)

    monkeypatch.setattr(RemoteDirectory, "download", overtaken)
    with pytest.raises(StoreError, match="changed while it was fetched"):
        fetched(address("models/tiny"))
    assert not [path for path in (tmp_path / "cache").rglob("a") if path.is_file()]


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (f"s3://{BUCKET}/nothing/here", "there is no such object, and none below it"),
        ("s3://no-such-bucket/model", "there is no bucket no-such-bucket at http://127.0.0.1:"),
        (
            f"s3://{BUCKET}/model?endpoint_override={UNUSED_PORT}",
            f"{UNUSED_PORT} cannot be reached (Failed to connect to 127.0.0.1:9",
        ),
    ],
)
def test_what_is_not_there_is_named_with_its_key(
    store: ObjectStore, tmp_path: Path, place: str, wrong: str
) -> None:
    with pytest.raises(StoreError) as caught:
        pinned(config(tmp_path, student=place))
    assert str(caught.value).startswith(f"student.model: {place}: ")
    assert wrong in str(caught.value)


def test_refused_credentials_end_the_command_with_one_line_that_holds_none(
    store: ObjectStore, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config(tmp_path, train=str(address("data/train.jsonl")))))
    with store.refusing_credentials():
        ended = CliRunner().invoke(app, ["train", str(path)])
    assert ended.exit_code == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: data.train.0: s3://{BUCKET}/data/train.jsonl: {store.url} ref")
    assert "AWS_ACCESS_KEY_ID" in line
    assert SECRET not in line


def test_rows_are_named_by_the_address_of_their_file(store: ObjectStore, tmp_path: Path) -> None:
    store.put("rows/train-00000-of-00001.jsonl", ROW + "{}\n")
    place = address("rows")
    (file,) = find_files([place], "train")
    assert file.position(2) == f"s3://{BUCKET}/rows/train-00000-of-00001.jsonl:2"
    with pytest.raises(DataError, match=f"^s3://{BUCKET}/rows/train-00000-of-00001.jsonl:2: "):
        check_files(config(tmp_path, train=str(place)).data)


def test_a_file_is_fetched_anew_where_the_cache_of_a_node_has_another_place(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store.put("rows/train.jsonl", ROW)
    (file,) = find_files([address("rows")], "train")
    monkeypatch.setenv("DISTILLM_RAY_CACHE", str(tmp_path / "of another node"))
    assert file.here().read_text() == ROW
    assert file.here() != file.path


def test_a_saved_config_keeps_the_address_and_resumes_with_it(
    store: ObjectStore, tmp_path: Path
) -> None:
    store.put("data/train.jsonl", ROW)
    place = f"s3://{BUCKET}/data/train.jsonl?endpoint_override={store.url}"
    before = config(tmp_path, train=place)
    found = pinned(before)
    (tmp_path / "config.yaml").write_text(dump_config(found))
    again = load_config(tmp_path / "config.yaml")
    assert again.data.train == before.data.train
    assert str(again.data.train[0]) == place
    check_resume(again, found)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (f"s3://test:{SECRET}@{BUCKET}/model", "must hold no credentials"),
        (f"s3://{BUCKET}/model?secret_key={SECRET}", "must hold no credentials"),
        ("gs://bucket/model", "must be a path or an address s3://BUCKET/KEY"),
        ("s3://bucket", "must name a bucket and a key"),
        ("s3://bucket/a/../b", "must have no empty parts, . or .. in its key"),
        ("s3://bucket/a?versionId=3", "may have the options endpoint_override, region, scheme"),
        ("s3://bucket/a?scheme=ftp", "must have the option scheme=http or scheme=https"),
    ],
)
def test_an_address_of_a_wrong_form_is_refused_by_key(tmp_path: Path, text: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=r"student\.model: ") as caught:
        config(tmp_path, student=text)
    assert rule in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("command", ["export", "plot", "compare"])
def test_commands_on_a_run_that_need_it_on_a_disk_say_so(command: str) -> None:
    ended = CliRunner().invoke(app, [command, "s3://bucket/runs/one"])
    assert ended.exit_code == 2
    said = " ".join(ended.stderr.replace("│", " ").split())  # without the frame around it
    assert "must be a path on a disk, got 's3://bucket/runs/one': copy it there first" in said


def test_an_address_where_only_a_path_can_stand_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config(tmp_path)))
    with pytest.raises(ConfigError, match=r"targets\.library: must be a path on a disk, got 's3:"):
        load_config(path, ["targets.library=s3://bucket/library", "teacher.dtype=float32"])
