"""Run control: the small actor that every phase asks whether to go on.

It keeps the phase, a request to stop, the nodes that will be taken away, a failure that ends the
job, and what the run waits for. The driver writes the first three and reads the rest; learners read
the first three and write the rest.
"""

from __future__ import annotations

import dataclasses

import ray
from ray.actor import ActorProxy

from distillm_ray.cluster.actors import ask, beside_driver
from distillm_ray.cluster.reporter import Reporting
from distillm_ray.types import RunStatus

_WHAT = "run control"


class ControlActor(Reporting):
    """Holds a `RunStatus`.

    After a crash it starts empty. The driver repeats what it wrote with every `update`.
    """

    def __init__(self) -> None:
        self._status = RunStatus()

    @ray.method
    def update(self, phase: str, stop: bool, leaving: frozenset[str]) -> RunStatus:
        """Set what the driver decides or sees."""
        self._status = dataclasses.replace(self._status, phase=phase, stop=stop, leaving=leaving)
        return self._status

    @ray.method
    def status(self) -> RunStatus:
        """The status as it is now."""
        return self._status

    @ray.method
    def wait_for(self, what: str, waited_s: float) -> RunStatus:
        """Set what the learners wait for, if they do, and for how long they have waited so far."""
        self._status = dataclasses.replace(self._status, waiting=what, waited_s=waited_s)
        return self._status

    @ray.method
    def lose(self, nodes: frozenset[str]) -> None:
        """Report which of the leaving nodes the learners or the driver are on."""
        self._status = dataclasses.replace(self._status, losing=self._status.losing | nodes)

    @ray.method
    def fail(self, message: str) -> None:
        """Report an error that a restart does not fix. The first report is kept."""
        if self._status.failure is None:
            self._status = dataclasses.replace(self._status, failure=message)


def start_control() -> ActorProxy[ControlActor]:
    """Start the actor on the driver's node."""
    return beside_driver(ControlActor, survives=True, concurrent=False).remote()


class ControlClient:
    """The actor as a learner or the driver calls it."""

    def __init__(self, actor: ActorProxy[ControlActor]) -> None:
        self._actor = actor

    def update(self, phase: str, *, stop: bool, leaving: frozenset[str] = frozenset()) -> RunStatus:
        """Set phase, stop request and leaving nodes; returns the status. Called by the driver."""
        return ask(self._actor.update.remote(phase, stop, leaving), _WHAT)

    def status(self) -> RunStatus:
        """The status as it is now."""
        return ask(self._actor.status.remote(), _WHAT)

    def wait_for(self, what: str, waited_s: float) -> RunStatus:
        """Set what the learners wait for, and for how long they have; returns the status."""
        return ask(self._actor.wait_for.remote(what, waited_s), _WHAT)

    def lose(self, nodes: frozenset[str]) -> None:
        """Report which of the leaving nodes the learners or the driver are on."""
        ask(self._actor.lose.remote(nodes), _WHAT)

    def fail(self, message: str) -> None:
        """Report an error that a restart does not fix."""
        ask(self._actor.fail.remote(message), _WHAT)
