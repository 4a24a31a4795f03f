"""Model-written Python, run so that it can harm nobody: programs, and interpreters that keep their state.

:func:`run_program` runs a program once; :class:`InterpreterPool` hands out an interpreter for each episode;
:class:`RemoteSandbox` leaves both the work and the risk to a service. :func:`available` says how well a sandbox holds
on this system.
"""

from rehearsal.sandbox.interpreter import Interpreter, InterpreterPool
from rehearsal.sandbox.isolation import Isolation
from rehearsal.sandbox.limits import CallResult, Limits, Outcome, ProgramResult
from rehearsal.sandbox.probing import available, require, strongest
from rehearsal.sandbox.program import ProgramRunner
from rehearsal.sandbox.remote import RemoteSandbox
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
    "strongest",
]
