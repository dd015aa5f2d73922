"""Manifests: which nodes, which command, what each format says, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from distillm_ray.cli import EXIT_USER_ERROR, app
from distillm_ray.config import Config
from distillm_ray.errors import ClusterError, ConfigError
from distillm_ray.manifest.job import SHARED, STOP_S, check_shells
from distillm_ray.manifest.layout import (
    AUTO_TARGETS_GIB,
    SHM_MARGIN_GIB,
    TRANSIT_GIB,
    Layout,
    Machine,
    machines,
    pods,
)
from tests import make

ROOT = Path(__file__).parent.parent
EIGHT = Machine(gpus=8, cpus=64)
GIB = 2**30

# What the files in deploy/ are the output of.
CONFIG = "configs/recipes/qwen3-chat.yaml"
LARGER = ("learner.workers=16", "rollout.actors=4", "teacher.actors=4")
IMAGE = ("--image", "registry.example/distillm-ray:0.1.0")
EXAMPLES: dict[str, tuple[str, ...]] = {
    "kuberay.yaml": (*LARGER, "--kuberay", *IMAGE, "--node-memory-gib", "900"),
    "ray-up.yaml": (*LARGER, "--ray-up", *IMAGE, "--machine-type", "p5.48xlarge"),
    "slurm.sh": (*LARGER, "--slurm", "--node-memory-gib", "900"),
    "skypilot.yaml": (*LARGER, "--skypilot", *IMAGE, "--machine-type", "H100"),
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def written(*arguments: str, config: str = CONFIG) -> str:
    result = CliRunner().invoke(app, ["manifest", config, *arguments])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refusal(*arguments: str, config: str = CONFIG) -> str:
    result = CliRunner().invoke(app, ["manifest", config, *arguments])
    assert result.exit_code == EXIT_USER_ERROR, result.output
    return result.stderr


def nodes(layout: Layout) -> dict[str, tuple[int, int, int]]:
    return {group.name: (group.count, group.gpus, group.cpus) for group in layout.groups}


def gpu_config(**sections: Any) -> Config:
    return make.config(evaluation={"at_end": False}, **sections)


# ---- the committed examples ---------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_example_is_the_output_of_its_command(name: str) -> None:
    command = shlex.join(["distillm-ray", "manifest", CONFIG, *EXAMPLES[name]])
    path = f"deploy/{name}"
    text = (ROOT / path).read_text(encoding="utf-8")
    assert text == written(*EXAMPLES[name]), f"{path} is out of date: {command} --output {path}"
    assert f"# Written by: {command}\n" in text, "it says how it was made"


def test_the_scripts_are_valid_for_bash() -> None:
    scripts = [(ROOT / "deploy" / "slurm.sh").read_text(encoding="utf-8")]
    for one in (LARGER, ("run.device=cuda",)):
        task = written(*one, "--skypilot", *IMAGE, "--machine-type", "H100")
        scripts.append(yaml.safe_load(task)["run"])
    for script in scripts:
        checked = subprocess.run(
            ["bash", "-n"], input=script, text=True, capture_output=True, check=False
        )
        assert checked.returncode == 0, checked.stderr


# ---- which nodes ---------------------------------------------------------------------------------


def test_pods_hold_all_learners_that_a_machine_can_and_one_generator_or_scorer() -> None:
    config = gpu_config(
        learner={"workers": 12, "batch_size": 12},
        rollout={"actors": 3, "tensor_parallel": 2},
        replay={"capacity": 100},
    )
    layout = pods(config, "cuda", EIGHT, None)
    assert nodes(layout) == {"learner": (2, 6, 48), "generator": (3, 2, 16), "scorer": (1, 1, 8)}
    assert layout.num_nodes == 7, "and a head"
    assert layout.overrides() == [
        "learner.node_labels.distillm-ray=learner",
        "rollout.node_labels.distillm-ray=generator",
        "teacher.node_labels.distillm-ray=scorer",
    ]


def test_pods_get_their_share_of_a_machines_memory() -> None:
    machine = Machine(gpus=8, cpus=64, memory_gib=800)
    layout = pods(gpu_config(learner={"workers": 4}), "cuda", machine, None)
    memory = {group.name: group.memory_gib for group in layout.groups}
    assert memory == {"learner": 400, "generator": 100, "scorer": 100}


def test_one_machine_that_holds_every_role_needs_no_labels() -> None:
    layout = machines(gpu_config(learner={"workers": 6}), "cuda", EIGHT, None)
    assert nodes(layout) == {"learner-generator-scorer": (1, 8, 64)}
    assert layout.overrides() == []


def test_a_role_that_needs_several_machines_shares_none_of_them() -> None:
    config = gpu_config(
        learner={"workers": 4},
        rollout={"actors": 9},  # the second machine has room for seven more
        teacher={"actors": 4},
    )
    layout = machines(config, "cuda", EIGHT, None)
    assert nodes(layout) == {"learner-scorer": (1, 8, 64), "generator": (2, 8, 64)}
    assert layout.overrides() == [
        "learner.node_labels.distillm-ray=learner-scorer",
        "teacher.node_labels.distillm-ray=learner-scorer",
        "rollout.node_labels.distillm-ray=generator",
    ]


def test_roles_that_share_parts_of_a_gpu_share_a_machine() -> None:
    config = gpu_config(
        learner={"num_gpus": 0.5}, rollout={"num_gpus": 0.25}, teacher={"num_gpus": 0.25}
    )
    layout = machines(config, "cuda", Machine(gpus=1, cpus=8), None)
    assert nodes(layout) == {"learner-generator-scorer": (1, 1, 8)}


def test_on_cpus_machines_are_filled_by_cpus() -> None:
    config = gpu_config(learner={"num_cpus": 3}, rollout={"num_cpus": 2, "actors": 2})
    layout = machines(config, "cpu", Machine(gpus=8, cpus=4), None)
    assert nodes(layout) == {"learner-scorer": (1, 0, 4), "generator": (1, 0, 4)}
    layout = pods(config, "cpu", Machine(gpus=8, cpus=4), None)
    assert nodes(layout) == {"learner": (1, 0, 3), "generator": (2, 0, 2), "scorer": (1, 0, 1)}


def test_every_node_has_room_for_its_share_of_the_target_stores_and_what_is_in_transit() -> None:
    config = gpu_config(targets={"max_bytes": 30 * GIB, "stores": 3})
    layout = pods(config, "cuda", EIGHT, None)
    assert layout.num_nodes == 4
    assert layout.store_gib == 10 + TRANSIT_GIB
    assert layout.shm_gib == 10 + TRANSIT_GIB + SHM_MARGIN_GIB
    on_one = machines(config, "cuda", EIGHT, None)
    assert on_one.store_gib == 30 + TRANSIT_GIB, "one machine has all three"


def test_a_run_without_teacher_has_no_scorers_and_keeps_no_targets() -> None:
    config = gpu_config(
        teacher=None,
        loss={"terms": [{"type": "cross_entropy"}]},
        schedule={"type": "fixed", "phi": 0.0},
    )
    layout = pods(config, "cuda", EIGHT, None)
    assert [group.name for group in layout.groups] == ["learner"]
    assert layout.store_gib == TRANSIT_GIB


# ---- what is refused -----------------------------------------------------------------------------


def test_parts_of_a_gpu_are_refused_where_every_role_has_its_own_nodes() -> None:
    with pytest.raises(ConfigError, match=r"rollout.num_gpus must be a whole number .* got 0.25"):
        pods(gpu_config(rollout={"num_gpus": 0.25}), "cuda", EIGHT, None)


def test_a_process_that_no_machine_holds_is_refused_by_key() -> None:
    config = gpu_config(rollout={"tensor_parallel": 16})
    for lay_out in (pods, machines):
        with pytest.raises(ConfigError) as caught:
            lay_out(config, "cuda", EIGHT, None)
        assert "a generator needs 16 GPUs and 1 CPUs on one machine" in str(caught.value)
        assert str(caught.value).endswith("; lower rollout.tensor_parallel")


def test_a_later_phase_that_the_nodes_cannot_hold_is_refused_by_key() -> None:
    config = make.config(evaluation={"teacher": {"tensor_parallel": 4}})
    with pytest.raises(ClusterError) as caught:
        pods(config, "cuda", EIGHT, None)
    assert "evaluation of the teacher: 4 GPUs asked for" in str(caught.value)
    assert "lower evaluation.teacher.tensor_parallel" in str(caught.value)


def test_targets_that_leave_a_pod_no_memory_are_refused_by_key() -> None:
    config = gpu_config(targets={"max_bytes": 200 * GIB})
    with pytest.raises(ConfigError, match=r"lower targets.max_bytes or --object-store-gib"):
        pods(config, "cuda", Machine(gpus=8, cpus=64, memory_gib=800), None)


def test_an_object_store_that_is_too_small_for_the_targets_is_refused_by_key() -> None:
    config = gpu_config(targets={"max_bytes": 10 * GIB})
    with pytest.raises(ClusterError, match=r"targets.max_bytes is 10,737,418,240"):
        machines(config, "cuda", EIGHT, 9)


def test_labels_of_the_users_are_refused_by_key() -> None:
    config = gpu_config(teacher={"node_labels": {"zone": "a"}})
    with pytest.raises(ConfigError, match=r"teacher.node_labels must be empty"):
        pods(config, "cuda", EIGHT, None)


def test_a_run_in_one_process_has_no_manifest() -> None:
    assert "run.mode must be cluster for a manifest" in refusal("run.mode=local", "--slurm")


def test_exactly_one_format_is_asked_for() -> None:
    assert "one of --kuberay, --ray-up, --slurm and --skypilot, got none" in refusal()
    assert "got --ray-up and --slurm" in refusal("--slurm", "--ray-up")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--kuberay",), "--image is required with --kuberay"),
        (("--slurm", *IMAGE), "--image must not be given with --slurm"),
        (("--ray-up", *IMAGE), "--machine-type is required with --ray-up"),
        (("--skypilot", *IMAGE), "--machine-type is required with --skypilot"),
        (("--slurm", "--machine-type", "H100"), "--machine-type must not be given with --slurm"),
        (
            ("run.device=cpu", "--skypilot", *IMAGE, "--machine-type", "H100"),
            "--machine-type must not be given with --skypilot on machines without GPUs",
        ),
    ],
)
def test_options_that_a_format_lacks_or_needs_are_named(
    arguments: tuple[str, ...], said: str
) -> None:
    assert said in refusal(*arguments)


def test_paths_that_the_nodes_do_not_share_are_refused_with_their_keys() -> None:
    here = ROOT / "models" / "x"
    message = refusal(
        *("run.directory=/scratch/run", f"student.model={here}", "data.test=[/shared/../x.jsonl]"),
        *("teacher.model=/shared/models/y", "--kuberay", *IMAGE),
    )
    named = re.findall(r"^  (\S+): (\S+)$", message, re.MULTILINE)
    assert named == [
        ("run.directory", "/scratch/run"),
        ("student.model", str(here)),
        ("data.test.0", "/shared/../x.jsonl"),
    ]
    assert "CONFIG" in refusal("--kuberay", *IMAGE, config=str(ROOT / CONFIG))
    written("run.directory=/scratch/run", "--slurm")  # its disks are what they are


def test_overrides_that_a_shell_would_change_are_refused() -> None:
    check_shells(["train", "x.yaml", "data.train=[a.jsonl,b.jsonl]", "learner.adam_betas=[0.9, 1]"])
    for argument in ("data.train=[*.jsonl]", "x=$HOME", "x=a;b", "x=it's", "x=\\n"):
        with pytest.raises(ConfigError, match="no character that a shell reads"):
            check_shells(["train", argument])


# ---- KubeRay -------------------------------------------------------------------------------------


@pytest.fixture
def ray_job() -> dict[str, Any]:
    return yaml.safe_load(written(*EXAMPLES["kuberay.yaml"]))


def pod_specs(ray_job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    cluster = ray_job["spec"]["rayClusterSpec"]
    workers = cluster["workerGroupSpecs"]
    groups = {"head": cluster["headGroupSpec"], **{one["groupName"]: one for one in workers}}
    return {name: group["template"]["spec"] for name, group in groups.items()}


def test_a_ray_job_runs_the_same_command_in_the_shared_directory(ray_job: dict[str, Any]) -> None:
    assert shlex.split(ray_job["spec"]["entrypoint"]) == [
        *("env", f"--chdir={SHARED}", "distillm-ray", "train", CONFIG, *LARGER, "run.device=cuda"),
        "learner.node_labels.distillm-ray=learner",
        "rollout.node_labels.distillm-ray=generator",
        "teacher.node_labels.distillm-ray=scorer",
    ]


def test_a_ray_job_retries_and_ends_its_cluster(ray_job: dict[str, Any]) -> None:
    spec = ray_job["spec"]
    assert (ray_job["apiVersion"], ray_job["kind"]) == ("ray.io/v1", "RayJob")
    assert ray_job["metadata"]["name"] == "qwen3-chat"
    assert (spec["backoffLimit"], spec["shutdownAfterJobFinishes"]) == (3, True)
    pinned = re.search(r"^ray==(\S+)", (ROOT / "requirements/cuda.lock").read_text(), re.MULTILINE)
    assert pinned is not None
    assert spec["rayClusterSpec"]["rayVersion"] == pinned[1]


def test_the_groups_of_a_ray_job_are_the_layout(ray_job: dict[str, Any]) -> None:
    groups = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    found = {
        group["groupName"]: (
            group["replicas"],
            group["template"]["spec"]["containers"][0]["resources"]["limits"],
            group["labels"],
        )
        for group in groups
    }
    one = {"cpu": "8", "memory": "112Gi", "nvidia.com/gpu": "1"}
    assert found == {
        "learner": (
            2,
            {"cpu": "64", "memory": "900Gi", "nvidia.com/gpu": "8"},
            {"distillm-ray": "learner"},
        ),
        "generator": (4, one, {"distillm-ray": "generator"}),
        "scorer": (4, one, {"distillm-ray": "scorer"}),
    }
    for group in groups:
        assert group["minReplicas"] == group["maxReplicas"] == group["replicas"]
    assert ray_job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_pods_have_shared_memory_for_the_object_store_and_the_shared_directory(
    ray_job: dict[str, Any],
) -> None:
    cluster = ray_job["spec"]["rayClusterSpec"]
    store = int(cluster["headGroupSpec"]["rayStartParams"]["object-store-memory"])
    assert store == (TRANSIT_GIB + AUTO_TARGETS_GIB) * GIB
    for group in cluster["workerGroupSpecs"]:
        assert group["rayStartParams"]["object-store-memory"] == str(store)
    for spec in pod_specs(ray_job).values():
        (container,) = spec["containers"]
        mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
        volumes = {one["name"]: one for one in spec["volumes"]}
        shm = volumes[mounts["/dev/shm"]]["emptyDir"]
        assert shm["medium"] == "Memory"
        assert int(shm["sizeLimit"].removesuffix("Gi")) * GIB > store
        claim = volumes[mounts[str(SHARED)]]["persistentVolumeClaim"]["claimName"]
        assert claim == "distillm-ray"


def test_a_shutdown_of_pods_waits_for_the_checkpoint(ray_job: dict[str, Any]) -> None:
    environment = yaml.safe_load(ray_job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert environment == {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}
    held: dict[str, str] = {}
    for name, spec in pod_specs(ray_job).items():
        assert spec["terminationGracePeriodSeconds"] > STOP_S
        (container,) = spec["containers"]
        drain = {one["name"]: one["value"] for one in container["env"]}
        assert drain == {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(STOP_S)}
        if "lifecycle" in container:
            held[name] = container["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert set(held) == {"head", "learner"}, "generators and scorers have nothing to save"
    assert "pkill -TERM" in held["head"]
    assert 'pkill -TERM -f "[r]ay start"' in held["learner"], "it is drained, so the run saves"
    for command in held.values():
        checked = subprocess.run(["bash", "-n", "-c", command], check=False)
        assert checked.returncode == 0


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_token_is_on_and_its_value_is_nowhere(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "s3cret-token")
    text = written(*EXAMPLES[name])
    assert "s3cret" not in text
    assert "RAY_AUTH_MODE=token" in text or re.search(r"mode: token|RAY_AUTH_MODE: token", text)


def test_pods_run_as_the_user_of_the_image(ray_job: dict[str, Any]) -> None:
    dockerfile = (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8")
    user = re.search(r"^ARG RUN_AS=(\d+)", dockerfile, re.MULTILINE)
    assert user is not None
    for spec in pod_specs(ray_job).values():
        assert spec["securityContext"]["runAsUser"] == int(user[1])
        assert spec["securityContext"]["runAsNonRoot"]


# ---- the others ----------------------------------------------------------------------------------


def test_a_cluster_file_fits_the_schema_of_ray_up_and_has_every_machine_from_the_start() -> None:
    document = yaml.safe_load(written(*EXAMPLES["ray-up.yaml"]))
    ray = importlib.util.find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    schema = Path(ray.origin).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(document, json.loads(schema.read_text(encoding="utf-8")))
    types = document["available_node_types"]
    workers = {name: one["min_workers"] for name, one in types.items()}
    assert workers == {"head": 0, "generator-scorer": 1, "learner": 1}
    assert document["max_workers"] == sum(workers.values())
    assert types["head"]["labels"] == types["learner"]["labels"] == {"distillm-ray": "learner"}
    assert document["setup_commands"] == [], "else Ray installs packages of its own choice"


def test_a_slurm_job_stops_before_its_time_limit_and_is_queued_again() -> None:
    script = written(*EXAMPLES["slurm.sh"])
    settings: dict[str, str] = {}
    for name, value in re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE):
        settings[name] = value
    assert settings["nodes"] == "3"
    assert (settings["gpus-per-node"], settings["mem"]) == ("8", "900G")
    assert settings["signal"] == f"B:TERM@{STOP_S}"
    assert "requeue" in settings
    starts = re.findall(r"^on (\d) ray start .*--labels=distillm-ray=(\S+)", script, re.MULTILINE)
    assert starts == [("0", "learner"), ("1", "learner"), ("2", "generator-scorer")]
    assert "gpus-per-node" not in written("run.device=cpu", "--slurm")


def test_a_skypilot_task_recovers_from_a_stop() -> None:
    task = yaml.safe_load(written(*EXAMPLES["skypilot.yaml"]))
    assert task["num_nodes"] == 3
    assert task["resources"]["accelerators"] == "H100:8"
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [3]
    assert task["secrets"] == {"RAY_AUTH_TOKEN": None}, "given at the launch only"
    ranks = re.findall(r"^ +(\d)\) ray start", task["run"], re.MULTILINE)
    assert ranks == ["1", "2"]
    alone = written("--skypilot", *IMAGE, "--machine-type", "H100")
    assert "SKYPILOT_NODE_RANK" not in alone


@pytest.mark.parametrize(
    ("directory", "name"),
    [
        ("runs/Qwen3_chat.v2", "qwen3-chat-v2"),
        ("runs/2026-run", "run-2026-run"),
        ("runs/" + "x" * 90, "x" * 40),
    ],
)
def test_a_run_is_named_as_kubernetes_allows(directory: str, name: str) -> None:
    text = written(f"run.directory={directory}", "--kuberay", *IMAGE)
    assert yaml.safe_load(text)["metadata"]["name"] == name


# ---- elastic pools -------------------------------------------------------------------------------

ELASTIC = ("learner.workers=16", "rollout.actors={min: 2, max: 16}", "teacher.actors=4")


def test_a_ray_job_has_the_bounds_of_an_elastic_pool_and_an_autoscaler_that_reads_labels() -> None:
    job = yaml.safe_load(written(*ELASTIC, "--kuberay", *IMAGE))
    cluster = job["spec"]["rayClusterSpec"]
    sizes = {
        group["groupName"]: (group["minReplicas"], group["replicas"], group["maxReplicas"])
        for group in cluster["workerGroupSpecs"]
    }
    assert sizes == {"learner": (2, 2, 2), "generator": (2, 2, 16), "scorer": (4, 4, 4)}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"] == {"version": "v2"}
    tokens = {name: spec["automountServiceAccountToken"] for name, spec in pod_specs(job).items()}
    assert [name for name, mounted in tokens.items() if mounted] == ["head"]


def test_machines_of_an_elastic_pool_come_and_go_so_no_other_role_shares_them() -> None:
    arguments = (*ELASTIC, "--ray-up", *IMAGE, "--machine-type", "p5.48xlarge")
    types = yaml.safe_load(written(*arguments))["available_node_types"]
    bounds = {name: (one["min_workers"], one["max_workers"]) for name, one in types.items()}
    assert bounds == {"head": (0, 0), "learner": (1, 1), "generator": (1, 2), "scorer": (1, 1)}
    document = yaml.safe_load(written(*arguments))
    assert document["max_workers"] == 4


@pytest.mark.parametrize(
    "arguments", [("--slurm",), ("--skypilot", *IMAGE, "--machine-type", "H100")]
)
def test_a_cluster_of_a_fixed_size_refuses_a_range_by_its_key(arguments: tuple[str, ...]) -> None:
    message = refusal(*ELASTIC, *arguments)
    assert f"rollout.actors must be one number with {arguments[0]}, got {{min: 2, max: 16}}" in (
        message
    )
    assert "set rollout.actors=16, or use --kuberay or --ray-up" in message


def test_an_offload_directory_is_of_each_node_and_pods_have_no_disk() -> None:
    nvme = ("learner.zero_stage=3", "learner.offload=nvme", "learner.offload_directory=/nvme/run")
    refused = refusal(*nvme, "--kuberay", *IMAGE, "--node-memory-gib", "900")
    assert "learner.offload must be none or cpu with --kuberay, got nvme" in refused
    task = written(*nvme, "--skypilot", *IMAGE, "--machine-type", "H100")
    assert "learner.offload_directory=/nvme/run" in task
