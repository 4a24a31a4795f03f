"""The arms of the experiment on the use of tools, and the calculator that breaks down in some of them.

See :mod:`experiments.tool_use` for what they are for.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rehearsal.agents.toolbox import ToolSource
from rehearsal.agents.toolkit.calculator import calculator
from rehearsal.agents.tools import Tool, ToolFailure, tool_from

COMMON: dict[str, Any] = {
    # Half of the groups of the shipped recipes, but for lookup: 75 runs have to end some day.
    "training.groups": 16, "evaluation.every": 0, "evaluation.episodes": 0, "diagnostics.every": 0,
    "diagnostics.gradients_every": 0, "engine.processes": 1,
}  # fmt: skip
COMPARED: dict[str, Any] = {"training.learning_rate": 2e-4}
"""Slower than the recipe, by which half of the success is there after two or three updates: too few to compare."""
GRPO: dict[str, Any] = {"algorithm.name": "grpo", "algorithm.options.aggregation": "sequence_mean"}
"""As published; the recipe averages over tokens, as DAPO does."""
DAPO: dict[str, Any] = {"algorithm.name": "dapo", "algorithm.options.max_refill_tries": 3}

BROKEN_STEPS, MENDED_STEPS = 12, 24
FAILS, COST = 0.8, 0.3
"""Share of calls that fail as long as the calculator is out of order, and what any call takes off the reward."""
CREDIT = 1.0
"""Of a call that brought a result: a broken call that is used well is then worth 0.2 (1 + 1) - 0.3 = 0.1."""
ENTROPY = 0.02
"""Weight of the bonus; with 0.04 runs of the lake fall apart, see :mod:`experiments.collapse`."""
FREE = {"tools.cost": 0.0}
LORA = {"adapters.policy_rank": 32, "adapters.world_rank": 32, "training.learning_rate": 3e-3}

UNRELIABLE = "experiments.tool_use_arms:Unreliable"
LADDER: dict[str, Any] = {
    "curriculum.name": "staged", "curriculum.stages": [{"digits": 1}, {"tools": [UNRELIABLE]}],
    # Of four steps. Whether the tool works by then it cannot know.
    "curriculum.threshold": 0.7, "curriculum.window": 64, "curriculum.patience": 64,
}  # fmt: skip


def _phases(first: Mapping[str, Any] | None = None, both: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    always = {
        "tools.names": [UNRELIABLE], "tools.cost": COST, "training.schedule": "constant",
        "environment.params.terms": 2, "environment.params.digits": 2, **(both or {}),
    }  # fmt: skip
    return [
        {**always, "training.steps": BROKEN_STEPS, "tools.options": {UNRELIABLE: {"fails": FAILS}}, **(first or {})},
        {**always, "training.steps": MENDED_STEPS, "tools.options": {UNRELIABLE: {"fails": 0.0}}},
    ]


_WORKS = {"tools.options": {UNRELIABLE: {"fails": 0.0}}}
ARMS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "calculate_grpo": ("calculate", [{**GRPO, **COMPARED}]),
    "calculate_dapo": ("calculate", [{**DAPO, **COMPARED}]),
    "calculate_without": ("calculate", [{**GRPO, **COMPARED, "tools.names": []}]),
    "lookup": ("lookup", [{"training.groups": 32}]),
    "abandoned_working": ("calculate", _phases(_WORKS)),
    "abandoned_broken": ("calculate", _phases()),
    "abandoned_exploration": ("calculate", _phases(both={"algorithm.options.entropy_coefficient": ENTROPY})),
    "abandoned_curriculum": ("calculate", _phases(both=LADDER)),
    "abandoned_credit": ("calculate", _phases(both={"rewards.call": CREDIT})),
    "abandoned_high_credit": ("calculate", _phases(both={"rewards.call": 2 * CREDIT})),
    "abandoned_late_price": ("calculate", _phases(FREE)),
    "abandoned_free_working": ("calculate", _phases(_WORKS, FREE)),
    "abandoned_free_broken": ("calculate", _phases(both=FREE)),
    "abandoned_working_lora": ("calculate", _phases(_WORKS, LORA)),
    "abandoned_broken_lora": ("calculate", _phases(both=LORA)),
    "abandoned_world": ("calculate", _phases(both={**LORA, "world.mode": "dual"})),
    "abandoned_placebo": ("calculate", _phases(both={**LORA, "world.mode": "placebo"})),
}
"""Recipe and options of each part of a run, by arm."""
TESTS: dict[str, dict[str, dict[str, Any]]] = {
    "calculate": {"": {}},
    "lookup": {"": {"environment.params.hops": 2}, "one_hop_": {"environment.params.hops": 1}},
}
"""What is played before and after, by recipe: options by the beginning of the figures' names."""
CURES = (
    "abandoned_exploration", "abandoned_curriculum", "abandoned_credit", "abandoned_world", "abandoned_high_credit",
    "abandoned_late_price",
)  # fmt: skip
"""The last two were thought of when the others had been played; none of their own runs had been."""
WORKING = {"abandoned_world": "abandoned_working_lora"}
"""What could be had by a cure; ``abandoned_working`` by those that are not named here."""
PAIRS = (
    ("abandoned_broken", "abandoned_working"), ("abandoned_exploration", "abandoned_broken"),
    ("abandoned_curriculum", "abandoned_broken"), ("abandoned_credit", "abandoned_broken"),
    ("abandoned_high_credit", "abandoned_broken"), ("abandoned_late_price", "abandoned_broken"),
    ("abandoned_high_credit", "abandoned_working"), ("abandoned_late_price", "abandoned_working"),
    ("abandoned_free_broken", "abandoned_free_working"), ("abandoned_free_broken", "abandoned_broken"),
    ("abandoned_broken_lora", "abandoned_working_lora"), ("abandoned_world", "abandoned_broken_lora"),
    ("abandoned_placebo", "abandoned_broken_lora"), ("abandoned_world", "abandoned_placebo"),
)  # fmt: skip
"""An arm and its control."""


class Unreliable(ToolSource):
    """The calculator, out of order now and then. Every episode has luck of its own.

    Args:
        fails: the share of calls that fail.
        seed: of the luck.
    """

    fast = True

    def __init__(self, fails: float = 0.0, seed: int = 0) -> None:
        self._fails, self._seed = fails, seed
        self._episodes = itertools.count()

    def open(self) -> Sequence[Tool]:
        rng = np.random.default_rng([self._seed, next(self._episodes)])

        def unreliable(expression: str) -> str:
            if rng.random() < self._fails:
                raise ToolFailure("out of order")
            return calculator(expression)

        # What the agent is told of it is what it is told of the one that works.
        unreliable.__doc__ = calculator.__doc__
        return [tool_from(unreliable, name="calculator", fast=True)]
