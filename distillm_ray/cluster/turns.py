"""Whose turn it is on devices that generators and learners share: a pure state machine.

The turns are numbered. Even ones are the generators', who have the first; odd ones the learners'.

    generators' turn ── every rank asks, and no work is left ──► engines fall asleep ──┐
          ▲                                                                            ▼
    engines wake, if there is work ◄── every rank has lent ◄────────────────── learners' turn

Each rank has a position: the number of the turn that it asks for or has (odd), or that it leaves to
the generators (even). A rank that is quicker than another one waits for it here, so that no
collective is needed around a turn.

Nobody waits forever. While the ranks ask, no step ends and no demand opens, so the generators' work
ends. The ranks lend whenever they wait for what only generators can give.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class Engines(StrEnum):
    """What the engines of all generators do."""

    AWAKE = "awake"
    FALLING_ASLEEP = "falling asleep"
    ASLEEP = "asleep"
    WAKING = "waking"


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """The state. Every event returns the next one.

    Example:
        >>> turns = Turns.of(ranks=1).arrives().enters().asks(rank=0)  # while a response is made
        >>> turns.learners_hold, str(turns.engines)
        (False, 'awake')
        >>> turns = turns.leaves()
        >>> turns.granted(0), str(turns.engines)
        (False, 'falling asleep')
        >>> turns = turns.slept()
        >>> turns.granted(0), str(turns.engines)
        (True, 'asleep')
        >>> turns = turns.arrives()  # a demand, which has to wait
        >>> turns.admits, str(turns.engines)
        (False, 'asleep')
        >>> turns = turns.lends(rank=0).woke()  # the learner waits for samples
        >>> turns.admits, turns.granted(0)
        (True, False)
    """

    positions: tuple[int, ...]  # of the learners' ranks; none: the generators have all turns
    turn: int = 0
    engines: Engines = Engines.AWAKE
    waiting: int = 0  # pieces of the generators' work that are not admitted yet
    running: int = 0  # those that are
    hurried: bool = False  # the ranks that ask wait for the work that runs only
    attempt: int = 0  # of the learners' group; a later one has taken the place of those before

    @classmethod
    def of(cls, *, ranks: int) -> Turns:
        """The start: the generators have the devices."""
        return cls(positions=(0,) * ranks)

    @property
    def learners_hold(self) -> bool:
        """Whether it is the learners' turn. The engines are asleep then."""
        return self.turn % 2 == 1

    def granted(self, rank: int) -> bool:
        """Whether the rank may use its device."""
        return self.learners_hold and self.positions[rank] == self.turn

    @property
    def admits(self) -> bool:
        """Whether the generators' work may start."""
        gives_way = self.hurried and self._all_ask
        return not self.learners_hold and self.engines is Engines.AWAKE and not gives_way

    # ---- events: the learners --------------------------------------------------------------------

    def asks(self, *, rank: int, attempt: int = 0, hurried: bool = False) -> Turns:
        """A rank asks for the next turn of the learners; again while it waits changes nothing.

        The first call of a later attempt ends what ranks of an earlier one have asked for. If they
        died in their turn, it goes to their successors. Calls of an earlier attempt are ignored.

        Args:
            hurried: do not wait for work that has not started.
        """
        if attempt < self.attempt:
            return self
        state = self
        if attempt > self.attempt:
            away = self.turn - self.turn % 2
            positions = (away,) * len(self.positions)
            state = replace(self, attempt=attempt, positions=positions, hurried=False)
        state = replace(state, hurried=state.hurried or hurried)
        return state._moved(rank, odd=True)

    def lends(self, *, rank: int, attempt: int = 0) -> Turns:
        """A rank has freed what it can of its device, and waits for the generators."""
        return self if attempt < self.attempt else self._moved(rank, odd=False)

    def ended(self) -> Turns:
        """The learners have ended: all turns are the generators' from now on."""
        return replace(self, turn=self.turn + self.turn % 2, positions=(), hurried=False)._settled()

    # ---- events: the generators ------------------------------------------------------------------

    def arrives(self) -> Turns:
        """A piece of work wants to start: a request, a weight update, the start of an engine."""
        return replace(self, waiting=self.waiting + 1)._settled()

    def withdraws(self) -> Turns:
        """A piece of work that waited is not wanted any more."""
        return replace(self, waiting=self.waiting - 1)._settled()

    def enters(self) -> Turns:
        """A piece of work that waited starts."""
        assert self.admits
        return replace(self, waiting=self.waiting - 1, running=self.running + 1)._settled()

    def leaves(self) -> Turns:
        """A piece of work has ended."""
        return replace(self, running=self.running - 1)._settled()

    def slept(self) -> Turns:
        """Every engine that was falling asleep is asleep or gone."""
        assert self.engines is Engines.FALLING_ASLEEP
        return replace(self, engines=Engines.ASLEEP)._settled()

    def woke(self) -> Turns:
        """Every engine that was waking is awake or gone."""
        assert self.engines is Engines.WAKING
        return replace(self, engines=Engines.AWAKE)._settled()

    # ---- inside ----------------------------------------------------------------------------------

    @property
    def _all_ask(self) -> bool:
        """In the generators' turn: whether every rank asks for the next one."""
        return bool(self.positions) and min(self.positions) > self.turn

    def _moved(self, rank: int, *, odd: bool) -> Turns:
        position = self.positions[rank]
        if position % 2 != odd:
            position += 1
        positions = (*self.positions[:rank], position, *self.positions[rank + 1 :])
        return replace(self, positions=positions)._settled()

    def _settled(self) -> Turns:
        """The state after all that follows at once."""
        state = self
        if state.learners_hold and min(state.positions) > state.turn:
            state = replace(state, turn=state.turn + 1)
        if state.learners_hold:
            return state
        idle = state.running == 0 and (state.waiting == 0 or state.hurried)
        match state.engines:
            case Engines.AWAKE if state._all_ask and idle:
                return replace(state, engines=Engines.FALLING_ASLEEP)
            case Engines.ASLEEP if state._all_ask:
                return replace(state, turn=state.turn + 1, hurried=False)
            case Engines.ASLEEP if state.waiting > 0:
                return replace(state, engines=Engines.WAKING)
            case _:
                return state
