"""Which thoughts are scored under which prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rehearsal.diagnostics import CrossTable, Tags, Thought, any_turn_table, first_turn_table, measure, thought_of_turn
from rehearsal.models.packing import PackItem
from rehearsal.trajectory import Group, Kind, Segment, StopReason, Trajectory

OPEN, CLOSE = 90, 91
TAGS = Tags((OPEN,), (CLOSE,))


def episode(prompt: Sequence[int], *thoughts: Sequence[int], tags: bool = True, failed: bool = False) -> Trajectory:
    """An episode with a thought a turn, each after an observation of two tokens, and an answer of one."""
    ids: list[int] = []
    kinds: list[Kind] = []
    turns: list[int] = []

    def say(tokens: Sequence[int], kind: Kind, turn: int) -> None:
        ids.extend(tokens)
        kinds.extend([kind] * len(tokens))
        turns.extend([turn] * len(tokens))

    for turn, thought in enumerate(thoughts):
        say(prompt if turn == 0 else [70, 71], Kind.OBSERVATION, turn)
        say([OPEN, *thought, CLOSE] if tags else thought, Kind.THOUGHT, turn)
        say([80], Kind.ACTION, turn)
    sampled = np.isin(kinds, (Kind.THOUGHT, Kind.ACTION))
    segment = Segment(np.array(ids), np.where(sampled, -1.0, np.nan), np.array(kinds), np.array(turns))
    stop = StopReason.ERROR if failed else StopReason.TERMINATED
    return Trajectory("x", 0, segments=[segment], stop_reason=stop)


def unigram(items: Sequence[PackItem]) -> list[np.ndarray]:
    """Thoughts under a policy that gives a token the likelier, the nearer it is to the first token of the prompt."""
    found = []
    for item in items:
        distance = np.abs(item.token_ids[item.targets] - item.token_ids[0])
        found.append((-0.5 * distance - math.log(3)).astype(np.float32))
    return found


def test_tags_belong_to_the_prompt() -> None:
    segment = episode([1, 2, 3], [10, 11], [12]).segments[0]
    first = thought_of_turn(segment, 0, TAGS)
    assert first is not None
    assert first.prompt.tolist() == [1, 2, 3, OPEN]
    assert first.tokens.tolist() == [10, 11]
    second = thought_of_turn(segment, 1, TAGS)
    assert second is not None
    assert second.prompt.tolist() == [1, 2, 3, OPEN, 10, 11, CLOSE, 80, 70, 71, OPEN]
    assert second.tokens.tolist() == [12]
    assert thought_of_turn(segment, 2, TAGS) is None
    plain = thought_of_turn(episode([1], [10, 11], tags=False).segments[0], 0, TAGS)
    assert plain is not None
    assert plain.tokens.tolist() == [10, 11]


def test_a_thought_that_was_cut_off_or_left_empty() -> None:
    ids = [1, OPEN]
    segment = Segment(ids, [np.nan, -1.0], [Kind.OBSERVATION, Kind.THOUGHT], [0, 0])
    found = thought_of_turn(segment, 0, TAGS)
    assert found is not None
    assert found.tokens.tolist() == []
    empty = thought_of_turn(episode([1], []).segments[0], 0, TAGS)
    assert empty is not None
    assert empty.tokens.tolist() == []


def test_scores_are_those_of_each_thought_after_each_prompt() -> None:
    table = CrossTable.of(
        [
            Thought(np.array([5, 0]), np.array([5, 6])),
            Thought(np.array([9, 0]), np.array([9])),
            Thought(np.array([5, 0]), np.array([], dtype=np.int64)),
        ]
    )
    assert len(table.prompts) == 2
    assert table.own == (0, 1, 0)
    assert table.cost == 2 + 2 + 2 * 3
    scores = table.scores(unigram)
    log3 = math.log(3)
    np.testing.assert_allclose(scores, [[-0.5 - 2 * log3, -3.5 - 2 * log3], [-2 - log3, -log3], [0, 0]], rtol=1e-6)
    found = measure(table, unigram)
    assert found.empty == pytest.approx(1 / 3)
    assert found.sequence.mutual_information > found.per_token.mutual_information > 0


def test_thoughts_of_length_zero_say_nothing() -> None:
    groups = [Group([episode([p], [])]) for p in range(6)]
    table = first_turn_table(groups, TAGS, np.random.default_rng(0), 10_000)
    assert table is not None
    found = measure(table, unigram)
    assert found.empty == 1.0
    assert found.sequence.mutual_information == 0.0
    assert found.sequence.entropy == 0.0


def groups_of(count: int, size: int = 4, turns: int = 3) -> list[Group]:
    return [
        Group([episode([p, 60, 61], *[[p, g, t] for t in range(turns)]) for g in range(size)]) for p in range(count)
    ]


def test_the_first_turn_of_some_groups() -> None:
    table = first_turn_table(groups_of(40), TAGS, np.random.default_rng(0), 10**6, most_prompts=16, per_prompt=2)
    assert table is not None
    assert (len(table.thoughts), len(table.prompts)) == (32, 16)
    assert [table.thoughts[i].tokens[0] for i in range(32)] == [table.prompts[table.own[i]][0] for i in range(32)]
    assert {int(thought.tokens[2]) for thought in table.thoughts} == {0}


def test_any_turn_counts_episodes_and_not_turns() -> None:
    groups = groups_of(400, size=1, turns=1)
    for p in range(200):
        groups[p] = Group([episode([p], *[[p, 0, t] for t in range(9)])])
    table = any_turn_table(groups, TAGS, np.random.default_rng(0), 10**9, most=400)
    assert table is not None
    assert len(table.thoughts) == len(table.prompts) == 400
    late = [int(thought.tokens[2]) for thought in table.thoughts if thought.tokens[0] < 200]
    assert np.bincount(late, minlength=9).min() > 5


@pytest.mark.parametrize("maker", [first_turn_table, any_turn_table])
@pytest.mark.parametrize("budget", [10, 60, 150, 400, 2000, 10**6])
def test_the_budget_is_kept_and_used(maker: Any, budget: int) -> None:
    groups = groups_of(24)
    table = maker(groups, TAGS, np.random.default_rng(1), budget)
    if table is None:
        assert budget <= 60
        return
    assert table.cost <= budget
    assert len(table.prompts) >= 2
    whole = maker(groups, TAGS, np.random.default_rng(1), 10**9)
    assert whole is not None
    if table.cost < whole.cost:
        assert table.cost > budget / 4, "no more than a step of the search is left unused"


@pytest.mark.parametrize("maker", [first_turn_table, any_turn_table])
def test_batches_with_nothing_to_compare(maker: Any) -> None:
    rng = np.random.default_rng(0)
    assert maker([], TAGS, rng, 1000) is None
    assert maker(groups_of(1), TAGS, rng, 1000) is None
    assert maker([Group([]), Group([])], TAGS, rng, 1000) is None
    assert maker([Group([episode([p], [p], failed=True)]) for p in range(5)], TAGS, rng, 1000) is None
    assert maker([Group([episode([7], [p])]) for p in range(5)], TAGS, rng, 1000) is None, "one prompt for all"
    answers = episode([1])
    answers.segments = [Segment([1, 80], [np.nan, -1.0], [Kind.OBSERVATION, Kind.ACTION], [0, 0])]
    assert maker([Group([answers]), Group([answers])], TAGS, rng, 1000) is None, "no thoughts"
