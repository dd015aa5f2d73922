"""Which input makes members of a pool fail: the evidence, and when it is enough.

A member that fails takes all its calls along, and only one of them may be the reason. So being in
flight at a failure makes an input a suspect, and nothing more. Inputs that were in flight at
`MAX_SHARED` failures without a success are told apart by halving: each runs with at most half as
many others as at its last failure, on a member that has no other calls, and never on two at a time.
Of 256 inputs the one that kills is alone after eight more failures. Only `MAX_ALONE` failures alone
give an input up. A success clears it.

The failure of such a group tells no input from a broken member. It is not held against the member,
unless another input fails there before one succeeds: then the member is the reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

MAX_SHARED = 2
MAX_ALONE = 3


@dataclass(slots=True)
class _Suspect:
    failures: int = 0  # at which it was in flight
    company: int | None = None  # how many may be in flight with it, itself included
    alone: list[str] = field(default_factory=list)  # the members that failed while it was alone


class Suspects:
    """The inputs that were in flight at a failure and have not succeeded since.

    Example:
        >>> suspects = Suspects()
        >>> for member in ("generator 0", "generator 1"):
        ...     counts = suspects.failed(member, ["p1", "p2", "p3"])
        >>> suspects.succeeded("generator 0", "p3")
        >>> [suspects.company(name) for name in ("p1", "p2", "p3")]
        [2, 2, None]
        >>> counts = suspects.failed("generator 0", ["p1", "p2"])
        >>> for member in ("generator 0", "generator 1", "generator 2"):
        ...     counts = suspects.failed(member, ["p1"])
        >>> suspects.is_given_up("p1")
        True
    """

    def __init__(self) -> None:
        self._suspects: dict[str, _Suspect] = {}
        self._excused: dict[str, frozenset[str]] = {}  # by member: whose failures did not count

    def failed(self, member: str, inputs: Iterable[str]) -> bool:
        """A member failed with these inputs in flight; returns whether it counts against it."""
        names = frozenset(inputs)
        suspects = [self._suspects.setdefault(name, _Suspect()) for name in names]
        known = all(one.failures for one in suspects)
        halved = all(one.company is not None and len(names) <= one.company for one in suspects)
        for one in suspects:
            one.failures += 1
            if one.failures >= MAX_SHARED:
                one.company = (len(names) + 1) // 2
        if len(names) == 1:
            suspects[0].alone.append(member)
        elif not halved:
            return True
        if known and names <= self._excused.get(member, names):
            self._excused[member] = names
            return False
        return True

    def succeeded(self, member: str, name: str) -> None:
        """A member replied to a call with this input."""
        self._excused.pop(member, None)
        if not self.is_given_up(name):
            self._suspects.pop(name, None)

    def company(self, name: str) -> int | None:
        """How many inputs may be in flight on a member with this one, itself included.

        None: any number. Else all of them are suspects.
        """
        return self._suspects[name].company if name in self._suspects else None

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
