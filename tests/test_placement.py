"""The resources of each phase, and the refusal of what a cluster does not have."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from distillm_ray.cluster.placement import (
    Available,
    Node,
    Phase,
    check,
    evaluate_phases,
    generate_phases,
    render_show,
    room_for_targets,
    score_phases,
    train_phases,
)
from distillm_ray.config import Config
from distillm_ray.errors import ClusterError
from tests import make

GIB = 2**30


def training(config: Config, device: Any) -> Phase:
    return train_phases(config, device)[0]


def refusal(config: Config, device: Any, available: Available) -> str:
    with pytest.raises(ClusterError) as caught:
        check(train_phases(config, device), available)
    return str(caught.value)


def test_the_defaults_ask_for_one_cpu_a_role_and_no_gpu_on_a_cpu() -> None:
    asked = training(make.config(), "cpu")
    roles = {role.role: (role.count, role.cpus, role.gpus) for role in asked.roles}
    assert roles == {"learner": (1, 1, 0), "generator": (1, 1, 0), "scorer": (1, 1, 0)}
    assert (asked.cpus, asked.gpus) == (3.0, 0.0)
    assert asked.store_use.stores == 1


def test_on_gpus_a_pool_asks_for_its_tensor_parallel_ranks() -> None:
    config = make.config(
        rollout={"actors": 3, "tensor_parallel": 2, "num_cpus": 0.5},
        teacher={"tensor_parallel": 4},
        learner={"workers": 8},
    )
    asked = training(config, "cuda")
    roles = {role.role: (role.count, role.cpus, role.gpus) for role in asked.roles}
    assert roles == {"learner": (8, 1, 1), "generator": (3, 0.5, 2), "scorer": (1, 1, 4)}
    assert (asked.cpus, asked.gpus) == (10.5, 18.0)


def test_fractions_of_a_gpu_are_taken_from_the_config() -> None:
    config = make.config(
        rollout={"num_gpus": 0.25}, teacher={"num_gpus": 0.25}, learner={"num_gpus": 0.5}
    )
    asked = training(config, "cuda")
    assert asked.gpus == 1.0
    check((asked,), Available(nodes=(Node(cpus=4, gpus=1),)))


def test_a_run_without_teacher_or_generation_asks_for_neither() -> None:
    config = make.config(
        loss={"terms": [{"type": "cross_entropy"}]},
        schedule={"type": "fixed", "phi": 0.0},
        validation={"probe_prompts": 0},
        evaluation={"at_end": False},
    )
    asked = training(config, "cuda")
    assert [role.role for role in asked.roles] == ["learner"]
    assert asked.store_use.target_bytes == 0


def test_the_evaluation_at_the_end_needs_a_generator_even_without_rollouts() -> None:
    config = make.config(schedule={"type": "fixed", "phi": 0.0}, validation={"probe_prompts": 0})
    assert "generator" in {role.role for role in training(config, "cpu").roles}


def test_what_fits_exactly_is_accepted() -> None:
    check(train_phases(make.config(), "cpu"), Available(nodes=(Node(cpus=2), Node(cpus=1))))


def test_too_few_cpus_are_reported_with_the_demand_the_supply_and_the_keys() -> None:
    config = make.config(rollout={"actors": 4})
    message = refusal(config, "cpu", Available(nodes=(Node(cpus=2),)))
    assert "6 CPUs asked for (1 learner x 1, 4 generator x 1, 1 scorer x 1)" in message
    assert "2 in the cluster" in message
    assert "lower learner.num_cpus, rollout.actors, rollout.num_cpus or teacher.num_cpus" in message


def test_too_few_gpus_are_reported_with_the_keys_that_count_them() -> None:
    config = make.config(learner={"workers": 4}, rollout={"num_gpus": 0}, teacher={"num_gpus": 0})
    message = refusal(config, "cuda", Available(nodes=(Node(cpus=64, gpus=2),)))
    assert "4 GPUs asked for (4 learner x 1), 2 in the cluster" in message
    assert message.endswith("lower learner.workers or learner.num_gpus")


def test_both_shortages_are_reported_at_once() -> None:
    message = refusal(make.config(), "cuda", Available(nodes=(Node(cpus=1),)))
    assert "3 CPUs asked for" in message
    assert "3 GPUs asked for" in message


def test_more_tensor_parallel_ranks_than_devices_on_a_node_are_refused() -> None:
    config = make.config(rollout={"tensor_parallel": 4})
    nodes = (Node(cpus=8, gpus=2),) * 4
    message = refusal(config, "cuda", Available(nodes=nodes))
    assert (
        "only 0 of 1 generator processes fit: each needs 1 CPUs and 4 GPUs on one node" in message
    )
    assert "rollout.tensor_parallel" in message


def test_an_actor_is_not_split_over_nodes() -> None:
    config = make.config(learner={"num_cpus": 2}, rollout={"num_cpus": 2}, teacher={"num_cpus": 2})
    check(train_phases(config, "cpu"), Available(nodes=(Node(cpus=2), Node(cpus=4))))
    message = refusal(config, "cpu", Available(nodes=(Node(cpus=3), Node(cpus=3))))
    assert "only 0 of 1 scorer processes fit" in message
    assert "lower teacher.actors or teacher.num_cpus" in message


def with_stores(*sizes: int) -> Available:
    return Available(nodes=tuple(Node(cpus=8, object_store_bytes=size) for size in sizes))


def test_targets_beyond_the_object_store_are_refused() -> None:
    config = make.config(targets={"max_bytes": 4 * GIB})
    message = refusal(config, "cpu", with_stores(GIB))
    assert "targets.max_bytes is 4,294,967,296 in 1 store of 4,294,967,296" in message
    assert "hold 1,073,741,824 bytes; lower targets.max_bytes" in message
    check(train_phases(config, "cpu"), Available(nodes=(Node(cpus=8),)))


def test_a_store_that_no_single_node_can_hold_is_refused_although_all_together_could() -> None:
    nodes = with_stores(*(100 * GIB for _ in range(8)))
    config = make.config(targets={"max_bytes": 600 * GIB})
    assert "in 1 store of 644,245,094,400, each on one node" in refusal(config, "cpu", nodes)
    for stores, fits in ((5, False), (6, True), (8, True)):
        config = make.config(targets={"max_bytes": 600 * GIB, "stores": stores})
        if fits:
            check(train_phases(config, "cpu"), nodes)
        else:
            assert "raise targets.stores" in refusal(config, "cpu", nodes)


def test_weights_and_batches_in_transit_need_room_on_every_node() -> None:
    config = make.config(targets={"max_bytes": 10 * GIB})
    nodes = with_stores(12 * GIB, 4 * GIB)

    def problem(weights: int, batches: int) -> str:
        phases = train_phases(config, "cpu", weights_bytes=weights, batch_bytes=batches)
        try:
            check(phases, nodes)
        except ClusterError as error:
            return str(error)
        return ""

    assert problem(GIB, GIB) == ""
    assert "targets.max_bytes is 10,737,418,240" in problem(2 * GIB, GIB)
    assert "5,368,709,120 on each node for weights and batches" in problem(4 * GIB, GIB)


@given(
    sizes=st.lists(st.integers(0, 10_000), min_size=1, max_size=6),
    stores=st.integers(1, 5),
    weights=st.integers(0, 500),
    batches=st.integers(0, 500),
)
def test_the_room_for_targets_fits_on_any_node_that_gets_a_store(
    sizes: list[int], stores: int, weights: int, batches: int
) -> None:
    nodes = with_stores(*sizes).nodes

    def phase(limit: int | str) -> Phase:
        config = make.config(targets={"max_bytes": limit, "stores": stores})
        return train_phases(config, "cpu", weights_bytes=weights, batch_bytes=batches)[0]

    used = with_stores(*(size * 9 // 10 for size in sizes))
    transit = weights + (batches if len(sizes) > 1 else 0)
    assume(all(size * 9 // 10 >= transit for size in sizes))
    room = room_for_targets(phase("auto"), nodes)
    assert room is not None and room % stores == 0
    most = -(-stores // len(sizes))  # on one node, if they are spread
    smallest = min(sizes) * 9 // 10 - transit
    assert most * room // stores <= smallest < most * (room // stores + 1)
    if room:
        check((phase(room),), used)


def test_the_room_for_targets_is_not_known_where_a_node_does_not_say() -> None:
    phase = train_phases(make.config(), "cpu")[0]
    assert room_for_targets(phase, (Node(cpus=8), Node(cpus=8, object_store_bytes=GIB))) is None


def test_show_prints_a_tree_that_loads_again_and_the_sums() -> None:
    config = make.config(rollout={"actors": 3})
    shown = render_show(config, "cpu")
    tree, _, table = shown.partition("\n\n")
    assert Config.model_validate(yaml.safe_load(tree)) == config
    rows = [[cell.strip() for cell in line.split("│")] for line in table.splitlines()]
    sums = {row[2]: row[3:8] for row in rows if len(row) > 8}
    assert sums["generator"] == ["3", "1", "0", "3", "0"]
    assert sums["together"] == ["", "", "", "5", "0"]
    assert sums["teacher generator"] == ["1", "1", "0", "1", "0"]
    assert "\x1b" not in shown


def test_show_says_that_generators_hold_the_teacher_where_responses_are_mixed() -> None:
    rollout = {"engine": {"type": "transformers"}, "teacher_mix": 0.2}
    said = "each generator holds the teacher beside the student (rollout.teacher_mix)"
    assert said in render_show(make.config(rollout=rollout), "cpu")
    assert said not in render_show(make.config(), "cpu")
    without = make.config(
        rollout=rollout,
        schedule={"type": "fixed", "phi": 0.0},
        loss={"terms": [{"type": "forward_kl"}]},
    )
    assert said not in render_show(without, "cpu")


def test_every_phase_has_its_own_resources() -> None:
    config = make.config(
        rollout={"tensor_parallel": 2},
        teacher={"tensor_parallel": 1, "num_gpus": 3},
        learner={"workers": 5},
        evaluation={
            "student": {"actors": 4},
            "teacher": {"tensor_parallel": 8, "num_cpus": 6},
            "held_out_loss": {"num_gpus": 7},
        },
        generate={"actors": 9, "num_gpus": 0.5},
    )
    asked = {
        phase.name: {role.role: (role.count, role.gpus) for role in phase.roles}
        for phase in train_phases(config, "cuda")
    }
    assert asked == {
        "training": {"learner": (5, 1), "generator": (1, 2), "scorer": (1, 3)},
        "evaluation of the student": {"student generator": (4, 1)},
        "held-out loss of the student": {"held-out loss": (1, 7)},
        "evaluation of the teacher": {"teacher generator": (1, 8)},
        "held-out loss of the teacher": {"held-out loss": (1, 7)},
    }
    assert [phase.gpus for phase in evaluate_phases(config, "cuda")] == [4, 7]
    assert [phase.gpus for phase in generate_phases(config, "cuda")] == [4.5]
    (phase,) = score_phases(config, "cuda")
    assert (phase.gpus, phase.store_use.target_bytes) == (3, 0)


def test_a_later_phase_that_does_not_fit_is_refused_before_the_first() -> None:
    config = make.config(evaluation={"teacher": {"tensor_parallel": 8}})
    message = refusal(config, "cuda", Available(nodes=(Node(cpus=16, gpus=4),)))
    assert "evaluation of the teacher: 8 GPUs asked for (1 teacher generator x 8)" in message
    assert message.endswith("lower evaluation.teacher.tensor_parallel")
    assert "training:" not in message


def test_a_run_without_teacher_evaluates_none() -> None:
    config = make.config(
        teacher=None,
        loss={"terms": [{"type": "cross_entropy"}]},
        schedule={"type": "fixed", "phi": 0.0},
    )
    names = [phase.name for phase in train_phases(config, "cpu")]
    assert names == ["training", "evaluation of the student", "held-out loss of the student"]


def test_threads_follow_the_cpus_unless_they_are_set() -> None:
    config = make.config(rollout={"num_cpus": 3.5}, learner={"num_cpus": 0, "num_threads": 2})
    threads = {role.role: role.num_threads for role in training(config, "cpu").roles}
    assert threads == {"learner": 2, "generator": 3, "scorer": 1}


def test_a_role_with_node_labels_needs_room_on_such_nodes() -> None:
    config = make.config(
        rollout={"actors": 2, "node_labels": {"pool": "generators"}},
        learner={"node_labels": {"pool": "learners", "zone": "a"}},
    )
    learners = {"pool": "learners", "zone": "a", "ray.io/node-id": "1"}

    def nodes(generators: int) -> Available:
        labelled = Node(cpus=generators, labels={"pool": "generators"})
        return Available(nodes=(Node(cpus=4), labelled, Node(cpus=1, labels=learners)))

    check(train_phases(config, "cpu"), nodes(2))
    message = refusal(config, "cpu", nodes(1))
    assert (
        "only 1 of 2 generator processes fit: each needs 1 CPUs and 0 GPUs on one node with"
        " pool=generators, the nodes with pool=generators have 1 CPUs and 0 GPUs; lower"
        " rollout.actors or rollout.num_cpus, or change rollout.node_labels" in message
    )
    unlabelled = refusal(config, "cpu", Available(nodes=(Node(cpus=8),)))
    assert "the nodes with pool=learners, zone=a have nothing: there is none" in unlabelled


def test_a_role_without_labels_leaves_labelled_nodes_to_those_that_need_them() -> None:
    config = make.config(teacher={"node_labels": {"pool": "scorers"}}, rollout={"num_cpus": 2})
    labelled = Node(cpus=2, labels={"pool": "scorers"})
    check(train_phases(config, "cpu"), Available(nodes=(labelled, Node(cpus=2))))


# ---- elastic pools -------------------------------------------------------------------------------


def test_the_cluster_must_have_room_for_what_an_elastic_pool_starts_with() -> None:
    config = make.config(
        rollout={"actors": {"min": 2, "max": 16}, "num_cpus": 4}, evaluation={"at_end": False}
    )
    check(train_phases(config, "cpu"), Available(nodes=(Node(cpus=10),)))
    with pytest.raises(ClusterError, match=r"2 generator x 4.*lower .*rollout\.actors\.min"):
        check(train_phases(config, "cpu"), Available(nodes=(Node(cpus=9),)))


def test_show_has_both_ends_of_an_elastic_pool() -> None:
    config = make.config(
        rollout={"actors": {"min": 2, "max": 16}, "num_cpus": 4}, evaluation={"at_end": False}
    )
    shown = render_show(config, "cpu")
    assert "2 to 16" in shown and "8 to 64" in shown and "10 to 66" in shown
    assert "rollout.actors: the run needs room for 2 and asks for up to 16" in shown
