"""Messages over a stream: four bytes that give the length, then so many bytes."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("!I")
LONGEST = 1 << 26
"""Bytes; what claims to be longer is no message."""


class WireError(Exception):
    """The other side does not keep to the protocol, or has gone in the middle of a message."""


def pack(payload: bytes) -> bytes:
    """The message as it is sent.

    Raises:
        WireError: it is too long.
    """
    if len(payload) > LONGEST:
        raise WireError(f"a message of {len(payload)} bytes is too long")
    return _LENGTH.pack(len(payload)) + payload


def send(connection: socket.socket, value: Any) -> None:
    """Send ``value`` as JSON."""
    connection.sendall(pack(json.dumps(value).encode()))


def receive(connection: socket.socket) -> Any:
    """The next message; None where the other side has closed its end.

    Raises:
        WireError: it ends early, or is no JSON.
        TimeoutError: the socket has a time limit, and nothing came within it.
    """
    head = _exactly(connection, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    payload = _exactly(connection, length) if length <= LONGEST else None
    if payload is None:
        raise WireError("a message ends early, or is too long")
    try:
        return json.loads(payload)
    except ValueError as error:
        raise WireError("a message is no JSON") from error


def _exactly(connection: socket.socket, count: int) -> bytes | None:
    """``count`` bytes, or None where the stream ends before them."""
    parts = []
    while count:
        part = connection.recv(min(count, 1 << 20))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
