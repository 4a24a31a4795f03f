"""The same task with other luck: for the members of a group, who must not all have the luck of one draw."""

from __future__ import annotations

import pickle
import random
import types
from collections.abc import Mapping
from typing import Any

import numpy as np

from rehearsal.environments.base import TextEnv

_DEEPEST = 4
_MOST = 2_000
_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, types.ModuleType, types.FunctionType, np.ndarray)


def reset_with_luck(env: TextEnv, seed: int | None, options: Mapping[str, Any]) -> Any:
    """Reset an environment, and give it the luck of ``options["chance"]`` where it does not do so by itself.

    What is drawn before the first observation belongs to the task and depends on the seed alone; what is drawn after it
    depends on both. Chance 0, like none, leaves the environment as its reset left it.

    Returns:
        what ``env.reset`` returned, whatever it is.
    """
    returned = env.reset(seed=seed, options=dict(options))
    if options.get("chance"):
        env.draw_luck(int(options["chance"]))
    return returned


def generator_states(env: Any) -> dict[str, bytes]:
    """The states of the random number generators that an environment can be seen to hold, by where they are, and of
    Python's and NumPy's own. One that a compiled simulator keeps to itself is not among them."""
    states = {"random": pickle.dumps(random.getstate()), "numpy.random": pickle.dumps(np.random.get_state())}
    seen: set[int] = set()

    def visit(thing: Any, path: str, depth: int) -> None:
        if isinstance(thing, _PLAIN) or id(thing) in seen or len(seen) > _MOST:
            return
        seen.add(id(thing))
        if isinstance(thing, random.Random):
            states[path] = pickle.dumps(thing.getstate())
        elif isinstance(thing, np.random.Generator):
            states[path] = pickle.dumps(thing.bit_generator.state)
        elif isinstance(thing, np.random.RandomState):
            states[path] = pickle.dumps(thing.get_state())
        elif depth < _DEEPEST:
            inner: list[tuple[str, Any]] = []
            if isinstance(thing, dict):
                inner = [(f"{path}[{key!r}]", value) for key, value in list(thing.items())[:100]]
            elif isinstance(thing, list | tuple):
                inner = [(f"{path}[{number}]", value) for number, value in enumerate(thing[:100])]
            elif hasattr(thing, "__dict__"):
                inner = [(f"{path}.{name}", value) for name, value in list(vars(thing).items())]
            for where, value in inner:
                visit(value, where, depth + 1)

    visit(env, "self", 0)
    return states
