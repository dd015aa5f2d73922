"""The `Example:` blocks of docstrings, run as doctests."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = (
    "distillm_ray.batching",
    "distillm_ray.data.rows",
    "distillm_ray.loss.fused",
    "distillm_ray.loss.terms",
    "distillm_ray.packing",
    "distillm_ray.replay.buffer",
    "distillm_ray.replay.draw",
    "distillm_ray.replay.schedule",
    "distillm_ray.rollout.lockstep",
    "distillm_ray.rollout.responses",
    "distillm_ray.teacher.target_library",
    "distillm_ray.teacher.target_sizes",
    "distillm_ray.teacher.target_store",
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_give_the_results_that_they_show(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0, f"{name} has no example"
    assert result.failed == 0, "the difference is in the captured output"
