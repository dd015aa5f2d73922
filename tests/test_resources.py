"""What a config asks for, and the refusal of what a cluster does not have."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from distillm_ray.cluster.resources import Available, Node, check, render_show, request
from distillm_ray.config import Config
from distillm_ray.errors import ClusterError

GIB = 2**30


def make_config(**sections: dict[str, Any]) -> Config:
    tree: dict[str, dict[str, Any]] = {
        "run": {"directory": "runs/x"},
        "teacher": {"model": "models/teacher"},
        "student": {"model": "models/student"},
        "data": {"train": ["data/train.jsonl"]},
        "learner": {"steps": 10, "batch_size": 8},
    }
    for name, values in sections.items():
        tree.setdefault(name, {}).update(values)
    return Config.model_validate(tree)


def refusal(config: Config, device: Any, available: Available) -> str:
    with pytest.raises(ClusterError) as caught:
        check(request(config, device), available)
    return str(caught.value)


def test_the_defaults_ask_for_one_cpu_a_role_and_no_gpu_on_a_cpu() -> None:
    asked = request(make_config(), "cpu")
    roles = {role.role: (role.count, role.cpus, role.gpus) for role in asked.roles}
    assert roles == {"learner": (1, 1, 0), "generator": (1, 1, 0), "scorer": (1, 1, 0)}
    assert (asked.cpus, asked.gpus) == (3.0, 0.0)
    assert asked.object_store_bytes == 2 * GIB


def test_on_gpus_a_pool_asks_for_its_tensor_parallel_ranks() -> None:
    config = make_config(
        rollout={"actors": 3, "tensor_parallel": 2, "num_cpus": 0.5},
        teacher={"tensor_parallel": 4},
        learner={"workers": 8},
    )
    asked = request(config, "cuda")
    roles = {role.role: (role.count, role.cpus, role.gpus) for role in asked.roles}
    assert roles == {"learner": (8, 1, 1), "generator": (3, 0.5, 2), "scorer": (1, 1, 4)}
    assert (asked.cpus, asked.gpus) == (10.5, 18.0)


def test_fractions_of_a_gpu_are_taken_from_the_config() -> None:
    config = make_config(
        rollout={"num_gpus": 0.25}, teacher={"num_gpus": 0.25}, learner={"num_gpus": 0.5}
    )
    asked = request(config, "cuda")
    assert asked.gpus == 1.0
    check(asked, Available(nodes=(Node(cpus=4, gpus=1),)))


def test_a_run_without_teacher_or_generation_asks_for_neither() -> None:
    config = make_config(
        loss={"terms": [{"type": "cross_entropy"}]},
        schedule={"type": "fixed", "phi": 0.0},
        validation={"probe_prompts": 0},
        evaluation={"at_end": False},
    )
    asked = request(config, "cuda")
    assert [role.role for role in asked.roles] == ["learner"]
    assert asked.object_store_bytes == 0


def test_the_evaluation_at_the_end_needs_a_generator_even_without_rollouts() -> None:
    config = make_config(schedule={"type": "fixed", "phi": 0.0}, validation={"probe_prompts": 0})
    assert "generator" in {role.role for role in request(config, "cpu").roles}


def test_what_fits_exactly_is_accepted() -> None:
    check(request(make_config(), "cpu"), Available(nodes=(Node(cpus=2), Node(cpus=1))))


def test_too_few_cpus_names_what_is_asked_what_is_there_and_the_keys() -> None:
    config = make_config(rollout={"actors": 4})
    message = refusal(config, "cpu", Available(nodes=(Node(cpus=2),)))
    assert "6 CPUs asked for (1 learner x 1, 4 generator x 1, 1 scorer x 1)" in message
    assert "2 in the cluster" in message
    assert "lower learner.num_cpus, rollout.actors, rollout.num_cpus or teacher.num_cpus" in message


def test_too_few_gpus_names_the_keys_that_count_them() -> None:
    config = make_config(learner={"workers": 4}, rollout={"num_gpus": 0}, teacher={"num_gpus": 0})
    message = refusal(config, "cuda", Available(nodes=(Node(cpus=64, gpus=2),)))
    assert "4 GPUs asked for (4 learner x 1), 2 in the cluster" in message
    assert message.endswith("lower learner.workers or learner.num_gpus")


def test_both_shortages_are_told_at_once() -> None:
    message = refusal(make_config(), "cuda", Available(nodes=(Node(cpus=1),)))
    assert "3 CPUs asked for" in message
    assert "3 GPUs asked for" in message


def test_more_tensor_parallel_ranks_than_devices_on_a_node_are_refused() -> None:
    config = make_config(rollout={"tensor_parallel": 4})
    nodes = (Node(cpus=8, gpus=2),) * 4
    message = refusal(config, "cuda", Available(nodes=nodes))
    assert "only 0 of 1 generator actors fit: each needs 1 CPUs and 4 GPUs on one node" in message
    assert "rollout.tensor_parallel" in message


def test_an_actor_is_not_split_over_nodes() -> None:
    config = make_config(learner={"num_cpus": 2}, rollout={"num_cpus": 2}, teacher={"num_cpus": 2})
    check(request(config, "cpu"), Available(nodes=(Node(cpus=2), Node(cpus=4))))
    message = refusal(config, "cpu", Available(nodes=(Node(cpus=3), Node(cpus=3))))
    assert "only 0 of 1 scorer actors fit" in message
    assert "lower teacher.actors or teacher.num_cpus" in message


def test_targets_beyond_the_object_store_are_refused() -> None:
    config = make_config(targets={"max_bytes": 4 * GIB})
    available = Available(nodes=(Node(cpus=8),), object_store_bytes=GIB)
    message = refusal(config, "cpu", available)
    assert "targets.max_bytes is 4,294,967,296" in message
    assert "1,073,741,824 bytes; lower targets.max_bytes" in message
    check(request(config, "cpu"), Available(nodes=(Node(cpus=8),)))


def test_show_prints_a_tree_that_loads_again_and_the_sums() -> None:
    config = make_config(rollout={"actors": 3})
    shown = render_show(config, "cpu")
    tree, _, table = shown.partition("\n\n")
    assert Config.model_validate(yaml.safe_load(tree)) == config
    rows = [[cell.strip() for cell in line.split("│")] for line in table.splitlines()]
    sums = {row[1]: row[2:7] for row in rows if len(row) > 7}
    assert sums["generator"] == ["3", "1", "0", "3", "0"]
    assert sums["together"] == ["", "", "", "5", "0"]
    assert "\x1b" not in shown
