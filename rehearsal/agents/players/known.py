"""The worlds of the built-in environments."""

from __future__ import annotations

from rehearsal.agents.players.callers import CalculateWorld, LookupWorld
from rehearsal.agents.players.helpdesk import HelpdeskWorld
from rehearsal.agents.players.worlds import BanditWorld, CountdownWorld, FrozenLakeWorld, SokobanWorld, World
from rehearsal.environments.base import TextEnv

WORLDS: dict[str, World] = {
    "frozenlake": FrozenLakeWorld(),
    "sokoban": SokobanWorld(),
    "bandit": BanditWorld(),
    "countdown": CountdownWorld(),
    "helpdesk": HelpdeskWorld(),
    "calculate": CalculateWorld(),
    "lookup": LookupWorld(),
}
"""By name. Add one for an environment of your own to give its players words."""


def world_of(env: TextEnv) -> World:
    """The world of an environment."""
    return WORLDS.get(env.name) or World()
