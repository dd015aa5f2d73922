"""A tiny run in which a process dies or freezes every minute, for an hour.

    python -m tests.integration.soak [--minutes 60] [--every 60] [--seed N]

`make soak` runs it. Two learner ranks, and two each of generators (vLLM), scorers and target
stores. Each fault hits the youngest process of its role, so that of two the older one lives long
enough to show whether it grows. What ends the driver is followed by the same command.

At the end the run is stopped. Then every step must be logged once, every ordinal trained on once as
fresh, no process may be left, and no process that lived long enough may have grown by more than 1 %
an hour after its warm-up. Writes bench/results/soak.json; exits with 1 if something does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from distillm_ray.log.commit import package_commit
from distillm_ray.log.metrics import FILE_NAME
from tests.integration.tiny import (
    Driver,
    Process,
    drawn,
    fresh_ordinals,
    make_config,
    marked_processes,
    wait_until_gone,
)

RESULT = Path(__file__).parents[2] / "bench" / "results" / "soak.json"
OVERRIDES = (
    "rollout.engine={type: vllm, max_num_seqs: 16}",
    "rollout.actors=2",
    "teacher.actors=2",
    "targets.stores=2",
    "learner.workers=2",
    "learner.zero_stage=1",
    "learner.max_restarts=1000",
    "replay.capacity=200",
    "validation={interval: 100, probe_prompts: 2}",
    "checkpoint.interval=20",
    "rollout.timeout_s=60",
    "teacher.timeout_s=60",
)
STEPS = 10_000_000  # more than any hour has
SAMPLE_S = 10.0  # between two readings of the processes' memory
FROZEN_S = 30.0
RECOVERY_S = 420.0
WARM_UP_S = 300.0  # of a process: allocators and caches fill
OBSERVED_S = 900.0  # at least, after the warm-up, for a slope that means something
MAX_GROWTH = 0.01  # an hour


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is done to whom."""

    name: str
    title: str  # part of the process's; empty: the driver
    number: signal.Signals = signal.SIGKILL
    frozen_s: float = 0.0
    ends_driver: bool = False


FAULTS = (
    Fault(name="generator killed", title="ray::GeneratorActor"),
    Fault(name="vLLM's engine killed", title="VLLM::EngineCore"),
    Fault(name="scorer killed", title="ray::ScorerActor"),
    Fault(name="target store killed", title="ray::TargetStoreActor"),
    Fault(name="learner rank killed", title="RayTrainWorker"),
    Fault(name="Train controller killed", title="ray::TrainController"),
    Fault(name="replay buffer killed", title="ray::BufferActor"),
    Fault(name="run control killed", title="ray::ControlActor"),
    *(
        Fault(name=f"{role} frozen", title=title, number=signal.SIGSTOP, frozen_s=FROZEN_S)
        for role, title in (
            ("generator", "ray::GeneratorActor"),
            ("scorer", "ray::ScorerActor"),
            ("target store", "ray::TargetStoreActor"),
            ("learner rank", "RayTrainWorker"),
        )
    ),
)
# Each of them ends everything, so they are rare.
ENDINGS = (
    Fault(name="orchestrator killed", title="ray::OrchestratorActor", ends_driver=True),
    Fault(name="log killed", title="ray::LogActor", ends_driver=True),
    Fault(name="driver killed", title="", ends_driver=True),
    Fault(name="driver told to stop", title="", number=signal.SIGTERM, ends_driver=True),
)
ENDING_EVERY = 15  # faults


@dataclass(frozen=True, slots=True, kw_only=True)
class Happened:
    """A fault and what came of it."""

    minute: float
    fault: str
    step: int  # the last one logged before
    seconds: float  # until the next step that was not logged before
    lost_steps: int  # trained again


@dataclass(slots=True)
class Memory:
    """Readings of one process: seconds of the soak, and bytes that are its own."""

    title: str
    born: float
    seconds: list[float] = field(default_factory=list)
    own_bytes: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """Of the process of a role that was observed longest."""

    process: str
    observed_minutes: float  # after the warm-up
    mebibytes: float  # at the end
    an_hour: float | None  # relative; None: not observed long enough


class Steps:
    """The step records of a growing log, read once each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0
        self.logged: list[int] = []  # superseded ones included

    def read(self) -> None:
        """Take what has been written since the last call."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._at)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._at += len(line)
                record = json.loads(line)
                if record["kind"] == "step":
                    self.logged.append(record["step"])

    @property
    def last(self) -> int:
        """The highest step so far."""
        return max(self.logged, default=0)


class Soak:
    """The run, its processes and its faults."""

    def __init__(self, directory: Path, seed: int) -> None:
        self._random = random.Random(seed)
        self.run = directory / "run"
        config = make_config(directory, steps=STEPS, batch_size=8)
        self._command = ("train", str(config), *OVERRIDES)
        self._log = directory / "soak.log"
        self.steps = Steps(self.run / FILE_NAME)
        self.memory: dict[int, Memory] = {}
        self.happened: list[Happened] = []
        self.codes: list[int] = []  # with which drivers ended
        self.marks: list[str] = []
        self._started = time.monotonic()
        self._sampled = -SAMPLE_S
        self.driver = self._start()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def _start(self) -> Driver:
        driver = Driver(*self._command, log=self._log)
        self.marks.append(driver.mark)
        return driver

    def wait(self, seconds: float) -> None:
        """Let it work, and read its memory."""
        until = self.seconds + seconds
        while self.seconds < until:
            self.tick()

    def wait_for_step_after(self, step: int) -> None:
        """Until it has trained a step that it had not trained before; restarts a driver."""
        deadline = self.seconds + RECOVERY_S
        while self.steps.last <= step:
            if (code := self.driver.poll()) is not None:
                self.codes.append(code)
                self.driver.__exit__()
                self.driver = self._start()
            if self.seconds > deadline:
                raise SystemExit(f"no step after {step} in {RECOVERY_S:g} s: see {self._log}")
            self.tick()

    def tick(self) -> None:
        """Half a second, with a reading of all processes every `SAMPLE_S`."""
        time.sleep(0.5)
        self.steps.read()
        if self.seconds - self._sampled < SAMPLE_S:
            return
        self._sampled = self.seconds
        for process in marked_processes(self.driver.mark):
            try:
                own = psutil.Process(process.pid).memory_full_info().uss
            except psutil.Error:
                continue
            name = _name(process)
            known = self.memory.get(process.pid)
            if known is None or known.title != name:  # Ray renames a worker when it gets an actor
                known = self.memory[process.pid] = Memory(name, self.seconds)
            known.seconds.append(self.seconds)
            known.own_bytes.append(own)

    def next_fault(self) -> Fault:
        """At random; what ends the driver is every `ENDING_EVERY`-th."""
        number = len(self.happened) + 1
        return self._random.choice(ENDINGS if number % ENDING_EVERY == 0 else FAULTS)

    def disturb(self, fault: Fault) -> None:
        """Do it and wait until the run has got over it."""
        step, superseded = self.steps.last, self._superseded()
        started = self.seconds
        if not fault.title:
            self.driver.send(fault.number)
        else:
            victim = self._await_youngest(fault.title)
            os.kill(victim.pid, fault.number)
            if fault.frozen_s:
                self.wait(fault.frozen_s)
                if psutil.pid_exists(victim.pid):
                    os.kill(victim.pid, signal.SIGCONT)
        if fault.ends_driver:
            self.codes.append(self.driver.wait(RECOVERY_S))
            self.driver.__exit__()
            self.driver = self._start()
        self.wait_for_step_after(max(step, self.steps.last) if fault.frozen_s else step)
        self.happened.append(
            Happened(
                minute=started / 60,
                fault=fault.name,
                step=step,
                seconds=self.seconds - started - fault.frozen_s,
                lost_steps=self._superseded() - superseded,
            )
        )
        print(
            f"{started / 60:5.1f} min, step {step}: {fault.name}, {self.happened[-1].seconds:.1f} s"
            f" to the next step, {self.happened[-1].lost_steps} steps again",
            flush=True,
        )

    def _superseded(self) -> int:
        return len(self.steps.logged) - len(set(self.steps.logged))

    def _await_youngest(self, title: str) -> Process:
        """One may be missing at this moment: its successor is starting."""
        deadline = self.seconds + RECOVERY_S
        while (found := self._youngest(title)) is None:
            if self.seconds > deadline:
                raise SystemExit(f"no process is titled {title}: see {self._log}")
            self.tick()
        return found

    def _youngest(self, title: str) -> Process | None:
        found = []
        for process in marked_processes(self.driver.mark):
            if title in process.title:
                try:
                    found.append((psutil.Process(process.pid).create_time(), process))
                except psutil.NoSuchProcess:
                    continue
        return max(found, key=lambda one: one[0])[1] if found else None

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.driver.send(signal.SIGTERM)
        return self.driver.wait(RECOVERY_S)


def _name(process: Process) -> str:
    """What kind of process it is, from its title."""
    title = process.title
    if title.startswith("ray::"):
        return title.split(".")[0].split(":")[2] if title.count(":") > 2 else title.split(".")[0]
    for part in ("VLLM::EngineCore", "gcs_server", "raylet", "distillm_ray.cli", "monitor.py"):
        if part in title:
            return part
    words = title.split()
    return Path(words[min(1, len(words) - 1)]).name if words else "?"


def growth(memory: Sequence[Memory]) -> Iterator[Growth]:
    """Of every kind of process, the one that was observed longest."""
    by_title: dict[str, list[Memory]] = {}
    for one in memory:
        by_title.setdefault(one.title, []).append(one)
    for title, several in sorted(by_title.items()):
        longest = max(several, key=lambda one: one.seconds[-1] - one.born)
        kept = [
            (second, own)
            for second, own in zip(longest.seconds, longest.own_bytes, strict=True)
            if second - longest.born > WARM_UP_S
        ]
        observed = kept[-1][0] - kept[0][0] if kept else 0.0
        relative: float | None = None
        if observed >= OBSERVED_S:
            seconds, own = np.array(kept).T
            slope, _ = np.polyfit(seconds, own, 1)
            relative = float(slope * 3600 / own.mean())
        yield Growth(
            process=title,
            observed_minutes=observed / 60,
            mebibytes=longest.own_bytes[-1] / 2**20,
            an_hour=relative,
        )


def table_of(happened: Sequence[Happened]) -> Table:
    """A row a kind of fault."""
    table = Table("fault", "times", "s to the next step", "longest", "steps trained again")
    for name in dict.fromkeys(one.fault for one in happened):
        of_kind = [one for one in happened if one.fault == name]
        seconds = [one.seconds for one in of_kind]
        table.add_row(
            name,
            str(len(of_kind)),
            f"{statistics.median(seconds):.1f}",
            f"{max(seconds):.1f}",
            f"{statistics.median(one.lost_steps for one in of_kind):.0f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Faults for an hour.")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two faults")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"seed {arguments.seed}, in {directory}", flush=True)
    soak = Soak(directory, arguments.seed)
    problems: list[str] = []
    try:
        soak.wait_for_step_after(0)
        while soak.seconds < 60 * arguments.minutes:
            soak.wait(arguments.every)
            soak.disturb(soak.next_fault())
        soak.wait(arguments.every)
        if (code := soak.stop()) != 3:
            problems.append(f"the stopped run ended with {code} instead of 3")
    finally:
        soak.driver.__exit__()
    soak.steps.read()
    last = soak.steps.last
    if sorted(drawn(soak.run)) != list(range(1, last + 1)):
        problems.append("not every step is in the log")
    ordinals = list(fresh_ordinals(soak.run))
    if sorted(ordinals) != list(range(len(ordinals))):
        problems.append("not every ordinal was trained on once")
    if left := [one.title for mark in soak.marks for one in wait_until_gone(mark, 30.0)]:
        problems.append(f"processes are left: {left}")
    grown = list(growth(list(soak.memory.values())))
    for one in grown:
        if one.an_hour is not None and one.an_hour > MAX_GROWTH:
            problems.append(f"{one.process} grew by {one.an_hour:.1%} an hour")
    console = Console(width=120)
    console.print(table_of(soak.happened))
    table = Table("process", "minutes after warm-up", "MiB", "growth an hour")
    for one in grown:
        relative = "–" if one.an_hour is None else f"{one.an_hour:+.2%}"
        table.add_row(one.process, f"{one.observed_minutes:.0f}", f"{one.mebibytes:.0f}", relative)
    console.print(table)
    again = len(soak.steps.logged) - last
    print(f"{last} steps, {again} of them again; {len(ordinals)} fresh samples, each once")
    RESULT.write_text(
        json.dumps(
            {
                "commit": package_commit(),
                "seed": arguments.seed,
                "minutes": soak.seconds / 60,
                "steps": last,
                "steps_again": again,
                "fresh_samples": len(ordinals),
                "exit_codes": soak.codes,
                "faults": [asdict(one) for one in soak.happened],
                "growth": [asdict(one) for one in grown],
                "problems": problems,
            },
            indent=1,
        )
        + "\n"
    )
    for problem in problems:
        print(f"PROBLEM: {problem}")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
