"""Looping and empty responses, and the filter."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from distillm_ray.config import FilterConfig
from distillm_ray.rollout.responses import response_facts, verdict
from distillm_ray.types import FinishReason, Rollout
from tests import make

END = 99


def rollout(tokens: Sequence[int], finish: FinishReason = FinishReason.LENGTH) -> Rollout:
    return make.rollout(response=tokens, finish=finish)


def is_looping(one: Rollout) -> bool:
    return response_facts(one).looping


def test_32_repetitions_of_a_token_are_a_loop_and_31_are_not() -> None:
    assert is_looping(rollout([1, 2, 3] + [7] * 32))
    assert not is_looping(rollout([1, 2, 3] + [7] * 31))


def test_a_sentence_is_a_loop_from_its_fourth_repetition_on() -> None:
    sentence = list(range(20))
    assert is_looping(rollout([50, 51] + sentence * 4))
    assert not is_looping(rollout([50, 51] + sentence * 3))
    assert is_looping(rollout(sentence * 4 + sentence[:7]))  # cut off in the middle


def test_a_repetition_that_ends_before_the_response_is_not_a_loop() -> None:
    assert not is_looping(rollout([7] * 60 + [1, 2, 3]))


def test_the_end_token_does_not_hide_a_loop() -> None:
    assert is_looping(rollout([7] * 32 + [END], FinishReason.STOP))


@given(
    st.lists(st.integers(0, 2), max_size=12),
    st.lists(st.integers(0, 2), min_size=1, max_size=40),
    st.integers(1, 50),
)
def test_looping_agrees_with_a_search_over_all_ngrams(
    start: list[int], ngram: list[int], repeats: int
) -> None:
    tokens = start + ngram * repeats

    def naive() -> bool:
        for size in range(1, 65):
            tail = 1
            while tail < len(tokens) and (
                tail < size or tokens[-tail - 1] == tokens[-tail - 1 + size]
            ):
                tail += 1
            if tail >= max(4 * size, 32):
                return True
        return False

    assert is_looping(rollout(tokens)) == naive()


def test_the_filter_names_its_reason_and_drops_nothing_by_default() -> None:
    loop = response_facts(rollout([7] * 40))
    cut = response_facts(rollout(range(40)))
    fine = response_facts(rollout([1, 2, END], FinishReason.STOP))
    assert verdict(loop, FilterConfig()) is None
    assert verdict(loop, FilterConfig(drop_looping=True)) == "looping"
    assert verdict(cut, FilterConfig(drop_looping=True)) is None
    assert verdict(cut, FilterConfig(drop_truncated=True)) == "truncated"
    assert verdict(fine, FilterConfig(drop_looping=True, drop_truncated=True)) is None


def test_an_empty_response_is_a_single_end_token() -> None:
    assert response_facts(rollout([END], FinishReason.STOP)).empty
    assert not response_facts(rollout([5], FinishReason.LENGTH)).empty
    assert not response_facts(rollout([5, END], FinishReason.STOP)).empty
