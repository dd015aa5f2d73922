"""`distillm-ray manifest`: which nodes, which job, which format."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from distillm_ray.config import Config
from distillm_ray.config.files import load_config
from distillm_ray.errors import ConfigError, UserError
from distillm_ray.manifest.job import check_paths, make_job
from distillm_ray.manifest.kuberay import kuberay
from distillm_ray.manifest.layout import Machine, check_is_fixed, machines, pods
from distillm_ray.manifest.ray_up import ray_up
from distillm_ray.manifest.skypilot import skypilot
from distillm_ray.manifest.slurm import slurm

Format: TypeAlias = Literal["kuberay", "ray-up", "slurm", "skypilot"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the command line asks for. None: not given."""

    format: Format
    image: str | None = None
    machine_type: str | None = None
    node_gpus: int | None = None
    node_cpus: int | None = None
    node_memory_gib: int | None = None
    object_store_gib: int | None = None

    @property
    def options(self) -> list[str]:
        """The options again."""
        given = (
            ("image", self.image),
            ("machine-type", self.machine_type),
            ("node-gpus", self.node_gpus),
            ("node-cpus", self.node_cpus),
            ("node-memory-gib", self.node_memory_gib),
            ("object-store-gib", self.object_store_gib),
        )
        named = [(f"--{name}", str(value)) for name, value in given if value is not None]
        return [f"--{self.format}", *(part for pair in named for part in pair)]

    @property
    def machine(self) -> Machine:
        """What one machine can give."""
        usual = Machine()
        return Machine(
            gpus=self.node_gpus or usual.gpus,
            cpus=self.node_cpus or usual.cpus,
            memory_gib=self.node_memory_gib,
        )


def write(path: Path, overrides: Sequence[str], request: Request) -> str:
    """The manifest of a config.

    Raises:
        UserError: the config is wrong, or this format cannot express it; with the key.
    """
    _check_options(request)
    config = _load(path, overrides, request)
    device = "cpu" if config.run.device == "cpu" else "cuda"
    _check_machine_type(request, device)
    if request.format == "kuberay" and config.learner.offload == "nvme":
        raise ConfigError(
            "learner.offload must be none or cpu with --kuberay, got nvme: the pods of the manifest"
            " have no disk of their own; write it with cpu, add a volume to the file, and set the"
            " key in its command"
        )
    lay_out = pods if request.format == "kuberay" else machines
    layout = lay_out(config, device, request.machine, request.object_store_gib)
    if request.format in ("slurm", "skypilot"):
        check_is_fixed(layout, request.format)
    job = make_job(
        config,
        path,
        overrides,
        layout,
        device,
        ray_version=importlib.metadata.version("ray"),
        written_by=shlex.join(
            ["distillm-ray", "manifest", str(path), *overrides, *request.options]
        ),
    )
    image = request.image or ""
    match request.format:
        case "kuberay":
            return kuberay(job, layout, image)
        case "ray-up":
            return ray_up(job, layout, image, request.machine_type or "")
        case "slurm":
            return slurm(job, layout)
        case "skypilot":
            return skypilot(job, layout, image, request.machine_type)


def _load(path: Path, overrides: Sequence[str], request: Request) -> Config:
    """The config, if its paths are ones that all nodes share.

    A Slurm job runs where it is submitted, on a disk that is shared already. The others run in
    `SHARED`; the config is read in an empty directory, to tell relative paths from others.
    """
    if request.format == "slurm":
        return load_config(path, overrides)
    with tempfile.TemporaryDirectory() as empty:
        root = Path(empty).resolve()
        absolute = path.absolute()
        with contextlib.chdir(root):
            config = load_config(absolute, overrides)
        check_paths(config, path, root)
    return config


def _check_options(request: Request) -> None:
    if request.format == "slurm":
        if request.image is not None:
            raise UserError(
                "--image must not be given with --slurm, got"
                f" {request.image}: the script runs from .venv in the shared directory"
            )
    elif request.image is None:
        raise UserError(
            f"--image is required with --{request.format}: the nodes run it; build it from"
            " deploy/Dockerfile and name it as in your registry"
        )


def _check_machine_type(request: Request, device: str) -> None:
    needs = request.format == "ray-up" or (request.format == "skypilot" and device == "cuda")
    if needs and request.machine_type is None:
        example = "p5.48xlarge" if request.format == "ray-up" else "H100"
        raise UserError(
            f"--machine-type is required with --{request.format}, as in --machine-type {example}:"
            " a config does not say which machines or GPUs you rent"
        )
    if not needs and request.machine_type is not None:
        raise UserError(
            f"--machine-type must not be given with --{request.format}"
            f"{' on machines without GPUs' if request.format == 'skypilot' else ''}, got"
            f" {request.machine_type}: nothing in the manifest would name it"
        )
