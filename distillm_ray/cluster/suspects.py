"""Which input makes members of a pool fail: the evidence, and when it is enough.

A member that fails takes all its calls along, and only one of them may be the reason. So being in
flight at a failure makes an input a suspect, and nothing more. An input that was in flight at
`MAX_SHARED` failures without a success runs alone from then on: on a member that has no other call,
where possible one that it has not failed on, and never on two at a time. Only a failure alone tells
an input from the others in flight, and `MAX_ALONE` of them give it up. A success clears it.

A failure alone tells no input from a broken member. It is not held against the member, unless
another input fails there before one succeeds: then the member is the reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

MAX_SHARED = 2
MAX_ALONE = 3


@dataclass(slots=True)
class _Suspect:
    failures: int = 0  # at which it was in flight
    alone: list[str] = field(default_factory=list)  # the members that failed while it was alone


class Suspects:
    """The inputs that were in flight at a failure and have not succeeded since.

    Example:
        >>> suspects = Suspects()
        >>> for member in ("generator 0", "generator 1"):
        ...     counts = suspects.failed(member, ["p1", "p2"])
        >>> suspects.succeeded("generator 0", "p2")
        >>> [suspects.runs_alone(name) for name in ("p1", "p2")]
        [True, False]
        >>> for member in ("generator 0", "generator 1", "generator 2"):
        ...     counts = suspects.failed(member, ["p1"])
        >>> suspects.is_given_up("p1")
        True
    """

    def __init__(self) -> None:
        self._suspects: dict[str, _Suspect] = {}
        self._excused: dict[str, str] = {}  # by member: the input whose failures did not count

    def failed(self, member: str, inputs: Iterable[str]) -> bool:
        """A member failed with these inputs in flight; returns whether it counts against it."""
        names = set(inputs)
        for name in names:
            self._suspects.setdefault(name, _Suspect()).failures += 1
        if len(names) != 1:
            return True
        (name,) = names
        suspect = self._suspects[name]
        suspect.alone.append(member)
        known = suspect.failures > 1
        return not (known and self._excused.setdefault(member, name) == name)

    def succeeded(self, member: str, name: str) -> None:
        """A member replied to a call with this input."""
        self._excused.pop(member, None)
        if not self.is_given_up(name):
            self._suspects.pop(name, None)

    def runs_alone(self, name: str) -> bool:
        """Whether a call with this input needs a member without other calls."""
        return name in self._suspects and self._suspects[name].failures >= MAX_SHARED

    def failed_alone_on(self, name: str) -> frozenset[str]:
        """The members that failed while they had this input alone."""
        return frozenset(self._suspects[name].alone if name in self._suspects else ())

    @property
    def failed_alone(self) -> tuple[str, ...]:
        """The inputs that were alone at a failure."""
        return tuple(name for name, suspect in self._suspects.items() if suspect.alone)

    def is_given_up(self, name: str) -> bool:
        """Whether no member shall get this input again."""
        return name in self._suspects and len(self._suspects[name].alone) >= MAX_ALONE
