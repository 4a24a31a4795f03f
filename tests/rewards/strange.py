"""Verifiers that misbehave, importable by the processes of a pool."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from rehearsal.rewards.verifier import Score, Task, VerificationError


@dataclass(frozen=True)
class Strange:
    """Does what the completion says; anything else is scored by its length."""

    name: str = "strange"

    def verify(self, completion: str, task: Task) -> Score:
        match completion.split():
            case ["sleep", seconds]:
                time.sleep(float(seconds))
            case ["regex"]:
                re.fullmatch("(a+)+b", "a" * 40)  # holds Python's lock
            case ["native"]:
                # Python's own library: neither Python's lock nor a signal handler gets a chance.
                ctypes.pythonapi.PyRun_SimpleString(b"while True: pass")
            case ["exit"]:
                os._exit(3)
            case ["kill"]:
                os.kill(os.getpid(), signal.SIGKILL)
            case ["segfault"]:
                ctypes.string_at(0)
            case ["leave"]:
                sys.exit(0)
            case ["raise"]:
                raise ZeroDivisionError("as asked")
            case ["cannot"]:
                raise VerificationError("The verifier cannot say.")
            case ["nan"]:
                return Score(float("nan"), False)
            case ["nothing"]:
                return None  # type: ignore[return-value]
            case ["memory"]:
                return Score(float(len(b"x" * (1 << 36))), True)
            case ["print"]:
                print("noise between the messages")
                os.write(1, b"more noise")
            case ["unpicklable"]:
                return Score(1.0, True, {"x": 1.0}, evidence=lambda: "x")  # type: ignore[arg-type]
            case ["child"]:
                child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
                with open(str(task.reference), "w") as file:
                    file.write(str(child.pid))
                time.sleep(600)
            case ["orphan"]:
                child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
                with open(str(task.reference), "w") as file:
                    file.write(str(child.pid))
                os._exit(3)
        return Score(float(len(completion)), len(completion) > 3, {"length": float(len(completion))}, completion)


@dataclass(frozen=True)
class Broken:
    """Cannot be warmed up."""

    name: str = "broken"

    def warm_up(self) -> None:
        raise ImportError("no such library")

    def verify(self, completion: str, task: Task) -> Score:
        raise AssertionError("never called")


@dataclass(frozen=True)
class DiesAtStart:
    """Kills its process while it warms up."""

    name: str = "dies"

    def warm_up(self) -> None:
        os._exit(7)

    def verify(self, completion: str, task: Task) -> Score:
        raise AssertionError("never called")
