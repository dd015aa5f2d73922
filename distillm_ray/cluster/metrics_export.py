"""Readings as Ray's metrics, which the node's agent serves to Prometheus (docs/metrics.md).

A process keeps its metrics in memory, and a thread of Ray sends them to the agent every ten
seconds. No reading waits for that or fails with it: an agent that is gone costs the metrics alone.
Ray sends a gauge only if it was set since the last time, and the agent forgets one that has not
come for twice as long. So gauges are set again and again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from ray.util.metrics import Counter, Gauge, Histogram

from distillm_ray.log.prometheus import RUN, Definition, Metric, Reading

RENEW_S = 1.0
"""Shortest time between two renewals, which set some fifty gauges."""


class MetricsExport:
    """The metrics of one run, in the process that exports them.

    Args:
        run: the value of the label `run`.
        clock: returns seconds; tests replace it.
    """

    def __init__(self, run: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._run = _ascii(run)
        self._clock = clock
        self._renewed_at = clock()
        self._set: dict[tuple[Metric, tuple[str, ...]], Reading] = {}  # gauges, as they are
        self._metrics = {metric: _ray_metric(metric.value) for metric in Metric}

    def add(self, readings: Iterable[Reading]) -> None:
        """Set, observe or add them."""
        for reading in readings:
            names = reading.metric.value.labels
            labels = dict(zip(names, map(_ascii, reading.labels), strict=True))
            labels[RUN] = self._run
            match self._metrics[reading.metric]:
                case Counter() as counter:
                    counter.inc(float(reading.value), labels)
                case Gauge() as gauge:
                    gauge.set(float(reading.value), labels)
                    self._set[reading.metric, reading.labels] = reading
                case Histogram() as histogram:
                    histogram.observe(float(reading.value), labels)

    def renew(self) -> None:
        """Set all gauges again, unless that was done less than RENEW_S ago."""
        if self._clock() - self._renewed_at >= RENEW_S:
            self._renewed_at = self._clock()
            self.add(tuple(self._set.values()))


def _ray_metric(definition: Definition) -> Counter | Gauge | Histogram:
    name, meaning, labels = definition.name, definition.meaning, (*definition.labels, RUN)
    match definition.kind:
        case "counter":
            return Counter(name, meaning, labels)
        case "gauge":
            return Gauge(name, meaning, labels)
        case "histogram":
            return Histogram(name, meaning, list(definition.buckets), labels)


def _ascii(label: str) -> str:
    """Ray encodes the values of labels as ASCII, and raises for others."""
    return label.encode("ascii", "backslashreplace").decode("ascii")
