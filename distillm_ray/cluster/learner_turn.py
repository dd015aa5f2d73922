"""The learners' side of shared devices: a rank asks for its device and lends it while it waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray.actor import ActorProxy

from distillm_ray.cluster.actors import CALL_TIMEOUT_S, ask
from distillm_ray.cluster.control import ControlClient
from distillm_ray.cluster.orchestrator import OrchestratorActor
from distillm_ray.errors import ClusterError

_POLL_S = 2.0  # interval at which run control is asked during a wait


class OwnDevice:
    """A device that the rank shares with nobody."""

    shared = False
    held = True
    """Whether the rank may use its device."""

    def ask(self) -> None:
        """Ask for the device, and wait for it for some seconds at most."""

    def take(self) -> None:
        """Wait until the device is held."""

    def lend(self) -> None:
        """Leave the device to the generators until the next `ask`."""

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Lend it for a block that waits for the generators. All ranks do so at the same place."""
        self.lend()
        yield
        self.take()


class SharedDevice(OwnDevice):
    """A device that the rank has in the learners' turns only. It begins without.

    A rank writes a checkpoint also while it has lent its device: that only reads what it keeps.
    """

    shared = True

    def __init__(
        self,
        actor: ActorProxy[OrchestratorActor],
        control: ControlClient,
        *,
        attempt: int,
        rank: int,
        limit_s: float,
        free: Callable[[], None],
    ) -> None:
        """`limit_s`: of a wait for the device. `free` frees what the rank does not keep on it."""
        self._actor = actor
        self._control = control
        self._attempt = attempt
        self._rank = rank
        self._limit_s = limit_s
        self._free = free
        self._asked_at: float | None = None
        self.held = False

    def ask(self) -> None:
        """Ask for the device, and wait for it for some seconds at most.

        When the run ends, work that the generators have not begun is not waited for.

        Raises:
            ClusterError: the generators' work did not end within its limits, or they failed.
        """
        if self.held:
            return
        if self._asked_at is None:
            self._asked_at = time.monotonic()
        hurried = self._control.status().ends
        call = self._actor.take_device.remote(self._attempt, self._rank, hurried, _POLL_S)
        self.held = ask(call, "the turn on a shared device", timeout_s=_POLL_S + CALL_TIMEOUT_S)
        waited_s = time.monotonic() - self._asked_at
        if self.held:
            self._asked_at = None
        elif waited_s > self._limit_s:
            raise ClusterError(
                f"the generators did not give up the devices within {waited_s:.0f} s, which is more"
                " than all that they had to do may take (rollout.timeout_s,"
                " rollout.stall_timeout_s, run.startup_timeout_s)"
            )

    def take(self) -> None:
        """Wait until the device is held. Raises what `ask` does."""
        while not self.held:
            self.ask()

    def lend(self) -> None:
        """Free what can be freed, and leave the device to the generators until the next `ask`.

        Raises:
            UserError: the rank keeps more than its share.
        """
        if not self.held:
            return
        self._free()
        self.held = False
        call = self._actor.lend_device.remote(self._attempt, self._rank)
        ask(call, "the turn on a shared device")
