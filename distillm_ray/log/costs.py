"""What the roles of a run cost: readings of processes, and the ledger that adds them up. Pure.

A process reports again and again what it has used since it started. The ledger credits the increase
over its reading before to its role, so that no total falls when a process is replaced.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Role: TypeAlias = Literal[
    "driver",
    "learner",
    "orchestrator",
    "buffer",
    "generator",
    "scorer",
    "target_store",
    "log",
    "control",
    "ray",
]
"""`ray`: Ray's own processes, and its tasks and actors without a role, where the driver started
Ray. On a cluster that runs by itself they are not the run's."""

ROLES: tuple[Role, ...] = get_args(Role)
WORKERS: tuple[Role, ...] = ("learner", "generator", "scorer")
"""Roles that compute. They say how long they were busy and how many tokens they made."""

_OUT_OF_ORDER_S = 60.0
"""Readings of a process may arrive out of order. One that is younger by more than this is of
another process, to which the operating system gave the same number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleCost:
    """What the processes of a role have used, summed over them.

    Only `WORKERS` have busy seconds and tokens, and only generators and scorers a queue.

    Example:
        >>> cost = RoleCost(seconds=20.0, cpu_seconds=5.0, busy_seconds=15.0, tokens=1000)
        >>> cost.busy_share, cost.tokens_per_cpu_second
        (0.75, 200.0)
    """

    seconds: float = 0.0  # wall-clock: two processes have two in a second
    cpu_seconds: float = 0.0  # user and system, of child processes too
    gpu_seconds: float = 0.0  # devices held x seconds
    busy_seconds: float = 0.0  # with at least one call in progress; of learners: without waiting
    queue_seconds: float = 0.0  # summed over the calls that waited for a free process
    tokens: int = 0  # generated; computed by the teacher, prompts included; trained on

    @property
    def busy_share(self) -> float:
        """Of the processes' wall-clock; NaN without any."""
        return self.busy_seconds / self.seconds if self.seconds else math.nan

    @property
    def tokens_per_cpu_second(self) -> float:
        """NaN where no processor worked."""
        return self.tokens / self.cpu_seconds if self.cpu_seconds else math.nan

    def plus(self, other: RoleCost) -> RoleCost:
        """The sum of both."""
        return RoleCost(**{name: getattr(self, name) + getattr(other, name) for name in _NAMES})

    def since(self, earlier: RoleCost) -> RoleCost:
        """The use between two readings; nothing is negative."""
        return RoleCost(
            **{name: max(0, getattr(self, name) - getattr(earlier, name)) for name in _NAMES}
        )

    def rounded(self) -> RoleCost:
        """To milliseconds, for the log."""
        return RoleCost(**{name: round(getattr(self, name), 3) for name in _NAMES})


_NAMES = tuple(item.name for item in dataclasses.fields(RoleCost))


def added(one: dict[Role, RoleCost], other: dict[Role, RoleCost]) -> dict[Role, RoleCost]:
    """The sums, role by role, in the order of `ROLES`."""
    nothing = RoleCost()
    return {
        role: one.get(role, nothing).plus(other.get(role, nothing))
        for role in ROLES
        if role in one or role in other
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """A reading: what one source has used since its start.

    `source` identifies the process. What one process knows of others, such as the pool of the
    calls to its members, is a source of its own, with no `seconds`.
    """

    role: Role
    source: str
    cost: RoleCost


class CostLedger:
    """Adds up readings by role, period by period.

    Example:
        >>> ledger = CostLedger(now=0.0)
        >>> ledger.account(Usage(role="scorer", source="node:17", cost=RoleCost(cpu_seconds=3.0)))
        >>> ledger.account(Usage(role="scorer", source="node:17", cost=RoleCost(cpu_seconds=5.0)))
        >>> ledger.account(Usage(role="scorer", source="node:18", cost=RoleCost(cpu_seconds=1.0)))
        >>> seconds, costs = ledger.close(now=10.0)
        >>> seconds, costs["scorer"].cpu_seconds
        (10.0, 6.0)
    """

    def __init__(self, now: float) -> None:
        self._since = now
        self._newest: dict[str, Usage] = {}
        self._spent: dict[Role, RoleCost] = {}

    def account(self, usage: Usage) -> None:
        """Add a reading. What is seen of a process from outside gives way to what it says itself:
        `ray` to any other role.
        """
        newest = self._newest.get(usage.source)
        if newest is not None and usage.role == "ray" and newest.role != "ray":
            return
        before = RoleCost()
        if newest is not None and usage.cost.seconds > newest.cost.seconds - _OUT_OF_ORDER_S:
            before = newest.cost
        increase = usage.cost.since(before)
        self._newest[usage.source] = dataclasses.replace(usage, cost=before.plus(increase))
        self._spent = added(self._spent, {usage.role: increase})

    def open_for(self, now: float) -> float:
        """Seconds since the period began."""
        return now - self._since

    def close(self, now: float) -> tuple[float, dict[Role, RoleCost]]:
        """Length and costs of the period that ends now; the next one begins."""
        seconds, spent = now - self._since, self._spent
        self._since, self._spent = now, {}
        return round(seconds, 3), {role: cost.rounded() for role, cost in spent.items()}
