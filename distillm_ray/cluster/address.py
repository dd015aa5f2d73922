"""The address of a Ray cluster: does one answer there?"""

from __future__ import annotations

import os
import socket

_TIMEOUT_S = 5.0
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_HTTP2_SETTINGS = 4  # type of the frame with which a server has to begin; the fourth byte says it


def knock(address: str) -> None:
    """Fail in seconds where no cluster can be: `ray.init` would try for minutes.

    Ray speaks gRPC, which is HTTP/2, so whatever answers otherwise is something else. With TLS only
    the connection is tried.

    Raises:
        OSError: nothing answers there, or not as a cluster does.
        ValueError: the port is no number, or the address is that of a dashboard.
    """
    if address.startswith(("http://", "https://")):
        raise ValueError(
            "a Ray cluster's address is HOST:PORT, and this is a dashboard's: `ray job submit`"
            " takes it, a program that joins the cluster does not; `ray start --head` says which"
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
        answer = connection.recv(4)
    except TimeoutError as error:
        raise TimeoutError(
            f"something listens there and says nothing for {_TIMEOUT_S:g} s: it hangs, or is no Ray"
            " cluster"
        ) from error
    if len(answer) < 4 or answer[3] != _HTTP2_SETTINGS:
        raise ConnectionError(
            "something listens there that is no Ray cluster; its port is the one that"
            " `ray start --head` says, 6379 unless it was told otherwise"
        )
