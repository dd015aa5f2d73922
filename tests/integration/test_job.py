"""`ray job submit` on a cluster of our own: log, exit code, stop and resume, with a token.

The cluster has its own ports and its own folder. The tests end only the processes that they have
started, so that they do not disturb another Ray on this machine.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from distillm_ray import __version__
from distillm_ray.learner.checkpoint import CheckpointDirectory
from distillm_ray.log.records import DoneRecord, StepRecord
from tests.integration.ray_nodes import BIN, TOKEN, Head, finish, running_head
from tests.integration.tiny import (
    LIMIT_S,
    checkpointed,
    make_config,
    records,
)

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(4 * LIMIT_S)]

STEPS = 60
CONNECT_SCRIPT = """
from pathlib import Path
import ray
from distillm_ray.cluster.connection import connect
from distillm_ray.config.files import load_config
connect(load_config(Path({config!r}), ["targets.max_bytes=1000000"]))
print(ray.nodes()[0]["MetricsExportPort"])
print(ray.get_runtime_context().gcs_address)
"""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head() as started:
        yield started


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_config(tmp_path_factory.mktemp("job"), steps=STEPS, batch_size=8)


def test_a_stopped_job_leaves_a_checkpoint_and_no_actor_and_resumes_when_submitted_again(
    head: Head, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = ("distillm-ray", "train", config.name, f"run.directory={run}")
    job = head.submit("first", config.parent, *command)
    deadline = time.monotonic() + LIMIT_S
    while not checkpointed(run, 2):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert head.roles()
    code, output = finish(head.job("stop", "first"), LIMIT_S)
    assert code == 0, output
    code, output = finish(job, LIMIT_S)
    assert "Stopped at step " in output
    deadline = time.monotonic() + 20
    while head.roles() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert head.roles() == []
    last_step = max(record.step for record in records(run, StepRecord))
    assert 2 <= last_step < STEPS
    checkpoint = CheckpointDirectory(run / "checkpoints", keep=2).latest()
    assert checkpoint is not None
    assert checkpoint.meta.step == last_step

    code, output = finish(head.submit("second", config.parent, *command), LIMIT_S)
    assert code == 0, output
    assert f"resumed from step {last_step}" in output
    assert f"step {STEPS}/{STEPS}" in output
    assert "complete at step" in output
    assert "\x1b[?" not in output, "no cursor movements in a log"
    assert "\r" not in output.replace("\r\n", "\n"), "lines are not drawn over"
    assert [record.step for record in records(run, StepRecord)] == list(range(1, STEPS + 1))
    assert [record.status for record in records(run, DoneRecord)] == ["stopped", "complete"]
    assert list((run / "model").glob("*.safetensors"))
    assert TOKEN not in output
    for path in (path for path in run.rglob("*") if path.is_file()):
        assert TOKEN.encode() not in path.read_bytes(), f"{path} holds the cluster's token"


def test_a_job_without_the_token_is_refused(head: Head, config: Path) -> None:
    stranger = {**head.environment, "RAY_AUTH_TOKEN": "another"}
    submitted = replace(head, environment=stranger).submit(
        "stranger", config.parent, "distillm-ray", "train", config.name
    )
    code, output = finish(submitted, LIMIT_S)
    assert code != 0
    assert "token" in output.lower()


def test_a_job_with_a_bad_config_fails_with_the_message(head: Head, config: Path) -> None:
    refused = head.submit("typo", config.parent, "distillm-ray", "train", config.name, "run.sed=1")
    lost = head.submit(
        *("lost", config.parent),
        *("distillm-ray", "train", config.name, "run.directory=runs/one"),
    )
    code, output = finish(refused, LIMIT_S)
    assert code != 0
    assert "run.sed" in output
    code, output = finish(lost, LIMIT_S)
    assert code != 0
    assert "deletes after the job" in output


def test_the_doctor_asks_every_node_and_proves_the_shared_directory(
    head: Head, tmp_path: Path
) -> None:
    with head.node(2, "role=other", notice_s=0):
        found = subprocess.run(
            [
                *(str(BIN / "distillm-ray"), "doctor", "--directory", str(tmp_path)),
                *("--address", f"127.0.0.1:{head.port}"),
            ],
            env={**head.environment, "COLUMNS": "400"},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    assert found.returncode == 0, found.stdout + found.stderr
    lines = [[cell.strip() for cell in line.split("│")[1:]] for line in found.stdout.splitlines()]
    rows = {cells[1]: (cells[0], cells[2]) for cells in lines if len(cells) > 3}
    status, detail = rows["Ray cluster"]
    assert status == "ok", "it has a dashboard"
    assert detail.startswith("2 nodes, ")
    host = socket.gethostname()
    kinds = [cells[2] for cells in lines if len(cells) > 3 and cells[1] == f"1 x {host}"]
    assert sorted(detail.split(",")[0] for detail in kinds) == ["1 CPUs", "4 CPUs"]
    assert f"distillm-ray {__version__}" in rows["the same on all nodes"][1]
    assert rows["shared directory"][0] == "ok"
    assert list(tmp_path.iterdir()) == [], "nothing is left there"


def test_without_an_address_we_start_our_own_cluster_beside_a_running_one(
    head: Head, config: Path
) -> None:
    """By default, Ray joins the cluster that was started last on a machine."""
    current = (head.folder / "ray" / "ray_current_cluster").read_text()
    assert current.rpartition(":")[2] == head.port
    found = subprocess.run(
        [sys.executable, "-c", CONNECT_SCRIPT.format(config=str(config))],
        env=head.environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    metrics_port, address = found.stdout.split()[-2:]
    assert metrics_port == "-1", "without run.metrics_port no port is open to everyone"
    port = address.rpartition(":")[2]
    assert port.isdigit()
    assert port != head.port
