"""The commit of a run is that of this package, not of a repository around its directory."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from distillm_ray.log.commit import package_commit


def git(directory: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ("git", "-C", str(directory), *identity, *arguments)
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package that is not in any repository."""
    directory = tmp_path / "project" / "package"
    directory.mkdir(parents=True)
    (directory / "__init__.py").write_text("")
    return directory


def test_outside_of_git_there_is_no_commit(package: Path) -> None:
    assert package_commit(package) == ""


def test_a_package_under_version_control_has_the_commit_and_a_mark_for_changes(
    package: Path,
) -> None:
    git(package.parent, "init", "--quiet")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "--quiet", "--message", "first")
    expected = git(package.parent, "rev-parse", "--short=9", "HEAD")
    assert package_commit(package) == expected
    (package / "__init__.py").write_text("changed = True\n")
    assert package_commit(package) == f"{expected}+"


def test_an_installed_copy_does_not_take_the_commit_of_the_repository_around_it(
    package: Path,
) -> None:
    (package.parent / "own.py").write_text("")
    git(package.parent, "init", "--quiet")
    git(package.parent, "add", "own.py")
    git(package.parent, "commit", "--quiet", "--message", "first")
    assert package_commit(package) == ""
