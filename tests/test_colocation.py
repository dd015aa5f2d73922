"""`run.placement: colocated`: what the config fills in and refuses, and a rank's side of a turn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from distillm_ray.cluster import learner_turn, orchestrator
from distillm_ray.cluster.actors import CALL_TIMEOUT_S
from distillm_ray.cluster.learner_turn import OwnDevice, SharedDevice
from distillm_ray.cluster.placement import Available, Node, check, render_show, train_phases
from distillm_ray.cluster.shared_gpus import bundles
from distillm_ray.config import Config
from distillm_ray.config.files import parse_config
from distillm_ray.errors import ClusterError, ConfigError, UserError
from distillm_ray.learner.shared_device import check_kept
from distillm_ray.manifest.layout import Machine, machines, pods
from distillm_ray.plan.plan import make_plan
from distillm_ray.types import RunStatus
from tests import make

GIB = 2**30


def tree(**sections: Any) -> dict[str, Any]:
    """A colocated run of two GPUs, with the keys of `sections` set in it."""
    values: dict[str, Any] = {
        "run": {"placement": "colocated"},
        "learner": {"workers": 2},
        "rollout": {"actors": 2},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return make.tree(**values)


def colocated(**sections: Any) -> Config:
    return parse_config(tree(**sections), name="x.yaml")


def vllm(utilization: float) -> dict[str, Any]:
    return {"engine": {"type": "vllm", "gpu_memory_utilization": utilization}}


# ---- parts of a GPU ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({}, (0.85, 0.15)),
        ({"rollout": vllm(0.6)}, (0.6, 0.4)),
        ({"rollout": vllm(0.3)}, (0.51, 0.49)),
        ({"rollout": vllm(0.3) | {"num_gpus": 0.7}}, (0.7, 0.3)),
        ({"rollout": vllm(0.3), "learner": {"num_gpus": 0.2}}, (0.8, 0.2)),
    ],
)
def test_the_generator_has_the_part_that_vllm_takes_and_the_learner_has_the_rest(
    sections: dict[str, Any], parts: tuple[float, float]
) -> None:
    config = colocated(**sections)
    assert (config.rollout.num_gpus, config.learner.num_gpus) == parts


def test_a_resolved_config_reads_back_as_it_was() -> None:
    config = colocated()
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_separate_roles_have_no_parts() -> None:
    config = make.config()
    assert (config.rollout.num_gpus, config.learner.num_gpus) == (None, None)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"rollout": {"engine": {"type": "transformers"}}},
            "rollout.engine.type must be vllm with run.placement=colocated, got transformers",
        ),
        (
            {"rollout": {"actors": {"min": 1, "max": 2}}},
            "rollout.actors must be one number with run.placement=colocated, got {min: 1, max: 2}",
        ),
        (
            {"rollout": {"tensor_parallel": 2}},
            "rollout.tensor_parallel must be 1 with run.placement=colocated, got 2",
        ),
        (
            {"rollout": {"actors": 3}},
            "rollout.actors must equal learner.workers with run.placement=colocated, got 3 and 2",
        ),
        (
            {"rollout": {"node_labels": {"pool": "a"}}},
            "rollout.node_labels must equal learner.node_labels with run.placement=colocated, got"
            " {pool: a} and {}",
        ),
        (
            {"rollout": vllm(0.6) | {"num_gpus": 0.6}, "learner": {"num_gpus": 0.5}},
            "rollout.num_gpus + learner.num_gpus must be 1 with run.placement=colocated",
        ),
        ({"rollout": vllm(0.3), "learner": {"num_gpus": 0.6}}, "got 0.4 + 0.6"),
        ({"rollout": vllm(1.0)}, "got 1 + 0"),
        (
            {"rollout": vllm(0.85) | {"num_gpus": 0.6}},
            "rollout.engine.gpu_memory_utilization must be at most rollout.num_gpus = 0.6",
        ),
        (
            {"teacher": {"num_gpus": 0.15}},
            "teacher.num_gpus must be a whole number with run.placement=colocated, got 0.15",
        ),
        (
            {"run": {"mode": "local"}},
            "run.placement must be separate with run.mode=local, got colocated",
        ),
        (
            {
                "loss": {"terms": [{"type": "cross_entropy"}]},
                "schedule": {"type": "fixed", "phi": 0.0},
                "evaluation": {"at_end": False},
            },
            "run.placement must be separate where a run generates nothing, got colocated",
        ),
    ],
)
def test_what_cannot_share_devices_is_refused_by_key(
    sections: dict[str, Any], message: str
) -> None:
    values = {"run": {"placement": "colocated"} | sections.pop("run", {})}
    with pytest.raises(ConfigError) as caught:
        colocated(**sections, **values)
    assert message in str(caught.value)


def test_on_policy_runs_and_long_windows_may_be_colocated() -> None:
    assert colocated(rollout={"max_staleness": 0, "lookahead": 1}).is_colocated
    assert colocated(rollout={"max_staleness": 9, "lookahead": 8}).is_colocated


# ---- placement -----------------------------------------------------------------------------------


def test_two_learners_and_two_generators_fit_on_two_gpus_beside_the_scorers_own() -> None:
    phases = train_phases(colocated(evaluation={"at_end": False}), "cuda")
    assert phases[0].gpus == 3.0
    check(phases, Available(nodes=(Node(cpus=8, gpus=3),)))
    check(phases, Available(nodes=(Node(cpus=8, gpus=2), Node(cpus=8, gpus=1))))
    with pytest.raises(ClusterError, match=r"3 GPUs asked for .*2 in the cluster"):
        check(phases, Available(nodes=(Node(cpus=8, gpus=2),)))


@pytest.mark.parametrize("count", [1, 3, 7, 8])
def test_parts_of_a_gpu_add_up_to_whole_ones(count: int) -> None:
    config = colocated(learner={"workers": count}, rollout={"actors": count})
    phases = train_phases(config, "cuda")[:1]
    check(phases, Available(nodes=(Node(cpus=32, gpus=count + 1),)))


def test_each_generator_has_a_bundle_of_its_own_and_no_two_fit_on_one_gpu() -> None:
    spec = train_phases(colocated(), "cuda")[0].roles[1]
    assert bundles(spec) == [{"CPU": 1.0, "GPU": 0.85}] * 2
    assert all(bundle["GPU"] > 0.5 for bundle in bundles(spec))
    on_cpus = train_phases(colocated(rollout={"num_cpus": 0}), "cpu")[0].roles[1]
    assert bundles(on_cpus) == [{"CPU": 0.01}] * 2


def test_show_names_the_mode_and_the_parts() -> None:
    shown = render_show(colocated(), "cuda")
    assert "one learner and one generator on each GPU, in turns" in shown
    assert "placement: colocated" in shown
    assert "num_gpus: 0.85" in shown


def test_a_plan_and_a_manifest_refuse_the_mode_by_key() -> None:
    for lay_out in (pods, machines):
        with pytest.raises(ConfigError, match=r"^run\.placement must be separate for a manifest"):
            lay_out(colocated(), "cuda", Machine(gpus=8, cpus=64), None)
    with pytest.raises(UserError, match=r"^run\.placement must be separate for a plan"):
        make_plan(colocated(), cast(Any, None), None, print)


# ---- a rank's side of a turn ---------------------------------------------------------------------


class Turns:
    """The orchestrator and run control as a rank calls them; the device comes at call number 3."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.grants_at = 3
        self.stop = False
        self.take_device = SimpleNamespace(remote=self.take)
        self.lend_device = SimpleNamespace(remote=self.lend)

    def take(self, attempt: int, rank: int, hurried: bool, timeout_s: float) -> bool:
        self.calls.append(f"take {attempt}.{rank}{' hurried' if hurried else ''}")
        return len(self.calls) >= self.grants_at

    def lend(self, attempt: int, rank: int) -> None:
        self.calls.append(f"lend {attempt}.{rank}")

    def free(self) -> None:
        self.calls.append("free")

    def status(self) -> RunStatus:
        return RunStatus(stop=self.stop)


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    monkeypatch.setattr(learner_turn, "ask", lambda call, what, timeout_s=0.0: call)
    return Turns()


def device(turns: Turns, *, limit_s: float = 60.0) -> SharedDevice:
    role = cast(Any, turns)
    return SharedDevice(role, role, attempt=2, rank=1, limit_s=limit_s, free=turns.free)


def test_a_rank_asks_until_it_has_its_device_and_frees_memory_before_it_lends(
    turns: Turns,
) -> None:
    own = device(turns)
    own.take()
    with own.lent():
        assert not own.held
        own.lend()  # again: nothing happens
        turns.grants_at = 0
    assert own.held
    assert turns.calls == ["take 2.1", "take 2.1", "take 2.1", "free", "lend 2.1", "take 2.1"]


def test_a_rank_that_keeps_too_much_does_not_lend(turns: Turns) -> None:
    own = device(turns)
    own.take()

    def refuse() -> None:
        raise ConfigError("a learner must keep at most")

    own._free = refuse
    with pytest.raises(ConfigError):
        own.lend()
    assert "lend 2.1" not in turns.calls


def test_a_rank_hurries_the_generators_when_the_run_ends(turns: Turns) -> None:
    turns.stop = True
    device(turns).take()
    assert set(turns.calls) == {"take 2.1 hurried"}


def test_a_wait_that_is_longer_than_all_work_ends_the_run(turns: Turns) -> None:
    turns.grants_at = 10**9
    with pytest.raises(ClusterError, match="did not give up the devices"):
        device(turns, limit_s=0.0).take()


def test_a_device_of_its_own_is_always_held() -> None:
    own = OwnDevice()
    with own.lent():
        assert own.held


def test_a_rank_waits_for_its_device_longer_than_the_generators_may_work() -> None:
    for config in (colocated(), colocated(rollout={"timeout_s": 9000.0})):
        turn_s = orchestrator.turn_limit_s(config, 500)
        assert turn_s > orchestrator.probe_limit_s(config, 500)
        assert turn_s + CALL_TIMEOUT_S < orchestrator.collective_limit_s(config, 500)


def test_a_learner_that_keeps_more_than_its_part_is_refused_with_what_would_be_enough() -> None:
    check_kept(kept_bytes=15 * GIB, total_bytes=100 * GIB, part=0.15)
    with pytest.raises(ConfigError) as caught:
        check_kept(kept_bytes=20 * GIB, total_bytes=80 * GIB, part=0.15)
    assert "learner.num_gpus = 0.15" in str(caught.value)
    assert "got 0.25 (20.0 of 80.0 GiB)" in str(caught.value)
    assert "gpu_memory_utilization below 0.75" in str(caught.value)
