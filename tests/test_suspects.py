"""Which input is held to be the reason of failures, and which failures count against a member."""

from __future__ import annotations

import random

from distillm_ray.cluster.suspects import MAX_ALONE, MAX_SHARED, Suspects


def test_inputs_that_always_fail_together_are_never_given_up() -> None:
    suspects = Suspects()
    for round_ in range(20):
        assert suspects.failed(f"generator {round_ % 3}", ["p1", "p2"]), "the member may be broken"
        assert suspects.runs_alone("p1") == (round_ + 1 >= MAX_SHARED)
    assert not suspects.is_given_up("p1")
    assert suspects.failed_alone == ()


def test_a_success_clears_an_input_of_all_failures() -> None:
    suspects = Suspects()
    for _ in range(MAX_ALONE - 1):
        suspects.failed("generator 0", ["p"])
    assert suspects.failed_alone_on("p") == {"generator 0"}
    suspects.succeeded("generator 1", "p")
    assert not suspects.runs_alone("p")
    assert suspects.failed_alone_on("p") == frozenset()
    for _ in range(MAX_ALONE - 1):
        suspects.failed("generator 0", ["p"])
    assert not suspects.is_given_up("p")


def test_failures_alone_give_an_input_up_for_good() -> None:
    suspects = Suspects()
    for number in range(MAX_ALONE):
        assert not suspects.is_given_up("p")
        suspects.failed(f"generator {number}", ["p", "p"])  # two requests for one input
    assert suspects.is_given_up("p")
    suspects.succeeded("generator 0", "p")
    assert suspects.is_given_up("p")


def test_a_failure_of_a_suspect_alone_is_not_held_against_the_member() -> None:
    suspects = Suspects()
    assert suspects.failed("generator 0", ["p", "q"])
    assert not suspects.failed("generator 0", ["p"])
    assert not suspects.failed("generator 0", ["p"])


def test_it_is_if_another_input_fails_there_before_one_succeeds() -> None:
    suspects = Suspects()
    suspects.failed("generator 0", ["p", "q"])
    assert not suspects.failed("generator 0", ["p"])
    assert suspects.failed("generator 0", ["q"])
    assert not suspects.failed("generator 1", ["q"]), "another member, which may be sound"
    suspects.succeeded("generator 0", "r")
    assert not suspects.failed("generator 0", ["q"])


def test_whatever_else_is_in_flight_only_the_input_that_kills_is_given_up() -> None:
    """Batches of random inputs. Members die of one input only; suspects run as they must."""
    numbers = random.Random(0)
    for _ in range(200):
        suspects, names = Suspects(), [f"p{index}" for index in range(8)]
        todo = list(names)
        while todo:
            numbers.shuffle(todo)
            batch = todo[: numbers.randint(1, 4)]
            if any(suspects.runs_alone(name) for name in batch):
                batch = batch[:1]
            if "p3" in batch:
                suspects.failed("generator 0", batch)
            else:
                for name in batch:
                    suspects.succeeded("generator 0", name)
                    todo.remove(name)
            todo = [name for name in todo if not suspects.is_given_up(name)]
        assert [name for name in names if suspects.is_given_up(name)] == ["p3"]
