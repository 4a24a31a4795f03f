"""Several proposals for one task: an episode that goes on after a wrong answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rehearsal.environments.base import TextEnv
from rehearsal.environments.episode import EpisodeEnv, whole_number
from rehearsal.environments.luck import reset_with_luck
from rehearsal.errors import EnvironmentFault

_CHANCE_STRIDE = 1_000_003


class Proposals(TextEnv):
    """An environment whose task may be tried again in the same episode, as in MINT (arXiv:2309.10691), where an agent
    proposes up to two solutions.

    When the inner environment ends without success, it is reset to the same task, with other luck, and the episode goes
    on. The agent sees what the inner environment said last and how many tries are left; where a try takes more than one
    action, also the first observation again. The reward of the episode is the sum over its tries, so judge it by its
    success. An environment that tells no success cannot be tried again: its episodes end when it says so.

    Args:
        inner: whose resets with one seed show one task.
        proposals: tries in an episode, 1 to 100; with 1 everything is as without it.

    Attributes:
        rejected: the action that the last step ended a try with, in vain; None after any other step.

    Raises:
        RecipeError: for a number of proposals out of its range.
        EnvironmentFault: at a step after which the inner environment showed another task than before.
    """

    def __init__(self, inner: TextEnv, proposals: int = 2) -> None:
        self.inner = inner
        self.proposals = whole_number("proposals", proposals, 1, 100)
        self.name = inner.name
        self.fast = inner.fast
        self.step_seconds = inner.step_seconds
        self.max_turns = inner.max_turns
        self.max_actions_per_turn = inner.max_actions_per_turn
        self.rejected: str | None = None
        self._used = 0
        self._seed = 0
        self._options: dict[str, Any] = {}
        self._task: object = None

    @property
    def one_answer(self) -> bool:
        """Whether a try is known to be a single action."""
        return isinstance(self.inner, EpisodeEnv) and self.inner.max_steps == 1

    @property
    def instructions(self) -> str:
        """Those of the inner environment, and how many tries there are."""
        if self.proposals == 1:
            return self.inner.instructions
        what = "answer" if self.one_answer else "attempt"
        return (
            f"{self.inner.instructions}\nAfter a wrong {what} there may be another, {self.proposals} in all.".lstrip()
        )

    @property
    def tools(self) -> Sequence[Callable[..., Any]]:
        """Those of the inner environment."""
        return self.inner.tools

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Start an episode with its first try; see :meth:`TextEnv.reset`."""
        super().reset(seed=seed)
        self._seed = int(self.np_random.integers(2**31)) if seed is None else seed
        self._options = dict(options or {})
        self._used = 0
        self.rejected = None
        observation, info = reset_with_luck(self.inner, self._seed, self._options)
        self._task = info.get("task")
        return observation, info

    def draw_luck(self, chance: int) -> None:
        """Nothing: the reset has done it."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take one action; a try that ends in vain is followed by the next, if there is one."""
        self.rejected = None
        observation, reward, terminated, truncated, info = self.inner.step(action)
        if not (terminated or truncated):
            return observation, reward, terminated, truncated, info
        self._used += 1
        success = info.get("success")
        if success is None or success or self._used >= self.proposals:
            return observation, reward, terminated, truncated, info
        self.rejected = action
        begun, info = self._again()
        left = self.proposals - self._used
        if self.one_answer:
            told = f"{observation}\nAnswers left: {left}."
        else:
            told = f"{observation}\nAttempts left: {left}. From the start:\n{begun}"
        return told, reward, False, False, {**info, "success": False, "effective": True}

    def _again(self) -> tuple[str, dict[str, Any]]:
        chance = int(self._options.get("chance", 0)) + self._used * _CHANCE_STRIDE
        begun, info = reset_with_luck(self.inner, self._seed, {**self._options, "chance": chance % 2**32})
        if info.get("task") != self._task:
            raise EnvironmentFault(
                f"{self.name} showed another task when it was reset with the same seed, so it cannot be tried again."
            )
        return begun, info

    def task_count(self, split: str) -> int | None:
        return self.inner.task_count(split)

    def legal_actions(self) -> list[str] | None:
        return self.inner.legal_actions()

    def parse_action(self, text: str) -> str | None:
        return self.inner.parse_action(text)

    def oracle(self) -> list[str] | None:
        return self.inner.oracle()

    def describe(self) -> dict[str, Any]:
        return self.inner.describe()

    def facts(self) -> dict[str, str]:
        return self.inner.facts()

    def close(self) -> None:
        """Close the inner environment."""
        self.inner.close()
