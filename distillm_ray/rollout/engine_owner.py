"""Ends vLLM's processes when the generator that owns them is gone.

    generator ──► engine core ──► workers, if `tensor_parallel` > 1

vLLM notices no SIGKILL of the generator: core and workers would keep their memory. Our code runs
where the model is, in the core or in the workers below it. It watches both processes above it, and
a worker ends the core as well. A generator that is killed while its engine starts is noticed when
the first worker is up.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from contextlib import suppress

import psutil

_OWNER = "DISTILLM_RAY_ENGINE_OWNER"  # the generator's process id, inherited by the engine's
_POLL_S = 1.0


def own_engine() -> None:
    """Make this process the owner of the engines that it starts from now on."""
    os.environ[_OWNER] = str(os.getpid())


def end_with_owner() -> None:
    """End this process, and the core above it, when the owner or the core ends. Returns at once.

    Does nothing in the owner itself.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        arguments = (int(os.environ[_OWNER]), parent.pid)
        threading.Thread(target=_watch, args=arguments, daemon=True, name="engine owner").start()


def _watch(owner_pid: int, parent_pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(parent_pid)  # knows it from a later process with the same id
        with suppress(psutil.NoSuchProcess):
            owner = psutil.Process(owner_pid)
            while _lives(owner) and _lives(parent):
                time.sleep(_POLL_S)
        if parent_pid != owner_pid:
            parent.kill()
    os._exit(1)


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
