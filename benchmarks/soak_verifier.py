"""The verifier of the soak, which breaks when the answer says so. A module of its own: processes start soon with it."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field

from rehearsal.rewards.mathematics import LastNumber
from rehearsal.rewards.verifier import Score, Task

FAULTS: dict[str, tuple[str, ...]] = {
    "verifier hangs": ("timeout",),
    "verifier dies": ("crash",),
    "verifier raises": ("error",),
    "verifier fills the memory": ("error",),
    # Its child keeps the pipe open, so that the end of the process may show only when its time is over.
    "verifier dies and leaves a child": ("timeout", "crash"),
}
"""By name: the kinds of failure that may come of it."""


class MuteError(Exception):
    """Cannot even be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


@dataclass
class Moody:
    """The last number of the answer, unless the answer begins with the name of a fault and a colon."""

    name: str = "moody"
    inner: LastNumber = field(default_factory=LastNumber)

    def verify(self, completion: str, task: Task) -> Score:
        match completion.partition(":")[0]:
            case "verifier hangs":
                time.sleep(1000)
            case "verifier dies":
                os.kill(os.getpid(), signal.SIGKILL)
            case "verifier raises":
                raise MuteError
            case "verifier fills the memory":
                bytearray(64 << 30)
            case "verifier dies and leaves a child":
                if os.fork() == 0:
                    time.sleep(1000)
                    os._exit(0)
                os._exit(5)
        return self.inner.verify(completion, task)
