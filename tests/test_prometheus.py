"""The metrics of a run: their table, what records say of them, and the files made from it."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import socket
from collections import Counter
from pathlib import Path

import pytest
import yaml
from ray.util.metrics import Gauge

from distillm_ray import pipeline
from distillm_ray.cluster.metrics_export import MetricsExport
from distillm_ray.log.costs import RoleCost
from distillm_ray.log.metrics import MetricsLog
from distillm_ray.log.prometheus import (
    Metric,
    PoolState,
    Reading,
    of_phase,
    of_pool,
    of_record,
)
from distillm_ray.log.records import (
    REWOUND,
    BufferSizes,
    CheckpointRecord,
    CostRecord,
    Counters,
    EventRecord,
    ProbeRecord,
    PublishRecord,
    Record,
    StartRecord,
    StepRecord,
    ValidationRecord,
)
from distillm_ray.report.console import ConsoleView
from distillm_ray.types import TRAINING, Mix
from scripts import monitoring
from tests import make

STEP = StepRecord(
    step=7,
    loss=0.5,
    loss_by_term={"skew_kl on all": 0.25},
    learning_rate=1e-3,
    gradient_norm=2.0,
    tokens=300,
    seconds=4.0,
    wait_seconds=1.0,
    skipped=True,
    infinite_tokens=2,
    logprob_gap=0.01,
    student_entropy=1.5,
    teacher_entropy=1.25,
    top_overlap=0.75,
    phi=0.6,
    psi=0.4,
    mix=Mix(fresh=3, replay=2, dataset=4, corpus=1),
    untargeted_sequences=1,
    fresh_age_mean=1.5,
    fresh_age_max=2,
    replay_age_mean=9.0,
    buffer=BufferSizes(fresh=5, replay=40, in_flight=6, target_bytes=1000),
    work=Counters(
        generated_sequences=8,
        generated_tokens=80,
        scored_sequences=5,
        scored_tokens=90,
        library_sequences=1,
        target_evictions=2,
        empty=1,
        truncated=3,
        looping=2,
        dropped=4,
        lost=5,
        given_up=1,
        late=1,
    ),
)
COST = RoleCost(
    seconds=20.0,
    cpu_seconds=5.0,
    gpu_seconds=10.0,
    busy_seconds=15.0,
    queue_seconds=2.5,
    tokens=100,
)
POOL = PoolState(role="generator", size=4, ready=3, busy=2, queue=7, restarts=1)


def values(record: Record) -> dict[tuple[Metric, tuple[str, ...]], float]:
    readings = list(of_record(record))
    found = {(one.metric, one.labels): one.value for one in readings}
    assert len(found) == len(readings), "each is set once"
    return found


# ---- the table -----------------------------------------------------------------------------------


def test_names_follow_the_conventions_of_prometheus() -> None:
    names = [metric.value.name for metric in Metric]
    assert len(set(names)) == len(names)
    for metric in Metric:
        one = metric.value
        assert re.fullmatch(r"distillm(_[a-z]+)+", one.name)
        assert one.name.endswith("_total") == (one.kind == "counter")
        base = one.name.removesuffix("_total")
        assert base.endswith("_seconds") == (one.unit in ("seconds", "Unix time")), one.name
        assert base.endswith("_bytes") == (one.unit == "bytes"), one.name
        assert (one.kind == "histogram") == bool(one.buckets)
        assert list(one.buckets) == sorted(one.buckets)
        # What has as many values as there are steps, prompts or processes is no label.
        assert set(one.labels) <= {"role", "shelf", "term", "phase", "activity", "flaw"}


def test_every_metric_is_read_from_a_record_a_pool_or_the_drivers_phase() -> None:
    records = (
        STEP,
        StartRecord(step=0),
        ValidationRecord(step=7, loss=1.0, seconds=2.0),
        PublishRecord(step=7, nbytes=5, seconds=1.0),
        CheckpointRecord(step=7, time=9.0, seconds=1.0),
        ProbeRecord(step=7, rouge_l=30.0),
        CostRecord(phase=TRAINING, seconds=10.0, roles={"scorer": COST}),
        EventRecord(name=REWOUND),
    )
    readings = [reading for record in records for reading in of_record(record)]
    readings += [*of_phase(TRAINING, "starting"), *of_pool(POOL, None)]
    # The log gives the number of planned steps once.
    assert {reading.metric for reading in readings} == set(Metric) - {Metric.PLANNED_STEPS}
    for reading in readings:
        assert len(reading.labels) == len(reading.metric.value.labels), reading.metric


# ---- readings ------------------------------------------------------------------------------------


def test_a_step_counts_its_sequences_tokens_and_seconds() -> None:
    found = values(STEP)
    assert found[Metric.STEP, ()] == 7
    assert found[Metric.TERM_LOSS, ("skew_kl on all",)] == 0.25
    assert {key[1]: value for key, value in found.items() if key[0] is Metric.SLOTS} == {
        ("fresh",): 3,
        ("replay",): 2,
        ("dataset",): 4,
        ("corpus",): 1,
    }
    assert found[Metric.TARGETED_SEQUENCES, ()] == 9
    assert found[Metric.LEARNER_SECONDS, ("compute",)] == 3.0
    assert found[Metric.LEARNER_SECONDS, ("wait",)] == 1.0
    assert found[Metric.STEP_SECONDS, ()] == 4.0
    assert found[Metric.FLAWED_SEQUENCES, ("truncated",)] == 3
    assert found[Metric.SAMPLE_AGE, ("replay",)] == 9.0
    assert found[Metric.SKIPPED_STEPS, ()] == 1.0


def test_what_is_unknown_or_did_not_happen_is_not_read() -> None:
    """A counter of Ray refuses an increment of 0."""
    quiet = StepRecord(step=1, loss=math.inf)
    found = values(quiet)
    assert all(math.isfinite(value) for value in found.values())
    assert not any(metric.value.kind == "counter" for metric, _ in found)
    unknown = {Metric.LOSS, Metric.SAMPLE_AGE, Metric.FRESH_AGE_MAX, Metric.STUDENT_ENTROPY}
    assert not unknown & {metric for metric, _ in found}
    assert found[Metric.PHI, ()] == 0.0, "a gauge may be 0"


def test_restarts_of_a_pool_are_counted_from_one_state_to_the_next() -> None:
    def restarts(state: PoolState, before: PoolState | None) -> list[float]:
        readings = of_pool(state, before)
        return [one.value for one in readings if one.metric is Metric.POOL_RESTARTS]

    assert restarts(POOL, None) == [1]
    assert restarts(POOL, POOL) == []
    assert restarts(dataclasses.replace(POOL, restarts=4), POOL) == [3]
    sizes = {one.metric: one.value for one in of_pool(POOL, POOL)}
    assert sizes == {
        Metric.POOL_SIZE: 4,
        Metric.POOL_READY: 3,
        Metric.POOL_BUSY: 2,
        Metric.POOL_QUEUE: 7,
    }


def test_learners_that_go_back_set_the_step_to_their_checkpoint() -> None:
    assert values(EventRecord(step=4, name=REWOUND)) == {
        (Metric.REWINDS, ()): 1,
        (Metric.STEP, ()): 4,
    }
    assert values(EventRecord(step=4, name="another event")) == {}


def test_the_log_exports_every_record_with_its_time_and_step(tmp_path: Path) -> None:
    seen: list[Record] = []
    log = MetricsLog(tmp_path, tensorboard=False, export=seen.append, clock=lambda: 50.0)
    log.add(StepRecord(step=1, loss=1.0))
    log.add(EventRecord(name="an event"))
    log.rewind(0)
    log.close()
    assert [(one.kind, one.step, one.time) for one in seen] == [
        ("start", 0, 50.0),
        ("step", 1, 50.0),
        ("event", 1, 50.0),
        ("event", 0, 50.0),
    ]


def test_labels_that_are_not_ascii_are_escaped_because_ray_refuses_them() -> None:
    export = MetricsExport("Läufe/größer \udcff")
    reading = Reading(metric=Metric.TERM_LOSS, value=1.0, labels=("Verlust ≥ 0",))
    export.add([reading, Reading(metric=Metric.STEP_SECONDS, value=1.0)])
    gauge = export._metrics[Metric.TERM_LOSS]
    with pytest.raises(UnicodeEncodeError):
        gauge.set(1.0, {"run": "Läufe", "term": ""})  # pyright: ignore


def test_gauges_are_set_again_because_ray_forgets_those_that_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[str, float]] = []
    monkeypatch.setattr(
        Gauge, "set", lambda self, value, tags: calls.append((self.info["name"], value))
    )
    now = 0.0
    export = MetricsExport("run", clock=lambda: now)
    export.add(of_record(PublishRecord(step=3, nbytes=5, seconds=1.0)))
    export.add(of_record(PublishRecord(step=4, nbytes=5, seconds=1.0)))
    version = Metric.WEIGHTS_VERSION.value.name
    assert calls == [(version, 3), (version, 4)]
    now = 0.9
    export.renew()
    assert len(calls) == 2
    now = 1.1
    export.renew()
    export.renew()
    assert calls[2:] == [(version, 4)]


# ---- the port -----------------------------------------------------------------------------------


def test_a_port_that_is_in_use_costs_the_metrics_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    output = io.StringIO()
    view = ConsoleView(1, stream=output)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        config = make.config(run={"directory": tmp_path, "metrics_port": port})
        assert pipeline._metrics_port(config, view) is None
    assert f"run.metrics_port = {port} is in use" in output.getvalue()
    assert pipeline._metrics_port(config, view) == port
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert pipeline._metrics_port(config, view) is None, "that cluster has a port of its own"


# ---- the files made from the table ---------------------------------------------------------------


def test_the_dashboard_and_the_table_in_the_docs_are_the_scripts_output() -> None:
    remedy = "out of date: python scripts/monitoring.py"
    assert monitoring.DASHBOARD.read_text(encoding="utf-8") == monitoring.dashboard(), remedy
    page = monitoring.PAGE.read_text(encoding="utf-8")
    assert page == monitoring.page(page), remedy
    for metric in Metric:
        assert f"| `{metric.value.exported}` |" in page


def test_the_dashboard_shows_every_metric() -> None:
    queries = " ".join(
        query for row in monitoring.ROWS for panel in row.panels for query in panel.queries.values()
    )
    shown = Counter(re.findall(r"ray_distillm_\w+", queries))
    names = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    assert names == {metric.value.exported for metric in Metric}


def test_panels_do_not_overlap() -> None:
    cells: Counter[tuple[int, int]] = Counter()
    for panel in monitoring._placed():
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells.update(
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        )
    assert set(cells.values()) == {1}


def test_the_example_for_prometheus_scrapes_the_port_that_the_docs_name() -> None:
    example = monitoring.ROOT / "deploy" / "prometheus.yml"
    jobs = {job["job_name"]: job for job in yaml.safe_load(example.read_text())["scrape_configs"]}
    assert jobs["distillm-ray"]["static_configs"] == [{"targets": ["127.0.0.1:8090"]}]
    assert "run.metrics_port=8090" in monitoring.PAGE.read_text()
    (found,) = jobs["ray"]["file_sd_configs"]
    (path,) = found["files"]
    assert path in monitoring.PAGE.read_text()
