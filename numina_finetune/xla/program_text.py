"""The same program has the same text: HLO modules as bytes in which nothing is left to chance.

A module is a protocol buffer, and protocol buffers write the entries of a map in an order that differs from process to
process. The attributes of instructions are such maps; here their entries are put in order.
"""

from __future__ import annotations

from collections.abc import Iterator

_COMPUTATIONS, _INSTRUCTIONS, _ATTRIBUTES = 3, 2, 68
"""Numbers of the fields: of the module, of a computation, of an instruction."""
_ATTRIBUTES_TAG = b"\xa2\x04"
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def canonical(module: bytes) -> bytes:
    """The module with every instruction's attributes in order; what is no module comes back as it is."""
    try:
        return b"".join(_ordered(module, (_COMPUTATIONS, _INSTRUCTIONS, _ATTRIBUTES)))
    except (ValueError, IndexError):
        return module


def _ordered(message: bytes, path: tuple[int, ...]) -> Iterator[bytes]:
    """Pieces of the message, in which the map that the path leads to is in order. Lengths do not change by it."""
    if not path:
        yield from sorted(message[start:end] for _, start, _, end in _fields(message))
        return
    for number, start, content, end in _fields(message):
        if number == path[0] and _ATTRIBUTES_TAG in message[start:end]:
            yield message[start:content]
            yield from _ordered(message[content:end], path[1:])
        else:
            yield message[start:end]


def _fields(message: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Each field's number, and where its tag, its content and the next field begin."""
    place = 0
    while place < len(message):
        start = place
        tag, place = _varint(message, place)
        kind = tag & 7
        if kind == _BYTES:
            length, place = _varint(message, place)
            content, place = place, place + length
        elif kind == _VARINT:
            content = place
            _, place = _varint(message, place)
        elif kind in (_FIXED64, _FIXED32):
            content, place = place, place + (8 if kind == _FIXED64 else 4)
        else:
            raise ValueError(f"no protocol buffer: wire type {kind}")
        if place > len(message):
            raise ValueError("cut off")
        yield tag >> 3, start, content, place


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
