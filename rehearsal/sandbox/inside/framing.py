"""Messages between processes: four bytes of length, then one JSON object.

Whoever reads sets the largest message that it takes, so a writer that lies about a length, floods or sends rubbish
makes an error and nothing else.
"""

from __future__ import annotations

import json
import os
from typing import Any

Message = dict[str, Any]

HEAD = 4
"""Bytes of a length, most significant first."""


class FramingError(Exception):
    """What came is not a message."""


def pack(message: Message) -> bytes:
    """A message as bytes. Lone surrogates survive, because JSON escapes them."""
    body = json.dumps(message).encode("ascii")
    return len(body).to_bytes(HEAD, "big") + body


class Unpacker:
    """Cuts a stream of bytes into messages.

    Args:
        largest: bytes of a message; more is an error as soon as its length is read.
    """

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that these bytes complete.

        Raises:
            FramingError: for a message that is too long or is no JSON object.
        """
        self._buffer += data
        found = []
        while len(self._buffer) >= HEAD:
            length = int.from_bytes(self._buffer[:HEAD], "big")
            if length > self.largest:
                raise FramingError(f"a message of {length} bytes where {self.largest} are allowed")
            if len(self._buffer) < HEAD + length:
                break
            body = bytes(self._buffer[HEAD : HEAD + length])
            del self._buffer[: HEAD + length]
            found.append(_parsed(body))
        return found


def _parsed(body: bytes) -> Message:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise FramingError("a message that is not JSON") from error
    if not isinstance(message, dict):
        raise FramingError("a message that is not an object")
    return message


def read_message(fd: int) -> Message | None:
    """The next message of a blocking descriptor whose writer is trusted; None at its end."""
    head = _exactly(fd, HEAD)
    body = _exactly(fd, int.from_bytes(head, "big")) if head else None
    return None if body is None else _parsed(body)


def write_all(fd: int, data: bytes) -> None:
    """Write everything to a blocking descriptor."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _exactly(fd: int, count: int) -> bytes | None:
    parts = []
    while count:
        part = os.read(fd, min(count, 1 << 20))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
