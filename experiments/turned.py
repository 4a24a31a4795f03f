"""Worlds that look like known ones and in which Left goes right and Right goes left.

The shipped base knows what a move does on the lake and in Sokoban: there is little left that the answers of these
environments could teach it. Here two moves of four are turned, and nobody says so; with all four an untrained policy
hardly ever succeeds, and rewards alone have nothing to begin with. All else, the splits too, is as it was.
"""

from __future__ import annotations

from typing import Any

from rehearsal.environments.frozenlake import FrozenLake
from rehearsal.environments.sokoban import Sokoban

TURNED = {"Left": "Right", "Right": "Left", "Up": "Up", "Down": "Down"}
"""Where a move goes. Its own inverse: what a plan of true moves is called is read off the same table."""


class _Turned:
    """What turned worlds share; stands before the environment in the order of classes."""

    def _act(self, action: str) -> Any:
        return super()._act(TURNED[action])  # type: ignore[misc]

    def _foreseeable(self, action: str) -> bool:
        # It follows from nothing that was shown.
        return False

    def oracle(self) -> Any:
        """The best plan, in moves as they are called here; see :meth:`TextEnv.oracle`."""
        plan = super().oracle()  # type: ignore[misc]
        return None if plan is None else [TURNED[move] for move in plan]


class TurnedLake(_Turned, FrozenLake):
    """The frozen lake with turned moves; parameters are those of :class:`FrozenLake`."""

    name = "turned_lake"


class TurnedSokoban(_Turned, Sokoban):
    """Sokoban with turned moves; parameters are those of :class:`Sokoban`."""

    name = "turned_sokoban"
