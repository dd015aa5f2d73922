"""The scripts of `distillm-ray manifest`, run for real: Ray nodes, token, driver, signal, resume.

Slurm's commands are replaced by ones that run everything on this machine.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from distillm_ray.cli import EXIT_STOPPED, app
from distillm_ray.log.records import StepRecord
from distillm_ray.manifest.text import PORT
from tests.integration.ray_nodes import free_ports
from tests.integration.tiny import (
    LIMIT_S,
    MARK,
    checkpointed,
    clean_environment,
    kill_marked,
    make_config,
    records,
    wait_until_gone,
)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.nightly,
    pytest.mark.timeout(4 * LIMIT_S),
]

STEPS = 24
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
case "$1" in
  show) echo one; echo two ;;
  requeue) echo "$2" >> requeued ;;
esac
"""


@dataclass(frozen=True, slots=True)
class Batch:
    """A script in its directory, and an environment for it."""

    script: Path
    mark: str
    environment: dict[str, str]

    def start(self) -> subprocess.Popen[bytes]:
        with (self.script.parent / "log").open("ab") as log:
            return subprocess.Popen(
                ["bash", str(self.script)],
                cwd=self.script.parent,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def log(self) -> str:
        return (self.script.parent / "log").read_text()


@pytest.fixture
def batch(tmp_path: Path) -> Iterator[Batch]:
    """Two nodes of two CPUs, told apart by labels; the scorer has the second for itself."""
    config = make_config(tmp_path, steps=STEPS, batch_size=8)
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    scripts = {"srun": SRUN, "scontrol": SCONTROL}
    for name in ("python", "ray", "distillm-ray"):
        scripts[name] = f'#!/bin/bash\nexec {Path(sys.executable).parent / name} "$@"\n'
    for name, text in scripts.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    overrides = [f"run.directory={tmp_path / 'run'}", "teacher.num_cpus=2"]
    written = CliRunner().invoke(
        app,
        [
            *("manifest", str(config), *overrides),
            *("--slurm", "--node-cpus", "2", "--object-store-gib", "1"),
        ],
    )
    assert written.exit_code == 0, written.stderr
    (port,) = free_ports(1)
    script = tmp_path / "job.slurm"
    script.write_text(written.stdout.replace(str(PORT), str(port)))
    # Ray puts its sockets here, and the path of a socket must be short.
    folder = tempfile.mkdtemp(prefix="dr")
    mark = uuid.uuid4().hex
    environment = {
        **clean_environment(),
        MARK: mark,
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "two nodes",
        "SLURM_CPUS_PER_TASK": "2",
        "RAY_TMPDIR": folder,
        # Ray's defaults, 60 and 30 s, are too short on a busy machine.
        "RAY_raylet_start_wait_time_s": "150",
        "RAY_agent_register_timeout_ms": "120000",
    }
    try:
        yield Batch(script=script, mark=mark, environment=environment)
    finally:
        kill_marked(mark)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_slurm_job_stops_at_its_time_limit_with_a_checkpoint_and_resumes_when_requeued(
    batch: Batch,
) -> None:
    directory = batch.script.parent
    run, token = directory / "run", directory / ".ray-token-17"
    job = batch.start()
    deadline = time.monotonic() + LIMIT_S
    while not checkpointed(run, 2):
        assert job.poll() is None, batch.log()
        assert time.monotonic() < deadline, batch.log()
        time.sleep(0.1)
    secret = token.read_text().strip()
    assert len(secret) == 64
    assert token.stat().st_mode & 0o077 == 0, "others can read the token"
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait(LIMIT_S) == EXIT_STOPPED, batch.log()
    assert (directory / "requeued").read_text() == "17\n"
    assert not token.exists()
    last_step = max(record.step for record in records(run, StepRecord))
    assert 2 <= last_step < STEPS

    job = batch.start()
    assert job.wait(LIMIT_S) == 0, batch.log()
    assert f"resumed from step {last_step}" in batch.log()
    assert (directory / "requeued").read_text() == "17\n", "it was not stopped"
    assert wait_until_gone(batch.mark, 20.0) == []
    for path in (path for path in run.rglob("*") if path.is_file()):
        assert secret.encode() not in path.read_bytes(), path
    assert secret not in batch.log()
