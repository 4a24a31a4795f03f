"""The contract of a text environment: Gymnasium's, with text in and text out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np

SPLITS = ("train", "validation", "test")
"""The splits that an environment may offer; they are disjoint in content, not only in seed."""

VIEWS = ("grid", "coordinates", "both")
"""How a spatial environment shows its state."""


class AnyText(gym.spaces.Text):
    """The space of all strings, line breaks and any script included.

    Gymnasium's own text space holds only strings over a fixed set of characters (ASCII letters and digits unless told
    otherwise), so its environment checker would complain about every grid. Samples are still letters and digits.
    """

    def contains(self, x: Any) -> bool:
        """Whether ``x`` is a string of an allowed length."""
        return isinstance(x, str) and self.min_length <= len(x) <= self.max_length


class TextEnv(gym.Env[str, str]):
    """A Gymnasium environment whose observations and actions are plain text.

    An author writes :meth:`reset` and :meth:`step` and, where it makes sense, the class attributes and the other
    methods; ``rehearsal.check_env`` says what is missing or wrong.

    What an environment may put into ``info``, all of it optional:

    - ``task`` (str, at reset): a key of the task's content. Two resets with the same key show the same task.
    - ``topic`` (str, at reset): what the task is about, for a memory that keeps a bit of everything: tasks of one topic
      have in common what is worth remembering.
    - ``category`` (str, at reset): the kind of task, of which there are a few: success is told for each apart.
    - ``split`` (str): the split that the task was drawn from. Only an environment that honours ``options["split"]``
      gives it: its splits are then disjoint in content.
    - ``success`` (bool, at every step): whether the task is solved, apart from the reward.
    - ``state`` (str): a key of the present state, used to count repeated states.
    - ``effective`` (bool, at a step): whether the action changed the state.
    - ``foreseeable`` (bool, at a step): whether the observation follows from the rules, what the agent has been shown
      and the action, so that it tells nothing about the world that could not be worked out.
    - ``meaning`` (str, at a step): what the observation says, whatever its words: observations of one meaning say the
      same. Left out where words and meaning are one.
    """

    name: str = "environment"
    """Short id, as in ``rehearsal.make(name)``."""

    fast: bool = False
    """Whether a step takes microseconds, never blocks and never hangs. Such an environment is stepped in line (which
    makes a run exactly repeatable); any other runs in a thread with a time limit."""

    step_seconds: float = 0.0
    """The most seconds that a step takes by time limits that the environment keeps itself, such as those of a server or
    a verifier, whatever it waits in. The harness gives it so much more before it calls the step hung."""

    max_turns: int = 5
    """How many turns an agent gets when nobody says otherwise."""
    max_actions_per_turn: int = 1
    """How many actions an agent may put into one answer when nobody says otherwise."""

    # Text has no useful bounds: the spaces are there because Gymnasium's wrappers ask for them.
    observation_space = AnyText(min_length=0, max_length=100_000)
    action_space = AnyText(min_length=0, max_length=10_000)

    @property
    def instructions(self) -> str:
        """The rules, told once in the system prompt: goal, symbols, actions. No word about the answer format."""
        return ""

    @property
    def tools(self) -> Sequence[Callable[..., Any]]:
        """Functions that the agent may call beside its actions, such as bound methods of this environment: each with
        types and a docstring, which the agent is told.

        They are asked for after every reset, so tasks may differ in them. A call takes a turn of the agent and is no
        step: whether the environment's own clock runs on is up to the function.
        """
        return ()

    @abstractmethod
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Start a new episode and return its first observation and info.

        An author's version calls ``super().reset(seed=seed)`` first, as in Gymnasium: it seeds ``self.np_random``.

        Args:
            seed: fixes the task and everything random that follows in this episode.
            options: ``{"split": ...}`` with one of :data:`SPLITS`; "train" if left out. ``{"chance": k}`` with a whole
                number asks for the same task with other luck: what is random after the first observation then depends
                on seed and k, and the first observation does not depend on k. Episodes of a group that all had the luck
                of one draw would make that draw look like skill. One that draws from ``self.np_random`` alone gets its
                luck by :meth:`draw_luck`. ``{"index": i}`` picks a task by its number where :meth:`task_count` counts
                them. An environment may ignore options that it does not know.
        """
        super().reset(seed=seed)
        return "", {}

    @abstractmethod
    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take one action; return observation, reward, terminated, truncated, info.

        Raises:
            gymnasium.error.ResetNeeded: when the episode is over or has not begun.
            ValueError: for an action that is not legal. The harness asks :meth:`parse_action` first, so an agent
                never gets here with one.
        """

    def task_count(self, split: str) -> int | None:
        """How many tasks a split has, where there is a list of them and ``options["index"]`` of a reset, from 0 on,
        picks one; None where tasks are drawn.

        Held-out play then meets each of them once: of as many random draws as there are tasks, more than a third would
        be repetitions.
        """
        return None

    def draw_luck(self, chance: int) -> None:
        """Let what is random from now on depend on ``chance`` too.

        Whoever plays several episodes of one task calls it right after a reset with ``options["chance"]`` from 1 on. By
        default it seeds ``self.np_random`` again, from what the reset left there and from ``chance``. An environment
        that draws from anything else, a simulator or a generator of its own, seeds that here, or honours
        ``options["chance"]`` in its reset.

        Args:
            chance: a whole number from 1 on.
        """
        if isinstance(self.np_random, np.random.Generator):  # an author may have put something else there
            self.np_random = np.random.default_rng([int(self.np_random.integers(2**32)), chance])

    def legal_actions(self) -> list[str] | None:
        """The actions that are legal now, spelled as the agent should write them; None where any text is an action."""
        return None

    def parse_action(self, text: str) -> str | None:
        """The action that ``text`` stands for, or None if it is not legal now.

        The default compares with :meth:`legal_actions` without regard to case and surrounding space.
        """
        legal = self.legal_actions()
        if legal is None:
            return text.strip() or None
        return {action.casefold(): action for action in legal}.get(text.strip().casefold())

    def oracle(self) -> list[str] | None:
        """The best actions from the present state on, up to the end of the episode; None where nobody knows them.

        With chance moves it is the best plan as of now: ask again after each step. An empty list means that nothing
        more can be won: the episode is over, or the state is a dead end.
        """
        return None

    def optimal_success(self) -> float | None:
        """The probability that the best player succeeds from the present state on, within the steps that are left.

        It is the ceiling that chance moves and step limits set; None where nobody knows it.
        """
        return None

    def describe(self) -> dict[str, Any]:
        """Facts of the present state by name (positions, numbers, names), for scripted players and reports.

        Positions are ``(row, column)`` pairs that count from 0 at the top left. Empty where there is nothing to tell.
        """
        return {}

    def facts(self) -> dict[str, str]:
        """What it works with, for the plan and the records of a run: ``{"sandbox": "namespaces"}`` where it runs code
        in a sandbox, ``{"judge": "MODEL at ADDRESS"}`` where it asks one. Asked before any reset."""
        return {}
