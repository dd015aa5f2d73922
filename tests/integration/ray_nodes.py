"""Ray started by hand, as users start it: a head with its own ports and folder, and nodes."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.integration.tiny import LIMIT_S, MARK, clean_environment, kill_marked, marked_processes

BIN = Path(sys.executable).parent
TOKEN = uuid.uuid4().hex  # of every cluster here
ROLES = ("GeneratorActor", "ScorerActor", "TargetStore", "BufferActor", "Orchestrator", "RayTrain")


@dataclass(frozen=True, slots=True)
class Node:
    """A `ray start --address --block`; all of its processes carry the mark."""

    mark: str
    process: subprocess.Popen[bytes]

    def notice(self) -> None:
        """Tell the node, as a cluster manager does, that it will be taken away."""
        self.process.terminate()

    def kill(self) -> None:
        """Take it away."""
        self.process.kill()
        kill_marked(self.mark)
        self.process.wait()


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

    @contextlib.contextmanager
    def node(self, number: int, label: str, *, notice_s: int) -> Iterator[Node]:
        """One more node of one CPU. After SIGTERM it lives on for `notice_s`.

        It has an address of its own by its number, from 2 on: Ray takes any node at a driver's
        address for the driver's.
        """
        mark = uuid.uuid4().hex
        agent, metrics = free_ports(2)
        environment = {
            **self.environment,
            MARK: mark,
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(notice_s),
        }
        log_path = self.folder / f"node-{mark}.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [
                    *(str(BIN / "ray"), "start", f"--address=127.0.0.1:{self.port}", "--block"),
                    *("--num-cpus=1", f"--labels={label}", "--object-store-memory=80000000"),
                    *(f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"),
                    *(f"--node-ip-address=127.0.0.{number}", "--disable-usage-stats"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        node = Node(mark, process)
        deadline = time.monotonic() + LIMIT_S
        try:
            while "Ray runtime started" not in (said := log_path.read_text()):
                assert process.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.2)
            yield node
        finally:
            node.kill()

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


@contextlib.contextmanager
def running_head() -> Iterator[Head]:
    """A head of four CPUs, with a token."""
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
