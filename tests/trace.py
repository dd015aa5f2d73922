"""Checks a file in the Trace Event Format."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

FIELDS = {
    "X": {"dur"},
    "C": {"args"},
    "b": {"cat", "id"},
    "e": {"cat", "id"},
    "i": {"s"},
    "M": {"args"},
}
"""What each kind of event has besides name, ph, pid, tid and (metadata aside) ts."""


def check_trace(trace: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """Fields, names, pairs and the nesting of slices; returns the tracks in use, by their names."""
    processes: dict[int, str] = {}
    threads: dict[tuple[int, int], str] = {}
    used: set[tuple[int, int]] = set()
    slices: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    pairs: dict[tuple[str, int], list[tuple[str, int]]] = defaultdict(list)
    for event in trace:
        kind = event["ph"]
        needed = {"name", "ph", "pid", "tid"} | FIELDS[kind] | ({"ts"} if kind != "M" else set())
        assert needed <= event.keys(), event
        track = (event["pid"], event["tid"])
        if kind == "M":
            if event["name"] == "process_name":
                processes[event["pid"]] = event["args"]["name"]
            elif event["name"] == "thread_name":
                assert threads.setdefault(track, event["args"]["name"]) == event["args"]["name"]
            continue
        assert isinstance(event["ts"], int), event
        assert event["ts"] >= 0, event
        used.add(track)
        match kind:
            case "X":
                assert event["dur"] >= 0, event
                slices[track].append((event["ts"], event["ts"] + event["dur"]))
            case "b" | "e":
                pairs[event["cat"], event["id"]].append((kind, event["ts"]))
            case "C":
                assert all(isinstance(value, int) for value in event["args"].values()), event
            case _:
                pass
    for of_track in slices.values():
        check_nesting(of_track)
    for begun_and_ended in pairs.values():
        assert [kind for kind, _ in begun_and_ended] in (["b", "e"], ["e"])  # a cut may divide one
        assert begun_and_ended == sorted(begun_and_ended, key=lambda one: one[1])
    return {(processes[pid], threads[pid, tid]) for pid, tid in used}


def check_nesting(slices: list[tuple[int, int]]) -> None:
    """Each slice lies within another one or beside it."""
    open_ends: list[int] = []
    for start, end in sorted(slices, key=lambda one: (one[0], -one[1])):
        while open_ends and open_ends[-1] <= start:
            open_ends.pop()
        assert not open_ends or end <= open_ends[-1], (start, end, open_ends)
        open_ends.append(end)
