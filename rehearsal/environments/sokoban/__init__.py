"""Sokoban: rules, solver, generator, level files, and the text environment."""

from rehearsal.environments.sokoban.game import Sokoban
from rehearsal.environments.sokoban.generator import draw_levels
from rehearsal.environments.sokoban.levels import parse_level, parse_levels, read_levels
from rehearsal.environments.sokoban.rules import Level
from rehearsal.environments.sokoban.solver import Solution, solve

__all__ = ["Level", "Sokoban", "Solution", "draw_levels", "parse_level", "parse_levels", "read_levels", "solve"]
