"""A whole run whose models, data and run directory are in an object store."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from distillm_ray.log.metrics import read_log, read_records
from distillm_ray.log.records import DoneRecord, StepRecord
from tests.integration.tiny import LIMIT_S, Driver, make_config
from tests.object_store import BUCKET, SECRET, ObjectStore

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(3 * LIMIT_S)]

ROOT = f"s3://{BUCKET}"
RUN = "runs/tiny"


def draws(records: tuple[StepRecord, ...] | list[StepRecord]) -> dict[int, object]:
    return {one.step: (one.mix, one.rollout_ids, one.draw_digest) for one in records}


def test_a_run_in_a_store_is_resumed_with_an_empty_disk_and_draws_the_same_steps(
    store: ObjectStore, tmp_path: Path
) -> None:
    path = make_config(tmp_path, steps=4, batch_size=4)
    for name in ("teacher", "student"):
        store.put_directory(f"models/{name}", tmp_path / name)
    for name in ("train", "validation"):
        store.put(f"data/{name}.jsonl", (tmp_path / f"{name}.jsonl").read_bytes())
    tree = yaml.safe_load(path.read_text())
    tree["run"]["directory"] = f"{ROOT}/{RUN}"
    for name in ("teacher", "student"):
        tree[name]["model"] = f"{ROOT}/models/{name}"
    for name in ("train", "validation"):
        tree["data"][name] = [f"{ROOT}/data/{name}.jsonl"]
    tree["learner"] |= {"workers": 2, "zero_stage": 1}
    config = tmp_path / "elsewhere" / "store.yaml"  # with nothing beside it
    config.parent.mkdir()
    config.write_text(yaml.safe_dump(tree))

    outputs = []
    for machine in ("one", "two"):
        environment = {**os.environ, "DISTILLM_RAY_CACHE": str(tmp_path / machine)}
        log = tmp_path / f"{machine}.log"
        with Driver("train", str(config), log=log, environment=environment) as driver:
            assert driver.wait(LIMIT_S) == 0, driver.output()
            outputs.append(driver.output())
        assert store.keys(f"{RUN}/lease.json") == []
        if machine == "one":
            # As if the upload of the last checkpoint had been cut off.
            newest = f"{RUN}/checkpoints/step-00000004"
            assert f"{newest}/manifest.json" in store.keys(newest)
            store.filesystem.delete_file(f"{BUCKET}/{newest}/manifest.json")

    log_file = tmp_path / "metrics.jsonl"
    log_file.write_bytes(store.get(f"{RUN}/metrics.jsonl"))
    steps = [one for one in read_records(log_file) if isinstance(one, StepRecord)]
    lost = [one for one in read_log(log_file).superseded if isinstance(one, StepRecord)]
    assert [one.step for one in lost] == [3, 4]
    assert [one.step for one in steps] == [1, 2, 3, 4]
    assert draws(lost) == {step: draw for step, draw in draws(steps).items() if step > 2}
    done = [one for one in read_records(log_file) if isinstance(one, DoneRecord)]
    assert (done[-1].step, done[-1].status) == (4, "complete")

    names = {key.removeprefix(f"{RUN}/") for key in store.keys(RUN)}
    assert {"config.yaml", "summary.json", "plots/overview.png", "model/config.json"} <= names
    assert "model/model.safetensors" in names
    kept = {name.split("/")[1] for name in names if name.startswith("checkpoints/")}
    assert kept == {"step-00000002", "step-00000004"}
    manifest = json.loads(store.get(f"{RUN}/checkpoints/step-00000004/manifest.json"))
    assert "buffer.bin" in manifest
    assert sum(name.endswith("optim_states.pt") for name in manifest) == 2  # one of each rank
    assert not any(SECRET in output for output in outputs)
    assert not [name for name in names if SECRET.encode() in store.get(f"{RUN}/{name}")]
