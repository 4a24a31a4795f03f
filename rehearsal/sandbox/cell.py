"""The host's side of a cell: requests to its warden, and what it answers."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Any

from rehearsal.sandbox.calls import Answer
from rehearsal.sandbox.inside.framing import FramingError, Message, Unpacker, pack
from rehearsal.sandbox.limits import Limits
from rehearsal.sandbox.zygote import Zygote

SECONDS_OF_GRACE = 10.0
"""How much later than the warden the host itself gives up on a call: the warden has then been ended or stopped."""
_PIECE = 1 << 16
_ROOM_FOR_A_VALUE = 1 << 26


class CellGone(Exception):
    """The cell does not answer any more, or says what no warden says."""


class Cell:
    """One cell. Not thread-safe.

    Raises:
        SandboxError: if the zygote is gone.
    """

    def __init__(self, zygote: Zygote, limits: Limits) -> None:
        self._socket = zygote.cell(limits)
        # Every byte of output may take six in JSON.
        self._unpacker = Unpacker(12 * limits.output_bytes + _ROOM_FOR_A_VALUE)

    @property
    def alive(self) -> bool:
        """Whether its warden still has its end of the socket. For a cell that has not been asked anything."""
        self._socket.setblocking(False)
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def send(self, message: Message, seconds: float = SECONDS_OF_GRACE) -> None:
        """Tell the warden something.

        Raises:
            CellGone: if it is not there, or does not read within ``seconds``.
        """
        self._socket.settimeout(seconds)
        try:
            self._socket.sendall(pack(message))
        except OSError as error:
            raise CellGone from error

    def ask(self, message: Message, seconds: float, answer: Answer | None = None) -> Message:
        """Send a request with a time limit, and wait for the result. Questions that come meanwhile are answered.

        Raises:
            CellGone: if there is no result in time, with some grace.
            Exception: what ``answer`` raises.
        """
        self.send({**message, "seconds": seconds})
        deadline = time.monotonic() + seconds + SECONDS_OF_GRACE
        while True:
            for reply in self._receive(deadline):
                if reply["said"] == "done":
                    return reply
                if answer is None:
                    self.send({"do": "answer", "error": "nobody answers questions here"})
                else:
                    self.send({"do": "answer", "text": answer(reply["text"])})

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _receive(self, deadline: float) -> list[Any]:
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            data = self._socket.recv(_PIECE)
            if not data:
                raise CellGone
            return self._unpacker.feed(data)
        except (OSError, FramingError) as error:
            raise CellGone from error
