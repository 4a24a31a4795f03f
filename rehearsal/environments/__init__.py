"""Text environments with Gymnasium's API: the contract, the built-in ones, adapters, a checker, and play by hand."""

from rehearsal.environments.adapters import GymTextAdapter, ReasoningGymEnv
from rehearsal.environments.base import SPLITS, VIEWS, TextEnv
from rehearsal.environments.check import CheckReport, Problem, check_env
from rehearsal.environments.play import play
from rehearsal.environments.registry import make, names, register

__all__ = [
    "SPLITS",
    "VIEWS",
    "CheckReport",
    "GymTextAdapter",
    "Problem",
    "ReasoningGymEnv",
    "TextEnv",
    "check_env",
    "make",
    "names",
    "play",
    "register",
]
