"""Environments by name: the built-in ones, those that a user registers, and any ``package.module:Class``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import gymnasium as gym

from rehearsal.environments.adapters import GymTextAdapter
from rehearsal.environments.base import TextEnv
from rehearsal.errors import EnvironmentFault, RecipeError, RehearsalError
from rehearsal.naming import hint, import_named

Factory = Callable[..., gym.Env[Any, Any]]

_GYMNASIUM_IDS = {
    "rehearsal/FrozenLake-v0": "rehearsal.environments.frozenlake:FrozenLake",
    "rehearsal/Sokoban-v0": "rehearsal.environments.sokoban:Sokoban",
    "rehearsal/Bandit-v0": "rehearsal.environments.bandit:Bandit",
    "rehearsal/Countdown-v0": "rehearsal.environments.countdown:Countdown",
    "rehearsal/Helpdesk-v0": "rehearsal.environments.helpdesk:Helpdesk",
    "rehearsal/Calculate-v0": "rehearsal.environments.calculate:Calculate",
    "rehearsal/Lookup-v0": "rehearsal.environments.lookup:Lookup",
    "rehearsal/Repair-v0": "rehearsal.environments.repair:Repair",
}

_registered: dict[str, str | Factory] = {
    "frozenlake": _GYMNASIUM_IDS["rehearsal/FrozenLake-v0"],
    "sokoban": _GYMNASIUM_IDS["rehearsal/Sokoban-v0"],
    "bandit": _GYMNASIUM_IDS["rehearsal/Bandit-v0"],
    "countdown": _GYMNASIUM_IDS["rehearsal/Countdown-v0"],
    "helpdesk": _GYMNASIUM_IDS["rehearsal/Helpdesk-v0"],
    "calculate": _GYMNASIUM_IDS["rehearsal/Calculate-v0"],
    "lookup": _GYMNASIUM_IDS["rehearsal/Lookup-v0"],
    "repair": _GYMNASIUM_IDS["rehearsal/Repair-v0"],
    "tasks": "rehearsal.environments.tasks:VerifiedTasks",
    "reasoning-gym": "rehearsal.environments.adapters:ReasoningGymEnv",
}


def names() -> list[str]:
    """The names that :func:`make` knows, sorted."""
    return sorted(_registered)


def register(name: str, environment: str | Factory) -> None:
    """Give an environment a name for :func:`make`.

    Args:
        name: without a colon, not in use yet.
        environment: the class, a function that returns an environment, or "package.module:Class".

    Raises:
        RecipeError: for a name that is in use or not usable.
    """
    if not name or ":" in name or name != name.strip():
        raise RecipeError(
            f"{name!r} cannot name an environment: a name is not empty, has no colon and no outer spaces."
        )
    if name in _registered:
        raise RecipeError(f"There is an environment named {name!r} already; choose another name.")
    if not isinstance(environment, str) and not callable(environment):
        raise RecipeError(f"{environment!r} is neither a class nor a function that makes an environment.")
    _registered[name] = environment


def make(name: str, **params: Any) -> TextEnv:
    """Make an environment.

    Args:
        name: one of :func:`names`, or "package.module:Class" for a class (or a function that returns an environment) of
            your own; modules in the present folder are found too. A Gymnasium environment whose spaces are text, or
            that is otherwise fit for it, is wrapped in :class:`GymTextAdapter`.
        **params: passed to the class.

    Raises:
        RecipeError: for an unknown name or parameter, an import that fails, or a value that the class refuses.
        EnvironmentFault: where what was made is not an environment, or its own code raised.
    """
    factory = _factory(name)
    _check_params(name, factory, params)
    try:
        made: object = factory(**params)
    except RehearsalError:
        raise
    except Exception as problem:
        raise EnvironmentFault(
            f"The environment {name} could not be made: {type(problem).__name__}: {problem}"
        ) from problem
    if isinstance(made, TextEnv):
        return made
    if isinstance(made, gym.Env):
        return GymTextAdapter(made)
    raise EnvironmentFault(
        f"{name} made a {type(made).__name__}, which is not an environment; derive it from rehearsal.TextEnv."
    )


def import_path(name: str) -> str | None:
    """What :func:`make` takes for the same environment in another process, "package.module:Class"; None where another
    process could not find it, such as a class of the script that runs.

    Raises:
        RecipeError: for an unknown name.
    """
    target = _target(name)
    if not isinstance(target, str):
        path = getattr(target, "__qualname__", "<lambda>")
        target = f"{getattr(target, '__module__', '__main__')}:{path}"
    return None if target.startswith("__main__:") or "<" in target else target


def describe_all() -> list[tuple[str, str, str]]:
    """Name, first sentence of the docstring, and parameters with their defaults, of every registered environment.

    One whose package is not installed says so instead.
    """
    rows = []
    for name in names():
        try:
            factory = _factory(name)
        except RehearsalError as problem:
            rows.append((name, str(problem), ""))
            continue
        text = (inspect.getdoc(factory) or "").split("\n\n")[0].replace("\n", " ")
        known = inspect.signature(factory).parameters.values()
        shown = (
            p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in known if p.kind is not p.VAR_KEYWORD
        )
        rows.append((name, text, ", ".join(shown)))
    return rows


def check_names(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a :class:`RecipeError` for the first name in ``given`` that is not in ``known``, with close matches."""
    known = list(known)
    for name in given:
        if name not in known:
            raise RecipeError(f"There is no {what} {name!r}; {hint(name, known)}")


def _target(name: str) -> str | Factory:
    """What a name stands for; one with a colon stands for itself."""
    if ":" in name:
        return name
    check_names("environment", [name], _registered)
    return _registered[name]


def _factory(name: str) -> Factory:
    target = _target(name)
    return _load(target) if isinstance(target, str) else target


def _load(target: str) -> Factory:
    found: object = import_named(target, "environment", RecipeError)
    if isinstance(found, type) and not issubclass(found, gym.Env):
        raise EnvironmentFault(f"{target} is a class but not an environment; derive it from rehearsal.TextEnv.")
    if not callable(found):
        raise EnvironmentFault(f"{target} is neither a class nor a function that makes an environment.")
    return found


def _check_params(name: str, factory: Factory, params: Mapping[str, Any]) -> None:
    """Compare the names of the parameters with the factory's signature before calling it."""
    try:
        accepted = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # some callables written in C have no signature; the call itself will tell
        return
    known = {p.name for p in accepted if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if not any(p.kind is p.VAR_KEYWORD for p in accepted):
        check_names(f"parameter of {name} called", params, known)
    needed = [p.name for p in accepted if p.name in known and p.default is p.empty and p.name not in params]
    if needed:
        raise RecipeError(f"The environment {name} needs the parameter {needed[0]}; give it a value.")


for _id, _entry_point in _GYMNASIUM_IDS.items():
    if _id not in gym.registry:
        gym.register(_id, entry_point=_entry_point)
