"""Write what follows from the table of metrics: the Grafana dashboard, and the table in the docs.

    python scripts/monitoring.py

A test compares both files with the output.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillm_ray.log.prometheus import RUN, Metric

ROOT = Path(__file__).parent.parent
DASHBOARD = ROOT / "deploy" / "grafana" / "distillm-ray.json"
PAGE = ROOT / "docs" / "metrics.md"
BEGIN = "<!-- The table is written by scripts/monitoring.py. -->\n"
END = "<!-- End of the table. -->\n"

_SELECTED = f'{{{RUN}=~"$run"}}'
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 3  # of a panel; Grafana's grid has 24 columns
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


# ---- queries -------------------------------------------------------------------------------------


def latest(metric: Metric, *labels: str) -> str:
    """The value of a gauge, by run and labels."""
    return f"max by ({', '.join((RUN, *labels))}) ({metric.value.exported}{_SELECTED})"


def per_second(metric: Metric, *labels: str, part: str = "") -> str:
    """The rate of a counter; `part`: `_sum` or `_count` of a histogram."""
    series = f"{metric.value.exported}{part}{_SELECTED}"
    return f"sum by ({', '.join((RUN, *labels))}) (rate({series}[$__rate_interval]))"


def count(metric: Metric, *labels: str) -> str:
    """The value of a counter of rare events; the rate of its first one would be 0."""
    return f"sum by ({', '.join((RUN, *labels))}) ({metric.value.exported}{_SELECTED})"


def quantile(share: float, metric: Metric) -> str:
    """A quantile of a histogram."""
    series = f"{metric.value.exported}_bucket{_SELECTED}"
    by_bucket = f"sum by ({RUN}, le) (rate({series}[$__rate_interval]))"
    return f"histogram_quantile({share:g}, {by_bucket})"


# ---- panels --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Panel:
    """A picture of some queries over time."""

    title: str
    unit: str  # one of Grafana's
    queries: dict[str, str]  # by legend, to which the run is added
    description: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under a heading."""

    title: str
    panels: Sequence[Panel]


ROWS = (
    Row(
        "Run",
        (
            Panel(
                "Step",
                "none",
                {
                    "completed": latest(Metric.STEP),
                    "planned": latest(Metric.PLANNED_STEPS),
                    "newest checkpoint": latest(Metric.CHECKPOINT_STEP),
                    "published weights": latest(Metric.WEIGHTS_VERSION),
                },
            ),
            Panel("Phase", "none", {"{{phase}}": f"{latest(Metric.PHASE, 'phase')} == 1"}),
            Panel(
                "Steps a second",
                "none",
                {"steps": per_second(Metric.STEP_SECONDS, part="_count")},
            ),
            Panel(
                "Age of the newest checkpoint",
                "s",
                {
                    "age": f"time() - {latest(Metric.CHECKPOINT_TIME)}",
                    "it took": latest(Metric.CHECKPOINT_SECONDS),
                },
                "What a failure would cost, and how long a checkpoint takes.",
            ),
            Panel(
                "Incidents",
                "none",
                {
                    "learners went back": count(Metric.REWINDS),
                    "{{role}} replaced": count(Metric.POOL_RESTARTS, "role"),
                    "steps skipped": count(Metric.SKIPPED_STEPS),
                    "ordinals given out again": count(Metric.LOST_ORDINALS),
                    "prompts given up": count(Metric.GIVEN_UP_PROMPTS),
                    "samples too old": count(Metric.LATE_SAMPLES),
                    "targets evicted": count(Metric.TARGET_EVICTIONS),
                },
                "Counted since the process that exports them was started.",
            ),
        ),
    ),
    Row(
        "Training",
        (
            Panel(
                "Loss",
                "none",
                {
                    "loss": latest(Metric.LOSS),
                    "{{term}}": latest(Metric.TERM_LOSS, "term"),
                    "held-out": latest(Metric.VALIDATION_LOSS),
                },
            ),
            Panel(
                "Schedule",
                "percentunit",
                {"phi": latest(Metric.PHI), "psi": latest(Metric.PSI)},
                "The probability that a slot takes student text, and fresh student text.",
            ),
            Panel(
                "Sequences trained on, a second",
                "none",
                {"{{shelf}}": per_second(Metric.SLOTS, "shelf")},
            ),
            Panel(
                "Gradient and learning rate",
                "none",
                {
                    "gradient norm": latest(Metric.GRADIENT_NORM),
                    "learning rate": latest(Metric.LEARNING_RATE),
                },
            ),
            Panel(
                "Seconds a step",
                "s",
                {
                    "mean": f"{per_second(Metric.STEP_SECONDS, part='_sum')}"
                    f" / {per_second(Metric.STEP_SECONDS, part='_count')}",
                    "95 %": quantile(0.95, Metric.STEP_SECONDS),
                },
            ),
            Panel(
                "What the learners do",
                "percentunit",
                {"{{activity}}": per_second(Metric.LEARNER_SECONDS, "activity")},
                "Share of the time. Much `wait`: more generators or scorers.",
            ),
            Panel(
                "Tokens trained on, a second",
                "none",
                {
                    "tokens": per_second(Metric.TRAINED_TOKENS),
                    "infinite divergence": per_second(Metric.INFINITE_TOKENS),
                },
            ),
            Panel(
                "Age of the samples, steps",
                "none",
                {
                    "{{shelf}}, mean": latest(Metric.SAMPLE_AGE, "shelf"),
                    "oldest fresh one": latest(Metric.FRESH_AGE_MAX),
                },
            ),
        ),
    ),
    Row(
        "Student text",
        (
            Panel(
                "Entropy of the next token, nats",
                "none",
                {
                    "student": latest(Metric.STUDENT_ENTROPY),
                    "teacher": latest(Metric.TEACHER_ENTROPY),
                    "engine against learner": latest(Metric.LOGPROB_GAP),
                },
            ),
            Panel(
                "Agreement with the teacher",
                "percentunit",
                {
                    "most likely tokens": latest(Metric.TOP_OVERLAP),
                    "ROUGE-L": f"{latest(Metric.PROBE_ROUGE_L)} / 100",
                },
            ),
            Panel(
                "Response tokens, mean",
                "none",
                {
                    "tokens": f"{per_second(Metric.GENERATED_TOKENS)}"
                    f" / {per_second(Metric.GENERATED_SEQUENCES)}"
                },
            ),
            Panel(
                "Flawed responses",
                "percentunit",
                {
                    "{{flaw}}": f"{per_second(Metric.FLAWED_SEQUENCES, 'flaw')}"
                    f" / ignoring (flaw) group_left {per_second(Metric.GENERATED_SEQUENCES)}",
                    "dropped": f"{per_second(Metric.DROPPED_SEQUENCES)}"
                    f" / {per_second(Metric.GENERATED_SEQUENCES)}",
                },
            ),
        ),
    ),
    Row(
        "Generation and scoring",
        (
            Panel(
                "Tokens a second",
                "none",
                {
                    "generated": per_second(Metric.GENERATED_TOKENS),
                    "scored": per_second(Metric.SCORED_TOKENS),
                },
            ),
            Panel(
                "Target reuse",
                "percentunit",
                {
                    "reused": f"1 - {per_second(Metric.SCORED_SEQUENCES)}"
                    f" / {per_second(Metric.TARGETED_SEQUENCES)}",
                    "from the library": f"{per_second(Metric.LIBRARY_SEQUENCES)}"
                    f" / {per_second(Metric.TARGETED_SEQUENCES)}",
                },
                "Share of the sequences trained on with targets that the teacher did not compute.",
            ),
            Panel(
                "Sequences held",
                "none",
                {
                    "{{shelf}}": latest(Metric.BUFFER_SEQUENCES, "shelf"),
                    "in flight": latest(Metric.IN_FLIGHT),
                },
            ),
            Panel("Targets held", "bytes", {"targets": latest(Metric.TARGET_BYTES)}),
            Panel("Weights published", "Bps", {"weights": per_second(Metric.PUBLISHED_BYTES)}),
        ),
    ),
    Row(
        "Roles",
        (
            Panel(
                "Actors",
                "none",
                {
                    "{{role}}s": latest(Metric.POOL_SIZE, "role"),
                    "{{role}}s ready": latest(Metric.POOL_READY, "role"),
                    "{{role}}s busy": latest(Metric.POOL_BUSY, "role"),
                },
            ),
            Panel("Calls that wait", "none", {"{{role}}": latest(Metric.POOL_QUEUE, "role")}),
            Panel("Processes", "none", {"{{role}}": per_second(Metric.PROCESS_SECONDS, "role")}),
            Panel("Cores in use", "none", {"{{role}}": per_second(Metric.CPU_SECONDS, "role")}),
            Panel("GPUs held", "none", {"{{role}}": per_second(Metric.GPU_SECONDS, "role")}),
            Panel(
                "Busy share",
                "percentunit",
                {
                    "{{role}}": f"{per_second(Metric.BUSY_SECONDS, 'role')}"
                    f" / {per_second(Metric.PROCESS_SECONDS, 'role')}"
                },
            ),
            Panel("Mean queue", "none", {"{{role}}": per_second(Metric.QUEUE_SECONDS, "role")}),
            Panel(
                "Tokens a CPU-second",
                "none",
                {
                    "{{role}}": f"{per_second(Metric.ROLE_TOKENS, 'role')}"
                    f" / {per_second(Metric.CPU_SECONDS, 'role')}"
                },
            ),
        ),
    ),
)


# ---- files ---------------------------------------------------------------------------------------


def dashboard() -> str:
    """The dashboard in Grafana's JSON model."""
    runs = f"label_values({Metric.STEP.value.exported}, {RUN})"
    tree = {
        "uid": "distillm-ray",
        "title": "distillm-ray",
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                {
                    "name": "run",
                    "type": "query",
                    "datasource": _DATASOURCE,
                    "query": runs,
                    "definition": runs,
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                    "allValue": ".+",
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "panels": list(_placed()),
    }
    return json.dumps(tree, indent=1) + "\n"


def _placed() -> Iterator[dict[str, Any]]:
    y = number = 0
    for row in ROWS:
        number += 1
        place = {"x": 0, "y": y, "w": _WIDTH * _COLUMNS, "h": 1}
        yield {"id": number, "type": "row", "title": row.title, "gridPos": place, "panels": []}
        y += 1
        for index, panel in enumerate(row.panels):
            number += 1
            place = {
                "x": _WIDTH * (index % _COLUMNS),
                "y": y + _HEIGHT * (index // _COLUMNS),
                "w": _WIDTH,
                "h": _HEIGHT,
            }
            yield _panel(panel, number, place)
        y += _HEIGHT * -(-len(row.panels) // _COLUMNS)


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": _DATASOURCE,
            "expr": query,
            "legendFormat": f"{legend} ({{{{{RUN}}}}})",
        }
        for index, (legend, query) in enumerate(panel.queries.items())
    ]
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit}, "overrides": []},
        "gridPos": place,
        "targets": targets,
    }


def table() -> str:
    """The metrics as a table in Markdown."""
    lines = ["| name | type | labels | unit | meaning |", "|---|---|---|---|---|"]
    for metric in Metric:
        one = metric.value
        labels = ", ".join(f"`{label}`" for label in one.labels)
        lines.append(f"| `{one.exported}` | {one.kind} | {labels} | {one.unit} | {one.meaning} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page of the docs with the table as it should be."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert rest, f"{PAGE} has no line {BEGIN!r}"
    assert after, f"{PAGE} has no line {END!r}, or ends with it"
    return before + BEGIN + table() + END + after


def main() -> None:
    """Write both files."""
    DASHBOARD.parent.mkdir(parents=True, exist_ok=True)
    DASHBOARD.write_text(dashboard(), encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
