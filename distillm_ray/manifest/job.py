"""What a manifest starts: the driver's command line, and the paths that it may name."""

from __future__ import annotations

import os.path
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillm_ray.config import Config
from distillm_ray.errors import ConfigError
from distillm_ray.manifest.layout import Layout
from distillm_ray.types import Device

SHARED = Path("/shared")
"""Where nodes mount the shared directory. Relative paths of a config are below it: jobs run in it,
so it has the layout of the directory in which the manifest was written."""

STOP_S = 300
"""From SIGTERM to SIGKILL: the step in progress, and a checkpoint."""

RETRIES = 3
"""Of a job that failed. It resumes from its newest checkpoint, because the run directory is on the
shared disk and the command is the same."""

STOPPED = 3
"""The driver's exit code after a stop that left a checkpoint."""

_LONGEST_NAME = 40  # KubeRay takes 47


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The run that a manifest starts."""

    name: str
    command: tuple[str, ...]  # of the driver
    ray_version: str
    written_by: str  # the command that wrote the manifest

    @property
    def in_shared_directory(self) -> str:
        """The command as a job's entrypoint."""
        return shlex.join(("env", f"--chdir={SHARED}", *self.command))


def make_job(
    config: Config,
    path: Path,
    overrides: Sequence[str],
    layout: Layout,
    device: Device,
    *,
    ray_version: str,
    written_by: str,
) -> Job:
    """`distillm-ray train` with the same config and overrides, on the nodes of the layout.

    Raises:
        ConfigError: the run takes place in one process.
    """
    if config.run.mode == "local":
        raise ConfigError(
            "run.mode must be cluster for a manifest, got local: such a run is one process without"
            " Ray; add run.mode=cluster"
        )
    chosen = [f"run.device={device}"] if config.run.device == "auto" else []
    return Job(
        name=_name(config.run.directory.name),
        command=("distillm-ray", "train", str(path), *overrides, *chosen, *layout.overrides()),
        ray_version=ray_version,
        written_by=written_by,
    )


def check_paths(config: Config, path: Path, root: Path) -> None:
    """Refuse paths that nodes do not share.

    Args:
        root: the working directory that the config was loaded in.

    Raises:
        ConfigError: with all keys whose path is neither relative nor below `SHARED`.
    """
    named = [("CONFIG", path), *_paths(config.model_dump())]
    named = [(key, one) for key, one in named if key != "learner.offload_directory"]  # of each node
    wrong = [
        f"  {key}: {one}"
        for key, one in named
        if not (_is_below(one, root) or _is_below(one, SHARED))
    ]
    if wrong:
        raise ConfigError(
            f"paths must be relative or below {SHARED}, where every node mounts the shared"
            " directory; these are not:\n"
            + "\n".join(wrong)
            + f"\ncopy the files below {SHARED}, and write their paths relative to it"
        )


def check_shells(command: Sequence[str]) -> None:
    """Refuse arguments that do not survive `ray job submit`, which a shell calls and which quotes
    its arguments for another one.

    Raises:
        ConfigError: with the first such argument.
    """
    for argument in command:
        try:
            survives = shlex.split(subprocess.list2cmdline([argument])) == [argument]
        except ValueError:
            survives = False
        if not survives or re.search(r"[$`;&|<>()*?!#\\\n]", argument):
            raise ConfigError(
                f"an override must hold no character that a shell reads, got {argument!r}: `ray job"
                " submit` would change it; write it into the config file"
            )


def _paths(value: Any, key: str = "") -> Iterator[tuple[str, Path]]:
    """All paths of a config, with their dotted keys."""
    if isinstance(value, Path):
        yield key, value
    elif isinstance(value, dict | list | tuple):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for part, one in parts:
            yield from _paths(one, f"{key}.{part}" if key else str(part))


def _is_below(path: Path, root: Path) -> bool:
    return Path(os.path.normpath(root / path)).is_relative_to(root)


def _name(directory: str) -> str:
    """A name that Kubernetes, Slurm and SkyPilot accept."""
    name = re.sub(r"[^a-z0-9]+", "-", directory.lower()).strip("-")
    if not name[:1].isalpha():
        name = f"run-{name}".strip("-")
    return name[:_LONGEST_NAME].rstrip("-")
