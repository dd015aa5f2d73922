"""`learner.offload`: DeepSpeed's settings, and what is refused at start."""

from pathlib import Path
from typing import Any

import pytest

from distillm_ray.config import LearnerConfig
from distillm_ray.errors import ConfigError
from distillm_ray.learner import offload
from distillm_ray.learner.offload import check_async_io, check_offload, offload_settings
from distillm_ray.types import Device


def config(**settings: Any) -> LearnerConfig:
    return LearnerConfig(steps=1, batch_size=1, **settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"zero_stage": 3}, {}),
        ({"zero_stage": 2, "offload": "cpu"}, {"offload_optimizer": {"device": "cpu"}}),
        (
            {"zero_stage": 3, "offload": "cpu"},
            {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
        ),
        (
            {"zero_stage": 3, "offload": "nvme", "offload_directory": "/nvme"},
            {
                "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme"},
                "offload_param": {"device": "cpu"},
            },
        ),
    ],
)
def test_the_optimizer_is_offloaded_and_under_zero_3_the_weights(
    settings: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert offload_settings(config(**settings)) == expected


@pytest.mark.parametrize("offloaded", ["none", "cpu"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_a_gpu_has_something_to_offload(offloaded: str, device: Device) -> None:
    learner = config(offload=offloaded)
    if (offloaded, device) != ("cpu", "cpu"):
        check_offload(learner, device)
        return
    with pytest.raises(ConfigError, match=r"learner\.offload must be none .* got cpu"):
        check_offload(learner, device)


def test_nvme_is_refused_with_the_reason_where_async_io_does_not_build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(offload, "async_io_problem", lambda build: "libaio is missing")
    with pytest.raises(ConfigError, match=r"but libaio is missing; or set learner\.offload=cpu"):
        check_async_io(tmp_path)
    monkeypatch.setattr(offload, "async_io_problem", lambda build: "")
    check_async_io(tmp_path)
