"""`distillm-ray check`: what it proves, in one process and without Ray."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Lfm2Config

from distillm_ray.models.row_path import TOLERANCES
from tests.integration.tiny import LIMIT_S, clean_environment, make_config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(2 * LIMIT_S)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_config(tmp_path_factory.mktemp("check"), steps=4, batch_size=4)


def check(config: Path, *overrides: str) -> tuple[int, str, str]:
    """Exit code, output and error output."""
    done = subprocess.run(
        [sys.executable, "-m", "distillm_ray.cli", "check", str(config), *overrides],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=clean_environment(),
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_it_shows_rows_and_proves_packing_export_and_responses(config: Path) -> None:
    code, output, errors = check(config)
    assert code == 0, errors
    lines = output.splitlines()
    assert lines[-1] == "no objection"
    # The first row: its prompt is context, its response is under the loss and ends.
    row = json.loads((config.parent / "train.jsonl").read_text().splitlines()[0])
    start = next(index for index, line in enumerate(lines) if line.startswith(f"{row['id']}: "))
    block = lines[start : start + 6]
    assert row["prompt"] in block[1]
    assert "context" in block[1]
    assert f"loss     '{row['response']} <end>'" in block[3]
    assert block[5].strip() == "ends with 3 '<end>', an end token"
    # Exact in float32.
    for role in ("teacher", "student"):
        (line,) = [line for line in lines if line.startswith(f"{role}: packed rows")]
        numbers = [float(one) for one in re.findall(r"(\d\.\de[+-]\d\d)", line)]
        assert len(numbers) == 3, line
        assert max(numbers) <= TOLERANCES[torch.float32]
    assert "logits differ by 0.0e+00; ends at 3" in output
    verdict = next(line for line in lines if "are the learner's most likely ones" in line)
    agreed, total = map(int, re.findall(r"\d+", verdict)[:2])
    assert agreed == total > 0
    assert "differ by 0.0e+00" in verdict or float(verdict.split()[-4]) < 1e-4
    assert not (config.parent / "run").exists(), "it writes nothing"


def test_a_student_that_cannot_share_rows_is_named_with_the_reason(
    config: Path, tmp_path: Path
) -> None:
    for file in (config.parent / "student").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(0)
    hybrid = Lfm2Config(
        vocab_size=19,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        layer_types=["conv", "full_attention"],
        max_position_embeddings=256,
        eos_token_id=3,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(hybrid).save_pretrained(tmp_path)
    code, output, errors = check(config, f"student.model={tmp_path}")
    assert code == 0, errors
    (line,) = [line for line in output.splitlines() if line.startswith("student: one sequence")]
    assert "its layers keep state along a row (conv)" in line


def test_a_bad_row_ends_it_with_file_and_line(config: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    lines = (config.parent / "train.jsonl").read_text().splitlines()
    bad.write_text("\n".join([*lines[:4], '{"prompt": "what"}']))
    code, output, errors = check(config, f"data.train=[{bad}]")
    assert code == 2
    assert f"{bad}:5: the row has no response" in errors
    assert "Traceback" not in errors
    assert "student: LlamaForCausalLM" in output, "the lines before it are printed"
