"""Which input is held to be the reason of failures, and which failures count against a member."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest

from distillm_ray.cluster.member import MAX_FAILURES
from distillm_ray.cluster.suspects import MAX_ALONE, MAX_SHARED, Suspects


def test_inputs_that_always_fail_together_are_never_given_up() -> None:
    suspects = Suspects()
    for round_ in range(20):
        assert suspects.failed(f"generator {round_ % 3}", ["p1", "p2"]), "the member may be broken"
        assert suspects.company("p1") == (1 if round_ + 1 >= MAX_SHARED else None)
    assert not suspects.is_given_up("p1")
    assert suspects.failed_alone == ()


def test_a_success_clears_an_input_of_all_failures() -> None:
    suspects = Suspects()
    for _ in range(MAX_ALONE - 1):
        suspects.failed("generator 0", ["p"])
    assert suspects.failed_alone_on("p") == {"generator 0"}
    suspects.succeeded("generator 1", "p")
    assert suspects.company("p") is None
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


def test_a_group_that_fails_is_not_held_against_the_member_and_is_halved() -> None:
    suspects, names = Suspects(), [f"p{index}" for index in range(8)]
    assert suspects.failed("generator 0", names)
    assert suspects.failed("generator 0", names)
    assert {suspects.company(name) for name in names} == {4}
    assert not suspects.failed("generator 0", names[:4])
    assert not suspects.failed("generator 0", names[2:4]), "half of those that failed there last"
    assert [suspects.company(name) for name in names] == [2, 2, 1, 1, 4, 4, 4, 4]
    assert suspects.failed("generator 0", names[4:]), "these fail there too: the member is broken"


@dataclass
class Trial:
    """What it took to find the input that kills."""

    given_up: list[str]
    crashes: int
    in_a_row: int  # failures that counted against the member without a success in between


def try_all(count: int, killer: str) -> Trial:
    """One member, every input at once, suspects in the largest groups that they may have."""
    suspects, trial = Suspects(), Trial([], 0, 0)
    line = [f"p{index}" for index in range(count)]
    counted = 0
    while line:
        batch = [line[0]]
        company = suspects.company(line[0])
        for name in line[1:]:
            other = suspects.company(name)
            if company is None and other is None:
                batch.append(name)
            elif company is not None and other is not None and len(batch) < min(company, other):
                batch.append(name)
                company = min(company, other)
        line = [name for name in line if name not in batch]
        if killer not in batch:
            counted = 0
            for name in batch:
                suspects.succeeded("generator 0", name)
            continue
        trial.crashes += 1
        counted += suspects.failed("generator 0", batch)
        trial.in_a_row = max(trial.in_a_row, counted)
        given_up = [name for name in batch if suspects.is_given_up(name)]
        trial.given_up += given_up
        line += [name for name in batch if name not in given_up]
    return trial


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 256])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_the_input_that_kills_is_found_among_many_in_few_crashes(count: int, place: float) -> None:
    killer = f"p{round(place * (count - 1))}"
    trial = try_all(count, killer)
    assert trial.given_up == [killer]
    assert trial.crashes <= MAX_SHARED + math.ceil(math.log2(count)) + MAX_ALONE
    assert trial.in_a_row < MAX_FAILURES, "the member is not given up"


def test_whatever_else_is_in_flight_only_the_input_that_kills_is_given_up() -> None:
    """Batches of random inputs. Members die of one input only; suspects run as they must."""
    numbers = random.Random(0)
    for _ in range(200):
        suspects, names = Suspects(), [f"p{index}" for index in range(8)]
        todo = list(names)
        while todo:
            numbers.shuffle(todo)
            batch = todo[: numbers.randint(1, 4)]
            limits = [suspects.company(name) for name in batch]
            if any(limits):
                batch = batch[: min(limit or 1 for limit in limits)]
            if "p3" in batch:
                suspects.failed("generator 0", batch)
            else:
                for name in batch:
                    suspects.succeeded("generator 0", name)
                    todo.remove(name)
            todo = [name for name in todo if not suspects.is_given_up(name)]
        assert [name for name in names if suspects.is_given_up(name)] == ["p3"]
