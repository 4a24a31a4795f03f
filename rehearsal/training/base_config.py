"""What goes into the small base model: its size, its players, its scenes and its training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from rehearsal.agents.players import SkillMix
from rehearsal.environments.registry import check_names
from rehearsal.errors import RecipeError
from rehearsal.training.base_tokenizer import MIN_VOCABULARY


@dataclass(frozen=True)
class Scene:
    """An environment with its parameters, and how often it is played.

    Attributes:
        environment: a name for :func:`rehearsal.environments.make`.
        params: its parameters.
        weight: share of the episodes, relative to the other scenes.
        skill: what differs from the mix of players in this scene, by the names in :class:`SkillMix`.
        rehearse: share of the episodes with thoughts in which the players rehearse.
        tools: names of tools that come along, beside those of the environment, as in ``rehearsal.agents.toolkit``.
    """

    environment: str
    params: Mapping[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    skill: Mapping[str, float] = field(default_factory=dict)
    rehearse: float = 0.0
    tools: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Name and parameters in one line."""
        params = ", ".join(f"{name}={value}" for name, value in self.params.items())
        return f"{self.environment}({params})" + "".join(f" with {name}" for name in self.tools)


_BOLD = {"boldness_high": 0.9}
"""Plans in Sokoban are longer than the turns of an episode, so its players move more than once a turn."""
_CAREFUL = {"wavering": 0.85, "blind": 0.0, "random": 0.15, "epsilon_low": 0.0, "epsilon_high": 0.3}
"""At the help desk one wrong action spoils an episode; what its players lack is knowledge, not skill."""
_KNOWN = {"world": 1, "companies": 100}
"""Companies of a world of their own: those that people train on and test with are not among them. They are few, so that
a name means something: where there are thousands, none is met often enough to be learnt, and a model comes to look past
names altogether."""
_ASKING = {"mistakes": 0.03, "oracle": 1.0, "wavering": 0.0, "blind": 0.0, "random": 0.3}
"""Where tools help, what players lack is the habit of asking: most of them guess, and so badly that it hardly pays."""

SCENES = (
    Scene("frozenlake", {"slip": 0.0}, 24.0, rehearse=0.2),
    Scene("frozenlake", {"slip": 0.2}, 7.0, rehearse=0.3),
    Scene("frozenlake", {"slip": 0.0, "frozen": 0.75}, 16.0),
    Scene("frozenlake", {"size": 3}, 4.0, rehearse=0.2),
    Scene("frozenlake", {"size": 5}, 5.0),
    Scene("frozenlake", {"size": 5, "slip": 0.2}, 2.0),
    Scene("frozenlake", {"view": "coordinates"}, 4.0, rehearse=0.2),
    Scene("frozenlake", {"view": "coordinates", "slip": 0.2}, 1.0),
    Scene("sokoban", {}, 22.0, _BOLD, rehearse=0.2),
    Scene("sokoban", {"size": 5}, 5.0, _BOLD),
    Scene("sokoban", {"size": 7}, 3.0, _BOLD),
    Scene("sokoban", {"view": "coordinates"}, 2.0, _BOLD),
    # Not the pairs of the environment's default: some of them are held out where any two names may meet.
    Scene("bandit", {"held_out": "pairs"}, 14.0),
    Scene("bandit", {"held_out": "pairs", "reversed": True}, 6.0),
    Scene("rehearsal.training.base_scenes:MadeUpBandit", {}, 12.0),
    Scene("countdown", {}, 14.0, rehearse=0.1),
    Scene("helpdesk", _KNOWN, 20.0, _CAREFUL, rehearse=0.7),
    Scene(
        "rehearsal.training.base_scenes:Recite",
        {},
        60.0,
        {"oracle": 1.0, "wavering": 0.0, "blind": 0.0, "random": 0.0},
    ),
    Scene("calculate", {}, 7.0, {**_ASKING, "calls": 0.35}, tools=("calculator",)),
    Scene("calculate", {"terms": 2, "digits": 2}, 3.0, {**_ASKING, "calls": 0.35}, tools=("calculator",)),
    Scene("calculate", {"terms": 2, "digits": 2}, 2.0, _ASKING),
    Scene("rehearsal.training.base_scenes:LookupAnywhere", {"hops": 1}, 4.0, {**_ASKING, "calls": 0.5}),
    Scene("rehearsal.training.base_scenes:LookupAnywhere", {"hops": 2}, 3.0, {**_ASKING, "calls": 0.5}),
)
"""The built-in environments: mostly as they are by default, with other sizes, slips, views and names beside it. Tools
are used in few episodes: enough to know how, not whether it is of use."""


@dataclass(frozen=True)
class BaseConfig:
    """Everything that fixes a base model; two runs with the same values and threads give the same weights.

    Attributes:
        hidden: width of the model.
        layers: decoder layers.
        heads: query heads.
        kv_heads: key/value heads, which the query heads share evenly. With a single one a small model takes about half
            as many steps again to learn to copy.
        head_dim: width of a head.
        mlp: width of the gated feed-forward layer.
        max_positions: tokens of context.
        vocabulary: the most tokens of the tokenizer.
        tokens: training tokens, those that carry no loss included.
        tokens_per_step: tokens of one optimiser step.
        learning_rate: peak of the schedule (linear warm-up, then a cosine to zero).
        warmup: share of the steps for the warm-up.
        weight_decay: of the matrices other than the embedding.
        clip: the largest norm of a gradient.
        opening_weight: loss weight of the first observation of an episode, which nothing foretells.
        observation_weight: loss weight of all later observations. Thoughts and actions weigh 1, everything else 0.
        thoughtless: share of the episodes that are played without thoughts.
        free_limits: share of the episodes with other numbers of turns and actions than the environment's own.
        mix: the players.
        scenes: the environments.
        tokenizer_episodes: episodes that the tokenizer is trained on.
        heldout_episodes: episodes of the validation split that the losses at the end are measured on.
        seed: fixes tasks, players, initial weights and order.

    Raises:
        RecipeError: for values that cannot be used.
    """

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 384
    max_positions: int = 4096
    vocabulary: int = 1024
    tokens: int = 18_000_000
    tokens_per_step: int = 4096
    learning_rate: float = 3e-3
    warmup: float = 0.03
    weight_decay: float = 0.1
    clip: float = 1.0
    opening_weight: float = 0.05
    observation_weight: float = 0.5
    thoughtless: float = 0.1
    free_limits: float = 0.3
    mix: SkillMix = field(default_factory=SkillMix)
    scenes: tuple[Scene, ...] = SCENES
    tokenizer_episodes: int = 1500
    heldout_episodes: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        whole = ("hidden", "layers", "heads", "kv_heads", "head_dim", "mlp", "max_positions", "tokenizer_episodes")
        for name in (*whole, "heldout_episodes", "tokens_per_step"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.heads % self.kv_heads:
            raise RecipeError(f"heads must be a multiple of kv_heads, not {self.heads} and {self.kv_heads}.")
        if self.head_dim % 2:
            raise RecipeError(f"head_dim must be even (positions are rotations of pairs), not {self.head_dim}.")
        if self.vocabulary < MIN_VOCABULARY:
            raise RecipeError(f"vocabulary must be at least {MIN_VOCABULARY}, not {self.vocabulary}.")
        if self.tokens < self.tokens_per_step:
            raise RecipeError(f"tokens must be at least tokens_per_step ({self.tokens_per_step}), not {self.tokens}.")
        if not self.learning_rate > 0 or not self.clip > 0:
            raise RecipeError("learning_rate and clip must be above 0.")
        for name in ("warmup", "thoughtless", "free_limits"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise RecipeError(f"{name} must be a share from 0 to 1, not {getattr(self, name)}.")
        for name in ("weight_decay", "opening_weight", "observation_weight", "seed"):
            if getattr(self, name) < 0:
                raise RecipeError(f"{name} must not be negative, not {getattr(self, name)}.")
        if not self.scenes or min(scene.weight for scene in self.scenes) <= 0:
            raise RecipeError("There must be at least one scene, and every scene needs a weight above 0.")

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.tokens // self.tokens_per_step

    def to_options(self) -> dict[str, Any]:
        """What differs from the defaults, as :meth:`from_options` takes it; scenes have no option."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("mix", "scenes")}
        players = {f"mix.{f.name}": getattr(self.mix, f.name) for f in fields(self.mix)}
        defaults = {f.name: f.default for f in fields(self)} | {f"mix.{f.name}": f.default for f in fields(self.mix)}
        return {name: value for name, value in (own | players).items() if value != defaults[name]}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> BaseConfig:
        """A configuration from options by name, ``{"tokens": 1_000_000, "mix.oracle": 0.1}``; the rest as usual.

        Raises:
            RecipeError: for a name that does not exist or a value of the wrong type.
        """
        own: dict[str, Any] = {}
        mix: dict[str, Any] = {}
        plain = {f.name: f.default for f in fields(cls) if f.name not in ("mix", "scenes")}
        players = {f"mix.{f.name}": f.default for f in fields(SkillMix)}
        check_names("option", options, [*plain, *players])
        for name, value in options.items():
            default = (plain | players)[name]
            if isinstance(value, bool) or not isinstance(value, int if isinstance(default, int) else int | float):
                kind = "whole number" if isinstance(default, int) else "number"
                raise RecipeError(f"The option {name} must be a {kind}, not {value!r}.")
            if name in players:
                mix[name.removeprefix("mix.")] = value
            else:
                own[name] = value
        return cls(**own, mix=SkillMix(**mix))
