"""Model-written Python, run so that it can harm nobody: programs, and interpreters that keep their state.

:func:`run_program` runs a program once; :class:`InterpreterPool` hands out an interpreter for each episode;
:class:`RemoteSandbox` does both at a service, which then has the work and the risk. :func:`available` says how well a
sandbox holds on this system.
"""

from rehearsal.sandbox.calls import Interpreter
from rehearsal.sandbox.interpreter import InterpreterPool
from rehearsal.sandbox.isolation import Isolation
from rehearsal.sandbox.limits import CallResult, Limits, Outcome, ProgramResult
from rehearsal.sandbox.probing import available, require, strongest
from rehearsal.sandbox.program import ProgramRunner
from rehearsal.sandbox.remote import RemoteSandbox, service_at
from rehearsal.sandbox.run import run_program

__all__ = [
    "CallResult",
    "Interpreter",
    "InterpreterPool",
    "Isolation",
    "Limits",
    "Outcome",
    "ProgramResult",
    "ProgramRunner",
    "RemoteSandbox",
    "available",
    "require",
    "run_program",
    "service_at",
    "strongest",
]
