"""Exclusive use of a run directory in a store: an object with its owner, renewed while it works.

pyarrow cannot put an object on the condition that there is none, so the lease is written and read
back: of two jobs that begin within the same moment the later writer keeps it, and the other sees
that when it reads back, at its next renewal, or before its next checkpoint is complete. It writes
no manifest after that.

All ages are differences of times of the store's own clock.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from distillm_ray.errors import RunDirectoryError, StoreError
from distillm_ray.remote.store import RemoteDirectory

LEASE_FILE = "lease.json"
RENEWAL_S = 20.0
EXPIRY_S = 120.0  # without a renewal, the owner counts as gone
SETTLE_S = 1.0  # after which another job's write would be seen

_PROBE = ".lease-probe-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """A job that works in a run directory."""

    token: str
    host: str
    boot: str  # of the host's kernel, and the namespace of its process numbers
    pid: int

    @classmethod
    def this_process(cls) -> Owner:
        """A new owner."""
        return cls(token=uuid.uuid4().hex, host=socket.gethostname(), boot=_boot(), pid=os.getpid())

    @property
    def has_died_here(self) -> bool:
        """Whether it ran on this machine since its start, and runs no longer."""
        return self.boot == _boot() and not Path("/proc", str(self.pid)).exists()


def owner_in(directory: RemoteDirectory) -> Owner | None:
    """Who holds the lease; None if nobody does."""
    content = directory.read(LEASE_FILE)
    try:
        return Owner(**json.loads(content)) if content is not None else None
    except (ValueError, TypeError) as error:
        raise StoreError(
            f"{directory.address.child(LEASE_FILE)} is not a lease ({error}): remove it if no job"
            " is running there"
        ) from error


def check_owner(directory: RemoteDirectory, token: str) -> None:
    """Raise if another job has taken the directory.

    Raises:
        RunDirectoryError: it has.
    """
    found = owner_in(directory)
    if found is None or found.token != token:
        by = f"by a job on {found.host}" if found is not None else "away"
        raise RunDirectoryError(
            f"run.directory: the lease of {directory.address} was taken {by} while this job was"
            " running; it ends, and what the other one writes stays"
        )


class Lease:
    """Holds a run directory until `release`. A thread renews it; `check` says if it was lost."""

    def __init__(self, directory: RemoteDirectory) -> None:
        """Take the lease.

        Raises:
            RunDirectoryError: another job holds it.
            StoreError: the store cannot be used.
        """
        self._directory = directory
        self.owner = Owner.this_process()
        self._refuse_living_owner()
        self._write()
        time.sleep(SETTLE_S)
        self._failure: RunDirectoryError | StoreError | None = None
        self._renewed = time.monotonic()
        self._end = threading.Event()
        check_owner(directory, self.owner.token)
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")
        self._thread.start()

    def check(self) -> None:
        """Raise if the lease was lost.

        Raises:
            RunDirectoryError: another job has it.
            StoreError: it could not be renewed for too long.
        """
        if self._failure is not None:
            raise self._failure

    def release(self) -> None:
        """Give the lease back, if it is this job's."""
        self._end.set()
        self._thread.join()
        if self._failure is None:
            check_owner(self._directory, self.owner.token)
            self._directory.delete(LEASE_FILE)

    def _refuse_living_owner(self) -> None:
        found = owner_in(self._directory)
        if found is None or found.has_died_here:
            return
        probe = f"{_PROBE}{self.owner.token}"
        self._directory.write(probe, b"now")
        objects = self._directory.files()
        self._directory.delete(probe)
        if LEASE_FILE not in objects:
            return
        age_s = (objects[probe].modified_ns - objects[LEASE_FILE].modified_ns) / 1e9
        if age_s < EXPIRY_S:
            raise RunDirectoryError(
                f"run.directory: a job on {found.host} (process {found.pid}) is running in"
                f" {self._directory.address}; it was there {max(age_s, 0):.0f} s ago. Wait until it"
                f" ends (if it was killed: {EXPIRY_S - age_s:.0f} s), or set run.directory to a new"
                " one to start another run"
            )

    def _write(self) -> None:
        self._directory.write(LEASE_FILE, json.dumps(asdict(self.owner)).encode())

    def _renew(self) -> None:
        while not self._end.wait(RENEWAL_S) and self.renew():
            pass

    def renew(self) -> bool:
        """Say that this job goes on; False if it must not."""
        try:
            check_owner(self._directory, self.owner.token)
            self._write()
            self._renewed = time.monotonic()
        except RunDirectoryError as error:
            self._failure = error
        except StoreError as error:
            if time.monotonic() - self._renewed > EXPIRY_S - RENEWAL_S:
                self._failure = error
        return self._failure is None


def _boot() -> str:
    kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{kernel} {os.readlink('/proc/self/ns/pid')}"  # containers share the kernel
