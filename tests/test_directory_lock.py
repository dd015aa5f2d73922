"""A directory has one holder at a time, and none after the holder's process ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distillm_ray.directory_lock import locked
from distillm_ray.errors import RunDirectoryError
from distillm_ray.rollout.vllm_engine import remove_abandoned_weights
from distillm_ray.run_directory import held

HOLD = """
import sys, time
from pathlib import Path
from distillm_ray.directory_lock import locked
with locked(Path(sys.argv[1])) as free:
    print(free, flush=True)
    time.sleep(60)
"""


def test_a_directory_has_one_holder_until_it_is_released(tmp_path: Path) -> None:
    with locked(tmp_path) as first, locked(tmp_path) as second:
        assert (first, second) == (True, False)
    with locked(tmp_path) as free:
        assert free
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_process_is_released(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    with pytest.raises(RunDirectoryError, match="another job is running"), held(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with held(tmp_path):
        pass


def test_only_old_weights_without_a_holder_are_removed(tmp_path: Path) -> None:
    for name in ("distillm-ray-weights-used", "distillm-ray-weights-left", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard").touch()
        hour_ago = time.time() - 3600
        os.utime(tmp_path / name, (hour_ago, hour_ago))
    (tmp_path / "distillm-ray-weights-young").mkdir()
    with locked(tmp_path / "distillm-ray-weights-used"):
        remove_abandoned_weights(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"distillm-ray-weights-used", "distillm-ray-weights-young", "other"}
