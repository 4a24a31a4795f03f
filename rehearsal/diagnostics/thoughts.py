"""Which thoughts of a batch to score under which prompts, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rehearsal.diagnostics.information import Information, information
from rehearsal.models.packing import PackItem
from rehearsal.trajectory import Group, Kind, Segment

Score = Callable[[Sequence[PackItem]], Sequence[np.ndarray]]
"""Log-probs of the target tokens of sequences, see :func:`rehearsal.models.scoring.target_logprobs`."""


@dataclass(frozen=True)
class Tags:
    """Token ids of the tags around a thought, as the policy writes them; empty where there are none to look for.

    Tags are the same under every prompt: the opening one counts as the end of the prompt, the closing one not at all.
    """

    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()


@dataclass(frozen=True)
class Thought:
    """A thought and what it was an answer to.

    Attributes:
        prompt: int32, every token before it.
        tokens: int32, the thought without its tags; may be empty.
    """

    prompt: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class CrossTable:
    """A sample of thoughts with the prompts to score them under.

    Attributes:
        thoughts: N of them.
        prompts: M distinct ones.
        own: for each thought the number of its prompt.
    """

    thoughts: tuple[Thought, ...]
    prompts: tuple[np.ndarray, ...]
    own: tuple[int, ...]

    @classmethod
    def of(cls, thoughts: Sequence[Thought]) -> CrossTable:
        """All thoughts under all of their prompts; equal prompts are one."""
        numbers: dict[bytes, int] = {}
        prompts: list[np.ndarray] = []
        own = []
        for thought in thoughts:
            key = thought.prompt.tobytes()
            if key not in numbers:
                numbers[key] = len(prompts)
                prompts.append(thought.prompt)
            own.append(numbers[key])
        return cls(tuple(thoughts), tuple(prompts), tuple(own))

    @property
    def cost(self) -> int:
        """Tokens of the forward passes, each prompt read once."""
        return sum(map(len, self.prompts)) + len(self.prompts) * sum(len(thought.tokens) for thought in self.thoughts)

    def scores(self, score: Score) -> np.ndarray:
        """float64 of shape (N, M): log-likelihood in nats of each thought after each prompt."""
        table_NM = np.zeros((len(self.thoughts), len(self.prompts)))
        items, cells = [], []
        for j, prompt in enumerate(self.prompts):
            for i, thought in enumerate(self.thoughts):
                if len(thought.tokens):
                    sequence = np.concatenate([prompt, thought.tokens])
                    items.append(PackItem(sequence, np.arange(len(prompt), len(sequence)), j))
                    cells.append((i, j))
        for (i, j), logprobs in zip(cells, score(items), strict=True):
            table_NM[i, j] = np.asarray(logprobs, dtype=np.float64).sum()
        return table_NM


@dataclass(frozen=True)
class ThoughtInformation:
    """The estimates by both definitions, from one table.

    Attributes:
        sequence: of whole thoughts, the paper's definition.
        per_token: of log-likelihoods divided by the thought's length, the published code's.
        empty: share of the thoughts that have no token. They say nothing of their prompts and count as such.
        cost: tokens of the forward passes.
    """

    sequence: Information
    per_token: Information
    empty: float
    cost: int


def measure(table: CrossTable, score: Score) -> ThoughtInformation:
    """Score a sample of thoughts.

    Args:
        table: with at least one thought.
        score: the policy, at the temperature that it sampled with.
    """
    scores_NM = table.scores(score)
    lengths = [len(thought.tokens) for thought in table.thoughts]
    return ThoughtInformation(
        information(scores_NM, table.own), information(scores_NM, table.own, lengths),
        float(np.mean([length == 0 for length in lengths])), table.cost,
    )  # fmt: skip


# --- sampling ---------------------------------------------------------------------------------------------------------


def first_turn_table(
    groups: Sequence[Group], tags: Tags, rng: np.random.Generator, budget: int, most_prompts: int = 32,
    per_prompt: int = 2,
) -> CrossTable | None:  # fmt: skip
    """Thoughts of the first turn: of some groups, drawn at random, a few episodes each.

    Args:
        groups: of the batch.
        tags: of the policy's thoughts.
        rng: draws.
        budget: tokens of forward passes, at most.
        most_prompts: the most groups.
        per_prompt: episodes of each group; fewer where the budget would not reach for two prompts.

    Returns:
        None where the batch has fewer than two groups with thoughts, or the budget is too small for two of them.
    """
    picked: list[list[Thought]] = []
    for p in rng.permutation(len(groups)):
        if len(picked) == most_prompts:
            break
        found = []
        members = [trajectory for trajectory in groups[p] if not trajectory.failed and trajectory.segments]
        for g in rng.permutation(len(members)):
            thought = thought_of_turn(members[g].segments[0], 0, tags)
            if thought is not None:
                found.append(thought)
            if len(found) == per_prompt:
                break
        if found:
            picked.append(found)
    return _within(picked, budget)


def any_turn_table(
    groups: Sequence[Group], tags: Tags, rng: np.random.Generator, budget: int, most: int = 32
) -> CrossTable | None:
    """Thoughts of any turn: one of each episode, a turn and an episode of each group drawn at random.

    As in the published code every episode counts once, however many turns it has. Arguments and result are those of
    :func:`first_turn_table`.
    """
    picked: list[list[Thought]] = []
    for p in rng.permutation(len(groups)):
        if len(picked) == most:
            break
        members = [trajectory for trajectory in groups[p] if not trajectory.failed and trajectory.segments]
        if not members:
            continue
        trajectory = members[int(rng.integers(len(members)))]
        segment = trajectory.segments[int(rng.integers(len(trajectory.segments)))]
        turns = np.unique(segment.turns[segment.kinds == Kind.THOUGHT])
        thought = thought_of_turn(segment, int(rng.choice(turns)), tags) if len(turns) else None
        if thought is not None:
            picked.append([thought])
    return _within(picked, budget)


def _within(picked: Sequence[Sequence[Thought]], budget: int) -> CrossTable | None:
    """The table of as many prompts as the budget allows, in the order in which they were drawn."""
    for each in (max(map(len, picked), default=0), 1):
        low, high = 1, len(picked)  # the cost grows with the prompts, so the largest number is found by halving

        def table(count: int, each: int = each) -> CrossTable:
            return CrossTable.of([thought for found in picked[:count] for thought in found[:each]])

        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if table(middle).cost <= budget else (low, middle - 1)
        if low >= 2 and len(table(low).prompts) >= 2:
            return table(low)
    return None


def thought_of_turn(segment: Segment, turn: int, tags: Tags) -> Thought | None:
    """The thought of a turn in a segment and everything before it; None where the turn has none."""
    where = np.flatnonzero((segment.kinds == Kind.THOUGHT) & (segment.turns == turn))
    if not len(where):
        return None
    start, stop = int(where[0]), int(where[-1]) + 1
    ids = segment.token_ids[start:stop].tolist()
    if tags.opening and tuple(ids[: len(tags.opening)]) == tags.opening:
        start += len(tags.opening)
        ids = ids[len(tags.opening) :]
    if tags.closing and len(ids) >= len(tags.closing) and tuple(ids[-len(tags.closing) :]) == tags.closing:
        stop -= len(tags.closing)
    return Thought(segment.token_ids[:start], segment.token_ids[start:stop])
