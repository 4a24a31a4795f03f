"""What environments share: splits, the step limit, the end of an episode, views, checks of parameters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np

from rehearsal.environments.base import VIEWS, TextEnv
from rehearsal.environments.splits import split_option, task_key
from rehearsal.errors import RecipeError

Item = TypeVar("Item")

Position = tuple[int, int]
"""Row and column, counted from 0 at the top left."""


def whole_number(name: str, value: object, low: int, high: int) -> int:
    """``value`` if it is a whole number from ``low`` to ``high``; a :class:`RecipeError` that says so if not."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RecipeError(f"{name} must be a whole number from {low} to {high}, not {value!r}.")
    return value


def real_number(name: str, value: object, low: float, high: float) -> float:
    """``value`` as a float if it lies between ``low`` and ``high``; a :class:`RecipeError` that says so if not."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RecipeError(f"{name} must be a number from {low:g} to {high:g}, not {value!r}.")
    return float(value)


class EpisodeEnv(TextEnv):
    """Bookkeeping of one episode; a subclass draws tasks, acts and shows its state.

    Args:
        max_steps: actions after which an episode is truncated; as many as fit into its turns if None.
    """

    fast = True

    def __init__(self, max_steps: int | None = None) -> None:
        fitting = self.max_turns * self.max_actions_per_turn
        self.max_steps = whole_number("max_steps", fitting if max_steps is None else max_steps, 1, 1_000_000)
        self._split = "train"
        self._index: object = None
        self._task = ""
        self._steps = 0
        self._started = False
        self._over = False
        self._success = False

    @abstractmethod
    def _draw(self, split: str) -> str:
        """Draw a task of ``split`` with ``self.np_random``, set the state to its start and return its content."""

    def _pick(self, stock: Sequence[Item]) -> Item:
        """The one of a split's tasks that the reset asks for by ``options["index"]``, else any of them.

        Raises:
            RecipeError: for an index that there is not.
        """
        if self._index is None:
            return stock[int(self.np_random.integers(len(stock)))]
        return stock[whole_number("index", self._index, 0, len(stock) - 1)]

    @abstractmethod
    def _act(self, action: str) -> tuple[float, bool, bool, bool]:
        """Take a legal action; return reward, whether the episode is over, success, whether the state changed."""

    @abstractmethod
    def _observation(self) -> str:
        """The present state as the agent sees it."""

    def _state(self) -> str:
        """A key of the present state that does not depend on how it is shown."""
        return self._observation()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Start an episode of ``options["split"]``, with the luck of ``options["chance"]``; see :meth:`TextEnv.reset`.

        Raises:
            RecipeError: for a split or an index that does not exist, or a chance that is not a whole number from 0 on.
            EnvironmentFault: when the parameters allow no task in this split.
        """
        self._started = False
        split = split_option(options)
        super().reset(seed=seed)
        self._index = (options or {}).get("index")
        self._task = task_key(self._draw(split))
        chance = (options or {}).get("chance")
        if chance is not None:
            entropy = [int(self.np_random.integers(2**32)), whole_number("chance", chance, 0, 2**32)]
            self.np_random = np.random.default_rng(entropy)
        self._split = split
        self._steps = 0
        self._started = True
        self._over = False
        self._success = False
        return self._observation(), self._info()

    def draw_luck(self, chance: int) -> None:
        """Nothing: the reset has done it."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take one action; see :meth:`TextEnv.step`."""
        self._need_reset()
        if self._over:
            raise gym.error.ResetNeeded("The episode is over: call reset() before step().")
        legal = self.parse_action(action)
        if legal is None:
            raise ValueError(f"{action!r} is not a legal action here; legal are {self.legal_actions()}.")
        reward, terminated, self._success, effective = self._act(legal)
        self._steps += 1
        truncated = not terminated and self._steps >= self.max_steps
        self._over = terminated or truncated
        info = {**self._info(), "effective": effective}
        foreseeable = self._foreseeable(legal)
        if foreseeable is not None:
            info["foreseeable"] = foreseeable
        return self._observation(), reward, terminated, truncated, info

    @property
    def steps_left(self) -> int:
        """Actions that are left in this episode; 0 once it is over."""
        return 0 if self._over else self.max_steps - self._steps

    def _need_reset(self) -> None:
        if not self._started:
            raise gym.error.ResetNeeded(f"The {self.name} episode has not begun: call reset() first.")

    def _foreseeable(self, action: str) -> bool | None:
        """Whether what came of the action just taken followed from what had been shown; None if that is not told."""
        return None

    def _info(self) -> dict[str, Any]:
        return {"task": self._task, "state": self._state(), "success": self._success, "split": self._split}


class SpatialEnv(EpisodeEnv):
    """An environment on a grid, shown as rows of symbols, as coordinates, or as both.

    Args:
        max_steps: actions after which an episode is truncated.
        view: one of ``VIEWS``.
    """

    def __init__(self, max_steps: int, view: str) -> None:
        super().__init__(max_steps)
        if view not in VIEWS:
            raise RecipeError(f"There is no view {view!r}; choose one of {', '.join(VIEWS)}.")
        self.view = view

    @abstractmethod
    def _rows(self) -> list[str]:
        """The grid, one string a row and one character a cell."""

    @abstractmethod
    def _coordinates(self) -> str:
        """The same state in coordinates."""

    def _observation(self) -> str:
        if self.view == "coordinates":
            return self._coordinates()
        # Spaces keep a tokenizer from merging symbols, so that every cell is seen as itself.
        grid = "\n".join(" ".join(row) for row in self._rows())
        return grid if self.view == "grid" else f"{grid}\n{self._coordinates()}"

    def _state(self) -> str:
        return "/".join(self._rows())


def spell_positions(positions: Iterable[Position]) -> str:
    """Positions as text, in reading order: ``(0,1) (2,2)``."""
    return " ".join(f"({row},{column})" for row, column in sorted(positions))
