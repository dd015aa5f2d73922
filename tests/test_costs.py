"""What roles cost: the ledger, its sums in the log, and the meter of a process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from distillm_ray.cluster.busy_clock import BusyClock
from distillm_ray.cluster.process_meter import ProcessMeter
from distillm_ray.log.costs import CostLedger, Role, RoleCost, Usage, added
from distillm_ray.log.metrics import FILE_NAME, MetricsLog, read_records
from distillm_ray.log.records import CostRecord, StepRecord
from distillm_ray.log.tensorboard import scalars
from distillm_ray.log.totals import Totals
from distillm_ray.types import TRAINING


def reading(
    source: str, cpu_seconds: float, *, seconds: float = 0.0, role: Role = "generator"
) -> Usage:
    cost = RoleCost(seconds=seconds, cpu_seconds=cpu_seconds)
    return Usage(role=role, source=source, cost=cost)


def cpu_seconds(ledger: CostLedger, now: float = 0.0) -> dict[Role, float]:
    return {role: cost.cpu_seconds for role, cost in ledger.close(now)[1].items()}


def test_a_period_has_what_was_used_since_the_last_one() -> None:
    ledger = CostLedger(now=100.0)
    ledger.account(reading("node:1", 3.0))
    ledger.account(reading("node:2", 4.0))
    assert cpu_seconds(ledger, 110.0) == {"generator": 7.0}
    ledger.account(reading("node:1", 5.0))
    ledger.account(reading("node:1", 6.0))
    assert ledger.open_for(125.0) == 15.0
    assert cpu_seconds(ledger, 125.0) == {"generator": 3.0}
    assert cpu_seconds(ledger, 130.0) == {}


def test_a_process_that_replaces_another_adds_to_what_that_one_has_used() -> None:
    ledger = CostLedger(now=0.0)
    for usage in (reading("node:1", 50.0), reading("node:2", 1.0), reading("node:2", 2.0)):
        ledger.account(usage)
    assert cpu_seconds(ledger) == {"generator": 52.0}


def test_a_process_that_gets_the_number_of_a_dead_one_is_another() -> None:
    ledger = CostLedger(now=0.0)
    ledger.account(reading("node:1", 50.0, seconds=1000.0))
    ledger.account(reading("node:1", 49.0, seconds=998.0))  # it was under way for longer
    ledger.account(reading("node:1", 7.0, seconds=2.0))
    assert cpu_seconds(ledger) == {"generator": 57.0}


def test_what_a_process_says_of_itself_counts_before_what_is_seen_of_it() -> None:
    ledger = CostLedger(now=0.0)
    ledger.account(reading("node:1", 2.0, role="ray"))  # a worker that waits for its actor
    ledger.account(reading("node:1", 5.0, role="scorer"))
    ledger.account(reading("node:1", 6.0, role="ray"))
    ledger.account(reading("node:1", 7.0, role="scorer"))
    assert cpu_seconds(ledger) == {"ray": 2.0, "scorer": 5.0}


def test_costs_are_added_role_by_role() -> None:
    one: dict[Role, RoleCost] = {"scorer": RoleCost(tokens=1), "driver": RoleCost(cpu_seconds=1.0)}
    other: dict[Role, RoleCost] = {"scorer": RoleCost(tokens=2, gpu_seconds=4.0)}
    assert added(one, other) == {
        "driver": RoleCost(cpu_seconds=1.0),
        "scorer": RoleCost(tokens=3, gpu_seconds=4.0),
    }


def test_the_log_tells_the_training_from_all_phases_and_keeps_what_was_paid_for(
    tmp_path: Path,
) -> None:
    def record(phase: str, seconds: float) -> CostRecord:
        cost = RoleCost(seconds=2 * seconds, cpu_seconds=seconds / 2, busy_seconds=seconds)
        return CostRecord(phase=phase, seconds=seconds, roles={"generator": cost})

    log = MetricsLog(tmp_path, tensorboard=False)
    for entry in (record("starting", 8.0), record(TRAINING, 4.0), StepRecord(step=1, loss=1.0)):
        log.add(entry)
    log.rewind(0)
    log.add(record(TRAINING, 6.0))
    log.close()
    records = read_records(tmp_path / FILE_NAME)
    totals = Totals.of(records)
    assert totals.steps == 0
    assert totals.training_seconds == 10.0
    assert totals.training_costs["generator"].cpu_seconds == 5.0
    assert totals.training_costs["generator"].busy_share == 0.5  # of two processes
    assert totals.costs["generator"].cpu_seconds == 9.0
    shown = dict(scalars(record(TRAINING, 6.0), totals))
    assert shown["cost/cpu_seconds"] == 9.0
    assert shown["cost/busy_cores/generator"] == 0.5
    assert shown["cost/busy_share/generator"] == 0.5


def test_a_busy_clock_counts_seconds_with_a_call_and_seconds_of_all_calls() -> None:
    now = 0.0
    clock = BusyClock(lambda: now)
    with clock.running():
        now = 2.0
        with clock.running():
            now = 5.0
            assert (clock.seconds, clock.call_seconds) == (5.0, 8.0)
    now = 9.0
    assert (clock.seconds, clock.call_seconds) == (5.0, 8.0)


def test_the_meter_counts_children_while_they_run_and_after_they_ended() -> None:
    meter = ProcessMeter()
    before = meter.cpu_seconds()
    work = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    child = subprocess.Popen(
        [sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    own = sum(os.times()[:2])
    running = ProcessMeter().cpu_seconds()
    child.communicate(b"\n")
    ended = meter.cpu_seconds()
    assert running - before >= 0.45
    assert ended - before >= 0.45
    assert running >= own


def test_the_age_of_a_process_is_that_of_the_operating_system() -> None:
    age_s = time.time() - psutil.Process().create_time()
    assert ProcessMeter().age_s == pytest.approx(age_s, abs=1.0)
