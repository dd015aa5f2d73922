"""The size of a run's targets before its start, against sums by hand."""

from __future__ import annotations

from typing import Any

import pytest

from distillm_ray.config import TargetsConfig
from distillm_ray.errors import ConfigError
from distillm_ray.teacher.target_sizes import (
    TargetSizes,
    bytes_per_token,
    check_room,
    target_sizes,
    with_room,
)
from distillm_ray.types import Rollout
from tests import make

DATASET_ONLY = {"type": "fixed", "phi": 0.0}


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [
        ("hidden", "bfloat16", 2 * 576),
        ("hidden", "float32", 4 * 576),
        ("hidden", "auto", 4 * 576),
        ("top_k", "bfloat16", 8 * 7),
        ("logits", "bfloat16", 2 * 1000),
    ],
)
def test_bytes_of_a_loss_token(kind: Any, dtype: str, expected: int) -> None:
    targets = TargetsConfig(type=kind, k=7)
    assert bytes_per_token(targets, dtype=dtype, hidden_size=576, vocabulary_size=1000) == expected


def data(*lengths: int) -> list[Rollout]:
    return [
        make.rollout(f"r{index}", response=[1] * length) for index, length in enumerate(lengths)
    ]


def sizes(rollouts: list[Rollout], **sections: Any) -> TargetSizes:
    sections = {"learner": {"batch_size": 4, "steps": 10}} | sections
    return target_sizes(make.config(**sections), rollouts, (), token_bytes=10)


def test_a_run_on_the_data_alone() -> None:
    found = sizes(data(2, 4, 6), schedule=DATASET_ONLY, rollout={"lookahead": 3})
    # 4 tokens in the mean: 40 bytes a sequence, 4 sequences a step, 3 open steps.
    assert found == TargetSizes(token=10, step=160, open_steps=480, replay=0, data=120, num_data=3)
    assert found.hits(480) == 0.0
    assert found.hits(480 + 30) == 0.25
    assert found.hits(10**6) == 1.0


def test_the_replay_shelf_is_kept_beside_the_data() -> None:
    found = sizes(data(2, 4, 6), schedule={"type": "fixed", "phi": 0.5}, replay={"capacity": 8})
    assert found.replay == 8 * 40
    assert found.hits(found.open_steps + 8 * 40 + 60) == 0.5


def test_a_shelf_that_the_run_never_fills_counts_what_it_can_hold() -> None:
    found = sizes(data(4), schedule={"type": "fixed", "phi": 0.5})
    assert found.replay == 10 * 4 * 40  # all that is generated in ten steps


def test_pairs_need_two_sequences_a_slot() -> None:
    assert sizes(data(4), schedule={"type": "paired"}).step == 2 * 4 * 40


def test_what_no_term_compares_with_the_teacher_needs_no_room() -> None:
    found = sizes(
        data(4),
        schedule=DATASET_ONLY,
        teacher=None,
        loss={"terms": [{"type": "cross_entropy"}]},
    )
    assert (found.step, found.replay, found.data) == (0, 0, 0)


@pytest.mark.parametrize(
    ("room", "is_known", "limit"),
    [
        (5000, True, 2 * 480),
        (300, True, 300),
        (None, True, 2 * 480),
        (5000, False, 5000),
    ],
)
def test_auto_is_twice_what_is_expected_as_far_as_there_is_room(
    room: int | None, is_known: bool, limit: int
) -> None:
    config = make.config(targets={"max_bytes": "auto"})
    found = TargetSizes(
        token=10, step=40, open_steps=80, replay=100, data=300, num_data=3, is_known=is_known
    )
    assert with_room(config, found, room).targets.limit == limit


@pytest.mark.parametrize(("room", "is_known"), [(39, True), (-5, True), (9, False)])
def test_auto_without_room_for_a_step_is_refused(room: int, is_known: bool) -> None:
    step = 40 if is_known else 0
    found = TargetSizes(
        token=10, step=step, open_steps=0, replay=0, data=0, num_data=0, is_known=is_known
    )
    with pytest.raises(ConfigError, match=r"targets\.max_bytes=auto must find room .* larger"):
        with_room(make.config(), found, room)


def test_auto_without_any_figure_is_two_gibibytes() -> None:
    found = TargetSizes(
        token=10, step=40, open_steps=80, replay=100, data=0, num_data=0, is_known=False
    )
    assert with_room(make.config(), found, None).targets.limit == 2 * 2**30


def test_a_number_stays_as_it_is() -> None:
    config = make.config(targets={"max_bytes": 7})
    found = TargetSizes(token=10, step=40, open_steps=80, replay=0, data=300, num_data=3)
    assert with_room(config, found, 5000) == config


def test_stores_that_cannot_hold_a_step_are_refused_with_the_remedy() -> None:
    config = make.config(targets={"max_bytes": 159})
    found = TargetSizes(token=10, step=160, open_steps=320, replay=0, data=120, num_data=3)
    with pytest.raises(ConfigError) as caught:
        check_room(config, found)
    assert "targets.max_bytes must hold the targets of a step, about 160 bytes" in str(caught.value)
    assert "got 159" in str(caught.value)
    assert "raise it" in str(caught.value)


@pytest.mark.parametrize(
    ("targets", "end"),
    [
        ({"max_bytes": 10 * 2**20}, "targets.max_bytes holds 10.0, all of them"),
        (
            {"max_bytes": 4 * 2**20},
            "about 50 % of the data's draws will find theirs, the others are scored again",
        ),
        ({"max_bytes": 4 * 2**20, "library": "/l"}, "the others are read from targets.library"),
    ],
)
def test_a_run_says_which_share_of_its_draws_will_hit(targets: dict[str, Any], end: str) -> None:
    config = make.config(targets=targets, teacher={"model": "/m", "dtype": "float32"})
    found = TargetSizes(
        token=10, step=2**19, open_steps=2**20, replay=2**20, data=4 * 2**20, num_data=7
    )
    line = check_room(config, found)
    assert "10 bytes a loss token, 4.0 MiB for the 7 sequences" in line
    assert line.endswith(end)


def test_prompts_alone_do_not_say_how_large_a_step_is() -> None:
    sections: dict[str, Any] = {
        "schedule": {"type": "fixed", "phi": 1.0},
        "loss": {"terms": [{"on": "student", "type": "reverse_kl"}]},
        "targets": {"max_bytes": 1000},
    }
    found = sizes([], **sections)
    assert not found.is_known
    line = check_room(make.config(**sections), found)
    assert "is not known before it" in line and "holds 100 of them" in line
    assert sizes(data(3), **sections).is_known
