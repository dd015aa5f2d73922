"""The run's log: every record is read back as it was written, also after a crash."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto import event_pb2

from distillm_ray.batching import draw_facts
from distillm_ray.errors import RunDirectoryError
from distillm_ray.log import metrics
from distillm_ray.log.metrics import (
    FILE_NAME,
    MetricsLog,
    read_log,
    read_records,
)
from distillm_ray.log.records import (
    BufferSizes,
    Counters,
    EventRecord,
    ProbeRecord,
    PublishRecord,
    Sample,
    StepRecord,
    ValidationRecord,
    to_json,
)
from distillm_ray.log.tensorboard import scalars
from distillm_ray.log.totals import Totals
from distillm_ray.report.summary import read_run
from distillm_ray.types import (
    MicroBatchPlan,
    Mix,
    PlannedSequence,
    Shelf,
    StepPlan,
    TrainStep,
)
from tests import make

PROTOCOL: Any = event_pb2  # its classes are created at import, unseen by type checkers


class Clock:
    """A clock that the test sets."""

    def __init__(self, now: float = 100.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def step_record(step: int, *, loss: float = 1.0, tokens: int = 10) -> StepRecord:
    return StepRecord(
        step=step,
        loss=loss,
        tokens=tokens,
        seconds=2.0,
        wait_seconds=0.5,
        loss_by_term={"skew_kl(alpha=0.1) on all": loss / 2},
        alpha_by_term={"skew_kl(alpha=0.1) on all": 0.0625},
        mix=Mix(fresh=1, replay=2, dataset=3),
        work=Counters(generated_tokens=7, scored_sequences=2, scored_tokens=5),
    )


def open_log(directory: Path, resume_step: int | None = None, clock: Clock | None = None):
    return MetricsLog(directory, resume_step=resume_step, tensorboard=False, clock=clock or Clock())


def steps_in(directory: Path) -> list[int]:
    return [r.step for r in read_records(directory / FILE_NAME) if isinstance(r, StepRecord)]


def tensorboard_events(directory: Path) -> list[Any]:
    """All events, oldest file first. A record: length (8 bytes), its CRC (4), data, its CRC (4)."""
    events = []
    for path in sorted((directory / "tensorboard").iterdir()):
        data, start = path.read_bytes(), 0
        while start < len(data):
            length = int.from_bytes(data[start : start + 8], "little")
            events.append(PROTOCOL.Event.FromString(data[start + 12 : start + 12 + length]))
            start += length + 16
    return events


def scalars_in(events: list[Any], tag: str) -> list[tuple[int, float]]:
    values = [(event.step, value) for event in events for value in event.summary.value]
    return [(step, value.simple_value) for step, value in values if value.tag == tag]


def planned(shelf: Shelf, age: int) -> PlannedSequence:
    rollout = make.rollout(f"{shelf}-{age}", response=[2])
    return make.planned(rollout, shelf=shelf, age=age)


def test_a_step_record_joins_the_facts_of_learner_buffer_and_orchestrator() -> None:
    fresh = planned(Shelf.FRESH, 0)
    filler = dataclasses.replace(fresh, is_filler=True)  # the third rank has a filler only
    ranks = (
        (MicroBatchPlan(sequences=(fresh, planned(Shelf.REPLAY, 9))),),
        (MicroBatchPlan(sequences=(planned(Shelf.FRESH, 3), planned(Shelf.DATASET, 0))),),
        (MicroBatchPlan(sequences=(filler,)),),
    )
    mix = Mix(fresh=2, replay=1, dataset=1)
    plan = StepPlan(step=6, phi=0.6, psi=0.4, mix=mix, ranks=ranks)
    before = Counters(generated_tokens=100, scored_tokens=50, lost=3, generate_seconds=1.5)
    after = Counters(generated_tokens=180, scored_tokens=90, lost=4, generate_seconds=4.0)
    record = StepRecord.build(
        TrainStep(step=7, loss=0.5, loss_by_shelf={"fresh": 0.7}, seconds=3.0, wait_seconds=1.0),
        draw_facts(plan, with_ids=True),
        buffer=BufferSizes(replay=40),
        work=after.since(before),
    )
    assert before.since(after) == Counters(), "an actor was replaced"
    assert before.plus(after.since(before)) == after
    assert (record.step, record.phi, record.psi, record.mix) == (7, 0.6, 0.4, mix)
    assert record.fresh_age_mean == 1.5
    assert record.fresh_age_max == 3
    assert record.replay_age_mean == 9.0
    assert record.learn_seconds == 2.0
    expected = Counters(generated_tokens=80, scored_tokens=40, lost=1, generate_seconds=2.5)
    assert record.work == expected
    assert {shelf: len(ids) for shelf, ids in record.rollout_ids.items()} == {
        "fresh": 2,
        "replay": 1,
        "dataset": 1,
        "corpus": 0,
    }


def test_a_steps_line_names_what_was_drawn_only_if_asked_to() -> None:
    def line(slots: int, *, with_ids: bool) -> str:
        row = tuple(planned(Shelf.DATASET, index) for index in range(slots))
        ranks = ((MicroBatchPlan(sequences=row),),)
        plan = StepPlan(step=0, phi=0.0, psi=0.0, mix=Mix(dataset=slots), ranks=ranks)
        train = TrainStep(step=1, loss=0.5)
        facts = draw_facts(plan, with_ids=with_ids)
        return to_json(StepRecord.build(train, facts, buffer=BufferSizes(), work=Counters()))

    short = line(1024, with_ids=False)
    assert len(short) == len(line(1000, with_ids=False))
    assert "dataset-17" not in short
    assert "rollout_ids" not in json.loads(short)
    assert len(json.loads(short)["draw_digest"]) == 16
    named = line(1024, with_ids=True)
    assert len(json.loads(named)["rollout_ids"]["dataset"]) == 1024
    assert json.loads(named)["draw_digest"] == json.loads(short)["draw_digest"]


def test_every_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    sample = Sample(prompt="é\n", reference="", response="ü")
    written = [
        ValidationRecord(step=0, time=101.0, loss=3.25, tokens=9, phi=0.3),
        step_record(1),
        PublishRecord(step=1, time=103.0, nbytes=5, seconds=0.5),
        ProbeRecord(step=1, time=104.0, samples=(sample,)),
        EventRecord(step=1, time=105.0, name="generator restarted", detail="actor 0"),
    ]
    for record in written:
        log.add(record)
    log.close()
    read = read_records(tmp_path / FILE_NAME)[1:]
    assert read[0] == written[0]
    assert read[2:] == written[2:]
    step = read[1]
    assert isinstance(step, StepRecord)
    assert (step.time, step.mix, step.work) == (
        100.0,
        Mix(fresh=1, replay=2, dataset=3),
        written[1].work,
    )
    assert math.isnan(step.fresh_age_mean)


def test_a_record_is_in_the_file_as_soon_as_it_was_added(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.add(step_record(1))
    assert steps_in(tmp_path) == [1]
    log.close()


def test_a_loss_that_is_not_finite_is_valid_json_and_reads_as_nan(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.add(step_record(1, loss=math.inf))
    log.close()
    line = (tmp_path / FILE_NAME).read_text().splitlines()[-1]
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
    record = read_records(tmp_path / FILE_NAME)[-1]
    assert isinstance(record, StepRecord)
    assert math.isnan(record.loss)


def test_an_event_without_a_step_gets_the_newest_one(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.add(EventRecord(name="before all steps"))
    log.add(step_record(1))
    log.add(step_record(2))
    log.add(EventRecord(name="after two"))
    log.rewind(1)
    log.add(EventRecord(name="after going back"))
    log.close()
    events = [one for one in read_records(tmp_path / FILE_NAME) if isinstance(one, EventRecord)]
    assert [(event.name, event.step) for event in events] == [
        ("before all steps", 0),
        ("after two", 2),
        ("rewound", 1),
        ("after going back", 1),
    ]


def test_steps_after_the_checkpoint_are_superseded_and_kept(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for step in range(1, 6):
        log.add(step_record(step))
    log.add(EventRecord(step=5, name="generator restarted"))
    log.close()
    log = open_log(tmp_path, resume_step=3)
    log.add(step_record(4, loss=2.0))
    log.close()
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    assert read_log(tmp_path / FILE_NAME).superseded_steps == 2
    kinds = [record.kind for record in read_records(tmp_path / FILE_NAME)]
    assert kinds == ["start", "step", "step", "step", "event", "start", "step"]


def test_a_run_from_the_beginning_supersedes_all_earlier_records(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.add(ValidationRecord(step=0, loss=3.0))
    log.add(step_record(1))
    log.close()
    open_log(tmp_path).close()
    assert [r.kind for r in read_records(tmp_path / FILE_NAME)] == ["start", "start"]


@pytest.mark.parametrize("torn", [b'{"kind":"step","st', b"\x00\x00\x00\n", b'{"kind":"step"'])
def test_a_torn_last_line_is_ignored_by_readers_and_gone_after_a_resume(
    tmp_path: Path, torn: bytes
) -> None:
    log = open_log(tmp_path)
    log.add(step_record(1))
    log.close()
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes() + torn)
    assert steps_in(tmp_path) == [1]
    log = open_log(tmp_path, resume_step=1)
    log.add(step_record(2))
    log.close()
    assert steps_in(tmp_path) == [1, 2]
    for line in path.read_text().splitlines():
        json.loads(line)


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.close()
    path = tmp_path / FILE_NAME
    path.write_text(path.read_text() + "oops\n" + '{"kind":"event","step":1,"name":"x"}\n')
    with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl, line 2: not a JSON object"):
        open_log(tmp_path, resume_step=0)


def test_reopening_a_log_without_superseded_steps_does_not_change_its_lines(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.add(EventRecord(step=1, name="x", detail="é"))
    log.close()
    before = (tmp_path / FILE_NAME).read_bytes()
    log = open_log(tmp_path, resume_step=1)
    log.close()
    assert (tmp_path / FILE_NAME).read_bytes().startswith(before)


def test_a_run_is_read_in_one_pass_over_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(tmp_path)
    for step in range(1, 6):
        log.add(step_record(step))
    log.close()
    parsed = []

    def loads(line: bytes) -> Any:
        parsed.append(line)
        return json_loads(line)

    json_loads = json.loads
    monkeypatch.setattr(metrics.json, "loads", loads)
    run = read_run(tmp_path)
    assert parsed == (tmp_path / FILE_NAME).read_bytes().splitlines(keepends=True)
    assert len(run.records) == len(parsed) == 6


def test_a_live_view_gets_every_record_once(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    seen, position = log.since(0)
    for step in (1, 2):
        log.add(step_record(step))
        new, position = log.since(position)
        seen += new
    assert log.since(position) == ([], position)
    assert [record.kind for record in seen] == ["start", "step", "step"]
    log.close()


def test_wall_clock_counts_lost_steps_but_not_the_pause_before_a_resume(tmp_path: Path) -> None:
    clock = Clock(100.0)
    log = open_log(tmp_path, clock=clock)
    for step in (1, 2):
        clock.now += 10.0
        log.add(step_record(step))
    log.close()
    clock.now += 5000.0
    log = open_log(tmp_path, resume_step=1, clock=clock)
    clock.now += 3.0
    log.add(step_record(2))
    log.close()
    assert read_log(tmp_path / FILE_NAME).wall_seconds == 23.0


def test_tensorboard_shows_the_same_numbers(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, clock=Clock())
    log.add(step_record(1, loss=1.5))
    log.add(step_record(2, loss=math.nan))
    log.add(step_record(3, loss=0.5))
    log.add(ValidationRecord(step=3, loss=2.5, phi=0.4))
    log.close()
    events = tensorboard_events(tmp_path)
    assert scalars_in(events, "train/loss") == [(1, 1.5), (3, 0.5)]
    assert scalars_in(events, "train/loss_term/skew_kl_alpha_0.1_on_all") == [(1, 0.75), (3, 0.25)]
    alphas = scalars_in(events, "train/alpha_term/skew_kl_alpha_0.1_on_all")
    assert alphas == [(1, 0.0625), (2, 0.0625), (3, 0.0625)]
    assert scalars_in(events, "validation/loss") == [(3, 2.5)]
    assert scalars_in(events, "mix/replay") == [(1, 2.0), (2, 2.0), (3, 2.0)]
    assert scalars_in(events, "work/generated_tokens") == [(1, 7.0), (2, 7.0), (3, 7.0)]


def test_tensorboard_has_a_curve_of_the_corpus_where_there_is_one() -> None:
    plain = step_record(1)
    drawn = dataclasses.replace(plain, mix=dataclasses.replace(plain.mix, corpus=8))
    assert ("mix/corpus", 8) in list(scalars(drawn, Totals()))
    assert "mix/corpus" not in dict(scalars(plain, Totals()))


def test_tensorboard_shows_the_target_reuse_of_all_steps_so_far(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, clock=Clock())
    for step, scored in ((1, 6), (2, 0)):  # of 6 sequences with 10 tokens each step
        work = Counters(scored_sequences=scored, scored_tokens=2 * scored)
        log.add(dataclasses.replace(step_record(step), work=work))
    log.close()
    log = MetricsLog(tmp_path, resume_step=2, clock=Clock())
    log.add(dataclasses.replace(step_record(3), work=Counters()))
    log.close()
    events = tensorboard_events(tmp_path)
    reuse = scalars_in(events, "targets/reuse_sequences")
    assert reuse == [(1, 0.0), (2, 0.5), (3, pytest.approx(2 / 3))]
    reuse = scalars_in(events, "targets/reuse_tokens")
    assert reuse == [(step, pytest.approx(1 - 12 / (10 * step))) for step in (1, 2, 3)]


def test_tensorboard_shows_no_target_reuse_without_a_teacher(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, clock=Clock())
    log.add(dataclasses.replace(step_record(1), work=Counters()))
    log.close()
    assert scalars_in(tensorboard_events(tmp_path), "targets/reuse_tokens") == []


def test_tensorboard_forgets_the_steps_that_a_resume_repeats(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, clock=Clock(100.0))
    for step in (1, 2, 3):
        log.add(step_record(step))
    log.close()
    log = MetricsLog(tmp_path, resume_step=1, clock=Clock(200.0))
    log.add(step_record(2, loss=9.0))
    log.close()
    events = tensorboard_events(tmp_path)
    assert scalars_in(events, "train/loss") == [(1, 1.0), (2, 1.0), (3, 1.0), (2, 9.0)]
    # TensorBoard drops what lies at or after the step of a session's start
    starts = [
        event.step for event in events if event.session_log.status == PROTOCOL.SessionLog.START
    ]
    assert starts == [0, 2]
