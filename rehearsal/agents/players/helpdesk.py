"""What scripted players know of the help desk: less than the truth, and they act on what they believe."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np

from rehearsal.agents.players.worlds import World
from rehearsal.environments.base import TextEnv
from rehearsal.environments.helpdesk import Helpdesk, Requirement
from rehearsal.environments.helpdesk_words import FACTS, GATHER, GIVE, LEAVE, REACH


class HelpdeskWorld(World):
    """Thinks like this: "Veligo phone, refund Monday. need pin card, ready pin. go look up card."; once the company has
    been reached: "want pin card, given pin. go give card.".

    What a player believes that a company needs is the truth for a share of the episodes and a guess for the others. It
    stays the same for an episode, is what the player rehearses, and is what it prepares: so a model that is trained on
    such players learns to act on what it foretells, not to foretell.

    Args:
        knowledge: the share of episodes in which the belief is true.
    """

    def __init__(self, knowledge: float = 0.85) -> None:
        self.knowledge = knowledge

    def facts(self, env: TextEnv) -> str:
        """The company, its channel, the matter and the day."""
        seen = env.describe()
        return f"{seen['company']} {seen['channel']}, {seen['matter']} {seen['day']}."

    def intention(self, env: TextEnv, actions: Sequence[str], rng: np.random.Generator) -> str:
        """What is needed and what is there, or what is wanted and what was given, and the next action."""
        seen = env.describe()
        if seen["told"]:
            state = f"want {_listed(seen['told'])}, given {_listed(seen['given'])}"
        else:
            state = f"need {_listed(self.belief(env))}, ready {_listed(seen['ready'])}"
        return f"{state}. go {' '.join(actions)}."

    def rehearsals(self, env: TextEnv, actions: Sequence[str], rng: np.random.Generator) -> list[tuple[str, str]]:
        """Before anything is prepared: what the company will say, as far as it is believed."""
        seen = env.describe()
        if seen["told"] or seen["ready"]:
            return []
        reach = REACH[seen["channel"]]
        desk = cast(Any, copy.deepcopy(_desk(env)))
        # Chance of its own: nobody can know in which words it will be said.
        desk.np_random = np.random.default_rng(int(rng.integers(2**32)))
        if not self._knows(env):
            desk._company = replace(desk._company, requirement=Requirement(self.belief(env)))
        return [(reach, desk.step(reach)[0])]

    def oracle(self, env: TextEnv) -> list[str]:
        """The plan of somebody for whom what it believes is true."""
        seen = env.describe()
        leave = LEAVE[seen["channel"]]
        if seen["told"]:
            if set(seen["told"]) - set(seen["ready"]):
                return [leave]
            return [GIVE[fact] for fact in seen["told"] if fact not in seen["given"]]
        believed = self.belief(env)
        plan = [GATHER[fact] for fact in believed if fact not in seen["ready"]]
        room = _desk(env).max_facts - len(seen["ready"])
        return [*plan[:room], REACH[seen["channel"]], *(GIVE[fact] for fact in believed)]

    def belief(self, env: TextEnv) -> tuple[str, ...]:
        """The facts that a player expects the company to want, in the order in which facts are named."""
        desk = _desk(env)
        if self._knows(env):
            return desk.wanted
        rng = self._chance(env)
        count = int(rng.integers(1, desk.max_facts + 1))
        drawn = {FACTS[place] for place in rng.permutation(len(FACTS))[:count]}
        return tuple(fact for fact in FACTS if fact in drawn)

    def _knows(self, env: TextEnv) -> bool:
        return bool(self._chance(env).random(2)[1] < self.knowledge)

    def _chance(self, env: TextEnv) -> np.random.Generator:
        """The same for all turns of an episode, and for all episodes with the same words."""
        seen = env.describe()
        words = " ".join(str(seen[name]) for name in ("customer", "company", "matter", "day"))
        return np.random.default_rng(zlib.crc32(words.encode()))


def _desk(env: TextEnv) -> Helpdesk:
    return cast(Helpdesk, env.unwrapped)


def _listed(facts: Sequence[str]) -> str:
    return " ".join(facts) or "nothing"
