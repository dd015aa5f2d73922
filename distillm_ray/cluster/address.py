"""A quick check whether a Ray cluster listens at an address."""

from __future__ import annotations

import os
import socket

_TIMEOUT_S = 5.0
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_HTTP2_SETTINGS = 4  # type of the frame with which a server has to begin; the fourth byte says it


def knock(address: str) -> None:
    """Fail in seconds where there is no cluster: `ray.init` would try for minutes.

    Ray speaks gRPC over HTTP/2, so a server that does not reply in HTTP/2 is not Ray's. With TLS
    only the connection is tried.

    Raises:
        OSError: nothing listens there, or it is not a Ray cluster.
        ValueError: the port is not a number, or the address is that of a dashboard.
    """
    if address.startswith(("http://", "https://")):
        raise ValueError(
            "a Ray cluster's address is HOST:PORT, and this is a dashboard's, which only `ray job"
            " submit` takes; `ray start --head` prints both"
        )
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return
    with socket.create_connection((host, int(port)), timeout=_TIMEOUT_S) as connection:
        if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
            _greet(connection)


def _greet(connection: socket.socket) -> None:
    try:
        connection.sendall(_HTTP2_HELLO)
        reply = connection.recv(4)
    except TimeoutError as error:
        raise TimeoutError(
            f"something listens there but sends nothing for {_TIMEOUT_S:g} s: it hangs, or it is"
            " not a Ray cluster"
        ) from error
    if len(reply) < 4 or reply[3] != _HTTP2_SETTINGS:
        raise ConnectionError(
            "something listens there that is not a Ray cluster; `ray start --head` prints the"
            " cluster's port, 6379 by default"
        )
