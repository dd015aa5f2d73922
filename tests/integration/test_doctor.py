"""The doctor's probe of a running cluster."""

from __future__ import annotations

import subprocess
import sys

import pytest
import ray

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]

PROBE = """
import sys
from distillm_ray.doctor.cluster import examine_cluster
finding = examine_cluster(sys.argv[1])[0]
print(finding.status, finding.detail, finding.remedy, sep="; ")
"""


def test_a_cluster_without_a_dashboard_can_train_but_not_accept_jobs() -> None:
    """Ray starts without a dashboard if its port is taken."""
    address = ray.get_runtime_context().gcs_address
    found = subprocess.run(
        [sys.executable, "-c", PROBE, address],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    status, detail, remedy = found.stdout.splitlines()[-1].split("; ", 2)
    assert status == "warn"
    assert "16 of 16 CPUs free" in detail
    assert detail.endswith("no dashboard")
    assert remedy.startswith("training works, `ray job submit` does not")
