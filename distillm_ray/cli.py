"""The command line.

Commands parse and check first and import heavy modules afterwards: `--help` and config errors need
no torch, Ray or vLLM. Exit codes: 0 success, 1 a failed run, 2 a `UserError` or a full disk, 3 a
run that was stopped and that the same command resumes.
"""

from __future__ import annotations

import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distillm_ray import __version__
from distillm_ray.errors import DISK_FULL, NOT_ALLOWED, RunFailed, UserError

if TYPE_CHECKING:
    from distillm_ray.config import Config
    from distillm_ray.remote.run_store import RunSession
    from distillm_ray.report.console import ConsoleView

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 3

app = typer.Typer(
    name="distillm-ray",
    help="Distil large language models into small ones on a Ray cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _path(text: str) -> Path:
    """A path of the command line. Shells leave the `~` of `--output=~/x` in place."""
    from distillm_ray.config import expanded_path

    try:
        return expanded_path(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


ConfigArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML file.", parser=_path)
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, as in learner.steps=100."),
]


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def train(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Run the job; the same command resumes an interrupted run."""
    with _user_errors():
        tree = _load(config, overrides)
        _quiet()
        from distillm_ray.remote.run_store import opened

        with opened(tree) as session:
            _train(tree, session)
        if session is not None:
            typer.echo(f"The run is in {tree.run.directory}.")


def _train(tree: Config, session: RunSession | None) -> None:
    """The job, with its run directory on this node; `session` of one in a store."""
    from distillm_ray import preflight
    from distillm_ray.remote.inputs import pinned
    from distillm_ray.report.report import write_report

    directory = tree.run.local_directory
    tree = pinned(preflight.settled(tree, datetime.now()))
    if tree.run.mode == "local":
        from distillm_ray import local

        local.check(tree)
    checked = preflight.check(tree)
    if preflight.is_complete(tree):
        typer.echo(f"The run in {tree.run.directory} is complete.")
        if missing := preflight.missing_evaluations(tree):
            typer.echo(f"The evaluation of {' and '.join(missing)} is missing.")
            from distillm_ray import pipeline

            with _view(tree) as view:
                pipeline.evaluate_missing(tree, checked, view)
        _print(write_report(directory, compare=_comparable(tree)))
        return
    command = shlex.join(sys.argv)
    if tree.run.mode == "local":
        from transformers.utils.logging import disable_progress_bar

        from distillm_ray import local

        disable_progress_bar()  # of loading weights: it would garble the view
        with _view(tree) as view:
            local.train(tree, checked, view, command=command)
        if session is not None:
            session.push(models=True)
        _print(write_report(directory, compare=_comparable(tree)))
        return
    from distillm_ray import pipeline

    with _view(tree) as view:
        ended = pipeline.train(tree, checked, view, command=command, session=session)
    if ended.status == "stopped" and ended.step == 0:
        typer.echo("Stopped before the first checkpoint; the same command starts the run again.")
        raise typer.Exit(EXIT_STOPPED)
    _print(write_report(directory, compare=_comparable(tree)))
    if ended.status == "stopped":
        typer.echo(f"Stopped at step {ended.step}; the same command resumes the run.")
        raise typer.Exit(EXIT_STOPPED)


@app.command()
def evaluate(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    model: Annotated[
        Path | None,
        typer.Option(help="A Hugging Face directory; the run's model/ by default.", parser=_path),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where to write the JSON.", parser=_path)
    ] = None,
) -> None:
    """Validation loss of a model, and ROUGE, BLEU and matches of its responses."""
    with _user_errors():
        tree = _load(config, overrides)
        _quiet()
        from distillm_ray import jobs, preflight
        from distillm_ray.remote.inputs import pinned

        tree = pinned(preflight.settled(tree, datetime.now()))
        with _view(tree) as view:
            table = jobs.evaluate(tree, model, output, view)
        _print(table)


@app.command()
def generate(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    *,
    model: Annotated[
        Path, typer.Option(help="The Hugging Face directory that responds.", parser=_path)
    ],
    prompts: Annotated[
        list[Path], typer.Option(help="Files of prompts; may be given again.", parser=_path)
    ],
    output: Annotated[Path, typer.Option(help="The JSONL to write.", parser=_path)],
    keep_truncated: Annotated[
        bool, typer.Option(help="Keep responses that ended by length.")
    ] = False,
) -> None:
    """Responses of a model to a set of prompts, as JSONL (also SeqKD's data)."""
    with _user_errors():
        tree = _load(config, overrides)
        _quiet()
        from distillm_ray import jobs
        from distillm_ray.remote.inputs import pinned

        tree = pinned(tree)
        with _view(tree) as view:
            lines = jobs.generate(tree, model, prompts, output, keep_truncated, view)
        for line in lines:
            typer.echo(line)


@app.command()
def score(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Fill the target library ahead of runs: the teacher scores all training data once."""
    with _user_errors():
        tree = _load(config, overrides)
        from distillm_ray.config.remarks import why_not_scored

        if reason := why_not_scored(tree):
            raise UserError(reason)
        _quiet()
        from distillm_ray import scoring
        from distillm_ray.remote.inputs import pinned

        tree = pinned(tree)
        with _view(tree) as view:
            lines = scoring.score(tree, view)
        for line in lines:
            typer.echo(line)


@app.command("init-student")
def init_student(
    teacher: Annotated[Path, typer.Argument(help="A Hugging Face directory.", parser=_path)],
    out: Annotated[Path, typer.Argument(help="The directory to make.", parser=_path)],
    layers: Annotated[str | None, typer.Option(help="Layers to keep, as in 0,1,2,9.")] = None,
    keep: Annotated[
        int | None, typer.Option(help="How many layers to keep, chosen by --by.")
    ] = None,
    by: Annotated[
        str, typer.Option(help="loss: remove what is missed least; influence: what changes least.")
    ] = "loss",
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Rows to choose by, with --keep; may be given again.", parser=_path),
    ] = None,
    rows: Annotated[int, typer.Option(help="How many rows of --data.")] = 8,
) -> None:
    """A student from some of the teacher's layers: named, or chosen by what they do."""
    with _user_errors():
        if (layers is None) == (keep is None):
            raise UserError(
                "init-student needs either --layers, as in --layers 0,1,2,9, or --keep with --data,"
                " as in --keep 20 --by loss --data rows.jsonl"
            )
        if layers is not None:
            try:
                numbers = tuple(int(part) for part in layers.split(","))
            except ValueError:
                raise UserError(
                    "--layers must be numbers with commas between them, as in 0,1,2,9, got"
                    f" {layers!r}"
                ) from None
            _quiet()
            from distillm_ray import new_student

            lines = new_student.named_student(teacher, out, numbers)
        else:
            assert keep is not None
            _quiet()
            from transformers.utils.logging import disable_progress_bar

            from distillm_ray import new_student

            disable_progress_bar()  # of loading weights
            lines = new_student.chosen_student(
                teacher, out, keep, by=by, files=data or (), num_rows=rows
            )
        for line in lines:
            typer.echo(line)


@app.command()
def show(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """The resolved config, and what it will ask of the cluster."""
    with _user_errors():
        tree = _load(config, overrides)
        if tree.run.mode == "local":
            from distillm_ray.config.files import dump_config

            typer.echo(dump_config(tree))
            typer.echo(
                "run.mode is local: `train` runs in one process on this machine and asks for"
                " nothing of a cluster; with run.mode=cluster this command shows what it would"
                " ask for"
            )
            return
        from distillm_ray.cluster.placement import render_show

        device = "cpu" if tree.run.device == "cpu" else "cuda"
        typer.echo(render_show(tree, device))
        if tree.run.device == "auto":
            typer.echo(
                "run.device is auto: GPUs are asked for where the cluster has any; for a cluster"
                " without, add run.device=cpu"
            )


@app.command()
def manifest(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    *,
    kuberay: Annotated[bool, typer.Option("--kuberay", help="A RayJob for KubeRay.")] = False,
    ray_up: Annotated[bool, typer.Option("--ray-up", help="A cluster file for `ray up`.")] = False,
    slurm: Annotated[bool, typer.Option("--slurm", help="A batch script for Slurm.")] = False,
    skypilot: Annotated[bool, typer.Option("--skypilot", help="A task for SkyPilot.")] = False,
    image: Annotated[
        str | None, typer.Option(help="The image of deploy/Dockerfile, in your registry.")
    ] = None,
    machine_type: Annotated[
        str | None,
        typer.Option(help="--ray-up: type of the machines; --skypilot: accelerator, as in H100."),
    ] = None,
    node_gpus: Annotated[
        int | None, typer.Option(help="GPUs of one machine; 8 by default.", min=1)
    ] = None,
    node_cpus: Annotated[
        int | None, typer.Option(help="CPUs of one machine; 64 by default.", min=1)
    ] = None,
    node_memory_gib: Annotated[
        int | None, typer.Option(help="Memory of one machine; not written if unknown.", min=1)
    ] = None,
    object_store_gib: Annotated[
        int | None,
        typer.Option(help="Object store of a node; by default targets and 16 more.", min=1),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The file to write; printed by default.", parser=_path)
    ] = None,
) -> None:
    """A manifest that runs this config on a cluster: KubeRay, `ray up`, Slurm or SkyPilot."""
    with _user_errors():
        from distillm_ray.manifest.write import Format, Request, write

        flags: tuple[tuple[Format, bool], ...] = (
            ("kuberay", kuberay),
            ("ray-up", ray_up),
            ("slurm", slurm),
            ("skypilot", skypilot),
        )
        asked: list[Format] = [name for name, given in flags if given]
        if len(asked) != 1:
            raise UserError(
                "manifest needs one of --kuberay, --ray-up, --slurm and --skypilot, got"
                f" {' and '.join(f'--{name}' for name in asked) or 'none'}"
            )
        request = Request(
            format=asked[0],
            image=image,
            machine_type=machine_type,
            node_gpus=node_gpus,
            node_cpus=node_cpus,
            node_memory_gib=node_memory_gib,
            object_store_gib=object_store_gib,
        )
        text = write(config, overrides or [], request)
        if output is None:
            typer.echo(text, nl=False)
        else:
            output.write_text(text, encoding="utf-8")
            typer.echo(f"wrote {output}")


@app.command()
def check(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Prove what can be proven in a minute: rows, packing, heads, export, responses."""
    with _user_errors():
        tree = _load(config, overrides)
        _quiet()
        from distillm_ray import preflight
        from distillm_ray.remote.inputs import pinned

        tree = pinned(preflight.settled(tree, datetime.now()))
        checked = preflight.check(tree)
        from transformers.utils.logging import disable_progress_bar, set_verbosity_error

        from distillm_ray import check as checks

        # Both would stand between the lines.
        disable_progress_bar()
        set_verbosity_error()
        checks.check(tree, checked, typer.echo)
        typer.echo("\nno objection")


@app.command()
def plan(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    *,
    stages: Annotated[
        Path | None,
        typer.Option(help="A file of stage times; measured here by default.", parser=_path),
    ] = None,
    save_stages: Annotated[
        Path | None, typer.Option(help="Where to write the stage times.", parser=_path)
    ] = None,
    phi: Annotated[
        float | None, typer.Option(help="The phi that the advice is for.", min=0.0, max=1.0)
    ] = None,
    cpus: Annotated[
        float | None, typer.Option(help="CPUs that the advice may use; this machine's by default.")
    ] = None,
    gpus: Annotated[
        float | None, typer.Option(help="GPUs that the advice may use; the config's by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What a step will take and cost, and how many of each role balance, before a run."""
    with _user_errors():
        tree = _load(config, overrides)
        for name, amount in (("cpus", cpus), ("gpus", gpus)):
            if amount is not None and not amount > 0:
                raise UserError(f"--{name} must be above 0, got {amount:g}: no process would fit")
        from distillm_ray.plan.stages import read_stages, write_stages

        times = read_stages(stages) if stages is not None else None
        _quiet()
        from distillm_ray import preflight
        from distillm_ray.data.files import check_files
        from distillm_ray.remote.inputs import pinned

        tree = pinned(preflight.settled(tree, datetime.now()))
        preflight.check_engines(preflight.train_engines(tree))
        checked = preflight.check_models(tree)
        check_files(tree.data, require_responses=tree.draws_data)
        from distillm_ray.plan.plan import make_plan
        from distillm_ray.plan.table import render

        with _progress() as say:
            found = make_plan(tree, checked, times, say, phi=phi, cpus=cpus, gpus=gpus)
        if save_stages is not None:
            write_stages(save_stages, found.stages)
        if as_json:
            typer.echo(found.to_json())
        else:
            _print(render(found))


@app.command()
def plot(run: Annotated[Path, typer.Argument(help="A run directory.", parser=_path)]) -> None:
    """Figures, summary and table of a run."""
    with _user_errors():
        _quiet()
        from distillm_ray.report.report import write_report

        _print(write_report(run))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.", parser=_path)],
    output: Annotated[Path, typer.Option(help="The picture to write.", parser=_path)] = Path(
        "comparison.png"
    ),
) -> None:
    """Runs side by side: a table, and a picture of loss against time, tokens and cost."""
    with _user_errors():
        _quiet()
        from distillm_ray.report import comparison

        _print(comparison.compare(runs, output))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run directory.", parser=_path)],
    checkpoint: Annotated[
        str, typer.Option(help="best, latest, or the step of a checkpoint.")
    ] = "best",
    output: Annotated[
        Path | None,
        typer.Option(help="The directory to make; RUN/model-step-N by default.", parser=_path),
    ] = None,
) -> None:
    """A model directory from a checkpoint of a run, finished or stopped."""
    with _user_errors():
        _quiet()
        from transformers.utils.logging import disable_progress_bar

        from distillm_ray import checkpoint_export

        disable_progress_bar()  # of loading weights
        for line in checkpoint_export.export(run, checkpoint, output):
            typer.echo(line)


@app.command()
def doctor(
    address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Ask every node of a Ray cluster: auto, or HOST:PORT. Default: RAY_ADDRESS.",
        ),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(help="A directory that all nodes should share: proves it.", parser=_path),
    ] = None,
) -> None:
    """What this machine or cluster can run, and what is missing."""
    with _user_errors():
        _quiet()
        from distillm_ray.doctor.examination import examine
        from distillm_ray.doctor.findings import exit_code, render

        findings = examine(address, directory)
        _print(render(findings))
        raise typer.Exit(exit_code(findings))


def main() -> None:
    """The entry point."""
    app()


@contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(EXIT_USER_ERROR) from error
    except OSError as error:
        if error.errno not in (*DISK_FULL, *NOT_ALLOWED) or error.filename is None:
            raise
        full = error.errno in DISK_FULL
        remedy = "; free some space and give the same command again" if full else ""
        typer.echo(f"error: {error}{remedy}", err=True)
        raise typer.Exit(EXIT_USER_ERROR) from error
    except RunFailed as failure:
        typer.echo(f"failed: {failure}", err=True)
        raise typer.Exit(EXIT_FAILED) from failure


def _load(path: Path, overrides: list[str] | None) -> Config:
    from distillm_ray.config.files import load_config

    return load_config(path, overrides or [])


@contextmanager
def _view(config: Config) -> Iterator[ConsoleView]:
    from distillm_ray.report.console import ConsoleView

    view = ConsoleView(config.learner.known_steps or 0)  # of epochs: known when the data is read
    try:
        yield view
    finally:
        view.stop()


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What is being done: a line that changes on a terminal, else a line each. On stderr."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: typer.echo(text, err=True)
        return
    with console.status("") as status:
        yield status.update


def _comparable(config: Config) -> tuple[Path, ...]:
    """Evaluated runs beside this one whose names begin with its name, such as its ablations."""
    from distillm_ray.evaluation.results import has_trained_student

    directory = config.run.local_directory
    return tuple(filter(has_trained_student, sorted(directory.parent.glob(f"{directory.name}-*"))))


def _print(renderable: object) -> None:
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(renderable)


def _quiet() -> None:
    """Hide the notices of other libraries; their errors stay visible."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")


if __name__ == "__main__":
    main()
