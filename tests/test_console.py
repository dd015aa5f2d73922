"""The live view and the plain log lines."""

from __future__ import annotations

import dataclasses
import io
import math

import pytest
from rich.console import Console

from distillm_ray.log.records import (
    BufferSizes,
    CheckpointRecord,
    Counters,
    DoneRecord,
    EventRecord,
    ProbeRecord,
    PublishRecord,
    Sample,
    StartRecord,
    StepRecord,
    ValidationRecord,
)
from distillm_ray.report.console import ConsoleView, View, duration, line, mix_bar, percent, render
from distillm_ray.types import Mix


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def step_record(step: int, *, skipped: bool = False) -> StepRecord:
    return StepRecord(
        step=step,
        loss=1.25,
        loss_by_term={"skew_kl on all": 0.5, "cross_entropy on dataset": 0.75},
        gradient_norm=2.0,
        learning_rate=1e-4,
        tokens=4096,
        seconds=2.0,
        wait_seconds=0.5,
        skipped=skipped,
        phi=0.3,
        psi=0.2,
        mix=Mix(fresh=4, replay=2, dataset=10),
        buffer=BufferSizes(fresh=1, replay=30, in_flight=8, target_bytes=3 * 2**20),
        work=Counters(generated_tokens=500, scored_sequences=2, scored_tokens=1024),
    )


def screen(view: View, now: float, width: int = 100) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(render(view, now))
    return capture.get()


def plain_view(
    clock: Clock, *, line_interval_s: float = 5.0, heartbeat_s: float = 30.0
) -> tuple[ConsoleView, io.StringIO]:
    stream = io.StringIO()
    view = ConsoleView(
        100,
        stream=stream,
        clock=clock,
        line_interval_s=line_interval_s,
        heartbeat_s=heartbeat_s,
    )
    return view, stream


def printed(stream: io.StringIO) -> list[str]:
    return [text.split("  ", 1)[1] for text in stream.getvalue().splitlines()]


def test_a_step_line_shows_loss_schedule_mix_and_waiting() -> None:
    text = line(step_record(7), 100)
    for part in ("step 7/100", "loss 1.2500", "phi 0.30", "mix 4/2/10", "replay 30", "waited 0.5"):
        assert part in text
    assert "SKIPPED" in line(step_record(7, skipped=True), 100)


def test_the_corpus_is_shown_where_a_step_draws_from_it() -> None:
    plain = step_record(7)
    drawn = dataclasses.replace(plain, mix=dataclasses.replace(plain.mix, corpus=8))
    assert "  mix 4/2/10 + 8 corpus  replay 30" in line(drawn, 100)
    assert "fresh 4  replay 2  data set 10  corpus 8" in screen(
        View(total_steps=9).after(drawn, 0.0), 0.0
    )
    for text in (line(plain, 100), screen(View(total_steps=9).after(plain, 0.0), 0.0)):
        assert "corpus" not in text


def test_every_kind_of_record_has_a_line() -> None:
    sample = Sample(prompt="Why\nnot?", reference="", response="Because.")
    lines = {
        "resumed from step 3": StartRecord(step=3, resumed=True),
        "run started": StartRecord(step=0),
        "validation after step 5: loss 2.5000, phi 0.40": ValidationRecord(
            step=5, loss=2.5, phi=0.4
        ),
        "published version 5 (2 MiB in 0.5 s)": PublishRecord(
            step=5, nbytes=2 * 2**20, seconds=0.5
        ),
        "checkpoint of step 5: checkpoints/x (1.5 s)": CheckpointRecord(
            step=5, path="checkpoints/x", seconds=1.5
        ),
        "responses after step 5: Why not? -> Because.": ProbeRecord(step=5, samples=(sample,)),
        "responses after step 6": ProbeRecord(step=6),
        "scorer restarted (step 5): died": EventRecord(
            step=5, name="scorer restarted", detail="died"
        ),
        "stopped at step 5 after 2 min 05 s": DoneRecord(step=5, status="stopped", seconds=125.0),
    }
    for expected, record in lines.items():
        assert line(record, 100) == expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7620, "2 h 07 min"),
        (math.nan, "-"),
    ],
)
def test_durations_are_shown_in_readable_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.1759, "17.6 %"), (1.0, "100.0 %"), (-0.25, "-25.0 %"), (math.nan, "-")],
)
def test_shares_are_shown_in_percent(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(
    ("mix", "cells"),
    [
        (Mix(fresh=4, replay=2, dataset=10), (6, 3, 15)),
        (Mix(fresh=1, replay=1, dataset=1), (8, 8, 8)),
        (Mix(dataset=5), (0, 0, 24)),
        (Mix(fresh=4, corpus=4), (12, 0, 0, 12)),
    ],
)
def test_the_mix_bar_is_in_proportion_and_full(mix: Mix, cells: tuple[int, ...]) -> None:
    bar = mix_bar(mix, 24)
    drawn = {str(span.style): span.end - span.start for span in bar.spans}
    colors = ("#e69f00", "#56b4e9", "#999999", "#009e73")[: len(cells)]
    assert tuple(drawn.get(color, 0) for color in colors) == cells
    assert len(bar.plain) == 24


def test_an_empty_mix_has_no_bar() -> None:
    assert mix_bar(Mix(), 24).plain == ""


def test_the_remaining_time_follows_the_pace_of_the_steps() -> None:
    view = View(total_steps=100)
    assert math.isnan(view.eta_seconds)
    view = view.after(step_record(1), 10.0)
    assert math.isnan(view.eta_seconds)
    view = view.after(step_record(2), 13.0)
    assert view.eta_seconds == pytest.approx(3.0 * 98)
    view = view.after(step_record(4), 23.0)  # two steps in ten seconds
    assert view.step_seconds == pytest.approx(3.0 + 0.1 * (5.0 - 3.0))
    assert view.eta_seconds == pytest.approx(3.2 * 96)


def test_a_step_that_is_repeated_after_a_restart_does_not_change_the_pace() -> None:
    view = View(total_steps=100).after(step_record(9), 10.0).after(step_record(10), 12.0)
    view = view.after(step_record(6), 60.0)
    assert view.step_seconds == 2.0
    assert view.completed == 6


def test_the_screen_shows_phase_numbers_mix_buffer_and_the_current_wait() -> None:
    view = View(total_steps=100, phase="training", phase_started=5.0)
    view = view.after(ValidationRecord(step=0, loss=3.5, phi=0.3), 6.0)
    view = view.after(step_record(1), 7.0).after(step_record(2), 9.0)
    view = view.after(ValidationRecord(step=2, loss=2.5, phi=0.4), 9.0)
    view = view.after(PublishRecord(step=2), 9.0)
    view = view.after(EventRecord(step=2, name="generator restarted"), 9.0)
    text = screen(view, 65.0)
    for part in (
        "training",
        "1 min 00 s",
        "2/100 steps",
        "about 3 min 16 s left",
        "skew_kl on all 0.5000   cross_entropy on dataset 0.7500",
        "2.5000 after step 2   (was 3.5000 at step 0)",
        "0.40   rollout rate 0.20",
        "fresh 4  replay 2  data set 10",
        "fresh 1   replay 30   in flight 8   targets 3 MiB   newest weights: version 2",
        "learning 1.5 s   waiting 0.5 s",
        "generator restarted (step 2)",
        "87.5 % of sequences   75.0 % of tokens",
    ):
        assert part in text


def test_the_screen_shows_target_reuse_only_with_a_teacher() -> None:
    scored = step_record(1)
    assert "target reuse" in screen(View(total_steps=9).after(scored, 0.0), 0.0)
    without = dataclasses.replace(scored, work=Counters(), buffer=BufferSizes())
    assert "target reuse" not in screen(View(total_steps=9).after(without, 0.0), 0.0)


def test_the_screen_before_the_first_step_shows_the_phase_only() -> None:
    text = screen(View(total_steps=100, phase="starting generators"), 3.0)
    assert "starting generators" in text and "0/100 steps" in text
    assert "loss" not in text and "left" not in text


def test_only_the_newest_events_stay_on_the_screen() -> None:
    view = View(total_steps=10)
    for number in range(9):
        view = view.after(EventRecord(step=number, name=f"event-{number}"), 0.0)
    assert [event.split()[0] for event in view.events] == [f"event-{n}" for n in range(5, 9)]


def test_text_of_a_model_is_never_parsed_as_markup() -> None:
    sample = Sample(prompt="[bold]x[/bold]", reference="", response="[/red]")
    text = screen(View(total_steps=1).after(ProbeRecord(step=1, samples=(sample,)), 0.0), 0.0)
    assert "[bold]x[/bold] -> [/red]" in text


def test_a_log_gets_plain_lines_without_color_codes() -> None:
    view, stream = plain_view(Clock())
    view.start("training")
    view.update(step_record(1))
    view.update(ValidationRecord(step=1, loss=2.0))
    view.stop()
    assert [text.split()[0] for text in printed(stream)] == ["training", "step", "validation"]
    assert "\x1b" not in stream.getvalue()


def test_a_log_gets_a_step_line_every_few_seconds_and_the_last_one_always() -> None:
    clock = Clock()
    view, stream = plain_view(clock, line_interval_s=5.0)
    for step in range(1, 101):
        clock.now += 1.0
        view.update(step_record(step))
    steps = [int(text.split()[1].split("/")[0]) for text in printed(stream)]
    assert steps == [*range(1, 100, 5), 100]


def test_a_skipped_step_is_always_logged() -> None:
    view, stream = plain_view(Clock())
    view.update(step_record(1))
    view.update(step_record(2))
    view.update(step_record(3, skipped=True))
    assert len(printed(stream)) == 2


def test_a_long_wait_is_logged_from_time_to_time() -> None:
    clock = Clock()
    view, stream = plain_view(clock, heartbeat_s=30.0)
    view.start("starting generators")
    for _ in range(70):
        clock.now += 1.0
        view.tick()
    view.waiting("the validation after step 0")
    clock.now += 30.0
    view.tick()
    assert printed(stream)[1:] == [
        "starting generators: 30 s",
        "starting generators: 1 min 00 s",
        "starting generators: 1 min 40 s, waiting for the validation after step 0",
    ]


def test_a_phase_without_steps_shows_how_far_it_has_come() -> None:
    clock = Clock()
    view, stream = plain_view(clock)
    view.start("scoring 4,000 sequences")
    for done in (0, 10, 20, 4000):
        view.progress(done, 4000, "sequences")
        clock.now += 3
    assert printed(stream)[1:] == [
        "0 of 4,000 sequences",
        "20 of 4,000 sequences",
        "4,000 of 4,000 sequences",
    ]
    assert "4000/4000 sequences" in screen(view.view, clock.now)
    view.start("training")
    assert "0/100 steps" in screen(view.view, clock.now)


def test_a_terminal_gets_the_live_view_and_the_cursor_back() -> None:
    stream = io.StringIO()
    view = ConsoleView(100, stream=stream, interactive=True, clock=Clock())
    view.start("training")
    view.update(step_record(1))
    view.stop()
    view.stop()
    text = stream.getvalue()
    assert "1/100 steps" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
