"""`distillm-ray generate`: refusals before anything is spent, and a file that training reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from distillm_ray.config.files import load_config
from distillm_ray.data.splits import load_dataset
from distillm_ray.models.tokenizers import load_tokenizer
from tests.integration.tiny import (
    LIMIT_S,
    Driver,
    clean_environment,
    make_config,
    make_rows,
)

pytestmark = [pytest.mark.integration, pytest.mark.timeout(2 * LIMIT_S)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_config(tmp_path_factory.mktemp("generate"), steps=4, batch_size=4)


def generate(config: Path, output: Path, *more: str) -> tuple[int, str, str]:
    """Exit code, output and error output."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "distillm_ray.cli", "generate", str(config)),
            *("--model", str(config.parent / "teacher")),
            *("--prompts", str(config.parent / "train.jsonl"), "--output", str(output)),
            *more,
        ],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=clean_environment(),
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_what_it_writes_is_learned_with_the_prompts_that_the_model_saw(
    config: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "responses.jsonl"
    code, out, errors = generate(
        config, output, "--keep-truncated", "generate.sampling.max_tokens=6"
    )
    assert code == 0, errors
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    asked = [json.loads(line) for line in (config.parent / "train.jsonl").read_text().splitlines()]
    assert f"{len(rows)} responses to {len(asked)} prompts" in out
    by_id = {row["id"]: row for row in asked}
    assert rows
    assert all(row["prompt"] == by_id[row["id"]]["prompt"] for row in rows)
    tokenizer = load_tokenizer(config.parent / "student")
    data = load_config(config).data
    ours = load_dataset((output,), data, tokenizer, split="train")
    theirs = load_dataset(data.train, data, tokenizer, split="train")
    prompts = {one.prompt_id: one.token_ids.tolist() for one in theirs.prompts}
    assert all(one.token_ids.tolist() == prompts[one.prompt_id] for one in ours.prompts)
    ends = [
        one.response_ids[-1] == ours.end_token_id
        for one in sorted(ours.demonstrations, key=lambda one: one.prompt_id)
    ]
    stopped = [row["finish_reason"] == "stop" for row in sorted(rows, key=lambda row: row["id"])]
    assert ends == stopped


def test_a_killed_command_goes_on_with_the_prompts_that_are_missing(
    config: Path, tmp_path: Path
) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "responses.jsonl"
    make_rows(prompts, 150, start=0)
    partial = tmp_path / "responses.jsonl.partial"
    command = (
        *("generate", str(config), "generate.engine.max_batch_size=2", "--keep-truncated"),
        *("--model", str(config.parent / "teacher")),
        *("--prompts", str(prompts), "--output", str(output)),
    )

    def kept() -> list[str]:
        return partial.read_text().split("\n")[1:-1] if partial.exists() else []

    with Driver(*command, log=tmp_path / "log.txt") as driver:
        driver.wait_for(lambda: len(kept()) >= 20, LIMIT_S)
    first = {row["prompt_id"]: row["row"] for row in map(json.loads, kept())}
    assert 20 <= len(first) < 150
    assert not output.exists()
    with partial.open("a") as file:
        file.write('{"prompt_id": "q0", "trunc')

    with Driver(*command, log=tmp_path / "log.txt") as driver:
        assert driver.wait(LIMIT_S) == 0, driver.output()
        assert f"{partial} has {len(first)} of 150 responses" in driver.output()
        assert "150 of 150 prompts" in driver.output()
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    asked = [json.loads(line)["id"] for line in prompts.read_text().splitlines()]
    order = [asked.index(row["id"]) for row in rows]
    assert order == sorted(set(order))
    written = {row["id"]: row for row in rows}
    assert all(written[name] == row for name, row in first.items() if row is not None)
    assert {name for name, row in first.items() if row is None}.isdisjoint(written)
    assert not partial.exists()


def test_an_output_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    config: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    code, _, errors = generate(config, tmp_path / "file" / "out.jsonl")
    assert code == 2
    assert f"{tmp_path / 'file'} must be a directory, it is a file" in errors


def test_a_template_that_writes_the_date_needs_a_date(config: Path, tmp_path: Path) -> None:
    template = config.parent / "teacher" / "chat_template.jinja"
    plain = template.read_text()
    template.write_text("{{ strftime_now('%Y') }}" + plain)
    try:
        code, _, errors = generate(config, tmp_path / "out.jsonl")
    finally:
        template.write_text(plain)
    assert code == 2
    assert "data.time is required" in errors
    assert not (tmp_path / "out.jsonl").exists()
