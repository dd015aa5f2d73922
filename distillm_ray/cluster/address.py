"""The address of a Ray cluster: does anything listen there?"""

from __future__ import annotations

import socket

_CONNECT_TIMEOUT_S = 5.0


def knock(address: str) -> None:
    """Fail in seconds where nothing listens: `ray.init` would try for minutes.

    Raises:
        OSError: nothing answers there.
        ValueError: the port is no number.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
