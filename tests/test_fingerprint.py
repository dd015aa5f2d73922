"""The digests of a run's rows: equal data pass, the first other row is named by file and line."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from distillm_ray.config import DataConfig
from distillm_ray.config.files import dump_config
from distillm_ray.data.fingerprint import keep_or_compare
from distillm_ray.data.splits import Splits, load_splits
from distillm_ray.errors import DataError
from distillm_ray.learner.resume import check_resume
from distillm_ray.preflight import settled
from distillm_ray.run_directory import CONFIG_FILE
from tests import make

WORDS = [f"w{index}" for index in range(40)]
CHAT = (
    "{{ date }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
SPECIAL = ["<unk>", "<user>", "<assistant>", "<end>", "</s>"]
START = datetime(2026, 11, 25, 12, 0, 0)


def rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"w{index}", "response": f"w{index + 1}"} for index in range(count)]


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("\n\n".join(map(json.dumps, content)))  # rows stand in lines 1, 3, 5, …
    return path


def read(path: Path, *, time: datetime = START, dated: bool = False) -> Splits:
    template = CHAT.replace("{{ date }}", "w{{ strftime_now('%d') }} " if dated else "")
    tokenizer = make.tokenizer(SPECIAL, WORDS, chat_template=template)
    config = DataConfig(train=(path,), validation=(path,), time=time)
    return load_splits(config, tokenizer, seed=0)


def test_equal_data_pass_and_a_new_run_keeps_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(5))
    keep_or_compare(tmp_path, read(path), resumed=False)
    keep_or_compare(tmp_path, read(path), resumed=True)
    write(path, rows(4))
    keep_or_compare(tmp_path, read(path), resumed=False)
    keep_or_compare(tmp_path, read(path), resumed=True)


@pytest.mark.parametrize(
    ("change", "line", "said"),
    [
        (
            lambda all_: [*all_[:2], {"prompt": "w30", "response": "w3"}, *all_[3:]],
            5,
            "1 of 5 rows",
        ),
        (lambda all_: all_[:3], 7, "had 5 usable rows then and has 3 now"),
        (lambda all_: [*all_, {"prompt": "w9", "response": "w9"}], 11, "then and has 6 now"),
        (lambda all_: [all_[1], all_[0], *all_[2:]], 1, "2 of 5 rows"),
    ],
)
def test_the_first_row_that_changed_is_named(
    tmp_path: Path, change: Any, line: int, said: str
) -> None:
    path = write(tmp_path / "a.jsonl", rows(5))
    keep_or_compare(tmp_path, read(path), resumed=False)
    write(path, change(rows(5)))
    with pytest.raises(DataError, match=rf"data\.train: .*a\.jsonl:{line} is not the row.*{said}"):
        keep_or_compare(tmp_path, read(path), resumed=True)


def test_a_template_that_writes_the_date_renders_a_resumed_run_as_it_began(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", rows(5))
    config = make.config(run={"directory": str(tmp_path / "run")})
    begun = settled(config, START)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CONFIG_FILE).write_text(dump_config(begun))
    keep_or_compare(tmp_path, read(path, time=START, dated=True), resumed=False)

    tomorrow = START + timedelta(days=1)
    resumed = settled(config, tomorrow)
    check_resume(begun, resumed)
    assert resumed.data.time == START
    keep_or_compare(tmp_path, read(path, time=START, dated=True), resumed=True)
    with pytest.raises(DataError, match=r"a\.jsonl:1 is not the row .*5 of 5 rows differ"):
        keep_or_compare(tmp_path, read(path, time=tomorrow, dated=True), resumed=True)


def test_a_time_that_the_user_names_is_kept(tmp_path: Path) -> None:
    named = START - timedelta(days=300)
    config = make.config(run={"directory": str(tmp_path / "run")}, data={"time": named.isoformat()})
    assert settled(config, START).data.time == named
