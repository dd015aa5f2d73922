"""Bad input: the message that a user reads, exit code 2, and nothing written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from distillm_ray.cli import EXIT_USER_ERROR, app
from distillm_ray.config import files as config_files
from distillm_ray.config.files import dump_config, load_config
from distillm_ray.run_directory import held
from tests.integration.tiny import make_config

HEAVY = ("torch", "ray", "vllm", "transformers", "deepspeed", "matplotlib")


@pytest.fixture(scope="session")
def tiny_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of a run that would work, with its models and data beside it."""
    return make_config(tmp_path_factory.mktemp("tiny"), steps=10, batch_size=8)


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def refused(tiny_job: Path, run_directory: Path) -> Callable[..., str]:
    """Train with these overrides, and return the message of the refusal."""

    def refuse(*overrides: str, config: Path = tiny_job) -> str:
        existed = run_directory.exists()
        before = sorted(run_directory.rglob("*"))
        arguments = ["train", str(config), f"run.directory={run_directory}", *overrides]
        message = refusal(*arguments)
        assert run_directory.exists() == existed, "nothing may be written"
        assert sorted(run_directory.rglob("*")) == before, "nothing may be written"
        return message

    return refuse


def refusal(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == EXIT_USER_ERROR, result.output
    assert result.stderr.startswith("error: "), result.stderr
    assert "Traceback" not in result.output
    return result.stderr.removeprefix("error: ").strip()


def test_a_full_disk_gives_a_message_and_any_other_disk_error_a_stack_trace(
    tiny_job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int) -> Callable[..., None]:
        def load(*_: object) -> None:
            raise OSError(number, os.strerror(number), "runs/one/config.yaml")

        return load

    monkeypatch.setattr(config_files, "load_config", fail(errno.ENOSPC))
    message = refusal("show", str(tiny_job))
    assert "No space left on device: 'runs/one/config.yaml'; free some space" in message
    monkeypatch.setattr(config_files, "load_config", fail(errno.EIO))
    assert isinstance(CliRunner().invoke(app, ["show", str(tiny_job)]).exception, OSError)


# ---- start-up time ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["generate", "--help"],
        ["--version"],
        ["train", "CONFIG", "learner.stepz=5"],
        ["train", "nowhere.yaml"],
        ["show", "CONFIG"],
        ["manifest", "CONFIG", "--slurm"],
        ["plan", "--help"],
        ["plan", "CONFIG", "learner.stepz=5"],
        ["plan", "CONFIG", "--stages", "nowhere.json"],
    ],
    ids=" ".join,
)
def test_help_and_config_errors_take_less_than_a_second_and_load_no_heavy_module(
    arguments: list[str], tiny_job: Path
) -> None:
    program = (
        "import sys, time\n"
        "from distillm_ray.cli import app\n"
        "try:\n    app(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules], time.process_time())"
    )
    given = [str(tiny_job) if argument == "CONFIG" else argument for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-c", program, *given],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    loaded, _, seconds = done.stdout.splitlines()[-1].rpartition(" ")
    assert loaded == "[]"
    assert float(seconds) < 1.0


def test_a_wrong_command_line_ends_with_exit_code_2() -> None:
    result = CliRunner().invoke(app, ["generate", "x.yaml"])
    assert result.exit_code == 2
    assert "--model" in result.stderr


# ---- the config ---------------------------------------------------------------------------------


def test_a_misspelt_key_is_named_with_the_nearest_one(refused: Callable[..., str]) -> None:
    assert "learner.stepz: unknown key; did you mean learner.steps?" in refused("learner.stepz=5")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learner.steps=many", "learner.steps: Input should be a valid integer"),
        ("learner.steps=true", "learner.steps: must be a number, got true"),
        ("learner.steps=2.5", "learner.steps: Input should be a valid integer"),
        ("data.train=a.jsonl", "data.train: must be a list, as in [a, b]"),
        ("schedule.phi=1.5", "schedule.phi: Input should be less than or equal to 1"),
        ("loss.terms=[{type: kl}]", "loss.terms.0.type: must be one of forward_kl"),
        ("learner.steps", "override 'learner.steps': must have the form key=value"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_rule(
    override: str, message: str, refused: Callable[..., str]
) -> None:
    assert message in refused(override)


def test_all_problems_are_reported_at_once(refused: Callable[..., str]) -> None:
    message = refused("learner.stepz=5", "rollout.actors=0")
    assert "learner.stepz" in message and "rollout.actors" in message


def test_impossible_combinations_are_refused(refused: Callable[..., str]) -> None:
    assert "a sample would be older than you allow" in refused("rollout.lookahead=9")
    message = refused("rollout.engine={type: vllm}", "evaluation.sampling.temperature=2.5")
    assert "evaluation.sampling.temperature must be at most 2" in message
    message = refused("targets.type=top_k", "targets.k=999")
    assert "targets.k must be at most the vocabulary's size, got 999 > 19" in message


def test_a_config_file_that_is_missing_or_not_yaml_is_named(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = tmp_path / "config.yaml"
    assert refused(config=path) == f"config file {path} does not exist"
    path.write_text("run: [unclosed")
    assert refused(config=path).startswith(f"config file {path} is not valid YAML")


# ---- data ---------------------------------------------------------------------------------------


def test_a_missing_data_file_is_named(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "nowhere.jsonl"
    assert refused(f"data.train=[{path}]") == f"data.train: {path} does not exist"
    assert refused(f"data.test=[{path}]") == f"data.test: {path} does not exist"


def test_an_empty_data_file_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.touch()
    assert refused(f"data.train=[{path}]") == f"data.train: {path} is empty"


def test_malformed_json_is_named_with_its_line(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "one", "response": "two"}\n{"prompt": "one", \n')
    assert refused(f"data.train=[{path}]").startswith(f"{path}:2: not valid JSON: ")


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch, local_ray: None) -> None:
    """The job uses the Ray of the test session, with 16 CPUs, instead of starting its own."""
    from distillm_ray import pipeline

    monkeypatch.setattr(pipeline, "connect", lambda config, **_: None)


@pytest.mark.integration
@pytest.mark.usefixtures("joined")
class TestWithRay:
    """Refusals that need the cluster or all rows of the data."""

    def test_malformed_json_anywhere_is_named_with_its_line(
        self, refused: Callable[..., str], tmp_path: Path
    ) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text('{"prompt": "one", "response": "two"}\n' * 20 + "{bad\n")
        message = refused(f"data.train=[{path}]")
        assert message.startswith(f"{path}:21: not valid JSON: ")
        assert "set data.bad_rows=skip" in message

    def test_a_data_set_of_blank_lines_is_refused(
        self, refused: Callable[..., str], tmp_path: Path
    ) -> None:
        path = tmp_path / "blank.jsonl"
        path.write_text("\n\n")
        assert refused(f"data.train=[{path}]").startswith("data.train: no usable row in ")

    def test_a_prompt_longer_than_the_limit_is_named_if_the_config_asks_for_it(
        self, refused: Callable[..., str], tmp_path: Path
    ) -> None:
        path = tmp_path / "long.jsonl"
        path.write_text(json.dumps({"prompt": "one " * 300, "response": "two"}) + "\n")
        message = refused(f"data.train=[{path}]", "data.long_rows=fail")
        assert message.startswith(f"{path}:1: the prompt has 30")
        assert "data.max_prompt_tokens is 24" in message
        assert "no usable row" in refused(f"data.train=[{path}]")

    def test_too_few_cpus_are_reported_with_the_demand_the_supply_and_the_keys_to_lower(
        self, refused: Callable[..., str]
    ) -> None:
        message = refused("learner.workers=3", "learner.num_cpus=9")
        assert "27.5 CPUs asked for (3 learner x 9, 1 generator x 0.25" in message
        assert "16 in the cluster; lower learner.workers, learner.num_cpus" in message

    def test_gpus_that_are_not_there_are_named_with_their_keys(
        self, refused: Callable[..., str]
    ) -> None:
        message = refused(
            "run.device=cuda", "rollout.engine={type: vllm}", "rollout.tensor_parallel=4"
        )
        assert "6 GPUs asked for (1 learner x 1, 1 generator x 4, 1 scorer x 1)" in message
        assert "0 in the cluster" in message and "rollout.tensor_parallel" in message

    def test_an_object_store_too_small_for_the_targets_is_named(
        self, refused: Callable[..., str]
    ) -> None:
        message = refused("targets.max_bytes=9_000_000_000")
        assert "targets.max_bytes is 9,000,000,000 in 1 store of 9,000,000,000, each" in message


# ---- models -------------------------------------------------------------------------------------


def test_sequences_longer_than_the_context_are_refused(refused: Callable[..., str]) -> None:
    message = refused("data.max_prompt_tokens=250", "learner.max_micro_batch_tokens=512")
    assert "must fit the teacher's context, got 250 + 16 = 266 > 256" in message


def test_two_vocabularies_are_refused_by_the_first_id_that_differs(
    refused: Callable[..., str], tiny_job: Path, tmp_path: Path
) -> None:
    student = Path(shutil.copytree(tiny_job.parent / "student", tmp_path / "student"))
    tokenizer = json.loads((student / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["uno"] = vocabulary.pop("one")
    (student / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refused(f"student.model={student}")
    assert f"id {vocabulary['uno']} is 'one' for the teacher" in message
    assert "and 'uno' for the student" in message


def test_a_model_directory_without_safetensors_is_refused(
    refused: Callable[..., str], tiny_job: Path, tmp_path: Path
) -> None:
    message = refused(f"teacher.model={tmp_path / 'nowhere'}")
    assert message == f"teacher.model: {tmp_path / 'nowhere'} does not exist"
    model = Path(shutil.copytree(tiny_job.parent / "student", tmp_path / "student"))
    (model / "model.safetensors").unlink()
    message = refused(f"student.model={model}")
    assert message == f"student.model: {model} has no weights: no *.safetensors file in it"
    (model / "pytorch_model.bin").touch()
    message = refused(f"student.model={model}")
    assert "holds its weights as pickles only (pytorch_model.bin)" in message


# ---- the run directory --------------------------------------------------------------------------


def test_a_directory_of_another_run_is_not_touched(
    refused: Callable[..., str], tiny_job: Path, run_directory: Path
) -> None:
    run_directory.mkdir()
    other = load_config(tiny_job, [f"run.directory={run_directory}", "run.seed=7"])
    (run_directory / "config.yaml").write_text(dump_config(other))
    message = refused()
    assert "run.seed: 7 in the run, 0 now" in message
    assert "set run.directory to a new directory to start another run" in message


def test_a_directory_with_other_files_is_not_touched(
    refused: Callable[..., str], run_directory: Path
) -> None:
    run_directory.mkdir()
    (run_directory / "thesis.tex").write_text("years of work")
    assert "not a distillm-ray run; refusing to overwrite it" in refused()


def test_a_directory_in_use_by_another_job_is_not_touched(
    refused: Callable[..., str], run_directory: Path
) -> None:
    run_directory.mkdir()
    with held(run_directory):
        assert f"another job is running in {run_directory}" in refused()


def test_a_file_in_the_way_of_the_run_directory_is_named(tiny_job: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    train = ["train", str(tiny_job)]
    assert "must be a directory, it is a file" in refusal(*train, f"run.directory={file}")
    message = refusal(*train, f"run.directory={file / 'below' / 'it'}")
    assert f"cannot be made ({file} is a file)" in message


# ---- the cluster --------------------------------------------------------------------------------


@pytest.fixture
def same_environment() -> Iterator[None]:
    """Restores the environment: `connect` sets variables for Ray's workers."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("same_environment")
def test_a_cluster_that_cannot_be_reached_is_named_in_seconds(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from distillm_ray import pipeline  # noqa: F401  takes seconds, not to be timed

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        started = time.monotonic()
        message = refused()
    assert time.monotonic() - started < 10
    assert f"could not be reached (RAY_ADDRESS = {address})" in message
    assert "Connection refused" in message


@contextmanager
def listening(reply: bytes) -> Iterator[str]:
    """The address of a service that sends `reply` after its first request, and nothing if empty."""

    def serve() -> None:
        connection, _ = service.accept()
        with connection, suppress(ConnectionResetError):
            connection.recv(1024)
            connection.sendall(reply)
            connection.recv(1024)  # returns when the client closes the connection

    with socket.create_server(("127.0.0.1", 0)) as service:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{service.getsockname()[1]}"
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.usefixtures("same_environment")
@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "something listens there that is not a Ray cluster"),
        (b"", "sends nothing for 0.5 s: it hangs, or it is not a Ray cluster"),
    ],
)
def test_another_service_at_the_clusters_address_is_reported_in_seconds(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, reply: bytes, message: str
) -> None:
    from distillm_ray import pipeline  # noqa: F401  takes seconds, not to be timed
    from distillm_ray.cluster import address

    monkeypatch.setattr(address, "_TIMEOUT_S", 0.5)
    with listening(reply) as service:
        monkeypatch.setenv("RAY_ADDRESS", service)
        started = time.monotonic()
        error = refused()
    assert time.monotonic() - started < 10
    assert f"could not be reached (RAY_ADDRESS = {service})" in error
    assert message in error


@pytest.mark.usefixtures("same_environment")
def test_a_dashboards_address_is_refused(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    assert "is HOST:PORT, and this is a dashboard's, which only `ray job submit` takes" in refused()


@pytest.mark.usefixtures("same_environment")
def test_a_cluster_that_does_not_start_is_reported_with_rays_error(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def fail(**settings: object) -> None:
        raise RuntimeError("the port 6379 is taken")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", fail)
    message = refused()
    assert message.startswith("Ray did not start or could not be reached")
    assert message.endswith("the port 6379 is taken")


# ---- the other commands -------------------------------------------------------------------------


def test_evaluate_and_generate_check_their_arguments_first(tiny_job: Path, tmp_path: Path) -> None:
    job, model = str(tiny_job), str(tiny_job.parent / "student")
    prompts, output = str(tiny_job.parent / "train.jsonl"), tmp_path / "out.jsonl"
    output.write_text("mine")
    generate = ["generate", job, "--model", model, "--output", str(output)]
    assert "is not overwritten" in refusal(*generate, "--prompts", prompts)
    assert output.read_text() == "mine"
    output.unlink()
    message = refusal(*generate, "--prompts", "nowhere.jsonl")
    assert message == "--prompts nowhere.jsonl does not exist"
    assert not output.exists()

    nowhere = str(tmp_path / "nowhere")
    assert f"--model: {nowhere} does not exist" in refusal("evaluate", job, "--model", nowhere)
    assert "has no model/, which a finished run leaves" in refusal("evaluate", job)
    message = refusal("evaluate", job, "--model", model, "--output", prompts)
    assert "must be a directory, it is a file" in message
    message = refusal("evaluate", job, f"data.test=[{nowhere}.jsonl]", "--model", model)
    assert message == f"data.test: {nowhere}.jsonl does not exist"


def test_score_refuses_what_leaves_it_nothing_to_do(tiny_job: Path, tmp_path: Path) -> None:
    job, library = str(tiny_job), f"targets.library={tmp_path / 'targets'}"
    message = refusal("score", job)
    assert message.startswith("targets.library is required by `score`, got none")
    assert "as in targets.library=/shared/targets" in message
    message = refusal("score", job, library, "method=sft")
    assert "got only type: cross_entropy, which needs no targets" in message
    message = refusal("score", job, library, "method=imitkd")
    assert "what the student samples is not known before a run" in message
    message = refusal("score", job, library, "teacher.dtype=auto")
    assert "teacher.dtype must be bfloat16 or float32 with targets.library, got auto" in message
    rows = tiny_job.parent / "train.jsonl"
    message = refusal("score", job, f"targets.library={rows}")
    assert message == f"targets.library: {rows} must be a directory, it is a file"
    message = refusal("score", job, library, "data.train=[nowhere.jsonl]")
    assert message.endswith("nowhere.jsonl does not exist")
    assert not (tmp_path / "targets").exists()


def test_init_student_and_plot_refuse_wrong_arguments(tiny_job: Path, tmp_path: Path) -> None:
    teacher, out = str(tiny_job.parent / "teacher"), tmp_path / "student"
    init = ["init-student", teacher, str(out), "--layers"]
    assert "--layers must be numbers with commas" in refusal(*init, "0,first")
    assert "9" in refusal(*init, "0,9")
    rows = str(tiny_job.parent / "train.jsonl")
    init = ["init-student", teacher, str(out)]
    assert "needs either --layers" in refusal(*init)
    assert "needs either --layers" in refusal(*init, "--layers", "0", "--keep", "1")
    assert "--keep 1 needs --data" in refusal(*init, "--keep", "1")
    choose = [*init, "--keep", "1", "--data", rows]
    assert refusal(*choose, "--by", "size") == "--by must be loss or influence, got 'size'"
    assert refusal(*choose, "--rows", "0") == "--rows must be at least 1, got 0"
    message = refusal(*init, "--keep", "3", "--data", rows)
    assert message.startswith("--keep must lie between 1 and 2, got 3")
    assert "nowhere.jsonl does not exist" in refusal(*choose, "--data", "nowhere.jsonl")
    assert not out.exists()
    assert str(tmp_path / "nowhere") in refusal("plot", str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_show_prints_a_config_that_loads_and_the_resources_it_needs(
    tiny_job: Path, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, ["show", str(tiny_job), "learner.workers=2"])
    assert result.exit_code == 0
    tree, _, table = result.stdout.partition("asked of the cluster")
    assert yaml.safe_load(tree)["learner"]["workers"] == 2
    assert "learner.workers" in table
    assert "targets.library" not in table
    library = tmp_path / "targets"
    options = (f"targets.library={library}", "targets.library_max_bytes=5368709120")
    shown = CliRunner().invoke(app, ["show", str(tiny_job), *options]).stdout
    assert f"disk: at most 5.00 GiB of teacher targets in {library}" in shown
