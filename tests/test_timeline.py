"""timeline.json: what the Trace Event Format asks for, read back from the file."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distillm_ray.log.timeline import MAX_PENDING, Event, Level, Slice, Timeline, TimelineFile
from tests.trace import check_trace

START = 1_000_000.0  # of the run, in seconds since the epoch


class Clock:
    def __init__(self, now: float = START) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def opened(
    path: Path,
    *,
    max_events: int = 1000,
    resumed: bool = False,
    started: float = START,
    **more: Any,
) -> TimelineFile:
    attempt = "resumed" if resumed else "run started"
    return TimelineFile(
        path, max_events=max_events, started=started, attempt=attempt, resumed=resumed, **more
    )


def kill(file: TimelineFile, path: Path, *, torn: int = 0) -> None:
    """Leave what is on the disk now, `torn` bytes of which are lost."""
    content = path.read_bytes()
    file.close()
    path.write_bytes(content[: len(content) - torn])


def step(number: int, *, track: str = "rank 0") -> Slice:
    """Each takes half of the second that has its number."""
    at = START + number
    return Slice(role="learner", track=track, name=f"step {number}", start=at, end=at + 0.5)


def names(path: Path) -> list[str]:
    return [event["name"] for event in json.loads(path.read_text()) if event["ph"] == "X"]


def test_slices_of_several_tracks_nest_and_every_track_is_named(tmp_path: Path) -> None:
    clock = Clock()
    timeline = Timeline(clock)
    with timeline.slice("learner", "rank 0", "validate"):
        clock.now += 0.1
        with timeline.slice("learner", "rank 0", "publish"):
            clock.now += 0.2
    with timeline.slice("driver", "phases", "training"):
        clock.now += 1.0
    with timeline.slice("orchestrator", "ordinals", "ordinal 3", apart=True):
        clock.now += 1.0
    file = opened(tmp_path / "t.json")
    file.add(timeline.take())
    file.close()
    trace = json.loads((tmp_path / "t.json").read_text())
    tracks = check_trace(trace)
    assert set(tracks) == {
        ("driver", "driver"),  # where attempts are marked
        ("driver", "phases"),
        ("learners", "rank 0"),
        ("orchestrator", "ordinals"),
    }
    assert [
        (event["name"], event["ts"], event.get("dur")) for event in trace if event["ph"] in "Xbe"
    ] == [
        ("publish", 100_000, 200_000),
        ("validate", 0, 300_000),
        ("training", 300_000, 1_000_000),
        ("ordinal 3", 1_300_000, None),
        ("ordinal 3", 2_300_000, None),
    ]


async def test_calls_to_an_actor_are_counted_and_make_one_slice_while_any_runs() -> None:
    clock = Clock(0.0)
    timeline = Timeline(clock)
    first, second = asyncio.Event(), asyncio.Event()

    async def call(end: asyncio.Event) -> None:
        with timeline.call("scorer", "scorer 0", "busy"):
            await end.wait()

    tasks = []
    for end in (first, second):
        tasks.append(asyncio.create_task(call(end)))
        await asyncio.sleep(0)
        clock.now += 1.0
    for end, task in zip((first, second), tasks, strict=True):
        end.set()
        await task
        clock.now += 1.0
    assert timeline.take() == [
        Level(role="scorer", name="scorer 0", at=0.0, value=1),
        Level(role="scorer", name="scorer 0", at=1.0, value=2),
        Level(role="scorer", name="scorer 0", at=2.0, value=1),
        Level(role="scorer", name="scorer 0", at=3.0, value=0),
        Slice(role="scorer", track="scorer 0", name="busy", start=0.0, end=3.0),
    ]


def test_a_block_that_raises_is_noted_too() -> None:
    timeline = Timeline(Clock())
    with pytest.raises(KeyError), timeline.slice("learner", "rank 0", "step 1"):
        raise KeyError
    assert len(timeline.take()) == 1
    assert timeline.take() == []


def test_a_process_that_cannot_send_keeps_a_bounded_number_of_events() -> None:
    timeline = Timeline(Clock())
    for _ in range(MAX_PENDING):
        with timeline.count("generator", "generators, queue"):
            pass
    assert len(timeline.take()) == MAX_PENDING


def test_a_long_run_keeps_its_first_and_its_newest_events(tmp_path: Path) -> None:
    file = opened(tmp_path / "t.json", max_events=20)
    for number in range(1000):
        file.add([step(number, track="rank 0" if number < 500 else "later")])
    file.close()
    trace = json.loads((tmp_path / "t.json").read_text())
    check_trace(trace)
    assert names(tmp_path / "t.json") == [f"step {n}" for n in (*range(9), *range(990, 1000))]
    assert sum(event["ph"] != "M" for event in trace) == 20  # the start of the run is one


def test_a_run_that_is_killed_leaves_an_array_without_its_end(tmp_path: Path) -> None:
    clock = Clock(0.0)
    file = opened(tmp_path / "t.json", max_events=20, clock=clock)
    for number in range(100):
        clock.now += 20.0  # the newest half is written again after 30 s
        file.add([step(number)])
    kill(file, tmp_path / "t.json")
    text = (tmp_path / "t.json").read_text()
    check_trace(json.loads(text + "]"))
    assert '"step 99"' in text
    assert "step 0" in text


def many(first: int, last: int) -> Sequence[Event]:
    return [step(number) for number in range(first, last)]


@pytest.mark.parametrize("ending", ["closed", "killed", "torn"])
def test_a_resumed_run_goes_on_on_the_same_tracks_and_clock(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "t.json"
    first = opened(path, max_events=40)
    first.add(many(0, 10))
    if ending == "closed":
        first.close()
    else:
        kill(first, path, torn=3 if ending == "torn" else 0)
    second = opened(path, max_events=40, resumed=True, started=START + 100.0)
    second.add([*many(101, 104), step(105, track="another")])
    second.close()
    trace = json.loads(path.read_text())
    tracks = check_trace(trace)
    assert {name for _, name in tracks} == {"driver", "rank 0", "another"}
    kept = range(9 if ending == "torn" else 10)
    assert names(path) == [f"step {n}" for n in (*kept, 101, 102, 103, 105)]
    starts = {event["name"]: event["ts"] for event in trace if event["ph"] == "i"}
    assert starts == {"run started": 0, "resumed": 100_000_000}
    assert trace[-1]["ts"] == 105_000_000


def test_a_run_that_is_resumed_often_stays_within_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    for attempt in range(10):
        file = opened(path, max_events=30, resumed=attempt > 0, started=START + 20 * attempt)
        file.add(many(20 * attempt, 20 * attempt + 8))
        file.close()
    trace = json.loads(path.read_text())
    check_trace(trace)
    assert sum(event["ph"] != "M" for event in trace) == 30
    names_of = defaultdict[str, int](int)
    for event in trace:
        if event["ph"] == "M":
            names_of[json.dumps(event)] += 1
    assert max(names_of.values()) <= 2  # before the first half, and with the newest


def test_a_new_run_replaces_the_timeline_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    for events in (many(0, 5), ()):
        file = opened(path)
        file.add(events)
        file.close()
    assert names(path) == []


def test_no_events_are_written_where_none_are_wanted(tmp_path: Path) -> None:
    file = opened(tmp_path / "t.json", max_events=0)
    file.add(many(0, 5))
    file.close()
    assert not (tmp_path / "t.json").exists()
