"""The data that flows through the house: tokens with their kinds, turns, trajectories, groups.

Nothing here knows of models, environments or training. A trajectory is written once, by the rollout, and everything
downstream (objectives, diagnostics, memory, reports) reads it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


class Kind(enum.IntEnum):
    """Where a token came from; recorded when the token is made and never inferred afterwards."""

    TEMPLATE = 0
    """Chat scaffolding: role names, turn markers, separators."""
    SYSTEM = 1
    """The system prompt: rules of the environment and of the answer format."""
    OBSERVATION = 2
    """The environment's own words."""
    NOTICE = 3
    """What our own harness adds: warnings, hints, budgets."""
    THOUGHT = 4
    """Sampled by the policy before the end of its thought, tags included."""
    ACTION = 5
    """Sampled by the policy after its thought: the answer, its tags and the end of the turn."""


SAMPLED_KINDS = (Kind.THOUGHT, Kind.ACTION)
"""The kinds that the policy sampled: what a policy objective trains on."""


class StopReason(enum.StrEnum):
    """Why an episode ended."""

    TERMINATED = "terminated"
    """The environment reached a final state."""
    TRUNCATED = "truncated"
    """The environment stopped the episode by a limit of its own."""
    TURN_LIMIT = "turn_limit"
    """The agent used all its turns."""
    ACTION_LIMIT = "action_limit"
    """The agent used all its actions."""
    CONTEXT_LIMIT = "context_limit"
    """The next observation, or the answer to it, did not fit into the context."""
    ERROR = "error"
    """The environment raised or broke its contract: the episode has no reward."""
    TIMEOUT = "timeout"
    """The environment did not answer in time: the episode has no reward."""


FAILED_STOPS = (StopReason.ERROR, StopReason.TIMEOUT)
"""Stops that leave an episode without a reward. It is left out of its group's baseline; it is not a zero."""


class SampleStop(enum.StrEnum):
    """Why sampling of one turn ended."""

    END = "end"
    """The policy ended its turn."""
    LENGTH = "length"
    """The tokens of the turn were used up."""
    CONTEXT = "context"
    """The context was full."""


def _total(rewards: Iterable[float]) -> float:
    """The sum, rounded once; infinite or not a number where rewards are beyond what a float holds."""
    values = list(rewards)
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        return sum(values)


@dataclass
class Segment:
    """One contiguous token sequence as the model saw it.

    A trajectory has one segment as long as its context only grows, and several once something has rewritten it.

    Attributes:
        token_ids: int32 of shape (T,).
        logprobs: float32 of shape (T,): natural-log probability of each sampled token under the distribution it was
            sampled from (temperature and truncation included); NaN for tokens that were not sampled.
        kinds: int8 of shape (T,), values of :class:`Kind`.
        turns: int16 of shape (T,): index of the turn that the token belongs to. A turn is an observation and the
            answer to it; the system prompt belongs to turn 0.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    kinds: np.ndarray
    turns: np.ndarray

    def __post_init__(self) -> None:
        self.token_ids = np.asarray(self.token_ids, dtype=np.int32)
        self.logprobs = np.asarray(self.logprobs, dtype=np.float32)
        self.kinds = np.asarray(self.kinds, dtype=np.int8)
        self.turns = np.asarray(self.turns, dtype=np.int16)
        lengths = {len(self.token_ids), len(self.logprobs), len(self.kinds), len(self.turns)}
        if len(lengths) != 1:
            raise ValueError(f"the arrays of a segment must have one length, not {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def sampled_mask(self) -> np.ndarray:
        """bool of shape (T,): the tokens that the policy sampled."""
        return np.isin(self.kinds, SAMPLED_KINDS)


@dataclass(frozen=True)
class Prediction:
    """What the agent expected the environment to answer.

    Attributes:
        actions: to these actions.
        text: the expected answer.
        position: index in the segment of the first token behind the tag that opens the prediction.
        end: index of the first token behind the tag that closes it, or behind the last token where it was cut off.
    """

    actions: tuple[str, ...]
    text: str
    position: int
    end: int


@dataclass(frozen=True)
class ToolCall:
    """A tool that the agent called, and what came of it.

    Attributes:
        name: of the tool, as the agent wrote it.
        arguments: by name, as the agent wrote them: values of JSON.
        result: what the agent was told, the harness's own words included; "" as long as it was not executed.
        error: the kind of failure, "" if there is none: "unknown" (there is no such tool), "arguments", "raised",
            "timeout", "busy" (an earlier call has not come back), or "limit" (no calls were left, so nothing ran).
        cost: what the call took off the reward; not negative.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    result: str = ""
    error: str = ""
    cost: float = 0.0


@dataclass
class Turn:
    """One exchange: what the agent was shown, what it answered, what came of it.

    The texts are for people (reports, memory, logs); training reads the segment's tokens.

    Attributes:
        observation: the environment's words at the start of the turn; after an answer that called tools, their
            results.
        notice: what the harness added to them ("" if nothing).
        response: everything that the policy sampled in this turn, decoded.
        thought: the text inside the thought, or "".
        actions: the actions that were parsed out of the answer, at most as many as a turn allows.
        executed: those of them that the environment stepped.
        aliases: for each executed action the foretold ones that stood for it in that state, in the rehearse protocol.
        rewards: the environment's reward of each executed action.
        penalty: what the harness took off for an answer that could not be parsed or was illegal, and for the cost of
            tool calls (zero or negative).
        valid: whether the answer kept the format and every executed action was legal.
        stop: why sampling ended.
        state: a key of the environment's state at the start of the turn, if it gives one (info["state"]).
        predictions: what the thought expected of actions, in the rehearse protocol.
        calls: the tools that the answer called, in order, at most as many as a turn allows. An answer with calls has no
            actions.
        foreseeable: whether what the environment answered follows from what the agent had been shown, as far as the
            environment tells it.
        meaning: of what the environment answered, whatever its words; "" where it is not told apart from them.
        parts: what the rewards are made of, by name, where the environment says so (info["parts"]).
        violations: the rules that its actions broke, where the environment says so (info["violations"]).
        obligations: the duties that they did, where the environment says so (info["obligations"]).
        shaping: what the recipe adds to the reward in training, by name.
    """

    observation: str
    notice: str = ""
    response: str = ""
    thought: str = ""
    actions: list[str] = field(default_factory=list)
    executed: list[str] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    penalty: float = 0.0
    valid: bool = True
    stop: SampleStop = SampleStop.END
    state: str = ""
    predictions: list[Prediction] = field(default_factory=list)
    aliases: list[list[str]] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    foreseeable: bool = False
    meaning: str = ""
    parts: dict[str, float] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    obligations: list[str] = field(default_factory=list)
    shaping: dict[str, float] = field(default_factory=dict)

    @property
    def reward(self) -> float:
        """The reward of the turn: what the environment gave, the penalty of the harness, and what the recipe adds."""
        return _total(self.rewards) + self.penalty + _total(self.shaping.values())


@dataclass
class Trajectory:
    """One episode.

    Attributes:
        environment: id of the environment.
        seed: the seed that the environment was reset with.
        split: "train", "validation" or "test".
        task: key of the task's content, the same for all episodes of a group (info["task"]; "" if none).
        sample: index of the episode in its group.
        segments: the tokens, see :class:`Segment`.
        turns: the exchanges, oldest first.
        stop_reason: why it ended.
        success: whether the task was solved, apart from the reward; None where the environment cannot tell.
        error: one sentence, if the episode failed.
        final_observation: the environment's last words, after the last action.
        counters: numbers worth adding up over episodes, by name (format errors, illegal actions, seconds, ...).
        policy_step: the optimiser step of the policy that played it.
        topic: what the task is about, if the environment says so (info["topic"]): tasks of one topic have in common
            what is worth remembering about them, such as the company that is called.
        category: the kind of task that it is, if the environment says so (info["category"]): results are told for each
            kind apart.
    """

    environment: str
    seed: int
    split: str = "train"
    task: str = ""
    sample: int = 0
    segments: list[Segment] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    stop_reason: StopReason = StopReason.TERMINATED
    success: bool | None = None
    error: str = ""
    final_observation: str = ""
    counters: dict[str, float] = field(default_factory=dict)
    policy_step: int = 0
    topic: str = ""
    category: str = ""

    @property
    def failed(self) -> bool:
        """Whether the episode has no reward because something other than the agent broke."""
        return self.stop_reason in FAILED_STOPS

    @property
    def turn_rewards(self) -> np.ndarray:
        """float64 of shape (turns,)."""
        return np.array([turn.reward for turn in self.turns], dtype=np.float64)

    @property
    def reward(self) -> float:
        """The sum over turns; NaN for a failed episode."""
        return math.nan if self.failed else _total(turn.reward for turn in self.turns)

    @property
    def parts(self) -> dict[str, float]:
        """What the reward is made of, summed over turns: ``reward``, which environment and harness gave, the parts that
        the environment tells of, and what the recipe adds. The environment's parts are told apart from its reward, and
        need not add up to it."""
        found: dict[str, float] = {"reward": 0.0}
        for turn in self.turns:
            own = _total([*turn.rewards, turn.penalty])
            for name, amount in [("reward", own), *turn.parts.items(), *turn.shaping.items()]:
                found[name] = found.get(name, 0.0) + amount
        return found

    @property
    def n_tokens(self) -> int:
        return sum(len(segment) for segment in self.segments)

    @property
    def n_sampled(self) -> int:
        return sum(int(segment.sampled_mask.sum()) for segment in self.segments)


@dataclass
class Group:
    """Trajectories of the same task and seed, which share their first observation."""

    trajectories: list[Trajectory]

    def __len__(self) -> int:
        return len(self.trajectories)

    def __iter__(self) -> Iterator[Trajectory]:
        return iter(self.trajectories)

    @property
    def rewards(self) -> np.ndarray:
        """float64 of shape (G,), NaN where an episode failed."""
        return np.array([trajectory.reward for trajectory in self.trajectories], dtype=np.float64)


def rewards_matrix(groups: Sequence[Group]) -> np.ndarray:
    """Rewards of all groups as ``rewards_PG``, float64 of shape (P, G).

    Groups that are shorter than the longest are filled with NaN, as failed episodes are: neither has a reward.
    """
    width = max((len(group) for group in groups), default=0)
    rewards_PG = np.full((len(groups), width), np.nan)
    for row, group in enumerate(groups):
        rewards_PG[row, : len(group)] = group.rewards
    return rewards_PG


def all_trajectories(groups: Sequence[Group]) -> list[Trajectory]:
    """The trajectories of all groups, in order."""
    return [trajectory for group in groups for trajectory in group]


def info_success(info: dict[str, Any]) -> bool | None:
    """The success that an environment reports in ``info["success"]``, or None where it reports none."""
    value = info.get("success")
    return None if value is None else bool(value)
