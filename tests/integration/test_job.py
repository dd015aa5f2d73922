"""`ray job submit` on a cluster of our own: log, exit code, stop and resume, with a token.

The cluster has its own ports and its own folder. The tests end only the processes that they have
started, so that they do not disturb another Ray on this machine.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from distillm_ray.learner.checkpoint import CheckpointDirectory
from distillm_ray.log.records import DoneRecord, StepRecord
from tests.integration.tiny import (
    LIMIT_S,
    MARK,
    checkpointed,
    clean_environment,
    kill_marked,
    make_config,
    marked_processes,
    records,
)

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(4 * LIMIT_S)]

BIN = Path(sys.executable).parent
STEPS = 60
TOKEN = uuid.uuid4().hex  # of the cluster
ROLES = ("GeneratorActor", "ScorerActor", "TargetStore", "BufferActor", "Orchestrator", "RayTrain")
CONNECT_SCRIPT = """
from pathlib import Path
import ray
from distillm_ray.cluster.connection import connect
from distillm_ray.config.files import load_config
connect(load_config(Path({config!r}), ["targets.max_bytes=1000000"]))
print(ray.get_runtime_context().gcs_address)
"""


DOCTOR_SCRIPT = """
import os
from distillm_ray.doctor import probe_cluster
finding = probe_cluster(os.environ["RAY_ADDRESS"])
print(finding.detail, finding.status)
"""


@dataclass(frozen=True, slots=True)
class Head:
    """A running `ray start --head`."""

    mark: str
    folder: Path
    port: str
    dashboard: str
    environment: dict[str, str]

    def job(self, *arguments: str) -> subprocess.Popen[str]:
        """Run `ray job ...` against this cluster."""
        verb, *rest = arguments
        return subprocess.Popen(
            [str(BIN / "ray"), "job", verb, "--address", self.dashboard, *rest],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment,
        )

    def submit(self, name: str, directory: Path, *entrypoint: str) -> subprocess.Popen[str]:
        """Submit with the setting from the README that lets a stop wait for a checkpoint."""
        return self.job(
            "submit",
            *("--submission-id", name, "--working-dir", str(directory)),
            *("--runtime-env-json", '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}'),
            "--",
            *entrypoint,
        )

    def roles(self) -> list[str]:
        """The process titles of our living actors."""
        titles = [process.title for process in marked_processes(self.mark)]
        return [title for title in titles if any(role in title for role in ROLES)]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # Ray puts its sockets here, and the path of a socket must be short.
    folder = Path(tempfile.mkdtemp(prefix="dr"))
    port, dashboard, agent, metrics, client = free_ports(5)
    mark = uuid.uuid4().hex
    environment = {
        **clean_environment(),
        MARK: mark,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_TMPDIR": str(folder),
        # Ray's defaults, 60 and 30 s, are too short on a busy machine.
        "RAY_raylet_start_wait_time_s": "150",
        "RAY_agent_register_timeout_ms": "120000",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4"),
                *(f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}/ray"),
                *(f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"),
                *(f"--ray-client-server-port={client}", "--object-store-memory=150000000"),
                *("--node-ip-address=127.0.0.1", "--disable-usage-stats"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    try:
        wait_until_started(folder, dashboard, process)
        yield Head(
            mark=mark,
            folder=folder,
            port=str(port),
            dashboard=f"http://127.0.0.1:{dashboard}",
            environment=environment,
        )
    finally:
        process.kill()
        kill_marked(mark)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def wait_until_started(folder: Path, dashboard: int, process: subprocess.Popen[bytes]) -> None:
    """Return when the cluster accepts jobs and Ray lists it as the machine's current cluster."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, (folder / "head.log").read_text()
        time.sleep(0.2)
        if not (folder / "ray" / "ray_current_cluster").is_file():
            continue
        try:
            socket.create_connection(("127.0.0.1", dashboard), timeout=1).close()
        except OSError:
            continue
        return
    raise AssertionError(f"the cluster did not come up:\n{(folder / 'head.log').read_text()}")


def finish(process: subprocess.Popen[str], timeout_s: float) -> tuple[int, str]:
    """Exit code and output of a command."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise AssertionError(f"no end after {timeout_s:g} s:\n{output}") from None
    return process.returncode, output


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


def test_the_doctor_finds_the_cluster_and_its_dashboard(head: Head) -> None:
    environment = {**head.environment, "RAY_ADDRESS": f"127.0.0.1:{head.port}"}
    found = subprocess.run(
        [sys.executable, "-c", DOCTOR_SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split()[-1] == "ok", found.stdout


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
    port = found.stdout.split()[-1].rpartition(":")[2]
    assert port.isdigit()
    assert port != head.port
