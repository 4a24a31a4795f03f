"""Scripted players of any skill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rehearsal.agents.players.known import world_of
from rehearsal.environments.base import TextEnv
from rehearsal.errors import RecipeError


@dataclass(frozen=True)
class Player:
    """Somebody who plays by a rule.

    Attributes:
        guide: whom the player follows: "oracle", the environment's best plan, or "blind", straight for the goal without
            a look at what is in the way. Where the oracle sees a dead end, the player acts at random.
        epsilon: the probability that an action is drawn at random instead; 0 follows the guide always, 1 never. The
            other actions of the same turn stay as the guide planned them: the player does not look twice.
        boldness: the probability of each further action in a turn that allows several.
        mistakes: the probability that an answer is broken or has an illegal action.
        calls: whether the player reaches for tools where there are any that it knows.

    Raises:
        RecipeError: for a guide that does not exist or a probability outside of 0 to 1.
    """

    guide: Literal["oracle", "blind"] = "oracle"
    epsilon: float = 0.0
    boldness: float = 1.0
    mistakes: float = 0.0
    calls: bool = False

    def __post_init__(self) -> None:
        if self.guide not in ("oracle", "blind"):
            raise RecipeError(f'guide must be "oracle" or "blind", not "{self.guide}".')
        for name in ("epsilon", "boldness", "mistakes"):
            check_probability(name, getattr(self, name))

    def actions(self, env: TextEnv, n: int, rng: np.random.Generator) -> list[str]:
        """One to ``n`` actions for the present state.

        Raises:
            RecipeError: where the environment has no oracle, or lists no actions, and the player needs it.
        """
        world = world_of(env)
        count = 1
        while count < n and rng.random() < self.boldness:
            count += 1
        guided: list[str] = []
        strays = [bool(rng.random() < self.epsilon) for _ in range(count)]
        if not all(strays):
            guided = world.oracle(env) if self.guide == "oracle" else world.blind(env, count, rng)
            # A plan that ends early has reached its end.
            count = min(count, len(guided)) or count
        return [world.random(env, rng) if strays[i] or i >= len(guided) else guided[i] for i in range(count)]


@dataclass(frozen=True)
class SkillMix:
    """A population of players: who plays an episode is drawn from it.

    Attributes:
        oracle: weight of players that follow the oracle always.
        wavering: weight of players that follow it with an epsilon of their own.
        blind: weight of players that go straight for the goal and see nothing on the way.
        random: weight of players that act at random.
        epsilon_low, epsilon_high: between these the epsilon of a wavering player is drawn.
        boldness_low, boldness_high: between these the boldness of every player is drawn.
        mistakes: the probability of a broken answer, for every player.
        calls: the share of players that reach for tools where there are any.

    Raises:
        RecipeError: for negative weights, weights that are all zero, or probabilities outside of 0 to 1.
    """

    oracle: float = 0.0
    wavering: float = 0.6
    blind: float = 0.05
    random: float = 0.35
    epsilon_low: float = 0.6
    epsilon_high: float = 1.0
    boldness_low: float = 0.0
    boldness_high: float = 0.4
    mistakes: float = 0.012
    calls: float = 0.0

    def __post_init__(self) -> None:
        weights = (self.oracle, self.wavering, self.blind, self.random)
        if not all(0 <= weight < float("inf") for weight in weights) or not sum(weights) > 0:
            raise RecipeError("The weights of a skill mix must not be negative, and one of them must be above 0.")
        for name in ("epsilon_low", "epsilon_high", "boldness_low", "boldness_high", "mistakes", "calls"):
            check_probability(name, getattr(self, name))
        for name in ("epsilon", "boldness"):
            if getattr(self, f"{name}_low") > getattr(self, f"{name}_high"):
                raise RecipeError(f"{name}_low must not be above {name}_high.")

    def draw(self, rng: np.random.Generator) -> Player:
        """A player of this population."""
        weights = np.array([self.oracle, self.wavering, self.blind, self.random])
        kind = int(rng.choice(4, p=weights / weights.sum()))
        wavering = float(rng.uniform(self.epsilon_low, self.epsilon_high))
        boldness = float(rng.uniform(self.boldness_low, self.boldness_high))
        guide: Literal["oracle", "blind"] = "blind" if kind == 2 else "oracle"
        calls = self.calls > 0 and bool(rng.random() < self.calls)
        return Player(guide, (0.0, wavering, 0.0, 1.0)[kind], boldness, self.mistakes, calls)


def check_probability(name: str, value: float) -> None:
    """Raise a :class:`RecipeError` unless ``value`` lies between 0 and 1."""
    if not 0.0 <= value <= 1.0:
        raise RecipeError(f"{name} must be a probability from 0 to 1, not {value}.")
