"""Methods: which settings a name stands for, and which keys win over them."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from distillm_ray.config import (
    AdaptiveSchedule,
    Config,
    CrossEntropy,
    FixedSchedule,
    ForwardKL,
    JensenShannon,
    PairedSchedule,
    PolicyGradient,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
)
from distillm_ray.config.files import load_config
from distillm_ray.errors import ConfigError
from distillm_ray.methods import METHODS, MethodName
from tests import make

CONFIGS = Path(__file__).parent.parent / "configs"
NO_DATA = FixedSchedule(phi=1.0, replay_ratio="none")
LONG_PART = PolicyGradient(horizon="rest", clip=0.2)
EXPECTED: dict[str, tuple[Any, ...]] = {  # schedule, terms, strictly on-policy
    "sft": (FixedSchedule(phi=0.0), [CrossEntropy(on="dataset")], False),
    "kd": (FixedSchedule(phi=0.0), [ForwardKL(on="dataset")], False),
    "seqkd": (FixedSchedule(phi=0.0), [CrossEntropy(on="teacher")], False),
    "imitkd": (NO_DATA, [ForwardKL(on="student")], True),
    "gkd": (FixedSchedule(phi=0.5, replay_ratio="none"), [JensenShannon(beta=0.5)], True),
    "opd": (NO_DATA, [ReverseKL(on="student")], False),
    "minillm": (NO_DATA, [ReverseKL(on="student", max_importance=1.2), LONG_PART], False),
    "distillm": (AdaptiveSchedule(), [SkewKL(alpha=0.1)], False),
    "distillm2": (
        PairedSchedule(),
        [
            SkewKL(on="teacher", curriculum=True, final_weight=0.5),
            SkewReverseKL(on="student", curriculum=True, final_weight=1.5),
        ],
        False,
    ),
}


def write(path: Path, **keys: Any) -> Path:
    path.write_text(yaml.safe_dump(make.tree(**keys)))
    return path


def is_strictly_on_policy(config: Config) -> bool:
    rollout = config.rollout
    return (rollout.lookahead, rollout.sync_interval, rollout.max_staleness) == (1, 1, 0)


def test_every_name_has_settings_and_a_file() -> None:
    names = set(typing.get_args(MethodName))
    assert names == set(METHODS) == set(EXPECTED)
    assert names == {path.stem for path in (CONFIGS / "methods").glob("*.yaml")}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_method_is_its_schedule_and_its_loss(name: str, tmp_path: Path) -> None:
    schedule, terms, strict = EXPECTED[name]
    config = load_config(write(tmp_path / "a.yaml", method=name))
    assert config.schedule == schedule
    assert config.loss.terms == tuple(terms)
    assert is_strictly_on_policy(config) == strict
    assert config.method == name


@pytest.mark.parametrize("name", EXPECTED)
def test_the_file_of_a_method_is_the_quickstart_with_another_method(name: str) -> None:
    base = load_config(CONFIGS / "quickstart.yaml")
    config = load_config(CONFIGS / "methods" / f"{name}.yaml")
    schedule, terms, strict = EXPECTED[name]
    if name != "distillm":
        assert (config.schedule, config.loss.terms) == (schedule, tuple(terms))
        assert is_strictly_on_policy(config) == strict
    for section in ("teacher", "student", "learner", "evaluation", "validation"):
        assert getattr(config, section) == getattr(base, section)
    assert config.data.model_copy(update={"responses": "dataset"}) == base.data
    by_teacher = config.data.responses == "teacher"
    assert by_teacher == any(term.on == "teacher" for term in config.loss.terms)


@pytest.mark.parametrize("name", EXPECTED)
def test_one_word_on_the_command_line_runs_another_method(name: str) -> None:
    """Also where the file writes out the settings of its own method."""
    one = load_config(CONFIGS / "quickstart.yaml", [f"method={name}"])
    schedule, terms, strict = EXPECTED[name]
    assert one.loss.terms == tuple(terms)
    if name == "distillm":
        schedule = AdaptiveSchedule(start=0.1)  # a key of the file that the method leaves open
    assert one.schedule == schedule
    assert is_strictly_on_policy(one) == strict


def test_keys_beside_the_method_win(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", method="gkd", schedule={"phi": 0.25})
    config = load_config(path)
    assert config.schedule == FixedSchedule(phi=0.25, replay_ratio="none")
    changed = ["method=gkd", "schedule.phi=1.0", "loss.terms.0.beta=0.9", "rollout.lookahead=1"]
    config = load_config(path, changed)
    assert config.schedule == FixedSchedule(phi=1.0, replay_ratio="none")
    assert config.loss.terms == (JensenShannon(beta=0.9),)
    config = load_config(path, ["loss.terms=[{type: skew_reverse_kl}]", "method=kd"])
    assert config.loss.terms == (SkewReverseKL(),)
    assert config.schedule == FixedSchedule(phi=0.0)


def test_an_unknown_method_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"method: .*'sft', 'kd'.*got 'distil'"):
        load_config(write(tmp_path / "a.yaml"), ["method=distil"])


def test_a_file_extends_another_one_beside_it(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "base.yaml", learner={"learning_rate": 0.25, "weight_decay": 0.5})
    middle = tmp_path / "sub" / "middle.yaml"
    middle.write_text("extends: ../base.yaml\nmethod: kd\nlearner: {learning_rate: 0.125}\n")
    top = tmp_path / "sub" / "top.yaml"
    top.write_text(
        "extends: middle.yaml\nschedule: {phi: 0.5}\nloss: {terms: [{type: reverse_kl}]}"
    )
    config = load_config(top)
    assert (config.learner.learning_rate, config.learner.weight_decay) == (0.125, 0.5)
    assert config.schedule == FixedSchedule(phi=0.5)
    assert config.loss.terms == (ReverseKL(),)


@pytest.mark.parametrize(
    ("extends", "said"),
    [
        ("a.yaml", r"leads back to itself"),
        ("b.yaml", r"leads back to itself"),
        ("none.yaml", r"config file .*none\.yaml does not exist"),
        ("[a.yaml]", r"extends: must be a path"),
        ("3", r"extends: must be a path"),
    ],
)
def test_a_file_that_cannot_be_extended_is_named(tmp_path: Path, extends: str, said: str) -> None:
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    path = tmp_path / "a.yaml"
    path.write_text(f"extends: {extends}\n")
    with pytest.raises(ConfigError, match=said):
        load_config(path)
