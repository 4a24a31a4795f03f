"""Repair: small programs with bugs and failing tests, made from a seed and run in a sandbox."""

from rehearsal.environments.repair.bugs import Bug, possible_bugs, with_bugs
from rehearsal.environments.repair.edits import EditError, apply_edit, edits_between
from rehearsal.environments.repair.game import Repair
from rehearsal.environments.repair.programs import Program, draw_program

__all__ = [
    "Bug",
    "EditError",
    "Program",
    "Repair",
    "apply_edit",
    "draw_program",
    "edits_between",
    "possible_bugs",
    "with_bugs",
]
