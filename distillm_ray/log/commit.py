"""Which version of this package wrote a run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def package_commit(package: Path = PACKAGE) -> str:
    """Short hash of the commit that the package is at, "+" if tracked files differ from it.

    Empty where the package is not part of a git repository, such as an installed copy. An installed
    copy may lie inside of another project's repository, hence the look at the tracked files.
    """
    if not _git(package, "ls-files", "__init__.py"):
        return ""
    return _git(package, "describe", "--always", "--dirty=+", "--abbrev=9", "--exclude=*")


def _git(directory: Path, *arguments: str) -> str:
    """What git prints; empty if it fails or is not installed."""
    git = shutil.which("git")
    if git is None:
        return ""
    found = subprocess.run(
        [git, "-C", str(directory), *arguments],
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    return found.stdout.strip() if found.returncode == 0 else ""
