"""Other libraries' environments as text environments."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from rehearsal.environments.base import TextEnv
from rehearsal.environments.contract import FLAGS, TEXTS, bad_text, is_number
from rehearsal.environments.episode import EpisodeEnv, whole_number
from rehearsal.environments.splits import content_split, draw_in_split, split_option, task_key
from rehearsal.errors import EnvironmentFault, RecipeError

_SPLIT_TRIES = 500
"""Resets, or questions drawn, after which a split is taken to be empty."""


class GymTextAdapter(TextEnv):
    """Any Gymnasium environment whose observations are, or can be made, text.

    Observations must be strings unless ``observe`` turns them into strings. Actions may be text (a ``Text`` space), or
    numbers (a ``Discrete`` space) that ``action_names`` gives names to.

    A plain Gymnasium environment does not know splits, so by default none is claimed: ``options["split"]`` is ignored,
    ``info`` has no ``split``, and held-out play differs from training by seed alone. With ``split_by_content=True`` the
    environment is reset until the hash of its first observation falls into the wanted split; that costs about ten
    resets for a test episode, and needs first observations that tell tasks apart.

    Nor does it know that the members of a group share their task and not their luck: after a reset with
    ``options["chance"]`` from 1 on its ``np_random`` is seeded again, from what the reset left there and from that
    number. One that draws from anything else has the same luck each time; ``rehearsal.check_env`` says so.

    Args:
        environment: an environment, or the id of a registered one.
        action_names: a name for each action of a ``Discrete`` space, in order.
        observe: turns an observation into text.
        instructions: the rules, told once in the system prompt.
        name: short id; the environment's own if left out.
        max_turns: see :class:`TextEnv`.
        max_actions_per_turn: see :class:`TextEnv`.
        fast: see :class:`TextEnv`.
        split_by_content: see above.

    Raises:
        EnvironmentFault: where actions cannot be spelled, or an observation is not text.
    """

    def __init__(
        self,
        environment: gym.Env[Any, Any] | str,
        *,
        action_names: Sequence[str] | None = None,
        observe: Callable[[Any], str] | None = None,
        instructions: str = "",
        name: str | None = None,
        max_turns: int = 5,
        max_actions_per_turn: int = 1,
        fast: bool = False,
        split_by_content: bool = False,
    ) -> None:
        if isinstance(environment, str):
            try:
                environment = gym.make(environment)
            except gym.error.Error as problem:
                raise RecipeError(f"Gymnasium cannot make {environment!r}: {problem}") from problem
        self._inner = environment
        spec = environment.spec
        self.name = name or (spec.id if spec is not None else type(environment.unwrapped).__name__)
        self.max_turns = max_turns
        self.max_actions_per_turn = max_actions_per_turn
        self.fast = fast
        self._instructions = instructions
        self._observe = observe
        self._split_by_content = split_by_content
        self._actions = self._spell_actions(action_names)
        self._marks: dict[str, str] = {}  # what the adapter adds to every info of the episode
        self._running = False

    def _spell_actions(self, action_names: Sequence[str] | None) -> dict[str, int] | None:
        space = self._inner.action_space
        if isinstance(space, gym.spaces.Discrete):
            if action_names is None:
                raise EnvironmentFault(
                    f"{self.name} takes numbered actions: wrap it in GymTextAdapter(environment, action_names=[...]) "
                    f"with {space.n} names."
                )
            if len(action_names) != space.n or len({name.strip().casefold() for name in action_names}) != space.n:
                raise EnvironmentFault(
                    f"{self.name} has {space.n} actions, so action_names must be {space.n} different names."
                )
            return {name: int(space.start) + index for index, name in enumerate(action_names)}
        if not isinstance(space, gym.spaces.Text):
            raise EnvironmentFault(
                f"{self.name} takes actions from {type(space).__name__}; only text and named numbers can be spelled."
            )
        if action_names is not None:
            raise EnvironmentFault(f"{self.name} takes text, so action_names has no meaning; leave it out.")
        return None

    @property
    def instructions(self) -> str:
        """The rules that were given, followed by the names of the actions."""
        listed = f"Actions: {', '.join(self._actions)}." if self._actions else ""
        return "\n".join(part for part in (self._instructions, listed) if part)

    def legal_actions(self) -> list[str] | None:
        """The names of all actions, or None where actions are free text."""
        return None if self._actions is None else list(self._actions)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Start an episode; see :meth:`TextEnv.reset` and the class on splits and luck.

        Raises:
            RecipeError: for a split that does not exist, or a chance that is not a whole number from 0 on.
            EnvironmentFault: where an observation is not text, or no first observation falls into the split.
        """
        self._running = False
        split = split_option(options)
        super().reset(seed=seed)
        chance = whole_number("chance", (options or {}).get("chance", 0), 0, 2**32)
        own = ("split", "chance")  # the inner environment knows neither
        inner_options = {key: value for key, value in (options or {}).items() if key not in own} or None
        for _ in range(_SPLIT_TRIES):
            raw, info = self._inner.reset(seed=seed, options=inner_options)
            observation = self._text(raw)
            self._marks = {}
            if not self._split_by_content:
                break
            if content_split(observation) == split:
                self._marks = {"split": split, "task": task_key(observation)}
                break
            if seed is not None:  # an unseeded environment goes on by itself
                seed = int(self.np_random.integers(2**31))
        else:
            raise EnvironmentFault(
                f"None of {_SPLIT_TRIES} resets of {self.name} began with an observation of the {split} split; its "
                "first observations differ too little to split by content."
            )
        if chance:
            self._reseed(chance)
        self._running = True
        return observation, {**self._marks, **_told(info)}

    def _reseed(self, chance: int) -> None:
        """Give the inner environment other luck. Its wrappers, if there are any, draw from the same generator."""
        inner = self._inner.unwrapped
        if isinstance(inner, TextEnv):
            inner.draw_luck(chance)  # it may have luck from elsewhere than np_random
        if isinstance(inner.np_random, np.random.Generator):
            inner.np_random = np.random.default_rng([int(inner.np_random.integers(2**32)), chance])

    def draw_luck(self, chance: int) -> None:
        """Nothing: the reset has done it."""

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take one action; see :meth:`TextEnv.step`."""
        if not self._running:
            raise gym.error.ResetNeeded(f"No episode of {self.name} is running: call reset() before step().")
        legal = self.parse_action(action)
        if legal is None:
            raise ValueError(f"{action!r} is not a legal action here; legal are {self.legal_actions()}.")
        raw, reward, terminated, truncated, info = self._inner.step(
            legal if self._actions is None else self._actions[legal]
        )
        self._running = not (terminated or truncated)
        return self._text(raw), float(reward), bool(terminated), bool(truncated), {**self._marks, **_told(info)}

    def close(self) -> None:
        """Close the wrapped environment."""
        self._inner.close()

    def _text(self, raw: Any) -> str:
        text = raw if self._observe is None else self._observe(raw)
        if not isinstance(text, str):
            raise EnvironmentFault(
                f"An observation of {self.name} is a {type(text).__name__}, not text; give GymTextAdapter an observe "
                "function that turns it into text."
            )
        if bad := bad_text(text):
            raise EnvironmentFault(f"An observation of {self.name} is {bad}; decode it with errors='replace'.")
        return text


def _told(info: dict[str, Any]) -> dict[str, Any]:
    """What the inner environment says of itself, with the entries that mean something here in their types."""
    info = dict(info)
    for key in TEXTS:
        if info.get(key) is not None:
            info[key] = str(info[key])
    for key in FLAGS:
        if is_number(info.get(key)):
            info[key] = bool(info[key])
    return info


class ReasoningGymEnv(EpisodeEnv):
    """A data set of reasoning-gym: one question, one answer.

    The reward is the data set's own score of the answer, from 0 to 1; success is a score of 1. The splits are disjoint
    in the text of the question. An answer that the scorer cannot read scores 0, and ``info["scorer_error"]`` says why.
    Needs ``pip install reasoning-gym`` (github.com/open-thought/reasoning-gym).

    Args:
        dataset: name of the data set, such as "leg_counting".
        size: how many questions to draw from. Most data sets make a question when it is asked for; a few make all of
            them at the start.
        seed: of the data set.
        **config: options of the data set.

    Raises:
        RecipeError: where reasoning-gym is not installed, or does not know the data set or its options.
    """

    name = "reasoning-gym"
    fast = False
    max_turns = 1
    max_actions_per_turn = 1

    def __init__(self, dataset: str, size: int = 10_000, seed: int = 0, **config: Any) -> None:
        super().__init__(max_steps=1)
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError as problem:
            raise RecipeError(
                "The environment reasoning-gym needs the package of that name: pip install reasoning-gym"
            ) from problem
        if dataset not in DATASETS:
            close = difflib.get_close_matches(dataset, DATASETS, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else "see reasoning_gym.factory.DATASETS."
            raise RecipeError(f"reasoning-gym has no data set {dataset!r}; {hint}")
        try:
            self._dataset = reasoning_gym.create_dataset(dataset, size=size, seed=seed, **config)
        except (TypeError, ValueError, AssertionError) as problem:
            raise RecipeError(f"The data set {dataset} does not take these options: {problem}") from problem
        self.dataset = dataset
        self._entry: dict[str, Any] = {}
        self._score: float | None = None
        self._scorer_error = ""

    @property
    def instructions(self) -> str:
        """What counts as an action; the question itself tells the rest."""
        return "Answer the question. The action is the answer alone."

    def _draw(self, split: str) -> str:
        def entry() -> dict[str, Any]:
            return dict(self._dataset[int(self.np_random.integers(len(self._dataset)))])

        self._entry = draw_in_split(entry, _question, split, max_tries=_SPLIT_TRIES)
        self._score = None
        self._scorer_error = ""
        return _question(self._entry)

    def _act(self, action: str) -> tuple[float, bool, bool, bool]:
        try:
            self._score = float(self._dataset.score_answer(answer=action, entry=self._entry))
        except Exception as problem:
            # Some scorers raise on an answer of the wrong form. That is the agent's doing as long as the scorer can
            # read the stored answer.
            self._scorer_error = f"{type(problem).__name__}: {problem}"
            self._score = 0.0
            self._check_scorer()
        return self._score, True, self._score >= 1.0, True

    def _check_scorer(self) -> None:
        try:
            self._dataset.score_answer(answer=self._entry["answer"], entry=self._entry)
        except Exception as again:
            raise EnvironmentFault(
                f"The scorer of the data set {self.dataset} raises on any answer: {self._scorer_error}"
            ) from again

    def _info(self) -> dict[str, Any]:
        error = {"scorer_error": self._scorer_error} if self._scorer_error else {}
        return {**super()._info(), **error}

    def _observation(self) -> str:
        return _question(self._entry) if self._score is None else f"score {self._score:g}"

    def _state(self) -> str:
        return self._task if self._score is None else f"{self._task} {self._score:g}"

    def oracle(self) -> list[str] | None:
        """The stored answer, None where the data set has none, nothing once an answer was given."""
        self._need_reset()
        if self._over:
            return []
        answer = self._entry.get("answer")
        return None if answer is None else [str(answer)]

    def describe(self) -> dict[str, Any]:
        """``question``, ``answer`` and ``metadata`` of the item."""
        self._need_reset()
        return {key: self._entry.get(key) for key in ("question", "answer", "metadata")}


def _question(entry: dict[str, Any]) -> str:
    return str(entry["question"]).strip()
