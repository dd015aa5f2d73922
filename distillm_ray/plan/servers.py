"""The processes of a simulated run, each a server whose work lasts as long as its stage times say.

Work is measured in seconds at full speed; how fast it goes is decided by who shares the machine.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Literal, Protocol, TypeAlias

from distillm_ray.plan.stages import GenerationTimes, ScoringTimes
from distillm_ray.types import Demand, Rollout

Role: TypeAlias = Literal["learner", "generator", "scorer"]
ROLES: tuple[Role, ...] = ("learner", "generator", "scorer")


class Server(Protocol):
    """A process with work. Work is measured in seconds at full speed."""

    role: Role
    threads: int

    @property
    def remaining(self) -> float:
        """Until something happens in it; infinite where it has nothing to do."""
        ...

    def work(self, seconds: float) -> None:
        """Do so much of it, at most what remains, and report what is done."""
        ...


class Rank:
    """One rank of the learner: one piece of work after the other."""

    role: Role = "learner"

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._left = 0.0

    def give(self, seconds: float) -> None:
        """Add work to what is left."""
        self._left += seconds

    @property
    def idle(self) -> bool:
        return self._left == 0.0

    @property
    def remaining(self) -> float:
        return self._left or math.inf

    def work(self, seconds: float) -> None:
        self._left = 0.0 if seconds >= self._left * (1.0 - 1e-12) else self._left - seconds


class Generator:
    """An engine that gives every request in flight a token at a time."""

    role: Role = "generator"

    def __init__(
        self,
        times: GenerationTimes,
        threads: int,
        *,
        max_requests: int,
        keep_in_flight: bool,
        finished: Callable[[Demand, int], None],
    ) -> None:
        self.threads = threads
        self._times = times
        self._max_requests = max_requests
        self._keep_in_flight = keep_in_flight
        self._finished = finished
        self._waiting: deque[tuple[Demand, int]] = deque()
        self._loads = 0  # weights that wait to be taken
        self._blocking = 0.0  # reading prompts and weights, while no token is written
        self._left: dict[int, float] = {}  # tokens, by ordinal
        self._requests: dict[int, tuple[Demand, int]] = {}

    @property
    def num_requests(self) -> int:
        return len(self._waiting) + len(self._left)

    def request(self, demand: Demand, num_tokens: int) -> None:
        """Respond with so many tokens when there is a place."""
        self._waiting.append((demand, num_tokens))
        self._admit()

    def load(self) -> None:
        """Take new weights, at once or when all requests in flight have ended."""
        self._loads += 1
        self._admit()

    def _admit(self) -> None:
        if self._loads and (self._keep_in_flight or not self._left):
            self._blocking += self._loads * self._times.load
            self._loads = 0
        if self._loads:
            return
        while self._waiting and len(self._left) < self._max_requests:
            demand, num_tokens = self._waiting.popleft()
            self._left[demand.ordinal] = float(num_tokens)
            self._requests[demand.ordinal] = demand, num_tokens
            self._blocking += self._times.prompt_token * len(demand.prompt_ids)

    @property
    def _token_seconds(self) -> float:
        """An engine's step with what is in flight now."""
        return self._times.engine_step + self._times.token * len(self._left)

    @property
    def remaining(self) -> float:
        if self._blocking:
            return self._blocking
        return min(self._left.values()) * self._token_seconds if self._left else math.inf

    def work(self, seconds: float) -> None:
        if self._blocking:
            done = seconds >= self._blocking * (1.0 - 1e-12)
            self._blocking = 0.0 if done else self._blocking - seconds
            return
        tokens = seconds / self._token_seconds
        ended = [ordinal for ordinal, left in self._left.items() if left - tokens < 1e-9 * left]
        for ordinal in self._left:
            self._left[ordinal] -= tokens
        for ordinal in ended:
            del self._left[ordinal]
        self._admit()
        for ordinal in ended:
            self._finished(*self._requests.pop(ordinal))


class Scorer:
    """Forward passes over as many whole sequences as fit."""

    role: Role = "scorer"

    def __init__(
        self,
        times: ScoringTimes,
        threads: int,
        *,
        max_tokens: int,
        finished: Callable[[Rollout], None],
    ) -> None:
        self.threads = threads
        self._times = times
        self._max_tokens = max_tokens
        self._finished = finished
        self._queue: deque[Rollout] = deque()
        self._batch: list[Rollout] = []
        self._left = 0.0

    @property
    def num_requests(self) -> int:
        return len(self._queue) + len(self._batch)

    def request(self, rollout: Rollout) -> None:
        """Queue a sequence for the passes that `begin` starts."""
        self._queue.append(rollout)

    def begin(self) -> None:
        """Start a pass over what is queued, unless one is running."""
        if self._batch or not self._queue:
            return
        tokens = 0
        left: deque[Rollout] = deque()
        for rollout in self._queue:
            if self._batch and tokens + rollout.num_tokens > self._max_tokens:
                left.append(rollout)
            else:
                self._batch.append(rollout)
                tokens += rollout.num_tokens
        self._queue = left
        self._left = self._times.batch + self._times.token * tokens

    @property
    def remaining(self) -> float:
        return self._left if self._batch else math.inf

    def work(self, seconds: float) -> None:
        self._left -= seconds
        if self._left > 1e-12 * seconds:
            return
        batch, self._batch = self._batch, []
        for rollout in batch:
            self._finished(rollout)
