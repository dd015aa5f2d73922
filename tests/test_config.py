"""The config tree: what loads, what is refused, and with which message."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from distillm_ray.cli import EXIT_USER_ERROR, app
from distillm_ray.config import (
    AdaptiveSchedule,
    Config,
    CrossEntropy,
    FixedSchedule,
    LossConfig,
    ReverseKL,
    SkewKL,
    TransformersEngine,
)
from distillm_ray.config.files import dump_config, load_config, parse_config
from distillm_ray.errors import ConfigError
from tests import make

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))


MIXED: dict[str, Any] = {"engine": {"type": "transformers"}, "teacher_mix": 0.2}


def refusal(**sections: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(make.tree(**sections), name="x.yaml")
    return str(caught.value).removeprefix("x.yaml:\n").strip()


def rejected(file: Path, *overrides: str) -> str:
    """The message of the error of loading `file` with these overrides."""
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make.tree(loss={"terms": [{"type": "skew_kl", "alpha": 0.2}]})))
    return path


def test_there_are_configs_to_load() -> None:
    assert "quickstart.yaml" in {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
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


def test_a_type_within_a_mapping_replaces_the_keys_of_the_old_one(file: Path) -> None:
    first = "rollout.engine={type: vllm, max_num_seqs: 3}"
    engine = load_config(
        file, [first, "rollout={engine: {type: transformers}, lookahead: 1}"]
    ).rollout.engine
    assert engine == TransformersEngine()


def test_the_same_type_keeps_the_keys_that_are_there(file: Path) -> None:
    for override in ("loss.terms.0.type=skew_kl", "loss.terms.0={type: skew_kl, weight: 1}"):
        assert load_config(file, [override]).loss.terms == (SkewKL(alpha=0.2),)


def test_a_type_that_is_no_choice_of_a_union_keeps_the_keys_beside_it(file: Path) -> None:
    targets = load_config(file, ["targets={k: 7, max_bytes: 5}", "targets.type=top_k"]).targets
    assert (targets.type, targets.k, targets.max_bytes) == ("top_k", 7, 5)


def test_an_override_reaches_into_a_section_that_is_an_interpolation(file: Path) -> None:
    file.write_text(
        file.read_text()
        + "rollout: {sampling: {top_p: 0.9}}\nevaluation: {sampling: '${rollout.sampling}'}\n"
    )
    for override in ("evaluation.sampling.temperature=0", "evaluation.sampling={temperature: 0}"):
        config = load_config(file, [override])
        changed, source = config.evaluation.sampling, config.rollout.sampling
        assert (changed.temperature, changed.top_p) == (0, 0.9)
        assert (source.temperature, source.top_p) == (1, 0.9)


def test_an_override_of_one_alias_leaves_the_other_as_it_is(file: Path) -> None:
    pools = "evaluation: {student: &pool {actors: 2, num_cpus: 3}, teacher: *pool}\n"
    file.write_text(file.read_text() + pools)
    evaluation = load_config(file, ["evaluation.teacher.actors=5"]).evaluation
    assert evaluation.teacher is not None
    assert (evaluation.student.actors, evaluation.teacher.actors) == (2, 5)
    assert evaluation.student.num_cpus == evaluation.teacher.num_cpus == 3


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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("=", "must have the form key=value, as in learner.steps=100"),
        ("a..b=1", "a key has a word or a number on each side of a dot"),
        (".a=1", "a key has a word or a number on each side of a dot"),
        ("student.model[0]=1", "the index of an item follows a dot, as in data.train.0=a.jsonl"),
        ("data.train[0]=x", "the index of an item follows a dot, as in data.train.0=a.jsonl"),
        ("student.model.x=1", "student.model is a value, '/models/student', and has no key x"),
        ("student.model.0.x=1", "student.model is a value, '/models/student', and has no key 0"),
        ("data.train.0.x=1", "data.train.0 is a value, '/data/train.jsonl', and has no key x"),
        ("data.test.0==1", "data.test has no items in the file, so none can be changed: write the"),
        ("loss.terms.9.alpha=1", "loss.terms is a list of length 1 whose first item is loss.term"),
        ("loss.terms.x=1", "and has no item x; to add one, write the whole list, as in loss.term"),
        ("loss.terms.-1=1", "and has no item -1; to add one, write the whole list, as in loss.ter"),
        ("loss.terms.00=1", "and has no item 00; to add one, write the whole list, as in loss.ter"),
        ("data.train=[", "while parsing a flow node did not find expected node content at line 2"),
        ("learner={steps: 1, steps: 2}", "line 1: a key may stand once, got steps again after li"),
        ("learner={1: 2}", "line 1: a key must be a word without dots and brackets, got '1'"),
        ("learner.steps=!!python/none", "line 1: a value must have no tag, got tag:yaml.org,2002"),
        ("learner.steps=" + "9" * 5000, "a number must have at most 100 characters, got 5,000"),
        ("run.directory=\ud83d", "must be UTF-8 text"),
        ("run.directory=${", "no viable alternative at input '${'"),
        ("data.train=" + "[" * 100, "line 1: mappings and lists must be nested at most 32 deep"),
    ],
)
def test_an_override_without_a_place_in_the_tree_is_refused(
    file: Path, override: str, message: str
) -> None:
    found = rejected(file, override)
    shown = repr(override) if len(override) < 200 else f"{override!r:.200}…"
    assert found.startswith(f"override {shown}: ")
    assert message in found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run=1", "run: must be a mapping of keys to values, got 1"),
        ("schedule=1", "schedule: must be a mapping of keys to values, got 1"),
        ("run.seed.x=1", "run.seed: Input should be a valid integer, got a mapping"),
        ("data.train=[[a]]", "data.train.0: must be a path, got ['a']"),
        ("student.model=", "student.model: must be a path, got None"),
        ("run.directory=${nope}", "run.directory: Interpolation key 'nope' not found; an environ"),
        ("run.seed=${run.seed}", "run.seed: Recursive interpolation detected"),
        ("run.seed=???", "run.seed: Missing mandatory value: seed"),
        ("run.seed=${oc.env:NOPE_}", "Environment variable 'NOPE_' not found"),
        ("data.template={type: chat, system: '${oc.env:HALF}'}", "data.template.system: must be U"),
    ],
)
def test_an_override_with_a_wrong_value_is_refused_by_key(
    file: Path, override: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALF", "a\udcff")
    found = rejected(file, override)
    assert message in found
    assert len(found.splitlines()) <= 2, "one problem gives one line"


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
            " skew_reverse_kl, total_variation, adaptive_kl, cross_entropy, policy_gradient, got"
            " skew; did you mean skew_kl?",
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
            "loss.terms.0.on: Input should be 'dataset', 'student', 'teacher', 'corpus' or 'all',",
        ),
        ({"loss": {"terms": {"type": "skew_kl"}}}, "loss.terms: must be a list, as in [a, b]"),
        (
            {"schedule": {"type": "adaptiv"}},
            "schedule.type: must be one of adaptive, fixed, paired, got adaptiv; did you mean"
            " adaptive?",
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
        (
            {"teacher": {"actors": 2, "min_actors": 3}},
            ("teacher: min_actors must be at most actors", "got 3 > 2", "raise actors"),
        ),
        ({"learner": {"workers": 9}}, ("learner.workers", "9 > 8")),
        (
            {"learner": {"offload": "cpu", "zero_stage": 0}},
            ("zero_stage must be at least 1 with offload: cpu, got 0", "set zero_stage=1"),
        ),
        (
            {"learner": {"offload": "nvme", "zero_stage": 2, "offload_directory": "/nvme"}},
            ("zero_stage must be 3 with offload: nvme, got 2", "offload=cpu"),
        ),
        (
            {"learner": {"offload": "nvme", "zero_stage": 3}},
            ("offload_directory is required with offload: nvme",),
        ),
        (
            {"learner": {"offload": "cpu", "offload_directory": "/nvme"}},
            ("offload_directory needs offload: nvme, got offload: cpu", "remove the key"),
        ),
        (
            {"run": {"device": "cpu"}, "learner": {"offload": "cpu"}},
            ("learner.offload must be none with run.device=cpu, got cpu",),
        ),
        (
            {"learner": {"activation_checkpointing": 1}},
            ("learner.activation_checkpointing", "greater than or equal to 2"),
        ),
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
            {"rollout": {"teacher_mix": 0.2}},
            ("rollout.teacher_mix must be 0 with rollout.engine.type=vllm, got 0.2", "one model"),
        ),
        (
            {"rollout": MIXED, "teacher": None, "loss": {"terms": [{"type": "cross_entropy"}]}},
            ("teacher.model is required with rollout.teacher_mix = 0.2",),
        ),
        (
            {"rollout": MIXED | {"sampling": {"temperature": 0.0}}},
            ("rollout.sampling.temperature must be 1 with rollout.teacher_mix = 0.2, got 0:",),
        ),
        (
            {"rollout": MIXED | {"sampling": {"top_p": 0.9}}},
            ("rollout.sampling.top_p must be 1 with rollout.teacher_mix = 0.2, got 0.9",),
        ),
        (
            {"rollout": MIXED | {"sampling": {"top_k": 50}}},
            ("rollout.sampling.top_k must be 0 with rollout.teacher_mix = 0.2, got 50",),
        ),
        ({"rollout": MIXED | {"teacher_mix": 1.0}}, ("rollout.teacher_mix", "less than 1")),
        (
            {"targets": {"type": "top_k"}, "loss": {"temperature": 2.0}},
            ("loss.temperature must be 1 with targets.type=top_k, got 2",),
        ),
        (
            {"generate": {"engine": {"type": "transformers"}, "tensor_parallel": 2}},
            ("generate: tensor_parallel must be 1 with engine.type=transformers, got 2",),
        ),
        ({"teacher": None}, ("teacher.model is required", "type: cross_entropy alone")),
        (
            {"targets": {"library": "targets"}},
            (
                "teacher.dtype must be bfloat16 or float32 with targets.library, got auto",
                "add teacher.dtype=bfloat16",
            ),
        ),
        (
            {"loss": {"terms": [{"type": "skew_kl"}, {"type": "cross_entropy", "on": "corpus"}]}},
            (
                "data.corpus is required by loss.terms.1 (cross_entropy on corpus), got no files",
                "name files of plain text, as in data.corpus=[corpus.jsonl], or remove the term",
            ),
        ),
        (
            {"data": {"train": ["a.jsonl"], "corpus": ["b.jsonl"]}},
            (
                "data.corpus needs a term with on: corpus in loss.terms, got terms on all only",
                "add {on: corpus, type: cross_entropy} to loss.terms, or remove data.corpus",
            ),
        ),
        (
            {"data": {"train": ["a.jsonl"], "corpus_batch": 4}},
            ("data.corpus_batch needs data.corpus, got 4 without files",),
        ),
        (
            {
                "data": {"train": ["a.jsonl"], "corpus": ["b.jsonl"]},
                "loss": {"terms": [{"type": "reverse_kl", "on": "corpus"}]},
            },
            ("loss.terms must cover all text that the run draws (dataset and student), got",),
        ),
        (
            {"loss": {"terms": [{"type": "policy_gradient", "on": "corpus"}]}},
            ("on must be student with type: policy_gradient, got corpus",),
        ),
        (
            {"loss": {"terms": [{"type": "skew_kl", "on": "corpus", "max_importance": 2.0}]}},
            ("loss.terms.0.max_importance needs on: student, got corpus",),
        ),
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


def flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree by their dotted keys; lists are values."""
    found: dict[str, Any] = {}
    for name, value in section.items():
        key = f"{prefix}{name}"
        found |= flat(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return found


NUMBERS = [
    key
    for key, value in flat(make.config().model_dump(mode="json")).items()
    if type(value) in (int, float) or key in ("rollout.num_gpus", "validation.max_prompts")
]


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_is_neither_a_boolean_nor_infinite_nor_nan(file: Path, key: str) -> None:
    file.write_text(dump_config(make.config()))
    assert f"  {key}: must be a number, got true" in rejected(file, f"{key}=true")
    for written in (".inf", "-.inf", ".nan"):
        assert f"  {key}: " in rejected(file, f"{key}={written}")


def test_items_of_lists_of_numbers_are_no_booleans_either() -> None:
    message = refusal(
        learner={"adam_betas": [True, 0.9]},
        evaluation={"seeds": [False]},
        rollout={"sampling": {"stop_token_ids": [True]}},
    )
    keys = ["learner.adam_betas.0", "rollout.sampling.stop_token_ids.0", "evaluation.seeds.0"]
    assert [line.split(": must be a number, got ")[0].strip() for line in message.splitlines()] == (
        keys
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.device=true", "run.device: Input should be 'auto', 'cuda' or 'cpu', got True"),
        ("run.mode=1", "run.mode: Input should be 'cluster' or 'local', got 1"),
        (
            "data.template={type: chat, system: true}",
            "data.template.system: Input should be a valid string, got True",
        ),
        ("run.seed=9007199254740993", "run.seed: Input should be less than or equal to 9007199"),
    ],
)
def test_a_value_of_another_kind_is_refused(file: Path, override: str, message: str) -> None:
    assert message in rejected(file, override)


@pytest.mark.parametrize("written", ["010", "-01", "1:30", "0_7", "1:30.5"])
def test_a_number_that_yaml_reads_with_another_base_is_refused(file: Path, written: str) -> None:
    message = rejected(file, f"learner.steps={written}")
    assert f"no leading zeros and no colons, got '{written}': YAML reads it with base 8" in message
    assert "write it with base 10" in message


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
    assert config.run.local_directory == Path("/home/ada/one")
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
        ("a: [1", "is not valid YAML: while parsing a flow sequence at line 1, column 4"),
        ("- a\n- b", "must hold a mapping of sections at its top level, as in `run: {…}`, got ['a"),
        ("3", "must hold a mapping of sections at its top level, as in `run: {…}`, got 3"),
        ("true", "must hold a mapping of sections at its top level, as in `run: {…}`, got True"),
        ("hello", "must hold a mapping of sections at its top level, as in `run: {…}`, got 'hello"),
        (
            "2020-01-01",
            "must hold a mapping of sections at its top level, as in `run: {…}`, got '2",
        ),
        ("run: ${nowhere}", "Interpolation key 'nowhere' not found; an environment variable is wr"),
        ("run: {a: '${run.b}', b: '${run.a}'}", "Recursive interpolation detected"),
        ("run: ${run}", "Recursive interpolation detected"),
        ("run: 1\nrun: 2", "line 2: a key may stand once, got run again after line 1"),
        ("run:\n  seed: 1\n  seed: 2", "line 3: a key may stand once, got seed again after line 2"),
        ('a: [{on: 1, "on": 2}]', "line 1: a key may stand once, got on again after line 1"),
        ("run:\n  1: 2", "line 2: a key must be a word without dots and brackets, got '1'"),
        ("yes: 2", "line 1: a key must be a word without dots and brackets, got 'yes'"),
        ("~: 2", "line 1: a key must be a word without dots and brackets, got '~'"),
        ('"": 2', "line 1: a key must be a word without dots and brackets, got ''"),
        ("? [a]\n: 2", "line 1: a key must be a word without dots and brackets, got a list"),
        ("learner.steps: 2", "line 1: a key must be a word without dots and brackets, got 'lear"),
        ("a: 1\nb: !!python/object:os.system x", "line 2: a value must have no tag, got tag:yaml"),
        ("a: !mine x", "line 1: a value must have no tag, got !mine; remove it"),
        ("[" * 100_000, "line 1: mappings and lists must be nested at most 32 deep"),
        ("- " * 100_000, "line 1: mappings and lists must be nested at most 32 deep"),
        ("a: &a [*a]", "recursive aliases are not supported"),
        ("a: &a [x, x, x]\nb: &b [*a, *a]\nc: [" + "*b, " * 2000 + "x]", "expan"),
        ("a: 010", "line 1: a number must have no leading zeros and no colons, got '010'"),
        ("a: \0", "control characters are not allowed"),
        ("---\nrun: 1\n---\nrun: 2", "but found another document at line 3"),
        ("a" * 300_000, "must hold at most 262,144 bytes, it holds more"),
        ("", "learner: this key is required"),
    ],
    ids=lambda text: text[:20],
)
def test_a_file_that_is_not_a_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    found = rejected(path)
    assert str(path) in found
    assert message in found


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"run: \xff\xfe\x80")
    assert rejected(path).startswith(
        f"config file {path} must be UTF-8 text, got byte 0xff at offset 5"
    )


def test_a_byte_order_mark_is_left_out(file: Path) -> None:
    config = load_config(file)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert load_config(file) == config


def test_a_path_that_is_no_readable_file_is_named(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rejected(tmp_path / "nothing.yaml").endswith("nothing.yaml does not exist")
    assert rejected(tmp_path / ("x" * 5000)).endswith("x does not exist")
    assert rejected(tmp_path).endswith("is a directory: name a YAML file in it")
    assert "/dev/null is a device or a pipe" in rejected(Path("/dev/null"))

    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    assert rejected(file) == f"config file {file} cannot be read: Permission denied"


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


@pytest.mark.parametrize("key", ["pool", "example.com/pool", "a/B_c.d-e", "x" * 63])
def test_labels_of_nodes_are_what_ray_and_kubernetes_take(key: str) -> None:
    assert make.config(learner={"node_labels": {key: "a100"}}).learner.node_labels == {key: "a100"}


@pytest.mark.parametrize("label", ["", "-x", "x y", "x/", "a/b/c", "A/b", "x" * 64])
def test_other_labels_are_refused_by_key(label: str) -> None:
    with pytest.raises(ConfigError, match=r"learner.node_labels.*must be at most 63 letters"):
        parse_config(make.tree(learner={"node_labels": {label: "a"}}), name="x.yaml")
    with pytest.raises(ConfigError, match=r"learner.node_labels.pool: must be at most 63 letters"):
        parse_config(make.tree(learner={"node_labels": {"pool": label}}), name="x.yaml")


def load_text(text: str) -> Config:
    return parse_config(yaml.safe_load(text), name="x.yaml")


def test_every_step_adds_as_many_sequences_of_the_corpus_as_it_has_slots() -> None:
    terms = [{"type": "skew_kl"}, {"type": "cross_entropy", "on": "corpus"}]
    data = {"train": ["a.jsonl"], "corpus": ["corpus.jsonl"]}
    assert make.config(data=data, loss={"terms": terms}).data.corpus_batch == 8
    named = make.config(data={**data, "corpus_batch": 3}, loss={"terms": terms})
    assert named.data.corpus_batch == 3
    assert load_text(dump_config(named)) == named
    assert make.config().data.corpus_batch is None


def test_all_stands_for_responses_and_leaves_the_corpus_out() -> None:
    loss = LossConfig.model_validate(
        {"terms": [{"type": "skew_kl"}, {"type": "cross_entropy", "on": "corpus"}]}
    )
    on_all, on_corpus = loss.terms
    assert [on_all.covers(text) for text in ("dataset", "student", "corpus")] == [True, True, False]
    assert [on_corpus.covers(text) for text in ("dataset", "student", "corpus")] == [
        *(False, False, True)
    ]
    assert [loss.compares(text) for text in ("student", "corpus")] == [True, False]
    scored = loss.model_copy(update={"terms": (*loss.terms, SkewKL(on="corpus"))})
    assert scored.compares("corpus")


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
        "import sys, distillm_ray.config.files as _;"
        "print([n for n in ('torch', 'ray', 'vllm', 'transformers', 'deepspeed', 'matplotlib')"
        " if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


# ---- the command line ----------------------------------------------------------------------------

WITH_CONFIG = {
    "show": [],
    "train": [],
    "evaluate": [],
    "score": [],
    "generate": ["--model=/m", "--prompts=/p.jsonl", "--output=/o.jsonl"],
}


def refused_by_command(*arguments: str) -> str:
    """The message, on one line, of a command that ends with the exit code of a wrong input."""
    result = CliRunner(env={"COLUMNS": "1000"}).invoke(app, arguments)
    assert result.exit_code == EXIT_USER_ERROR, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize("command", WITH_CONFIG)
def test_every_command_refuses_a_wrong_config_without_a_stack_trace(
    command: str, file: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.yaml"
    options = WITH_CONFIG[command]
    for content in (b"3", b"hello", b"[1]", b"a: [", b"\xff", b"run: 1\nrun: 2", b"[" * 100_000):
        bad.write_bytes(content)
        assert "bad.yaml" in refused_by_command(command, str(bad), *options)
    for path in (tmp_path, tmp_path / "nothing.yaml", "~nobody-here/x", "$NOPE_/x", "", "\ud83d"):
        refused_by_command(command, str(path), *options)
    for override in ("student.model[0]=1", "data.test.0==1", "run.directory=\ud83d", "=", "a..b=1"):
        assert "override" in refused_by_command(command, str(file), override, *options)


def test_commands_expand_their_paths(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NAME", "one")
    assert CliRunner().invoke(app, ["show", f"~/{file.name}"]).exit_code == 0
    (tmp_path / "out").write_text("mine")
    generate = ["generate", "~/config.yaml", "--model", "~/m", "--prompts", "~/p"]
    message = refused_by_command(*generate, "--output=~/out")
    assert f"--output {tmp_path}/out exists and is not overwritten" in message
    message = refused_by_command(*generate, "--output=~/other")
    assert f"--prompts {tmp_path}/p does not exist" in message
    message = refused_by_command("evaluate", "~/config.yaml", "--model=$HOME/$NAME")
    assert f"--model: {tmp_path}/one does not exist" in message
    message = refused_by_command("evaluate", "~/config.yaml", "--model=~/one", "--output=~/out")
    assert f"--output: {tmp_path}/out must be a directory" in message
    assert f"{tmp_path}/one holds no metrics.jsonl" in refused_by_command("plot", "~/$NAME")
    message = refused_by_command("init-student", "~/one", "~/two", "--layers=0")
    assert f"{tmp_path}/one" in message
    message = refused_by_command("init-student", "~/one", "~/out", "--layers=0")
    assert not (Path.cwd() / "~").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["plot", "PATH"],
        ["compare", "run", "PATH"],
        ["compare", "run", "other", "--output", "PATH"],
        ["init-student", "PATH", "out", "--layers=0"],
        ["init-student", "teacher", "PATH", "--layers=0"],
        ["evaluate", "CONFIG", "--model", "PATH"],
        ["evaluate", "CONFIG", "--output", "PATH"],
        ["generate", "CONFIG", "--model=/m", "--prompts=/p", "--output", "PATH"],
        ["generate", "CONFIG", "--model=/m", "--output=/o", "--prompts", "PATH"],
        ["generate", "CONFIG", "--prompts=/p", "--output=/o", "--model", "PATH"],
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_a_path_of_the_command_line_that_cannot_be_meant_is_refused(
    arguments: list[str], file: Path
) -> None:
    for written, rule in {
        "$NOPE_/x": "must name variables that are set, got $NOPE_ in '$NOPE_/x'",
        "~nobody-here/x": "got '~nobody-here/x': there is no such user",
        "": "must be a path, got ''",
        "a\ud83d": "must be UTF-8 text",
    }.items():
        given = [{"PATH": written, "CONFIG": str(file)}.get(one, one) for one in arguments]
        assert rule in refused_by_command(*given)


def test_bytes_of_the_command_line_that_are_no_text_are_refused(file: Path) -> None:
    command = [sys.executable, "-m", "distillm_ray.cli", "show"]
    for arguments in ([b"\xff.yaml"], [os.fsencode(file), b"run.directory=\xff"]):
        done = subprocess.run([*command, *arguments], capture_output=True, timeout=60)
        assert done.returncode == EXIT_USER_ERROR
        assert b"UTF-8" in done.stderr
        assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "term"),
    [
        ([], "loss.terms.0 (skew_kl on all)"),
        (["method=kd"], "loss.terms.0 (forward_kl on dataset)"),
        (["method=seqkd"], "loss.terms.0 (cross_entropy on teacher)"),
        (["method=opd"], None),
        (["method=minillm"], None),
        (["schedule={type: adaptive, start: 1.0}"], None),
    ],
)
def test_the_term_that_trains_on_responses_is_known(
    tmp_path: Path, overrides: list[str], term: str | None
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make.tree()))
    assert load_config(path, overrides).responses_needed_by == term


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("2026-11-25", datetime(2026, 11, 25)),
        ("2026-11-25T12:30:00", datetime(2026, 11, 25, 12, 30)),
        ("2026-11-25 12:30:00", datetime(2026, 11, 25, 12, 30)),
    ],
)
def test_a_date_needs_no_quotes(tmp_path: Path, written: str, read: datetime) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make.tree()))
    assert load_config(path, [f"data.time={written}"]).data.time == read


@pytest.mark.parametrize("written", ["20261125", "1", "1.5", "today", "true"])
def test_a_number_is_no_date(tmp_path: Path, written: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make.tree()))
    with pytest.raises(ConfigError, match=r"data\.time: must be a date, as in 2026-11-25"):
        load_config(path, [f"data.time={written}"])


# ---- elastic pools -------------------------------------------------------------------------------


def test_a_pool_may_have_a_range_of_actors_and_a_number_stays_one(file: Path) -> None:
    config = load_config(file, ["rollout.actors={min: 2, max: 16}", "teacher.actors=3"])
    assert (config.rollout.fewest, config.rollout.most) == (2, 16)
    assert config.teacher is not None
    assert (config.teacher.fewest, config.teacher.most, config.teacher.actors) == (3, 3, 3)
    again = parse_config(config.model_dump(mode="json"), name="x.yaml")
    assert again == config
    changed = load_config(file, ["rollout.actors={min: 2, max: 16}", "rollout.actors.max=4"])
    assert (changed.rollout.fewest, changed.rollout.most) == (2, 4)


@pytest.mark.parametrize(
    ("section", "actors", "parts"),
    [
        ("rollout", {"min": 3, "max": 2}, ("rollout.actors: max must be at least min, got 2 < 3",)),
        ("rollout", {"max": 2}, ("rollout.actors.min: this key is required",)),
        ("teacher", {"min": 0, "max": 2}, ("teacher.actors.min: Input should be greater than",)),
        ("rollout", {"min": 1, "max": 2, "mix": 1}, ("rollout.actors.mix: unknown key",)),
        ("rollout", [1, 2], ("rollout.actors: Input should be a valid integer, got [1, 2]",)),
        ("generate", {"min": 1, "max": 2}, ("generate.actors must be one number, got {min: 1, m",)),
    ],
)
def test_a_range_that_is_none_is_refused_by_key(
    section: str, actors: Any, parts: tuple[str, ...]
) -> None:
    message = refusal(**{section: {"actors": actors}})
    for part in parts:
        assert part in message


def test_the_evaluations_pool_is_no_range_because_no_learner_waits_for_it() -> None:
    message = refusal(evaluation={"teacher": {"actors": {"min": 1, "max": 2}}})
    assert "evaluation.teacher.actors must be one number, got {min: 1, max: 2}" in message
    assert "no learner waits for it" in message


def test_the_minimum_of_working_actors_is_one_that_the_pool_always_has() -> None:
    pool = {"actors": {"min": 2, "max": 16}, "min_actors": 3}
    assert "min_actors must be at most actors.min, got 3 > 2" in refusal(rollout=pool)


def test_learners_are_no_range_and_the_message_says_why() -> None:
    message = refusal(learner={"workers": {"min": 1, "max": 4}})
    assert "learner.workers: must be one number, got {min: 1, max: 4}" in message
    assert "splits the optimizer state over the ranks" in message
    assert "with zero_stage 0 a run may be resumed with another number" in message
