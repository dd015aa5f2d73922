"""The partial file of `generate`: what a kill leaves is valid, and only its own command goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from distillm_ray.data.partial_responses import held, partial_path
from distillm_ray.data.response_rows import ResponseCounts, ResponseRow
from distillm_ray.errors import DataError

SETTINGS = {"model": "a", "generate": {"sampling": {"temperature": 1.0, "stop": (1, 2)}}}
ORDER = ("q0", "q1", "q2", "q3")


def row(name: str, *, truncated: bool = False) -> ResponseRow:
    return ResponseRow(
        prompt_id=name, truncated=truncated, row={"id": name, "response": f"été {name}"}
    )


def add(output: Path, *rows: ResponseRow) -> None:
    """What a process does before it is killed."""
    with held(output, SETTINGS) as partial:
        partial.add(rows)


def finish(output: Path, names: Sequence[str] = ORDER, *, keep: bool = False) -> ResponseCounts:
    with held(output, SETTINGS) as partial:
        return partial.finish(names, keep_truncated=keep)


def done(output: Path) -> tuple[set[str], int]:
    """Prompts with a response, and damaged lines."""
    with held(output, SETTINGS) as partial:
        return set(partial.done), partial.num_damaged


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def test_responses_of_several_processes_are_written_in_the_order_of_the_prompts(
    output: Path,
) -> None:
    add(output, row("q2"), row("q0"))
    add(output, row("q3"))
    add(output, row("q1"))
    assert done(output) == (set(ORDER), 0)
    assert not output.exists()
    assert finish(output).written == 4
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows == [row(name).row for name in ORDER]
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_whatever_a_kill_leaves_of_the_file_is_gone_on_with(output: Path) -> None:
    add(output, row("q0"), row("q1"), row("q2"))
    whole = partial_path(output).read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    near_ends = {end + offset for end in (0, *ends) for offset in (-1, 0, 1, 30)}
    for length in sorted(near_ends & set(range(len(whole) + 1))):
        partial_path(output).write_bytes(whole[:length])
        names = {f"q{index}" for index in range(3) if length >= ends[index + 1]}
        assert done(output) == (names, 0)
        missing = [row(name) for name in ORDER if name not in names]
        add(output, *missing)
        assert finish(output).written == 4
        assert len(output.read_text().splitlines()) == 4
        output.unlink()


def test_a_damaged_line_costs_its_own_response_only(output: Path) -> None:
    add(output, row("q0"), row("q1"))
    head, first, second = partial_path(output).read_bytes().splitlines(keepends=True)
    damaged = b"\0" * (len(first) - 1) + b"\n"
    partial_path(output).write_bytes(head + damaged + b'{"other": 1}\n' + second)
    assert done(output) == ({"q1"}, 2)


def test_responses_of_other_settings_are_refused_with_both_values(output: Path) -> None:
    add(output, row("q0"))
    before = partial_path(output).read_bytes()
    other = {"model": "a", "generate": {"sampling": {"temperature": 0.5, "stop": (1, 2)}}}
    message = r"generate\.sampling\.temperature was 1\.0 and is 0\.5; give the same"
    with pytest.raises(DataError, match=message), held(output, other):
        pass
    assert partial_path(output).read_bytes() == before


def test_a_file_of_something_else_is_not_overwritten(output: Path) -> None:
    partial_path(output).write_text("mine\n")
    with pytest.raises(DataError, match="is in the way"), held(output, SETTINGS):
        pass
    assert partial_path(output).read_text() == "mine\n"


def test_a_second_process_is_refused(output: Path) -> None:
    with (
        held(output, SETTINGS),
        pytest.raises(DataError, match="another process is writing"),
        held(output, SETTINGS),
    ):
        pass


def test_without_a_row_the_responses_stay_for_another_keep_truncated(output: Path) -> None:
    add(output, row("q0", truncated=True))
    add(output, ResponseRow(prompt_id="q1", truncated=False, fault="empty"))
    counts = finish(output, ("q0", "q1"))
    assert (counts.written, counts.left_out) == (0, {"truncated": 1, "empty": 1})
    assert not output.exists()
    counts = finish(output, ("q0", "q1"), keep=True)
    assert (counts.written, counts.left_out) == (1, {"empty": 1})
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == ["q0"]
