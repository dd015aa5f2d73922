"""Progress of a run: a live view on a terminal, plain lines in a log file.

`render` and `line` are pure functions of a `View` and a record. `ConsoleView` updates the view and
decides when to print. Plain lines have no color codes, so that a job's log stays readable.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from distillm_ray.log.records import (
    CheckpointRecord,
    CostRecord,
    DoneRecord,
    EventRecord,
    ProbeRecord,
    PublishRecord,
    Record,
    Sample,
    StartRecord,
    StepRecord,
    ValidationRecord,
)
from distillm_ray.log.totals import Totals
from distillm_ray.types import Mix

_NUM_EVENTS = 4
_SMOOTHING = 0.1  # weight of the newest step in the average behind the remaining time
# Colors of the shelves.
_FRESH, _REPLAY, _DATASET, _CORPUS = "#e69f00", "#56b4e9", "#999999", "#009e73"


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Everything that the live view shows. Times are readings of the view's own clock."""

    total_steps: int
    phase: str = ""
    phase_started: float = 0.0
    waiting: str = ""  # what the run waits for, or empty
    progress: tuple[int, int, str] | None = None  # done, of how many, of what; in place of steps
    pace: str = ""  # of that progress
    step: StepRecord | None = None
    totals: Totals = field(default_factory=Totals)  # of the records that the view has seen
    first_validation: ValidationRecord | None = None
    validation: ValidationRecord | None = None
    version: int | None = None  # of the newest published weights
    sample: Sample | None = None
    events: tuple[str, ...] = ()
    step_seconds: float = math.nan  # smoothed wall-clock from one step to the next
    stepped_at: float | None = None

    @property
    def completed(self) -> int:
        """Completed optimizer steps."""
        return self.step.step if self.step is not None else 0

    @property
    def eta_seconds(self) -> float:
        """Seconds until the last step at the current rate; NaN before two steps."""
        return self.step_seconds * (self.total_steps - self.completed)

    def after(self, record: Record, now: float) -> View:
        """The view with one more record."""
        self = dataclasses.replace(self, totals=self.totals.plus(record))
        match record:
            case StepRecord():
                pace = self.step_seconds
                if self.stepped_at is not None and self.completed < record.step:
                    latest = (now - self.stepped_at) / (record.step - self.completed)
                    pace = latest if math.isnan(pace) else pace + _SMOOTHING * (latest - pace)
                return dataclasses.replace(
                    self, step=record, step_seconds=pace, stepped_at=now, waiting=""
                )
            case ValidationRecord():
                first = self.first_validation or record
                return dataclasses.replace(self, first_validation=first, validation=record)
            case PublishRecord(step=step):
                return dataclasses.replace(self, version=step)
            case ProbeRecord(samples=samples) if samples:
                return dataclasses.replace(self, sample=samples[0])
            case EventRecord():
                events = (*self.events, line(record, self.total_steps))[-_NUM_EVENTS:]
                return dataclasses.replace(self, events=events)
            case _:
                return self


def line(record: Record, total_steps: int) -> str:
    """One record as a line of a log."""
    match record:
        case StepRecord(mix=mix, buffer=buffer):
            corpus = f" + {mix.corpus} corpus" if mix.corpus else ""
            text = (
                f"step {record.step}/{total_steps}  loss {record.loss:.4f}"
                f"  lr {record.learning_rate:.2e}  phi {record.phi:.2f}"
                f"  mix {mix.fresh}/{mix.replay}/{mix.dataset}{corpus}"
                f"  replay {buffer.replay}  in flight {buffer.in_flight}"
                f"  tokens {record.tokens}"
                f"  {record.seconds:.1f} s (waited {record.wait_seconds:.1f})"
            )
            return text + ("  SKIPPED: loss or gradient not finite" if record.skipped else "")
        case ValidationRecord():
            what = "loss" if record.text == "dataset" else "divergence on the student's own text"
            return (
                f"validation after step {record.step}: {what} {record.loss:.4f},"
                f" phi {record.phi:.2f}"
            )
        case PublishRecord():
            size = record.nbytes / 2**20
            return f"published version {record.step} ({size:.0f} MiB in {record.seconds:.1f} s)"
        case CheckpointRecord():
            return f"checkpoint of step {record.step}: {record.path} ({record.seconds:.1f} s)"
        case ProbeRecord(samples=samples):
            shown = [_exchange(sample) for sample in samples[:1]]
            return ": ".join([f"responses after step {record.step}", *shown])
        case CostRecord(phase=phase, seconds=seconds, roles=roles):
            used = sum(cost.cpu_seconds for cost in roles.values())
            return f"{phase}: {used:.1f} CPU-seconds in {seconds:.1f} s"
        case StartRecord(resumed=resumed):
            return f"resumed from step {record.step}" if resumed else "run started"
        case EventRecord(name=name, detail=detail):
            return f"{name} (step {record.step}){f': {detail}' if detail else ''}"
        case DoneRecord(status=status):
            return f"{status} at step {record.step} after {duration(record.seconds)}"


def duration(seconds: float) -> str:
    """Seconds for a reader: 42 s, 3 min 05 s, 2 h 07 min; a dash for NaN."""
    if not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def percent(share: float) -> str:
    """A share for a reader: 17.6 %; a dash for NaN."""
    return f"{100 * share:.1f} %" if math.isfinite(share) else "-"


def mix_bar(mix: Mix, width: int) -> Text:
    """A bar of `width` cells in proportion to the shelves; empty without sequences."""
    bar = Text()
    if mix.total == 0:
        return bar
    drawn, cells = 0, 0
    for color, count in (
        (_FRESH, mix.fresh),
        (_REPLAY, mix.replay),
        (_DATASET, mix.dataset),
        (_CORPUS, mix.corpus),
    ):
        drawn += count
        upto = round(width * drawn / mix.total)
        bar.append("█" * (upto - cells), style=color)
        cells = upto
    return bar


def render(view: View, now: float) -> RenderableType:
    """The live view."""
    head = Table.grid(padding=(0, 2))
    elapsed = duration(now - view.phase_started)
    head.add_row(Text(view.phase or "starting", style="bold"), Text(elapsed, style="dim"))
    parts: list[RenderableType] = [head]
    bar, eta = Table.grid(padding=(0, 2)), view.eta_seconds
    done, total, what = view.progress or (view.completed, view.total_steps, "steps")
    bar.add_row(
        ProgressBar(total=max(total, 1), completed=done, width=40),
        f"{done}/{total} {what}",
        Text(f"about {duration(eta)} left" if math.isfinite(eta) else view.pace, style="dim"),
    )
    parts.append(bar)
    if view.step is not None or view.validation is not None:
        parts.append(_numbers(view))
    if view.sample is not None:
        parts.append(Text(_exchange(view.sample), "italic"))
    parts.extend(Text(event, style="dim") for event in view.events)
    if view.waiting:
        parts.append(Spinner("dots", Text(f"waiting for {view.waiting}", style="yellow")))
    return Group(*parts)


def _numbers(view: View) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    if (step := view.step) is not None:
        table.add_row(
            "loss",
            f"{step.loss:.4f}   gradient norm {step.gradient_norm:.2f}"
            f"   learning rate {step.learning_rate:.2e}",
        )
        if len(step.loss_by_term) > 1:
            terms = (f"{name} {loss:.4f}" for name, loss in step.loss_by_term.items())
            table.add_row("loss terms", "   ".join(terms))
    if (latest := view.validation) is not None:
        text = f"{latest.loss:.4f} after step {latest.step}"
        first = view.first_validation
        if first is not None and first.step < latest.step:
            text += f"   (was {first.loss:.4f} at step {first.step})"
        table.add_row("validation", text)
    if step is not None:
        phi = view.validation.phi if view.validation is not None else step.phi
        table.add_row("phi", f"{phi:.2f}   rollout rate {step.psi:.2f}")
        mix = mix_bar(step.mix, 24)
        mix.append(f"  fresh {step.mix.fresh}", style=_FRESH)
        mix.append(f"  replay {step.mix.replay}", style=_REPLAY)
        mix.append(f"  data set {step.mix.dataset}", style=_DATASET)
        if step.mix.corpus:
            mix.append(f"  corpus {step.mix.corpus}", style=_CORPUS)
        table.add_row("mix", mix)
        buffer = step.buffer
        published = "" if view.version is None else f"   newest weights: version {view.version}"
        table.add_row(
            "buffer",
            f"fresh {buffer.fresh}   replay {buffer.replay}   in flight {buffer.in_flight}"
            f"   targets {buffer.target_bytes / 2**20:.0f} MiB{published}",
        )
        learning, waiting = step.learn_seconds, step.wait_seconds
        table.add_row(
            "step",
            f"{step.tokens} tokens   learning {learning:.1f} s   waiting {waiting:.1f} s",
        )
        table.add_row(
            "others",
            f"generated {step.work.generated_tokens} tokens"
            f"   scored {step.work.scored_tokens} tokens"
            + (
                f"   from the library {step.work.library_tokens} tokens"
                if view.totals.work.library_sequences
                else ""
            ),
        )
        if view.totals.has_targets:
            table.add_row(
                "target reuse",
                f"{percent(view.totals.target_reuse_sequences)} of sequences"
                f"   {percent(view.totals.target_reuse_tokens)} of tokens",
            )
    return table


class ConsoleView:
    """Shows a run from its records. `stop` ends the view.

    Call `start` at each phase, `update` with each record and `tick` about once a second.

    Args:
        total_steps: optimizer steps of the whole run; 0 until `expect` says them.
        stream: where to print: the live view on a terminal, plain lines elsewhere.
        interactive: True or False decides between the two regardless of the stream.
        line_interval_s: shortest time between two plain step lines; the last step is always shown.
        heartbeat_s: time without a plain line after which `tick` prints one.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        stream: TextIO | None = None,
        interactive: bool | None = None,
        line_interval_s: float = 5.0,
        heartbeat_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._stream = stream if stream is not None else sys.stdout
        self._line_interval_s = line_interval_s
        self._heartbeat_s = heartbeat_s
        self._step_line_at = -math.inf
        self._printed_at = clock()
        self.view = View(total_steps=total_steps, phase_started=clock())
        console = Console(file=self._stream, force_terminal=interactive)
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(
                console=console,
                get_renderable=lambda: render(self.view, self._clock()),
                refresh_per_second=4,
            )
            self._live.start()

    def expect(self, total_steps: int) -> None:
        """Set the steps of the whole run, where they were not known at the start."""
        self.view = dataclasses.replace(self.view, total_steps=total_steps)

    def start(self, phase: str) -> None:
        """Enter a phase, such as "starting generators" or "training"."""
        self.view = dataclasses.replace(
            self.view, phase=phase, phase_started=self._clock(), waiting="", progress=None, pace=""
        )
        self._print(phase)

    def update(self, record: Record) -> None:
        """Show a record of the run's log."""
        now = self._clock()
        self.view = self.view.after(record, now)
        match record:
            case StepRecord(step=step, skipped=skipped):
                is_due = now - self._step_line_at >= self._line_interval_s
                if not (is_due or skipped or step == self.view.total_steps):
                    return
                self._step_line_at = now
            case PublishRecord() | CostRecord():
                return
        self._print(line(record, self.view.total_steps))

    def progress(self, done: int, total: int, what: str, *, pace: str = "") -> None:
        """Show how far a phase without steps has come, as in 12 of 40 sequences, and how fast."""
        self.view = dataclasses.replace(self.view, progress=(done, total, what), pace=pace)
        now = self._clock()
        if now - self._step_line_at >= self._line_interval_s or done == total:
            self._step_line_at = now
            self._print(f"{done:,} of {total:,} {what}" + (f"  {pace}" if pace else ""))

    def note(self, text: str) -> None:
        """Print a line that stays on the screen above the live view."""
        if self._live is None:
            self._print(text)
        else:
            self._live.console.print(text)

    def waiting(self, reason: str) -> None:
        """Show what the learner waits for; an empty reason clears it."""
        self.view = dataclasses.replace(self.view, waiting=reason)

    def tick(self) -> None:
        """Print a plain heartbeat line if nothing was printed for `heartbeat_s`."""
        now = self._clock()
        if self._live is None and now - self._printed_at >= self._heartbeat_s:
            reason = f", waiting for {self.view.waiting}" if self.view.waiting else ""
            elapsed = duration(now - self.view.phase_started)
            self._print(f"{self.view.phase or 'starting'}: {elapsed}{reason}")

    def stop(self) -> None:
        """Restore the terminal; the last view stays on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, text: str) -> None:
        if self._live is None:
            stamp = time.strftime("%H:%M:%S")
            self._stream.write(f"{stamp}  {text}\n")
            self._stream.flush()
            self._printed_at = self._clock()


def _exchange(sample: Sample) -> str:
    return f"{_one_line(sample.prompt)} -> {_one_line(sample.response)}"


def _one_line(text: str, limit: int = 90) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
