"""CPU-seconds and memory of a process tree by role, from the operating system's accounting.

Ray gives its actors' processes titles such as `ray::GeneratorActor`, vLLM calls its engine
`VLLM::EngineCore`. A process counts for the role that its newest title names, or for its parent's.
"""

from __future__ import annotations

import bisect
import contextlib
import threading
import time
from collections import defaultdict
from types import TracebackType

import psutil

INTERVAL_S = 0.5
COORDINATION = "coordination"
# In the order in which they are looked for. What else there is coordinates: driver, Ray, buffer.
ROLE_OF_TITLE = {
    "GeneratorActor": "generators",
    "VLLM": "generators",
    "ScorerActor": "scorers",
    "TrainWorker": "learners",
    "TargetStoreActor": "target stores",
}


class Accounting:
    """Reads the tree below this process twice a second while the block runs.

    What a process used after its last reading is lost, at most half a second of it.
    """

    def __init__(self) -> None:
        self._times: list[float] = []
        self._cpu: list[dict[str, float]] = []  # by role, at each of these times
        self._seconds: dict[int, float] = {}  # by process, living or not
        self._roles: dict[int, str] = {}
        self.peak_bytes: dict[str, int] = defaultdict(int)
        """By role: the most memory that its processes held together, shared pages left out."""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Accounting:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def between(self, start: float, end: float) -> dict[str, float]:
        """CPU-seconds by role between two times of `time.time()`, interpolated."""
        first, last = self._at(start), self._at(end)
        return {role: last[role] - first.get(role, 0.0) for role in last}

    def _at(self, moment: float) -> dict[str, float]:
        index = bisect.bisect_left(self._times, moment)
        if index == len(self._times):
            return self._cpu[-1]
        if index == 0:
            return self._cpu[0]
        before, after = self._times[index - 1], self._times[index]
        share = (moment - before) / (after - before)
        low, high = self._cpu[index - 1], self._cpu[index]
        return {
            role: low.get(role, 0.0) + share * (used - low.get(role, 0.0))
            for role, used in high.items()
        }

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL_S):
            self._read()
        self._read()

    def _read(self) -> None:
        held: dict[str, int] = defaultdict(int)
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error), process.oneshot():
                role = self._role(process)
                used, memory = process.cpu_times(), process.memory_info()
                self._seconds[process.pid] = used.user + used.system
                held[role] += memory.rss - getattr(memory, "shared", 0)
        for role, nbytes in held.items():
            self.peak_bytes[role] = max(self.peak_bytes[role], nbytes)
        cpu: dict[str, float] = defaultdict(float)
        for pid, seconds in self._seconds.items():
            cpu[self._roles[pid]] += seconds
        self._times.append(time.time())
        self._cpu.append(dict(cpu))

    def _role(self, process: psutil.Process) -> str:
        title = " ".join(process.cmdline())
        found = next((role for part, role in ROLE_OF_TITLE.items() if part in title), None)
        # A process that Ray started and no actor has yet; its parent coordinates.
        found = found or self._roles.get(process.ppid(), COORDINATION)
        self._roles[process.pid] = found
        return found
