"""The config tree: what loads, what is refused, and with which message."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from distillm_ray.config import (
    AdaptiveSchedule,
    Config,
    CrossEntropy,
    FixedSchedule,
    ReverseKL,
    SkewKL,
)
from distillm_ray.config_files import dump_config, load_config, parse_config
from distillm_ray.errors import ConfigError
from tests import make

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("**/*.yaml"))


def refusal(**sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(make.tree(**sections), name="x.yaml")
    return str(caught.value).removeprefix("x.yaml:\n").strip()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make.tree(loss={"terms": [{"type": "skew_kl", "alpha": 0.2}]})))
    return path


def test_there_are_configs_to_load() -> None:
    assert "quickstart.yaml" in {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads_and_survives_the_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


def test_overrides_are_applied_in_order_and_typed_like_yaml(file: Path) -> None:
    overrides = ["learner.steps=20", "learner.learning_rate=1e-4", "learner.steps=30"]
    more = ["student.lora.rank=4", "data.validation=[a.jsonl,b.jsonl]", "loss.terms.0.alpha=0.3"]
    config = load_config(file, overrides + more)
    assert (config.learner.steps, config.learner.learning_rate) == (30, 1e-4)
    assert config.student.lora is not None and config.student.lora.rank == 4
    assert config.data.validation == (Path("a.jsonl").absolute(), Path("b.jsonl").absolute())
    assert config.loss.terms == (SkewKL(alpha=0.3),)


@pytest.mark.parametrize(
    "override",
    [
        "loss.terms.0.type=reverse_kl",
        "loss.terms.0={type: reverse_kl}",
        "loss.terms=[{type: reverse_kl}]",
    ],
)
def test_another_type_replaces_the_keys_of_the_old_one(file: Path, override: str) -> None:
    assert load_config(file, [override]).loss.terms == (ReverseKL(),)


def test_a_teacher_can_be_switched_off_by_an_override(file: Path) -> None:
    terms = "loss.terms=[{type: cross_entropy, weight: 2}]"
    config = load_config(file, [terms, "schedule={type: fixed, phi: 0}"])
    assert config.loss.terms == (CrossEntropy(weight=2.0),)
    assert not config.loss.needs_teacher


def test_the_key_on_is_a_string_and_not_the_boolean_of_yaml_1_1(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    terms = "loss: {terms: [{on: dataset, type: skew_kl}, {on: student, type: reverse_kl}]}"
    path.write_text(yaml.safe_dump(make.tree()) + terms)
    assert [term.on for term in load_config(path).loss.terms] == ["dataset", "student"]
    one = load_config(path, ["loss.terms=[{on: all, type: forward_kl}]", "loss.terms.0.on=all"])
    assert [term.on for term in one.loss.terms] == ["all"]


def test_an_index_beyond_the_terms_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"loss\.terms is a list of length 1 .* has no item 1"):
        load_config(file, ["loss.terms.1.alpha=0.3"])


def test_the_tree_is_frozen() -> None:
    config = make.config()
    with pytest.raises(ValueError, match="frozen"):
        config.learner.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lerner": {}}, "lerner: unknown key; did you mean learner?"),
        (
            {"learner": {"lerning_rate": 1}},
            "learner.lerning_rate: unknown key; did you mean learner.learning_rate?",
        ),
        (
            {"loss": {"terms": [{"type": "skew_kl"}, {"type": "skew_kl", "alfa": 0.3}]}},
            "loss.terms.1.alfa: unknown key; did you mean loss.terms.1.alpha?",
        ),
        (
            {"loss": {"terms": [{"type": "forward_kl", "alpha": 0.3}]}},
            "loss.terms.0.alpha: no key of type: forward_kl, only of another type",
        ),
        (
            {"evaluation": {"sampling": {"tmperature": 1}}},
            "evaluation.sampling.tmperature: unknown key;"
            " did you mean evaluation.sampling.temperature?",
        ),
        ({"run": {"directory": "r", "zzzzqqqq": 1}}, "run.zzzzqqqq: unknown key"),
        (
            {"schedule": {"type": "fixed", "start": 0.3}},
            "schedule.start: no key of type: fixed, only of another type",
        ),
        (
            {"rollout": {"engine": {"type": "vllm", "max_batch_size": 3}}},
            "rollout.engine.max_batch_size: no key of type: vllm, only of another type",
        ),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_one_named(
    sections: dict[str, Any], message: str
) -> None:
    assert refusal(**sections) == message


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"learner": {"steps": "many"}}, "learner.steps: Input should be a valid integer"),
        ({"teacher": {"actors": 0}}, "teacher.actors: Input should be greater than or equal to 1"),
        ({"teacher": 3}, "teacher: must be a mapping of keys to values, got 3"),
        ({"data": {"train": "a.jsonl"}}, "data.train: must be a list, as in [a, b], got 'a.jsonl'"),
        ({"data": {"train": []}}, "data.train: Tuple should have at least 1 item"),
        ({"run": {"device": "tpu"}}, "run.device: Input should be 'auto', 'cuda' or 'cpu'"),
        (
            {"loss": {"terms": [{"alpha": 0.1}]}},
            "loss.terms.0.type: this key is required, one of forward_kl, reverse_kl,",
        ),
        (
            {"loss": {"terms": [{"type": "skew"}]}},
            "loss.terms.0.type: must be one of forward_kl, reverse_kl, jensen_shannon, skew_kl,"
            " skew_reverse_kl, total_variation, adaptive_kl, cross_entropy, got skew; did you mean"
            " skew_kl?",
        ),
        (
            {"loss": {"terms": [{"type": "skew_kl", "alpha": 3}]}},
            "loss.terms.0.alpha: Input should be less than 1, got 3",
        ),
        (
            {"loss": {"terms": [{"type": "skew_kl", "weight": 0}]}},
            "loss.terms.0.weight: Input should be greater than 0, got 0",
        ),
        (
            {"loss": {"terms": [{"type": "skew_kl", "weight": float("inf")}]}},
            "loss.terms.0.weight: Input should be a finite number",
        ),
        (
            {"loss": {"terms": [{"type": "skew_kl", "on": "replay"}]}},
            "loss.terms.0.on: Input should be 'dataset', 'student', 'teacher' or 'all', got",
        ),
        ({"loss": {"terms": {"type": "skew_kl"}}}, "loss.terms: must be a list, as in [a, b]"),
        (
            {"schedule": {"type": "adaptiv"}},
            "schedule.type: must be one of adaptive, fixed, got adaptiv; did you mean adaptive?",
        ),
    ],
)
def test_a_wrong_type_names_key_rule_and_value(sections: dict[str, Any], message: str) -> None:
    assert refusal(**sections).startswith(message)


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"replay": {"min_size": 4}}, ("8 <= 4 <= 1000", "without replacement")),
        ({"replay": {"capacity": 4}}, ("8 <= 8 <= 4",)),
        ({"replay": {"min_size": 2000}}, ("8 <= 2000 <= 1000", "never replays")),
        (
            {"rollout": {"lookahead": 4, "sync_interval": 3}},
            ("4 + 3 - 2 = 5 > 4", "raise max_staleness"),
        ),
        ({"rollout": {"max_staleness": 0, "lookahead": 2}}, ("2 + 1 - 2 = 1 > 0",)),
        ({"learner": {"workers": 9}}, ("learner.workers", "9 > 8")),
        ({"learner": {"warmup_steps": 10}}, ("10 >= 10", "never reach its peak")),
        ({"learner": {"max_micro_batch_tokens": 1000}}, ("1000 < 1024",)),
        ({"teacher": {"max_batch_tokens": 1000}}, ("teacher.max_batch_tokens", "1000 < 1024")),
        (
            {"rollout": {"sampling": {"max_tokens": 9000}}},
            ("learner.max_micro_batch_tokens", "8192 < 9512"),
        ),
        (
            {"rollout": {"engine": {"type": "transformers"}, "tensor_parallel": 4}},
            ("rollout: tensor_parallel must be 1", "got 4", "use engine.type=vllm"),
        ),
        (
            {"targets": {"type": "top_k"}, "loss": {"temperature": 2.0}},
            ("loss.temperature must be 1 with targets.type=top_k, got 2",),
        ),
        (
            {"generate": {"engine": {"type": "transformers"}, "tensor_parallel": 2}},
            ("generate: tensor_parallel must be 1 with engine.type=transformers, got 2",),
        ),
        ({"teacher": None}, ("teacher.model is required", "type: cross_entropy alone")),
        ({"evaluation": {"seeds": []}}, ("evaluation.seeds", "at least 1 item")),
        ({"evaluation": {"seeds": [-1]}}, ("evaluation.seeds.0", "greater than or equal to 0")),
        ({"loss": {"terms": []}}, ("loss.terms must hold at least one term", "nothing to learn")),
        (
            {"loss": {"terms": [{"type": "jensen_shannon", "beta": 1.0}]}},
            ("loss.terms.0: beta", "got 1.0", "type: forward_kl or type: reverse_kl"),
        ),
    ],
)
def test_an_impossible_combination_is_refused_with_the_reason(
    sections: dict[str, Any], parts: tuple[str, ...]
) -> None:
    message = refusal(**sections)
    for part in parts:
        assert part in message


def test_a_boolean_is_not_a_number() -> None:
    assert refusal(learner={"steps": True}) == "learner.steps: must be a number, got true"
    assert refusal(run={"seed": False}) == "run.seed: must be a number, got false"


# ---- paths ---------------------------------------------------------------------------------------


def with_path(key: str, value: Any) -> dict[str, Any]:
    """Sections in which one key is a path, or a list with one path."""
    section, name = key.split(".")
    given = [value] if section == "data" else value
    data = {"train": ["a.jsonl"]} if section == "data" else {}
    return {section: data | {name: given}}


PATHS = ["run.directory", "teacher.model", "student.model", "data.train", "data.test"]


@pytest.mark.parametrize("key", [*PATHS, "data.validation"])
@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~", "/home/ada"),
        ("~/one", "/home/ada/one"),
        ("$HOME/one", "/home/ada/one"),
        ("${HOME}/one", "/home/ada/one"),
        ("$ROOT/$USER_1/x", "/home/ada/data/ada/x"),
        ("/a/~/b", "/a/~/b"),
        ("/a/b$", "/a/b$"),
        ("./~one", f"{Path.cwd()}/~one"),
        ("one", f"{Path.cwd()}/one"),
    ],
)
def test_every_path_is_expanded_and_absolute(
    key: str, written: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("ROOT", "~/data")
    monkeypatch.setenv("USER_1", "ada")
    config = make.config(**with_path(key, written))
    section, name = key.split(".")
    found = getattr(getattr(config, section), name)
    assert found == ((Path(meant),) if section == "data" else Path(meant))
    assert load_text(dump_config(config)) == config, "a saved config has nothing left to expand"


def test_files_and_overrides_expand_paths_too(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    file.write_text(file.read_text().replace("/models/student", "${oc.env:HOME}/student"))
    overrides = ["run.directory=~/one", "data.train=[~/a.jsonl, $HOME/b.jsonl]"]
    config = load_config(file, [*overrides, "data.train.1=~/c.jsonl"])
    assert config.run.directory == Path("/home/ada/one")
    assert config.data.train == (Path("/home/ada/a.jsonl"), Path("/home/ada/c.jsonl"))
    assert config.student.model == Path("/home/ada/student")


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize(
    ("written", "parts"),
    [
        ("$NOPE/x", ("must name variables that are set, got $NOPE in '$NOPE/x'", "has no NOPE")),
        ("~nobody-here/x", ("got '~nobody-here/x': there is no such user", "write ./~")),
        ("$ODD/x", ("must not lead to a path with $HOME", "got '/a/$HOME/x'", "another name")),
        ("", ("must be a path, got ''",)),
        (" ", ("must be a path, got ' '",)),
        (3, ("must be a path, got 3",)),
        (True, ("must be a path, got True",)),
        (float("nan"), ("must be a path, got nan",)),
        ("a\0b", ("without null characters, got 'a\\x00b'",)),
        ("a\ud83d", ("must be UTF-8 text", "got 'a\\ud83d'")),
    ],
)
def test_a_path_that_cannot_be_meant_is_refused_by_key(
    key: str, written: object, parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ODD", "/a/$HOME")
    monkeypatch.delenv("NOPE", raising=False)
    message = refusal(**with_path(key, written))
    assert message.startswith(f"{key}.0: " if key.startswith("data.") else f"{key}: ")
    for part in parts:
        assert part in message


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", ["rollout", "evaluation"])
def test_a_temperature_that_vllm_refuses_is_refused_for_its_engine_only(section: str) -> None:
    hot = {"sampling": {"temperature": 2.5}}
    message = refusal(**{section: hot})
    assert message.startswith(f"{section}.sampling.temperature must be at most 2 with rollout.eng")
    assert "got 2.5: vLLM refuses it" in message
    sections: dict[str, Any] = {"rollout": {"engine": {"type": "transformers"}}}
    sections[section] = sections.get(section, {}) | hot
    assert parse_config(make.tree(**sections), name="x.yaml")


def test_all_problems_are_reported_at_once() -> None:
    message = refusal(learner={"steps": "many", "stepz": 1}, teacher={"actors": 0})
    assert [line.strip().split(":")[0] for line in message.splitlines()] == [
        "teacher.actors",
        "learner.steps",
        "learner.stepz",
    ]


def test_required_keys_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({}, name="x.yaml")
    required = {line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]}
    assert required == {"run", "student", "data", "learner"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not valid YAML"),
        ("- a\n- b", "must hold a mapping"),
        ("run: ${nowhere}", "nowhere"),
        ("run: 1\nrun: 2", "is not valid YAML"),
        ("", "learner: this key is required"),
    ],
)
def test_a_file_that_is_not_a_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml") as caught:
        load_config(path)
    assert message in str(caught.value)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml does not exist"):
        load_config(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("override", ["learner.steps", "=3", "--learner.steps 3"])
def test_an_override_without_key_or_value_is_refused(file: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="must have the form key=value"):
        load_config(file, [override])


def test_an_override_of_an_unknown_key_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean rollout\.actors\?"):
        load_config(file, ["rollout.actor=3"])


def test_defaults_follow_the_paper() -> None:
    config = make.config()
    assert config.schedule == AdaptiveSchedule(
        start=0.0, increment=0.1, tolerance=0.0, reference="best", replay_ratio="decreasing"
    )
    assert config.loss.terms == (SkewKL(alpha=0.1, on="all", weight=1.0),)
    assert config.loss.normalize == "source"
    assert config.replay.capacity == 1000
    assert config.replay_min_size == config.learner.batch_size


def test_defaults_that_follow_from_another_section_are_filled_in() -> None:
    config = make.config(
        data={"train": ["a.jsonl"], "max_response_tokens": 77},
        generate={"sampling": {"max_tokens": 5}},
        rollout={"num_cpus": 2.5},
    )
    assert config.replay.min_size == 8
    assert config.rollout.sampling.max_tokens == 77
    assert config.evaluation.sampling.max_tokens == 77
    assert config.generate.sampling.max_tokens == 5
    assert (config.rollout.num_threads, config.learner.num_threads) == (2, 1)
    shown = load_text(dump_config(config))
    assert shown == config, "the resolved config is complete"


def load_text(text: str) -> Config:
    return parse_config(yaml.safe_load(text), name="x.yaml")


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        (AdaptiveSchedule(), True),
        (FixedSchedule(phi=0.0), False),
        (FixedSchedule(phi=0.5), True),
    ],
)
def test_rollouts_are_wanted_if_phi_can_be_above_zero(schedule: Any, wanted: bool) -> None:
    assert make.config(schedule=schedule.model_dump()).wants_rollouts is wanted


def test_reading_a_config_imports_no_heavy_library() -> None:
    code = (
        "import sys, distillm_ray.config_files as _;"
        "print([n for n in ('torch', 'ray', 'vllm', 'transformers', 'deepspeed', 'matplotlib')"
        " if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
