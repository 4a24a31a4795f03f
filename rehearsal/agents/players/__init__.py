"""Scripted players: they make a base model's first episodes, warm starts, and baselines."""

from rehearsal.agents.players.player import Player, SkillMix
from rehearsal.agents.players.scripted import scripted_episode
from rehearsal.agents.players.worlds import WORLDS, World, world_of

__all__ = ["WORLDS", "Player", "SkillMix", "World", "scripted_episode", "world_of"]
