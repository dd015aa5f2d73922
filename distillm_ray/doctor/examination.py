"""Everything that the doctor looks at."""

from __future__ import annotations

import os
from pathlib import Path

from distillm_ray.doctor.cluster import examine_cluster
from distillm_ray.doctor.findings import Finding
from distillm_ray.doctor.machine import examine_machine, installed_version
from distillm_ray.errors import UserError


def examine(address: str | None = None, directory: Path | None = None) -> list[Finding]:
    """This machine, and a cluster if there is one.

    Args:
        address: of the cluster; None means `RAY_ADDRESS`, or no cluster if that is unset.
        directory: that all nodes of the cluster should share; None: it is not checked.

    Raises:
        UserError: a directory without a cluster, or one that does not exist here.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    if directory is not None:
        if address is None:
            raise UserError(
                "--directory is checked on the nodes of a cluster: name one with --address"
            )
        if not directory.is_dir():
            raise UserError(f"--directory: {directory} is not a directory on this machine")
        if not os.access(directory, os.W_OK | os.X_OK):
            raise UserError(f"--directory: {directory} cannot be written on this machine")
    findings = examine_machine()
    if address is not None and installed_version("ray") is not None:
        findings += examine_cluster(address, directory)
    return findings
