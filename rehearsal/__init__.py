"""Rehearsal trains language-model agents that keep learning, and tells whether the learning signal is real.

The names here are the public interface. They are imported when they are first used, so ``import rehearsal`` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rehearsal.environments.base import TextEnv as TextEnv
    from rehearsal.environments.check import check_env as check_env
    from rehearsal.environments.episode import EpisodeEnv as EpisodeEnv
    from rehearsal.environments.registry import make as make
    from rehearsal.environments.registry import register as register
    from rehearsal.errors import RehearsalError as RehearsalError
    from rehearsal.evaluation.run import evaluate_policy as evaluate  # noqa: F401
    from rehearsal.models.load import load_policy as load_policy
    from rehearsal.reports import write_report as write_report
    from rehearsal.training.export import export_policy as export_policy
    from rehearsal.training.recipe import Recipe as Recipe
    from rehearsal.training.recipe import resolve_recipe as resolve_recipe
    from rehearsal.training.run import train as train
    from rehearsal.trajectory import Group as Group
    from rehearsal.trajectory import Kind as Kind
    from rehearsal.trajectory import Trajectory as Trajectory

_WHERE = {
    "EpisodeEnv": "rehearsal.environments.episode:EpisodeEnv",
    "Group": "rehearsal.trajectory:Group",
    "Kind": "rehearsal.trajectory:Kind",
    "Recipe": "rehearsal.training.recipe:Recipe",
    "RehearsalError": "rehearsal.errors:RehearsalError",
    "TextEnv": "rehearsal.environments.base:TextEnv",
    "Trajectory": "rehearsal.trajectory:Trajectory",
    "check_env": "rehearsal.environments.check:check_env",
    "evaluate": "rehearsal.evaluation.run:evaluate_policy",
    "export_policy": "rehearsal.training.export:export_policy",
    "load_policy": "rehearsal.models.load:load_policy",
    "make": "rehearsal.environments.registry:make",
    "register": "rehearsal.environments.registry:register",
    "resolve_recipe": "rehearsal.training.recipe:resolve_recipe",
    "train": "rehearsal.training.run:train",
    "write_report": "rehearsal.reports:write_report",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'rehearsal' has no attribute {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
