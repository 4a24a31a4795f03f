"""An interpreter that lives by repetition, for a service that runs programs and keeps none of them.

The host sends all calls so far. They are made again, in silence, and then the new one is made. What that one writes is
the output of this program; on the stream of errors stand lines of our own: :data:`READY`, :data:`BEGUN` as the new call
begins, and at last what came of it, as JSON. Where it asks the host something, the question is what came of it, and the
host sends everything again, with the answer. Code that writes such lines itself has lied about its own call, no other.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from rehearsal.sandbox.inside import guest
from rehearsal.sandbox.inside.framing import Message, write_all

READY, BEGUN = "ready", "begun"
_LARGEST = 1_000_000
"""Bytes of a value or a question: services keep a MiB of a stream (SandboxFusion's ``sandbox/runners/base.py``)."""


def main(seed: int) -> None:
    """Make the calls that stand in standard input, and end this process.

    Each has what a warden gives a guest, and ``answers``: the questions that it asked, each with its answer; null where
    nobody answers it any.

    Args:
        seed: of the module ``random``, so that it goes the same way each time.
    """
    calls = json.load(sys.stdin)
    output, report = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nowhere, number)
    random.seed(seed)
    guest.make_home(tempfile.mkdtemp(dir=os.getcwd()))  # the service removes its folder, and this one with it
    answers: Iterator[Any] | None = None
    new = False

    def say(text: str) -> None:
        write_all(report, f"\n{text}\n".encode("ascii"))

    def exchange(text: str) -> Message:
        if answers is None:
            return {"error": "nobody answers questions here"}
        known = next(answers, None)
        if known is not None and known[0] == text:
            return dict(known[1])
        question = json.dumps({"ask": text})
        if known is not None or not new:
            question = json.dumps({"failed": "it asks something else when it is run again"})
        elif len(question) > _LARGEST:
            question = json.dumps({"failed": f"it asks more than {_LARGEST} bytes at once"})
        say(question)
        os._exit(0)

    space = guest.begin(exchange)
    say(READY)
    for number, call in enumerate(calls, 1):
        new = number == len(calls)
        answers = None if call["answers"] is None else iter(call["answers"])
        if new:
            os.dup2(output, 1)
            os.dup2(output, 2)
            say(BEGUN)
        answer = guest.answered(call, space, _LARGEST)
        if new:
            say(json.dumps(answer))
    os._exit(0)
