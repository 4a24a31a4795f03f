"""Scripted players: they make a base model's first episodes, warm starts, and baselines."""

from rehearsal.agents.players.known import WORLDS, world_of
from rehearsal.agents.players.player import Player, SkillMix
from rehearsal.agents.players.scripted import end_of_answer, scripted_episode
from rehearsal.agents.players.worlds import World

__all__ = ["WORLDS", "Player", "SkillMix", "World", "end_of_answer", "scripted_episode", "world_of"]
