"""What the samplers draw from what they are told, and that their state is all there is."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rehearsal.algorithms.curriculum import (
    ByDifficulty,
    Draw,
    Fresh,
    Mixture,
    Prioritised,
    Sampler,
    Staged,
    Uniform,
)
from rehearsal.errors import RecipeError

MAKERS: dict[str, Any] = {
    "fresh": Fresh,
    "uniform": lambda: Uniform(20),
    "difficulty": lambda: ByDifficulty(20),
    "variance": lambda: Prioritised(20),
    "progress": lambda: Prioritised(20, by="progress"),
    "staged": lambda: Staged(3, window=4),
    "staged with relief": lambda: Staged(3, window=2, threshold=1.0, patience=6, relief=frozenset({1, 2})),
    "mixture": lambda: Mixture([Uniform(20, 0), ByDifficulty(20, 1), Fresh(2)], [1, 2, 1]),
}


def taught(sampler: Any, success: dict[int, float]) -> Any:
    """A sampler that has met these tasks, often enough to be sure."""
    for _ in range(30):
        sampler.observe([Draw(sampler.environment, task) for task in success], list(success.values()))
    return sampler


def counts(sampler: Sampler, draws: int = 400, each: int = 4) -> Counter[int | None]:
    rng = np.random.default_rng(0)
    return Counter(draw.number for _ in range(draws) for draw in sampler.draw(each, rng))


@pytest.mark.parametrize("name", MAKERS)
@given(
    steps=st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, math.nan]), min_size=8, max_size=8), max_size=12),
    cut=st.integers(0, 12), seed=st.integers(0, 100),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_state_is_all_there_is(name: str, steps: list[list[float]], cut: int, seed: int) -> None:
    """A sampler that was stored and taken up draws as one that was not."""
    whole, part = MAKERS[name](), MAKERS[name]()
    for step, success in enumerate(steps):
        if step == cut:
            state = json.loads(json.dumps(part.state_dict()))
            part = MAKERS[name]()
            part.load_state_dict(state)
        draws = whole.draw(8, np.random.default_rng([seed, step]))
        assert part.draw(8, np.random.default_rng([seed, step])) == draws
        assert len(draws) == 8
        whole.observe(draws, success)
        part.observe(draws, success)
        assert part.figures() == whole.figures()
        assert all(math.isfinite(value) for value in whole.figures().values())


@pytest.mark.parametrize("name", ["uniform", "difficulty", "variance", "progress"])
def test_no_task_twice_in_a_step_unless_the_pool_is_too_small(name: str) -> None:
    rng = np.random.default_rng(0)
    sampler = MAKERS[name]()
    assert len({draw.number for draw in sampler.draw(20, rng)}) == 20
    many = Counter(draw.number for draw in sampler.draw(50, rng))
    assert sum(many.values()) == 50
    assert max(many.values()) <= 3


@pytest.mark.parametrize("name", list(MAKERS))
def test_who_chooses_by_success_says_so(name: str) -> None:
    sampler = MAKERS[name]()
    told = name in ("difficulty", "variance", "progress")
    assert sampler.figures().get("curriculum/adaptive", 0.0) == float(told), "from the first step on"
    both = Mixture([sampler, Fresh(1)], [1, 1])
    assert ("curriculum/adaptive/0" in both.figures()) == told


def test_uniform_is_uniform() -> None:
    drawn = counts(taught(Uniform(8), {0: 0.0, 1: 1.0}))
    assert min(drawn.values()) > 0.75 * max(drawn.values())


def test_the_band() -> None:
    success = {0: 0.0, 1: 0.1, 2: 0.2, 3: 0.5, 4: 0.8, 5: 0.9, 6: 1.0}
    sampler = taught(ByDifficulty(8, retry=0.1), success)
    drawn = counts(sampler)
    inside, outside = {2, 3, 4, 7}, {0, 1, 5, 6}
    assert sum(drawn[task] for task in outside) / 1600 == pytest.approx(0.1, abs=0.03)
    assert min(drawn[task] for task in inside) > 4 * max(drawn[task] for task in outside)
    assert sampler.figures()["curriculum/in_band"] == pytest.approx(3 / 7)
    never = counts(taught(ByDifficulty(8, retry=0.0), success))
    assert not outside & set(never)


def test_a_band_with_too_few_tasks_is_filled_from_outside() -> None:
    sampler = taught(ByDifficulty(6, retry=0.0), {0: 0.5, 1: 0.0, 2: 0.0, 3: 0.0, 4: 1.0, 5: 1.0})
    for seed in range(20):
        draws = [draw.number for draw in sampler.draw(3, np.random.default_rng(seed))]
        assert draws.count(0) == 1
        assert len(set(draws)) == 3
    empty = taught(ByDifficulty(3, retry=0.0), {0: 0.0, 1: 0.0, 2: 1.0})
    assert len(empty.draw(3, np.random.default_rng(0))) == 3


def test_no_task_is_retried_twice_in_a_step() -> None:
    sampler = taught(ByDifficulty(64, retry=0.5), {0: 0.0})
    for seed in range(50):
        draws = sampler.draw(32, np.random.default_rng(seed))
        assert len({draw.number for draw in draws}) == 32
        again = sampler.draw(8, np.random.default_rng(seed), draws)
        assert not {draw.number for draw in again} & {draw.number for draw in draws}


def test_a_task_comes_back_into_the_band() -> None:
    sampler = taught(ByDifficulty(2, retry=0.0), {0: 0.0, 1: 0.5})
    for _ in range(3):
        sampler.observe([Draw(0, 0)], [1.0])
        sampler.observe([Draw(0, 0)], [0.0])
    assert counts(sampler, each=1)[0] > 100


def test_variance_prefers_even_odds() -> None:
    drawn = counts(taught(Prioritised(4, explore=0.0), {0: 0.0, 1: 0.1, 2: 0.5, 3: 1.0}), each=1)
    assert drawn[0] == drawn[3] == 0
    assert drawn[2] / drawn[1] == pytest.approx(0.25 / 0.09, rel=0.3)
    explored = counts(taught(Prioritised(4, explore=0.4), {0: 0.0, 1: 0.1, 2: 0.5, 3: 1.0}), each=1)
    assert explored[0] / 400 == pytest.approx(0.1, abs=0.05)


def test_progress_is_not_chased_where_there_is_only_chance() -> None:
    # A policy that does not change: nothing progresses, so no task may become a favourite, and none be left alone.
    rng = np.random.default_rng(0)
    ability = rng.random(64)
    sampler = Prioritised(64, by="progress", explore=0.1, episodes=8)
    visits = np.zeros(64)
    for _ in range(60):
        draws = sampler.draw(8, rng)
        sampler.observe(draws, [rng.binomial(8, ability[draw.number]) / 8 for draw in draws])
        for draw in draws:
            visits[draw.number] += 1
    assert visits.min() >= 3
    assert visits.max() <= 4 * visits.mean()


def test_what_a_step_has_played_is_not_drawn_again_while_there_is_other() -> None:
    for make_one in (Uniform, ByDifficulty, Prioritised):
        sampler = make_one(10)
        played = sampler.draw(6, np.random.default_rng(0))
        more = sampler.draw(4, np.random.default_rng(1), played)
        assert len({*played, *more}) == 10
        again = sampler.draw(4, np.random.default_rng(2), [*played, *more])
        assert len(set(again)) == 4, "what is left is played twice rather than not at all"


def test_progress_prefers_what_changes() -> None:
    sampler = taught(Prioritised(3, by="progress", explore=0.0), {0: 0.5, 1: 0.2, 2: 0.8})
    for _ in range(2):
        sampler.observe([Draw(0, 0), Draw(0, 1), Draw(0, 2)], [0.5, 0.9, 0.8])
    drawn = counts(sampler, each=1)
    assert drawn[1] > 390


@pytest.mark.parametrize("by", ["variance", "progress"])
def test_tasks_that_were_never_met_come_first(by: Any) -> None:
    sampler = taught(Prioritised(10, by=by, explore=0.0), dict.fromkeys(range(9), 0.95))
    assert counts(sampler, each=1)[9] >= 400 / 10


@pytest.mark.parametrize("by", ["variance", "progress"])
def test_a_pool_in_which_nothing_is_left_to_learn_is_drawn_evenly(by: Any) -> None:
    drawn = counts(taught(Prioritised(5, by=by, explore=0.0), dict.fromkeys(range(5), 1.0)), each=1)
    assert min(drawn.values()) > 40


def test_stages() -> None:
    rng = np.random.default_rng(0)
    sampler = Staged(3, threshold=0.75, window=4, review=0.0)
    assert {draw.environment for draw in sampler.draw(50, rng)} == {0}
    first = [Draw(0)] * 4
    sampler.observe(first, [1.0, 1.0, 0.0, 0.0])
    assert sampler.stage == 0
    assert sampler.figures() == {"curriculum/stage": 0.0, "curriculum/stage_success": 0.5}
    sampler.observe(first[:2], [1.0, 1.0])
    assert sampler.stage == 0, "the last four: 0, 0, 1, 1"
    sampler.observe(first[:2], [1.0, math.nan])
    sampler.observe(first[:1], [1.0])
    assert sampler.stage == 1
    sampler.observe(first, [1.0] * 4)
    assert sampler.stage == 1, "old stages say nothing of the present one"
    sampler.observe([Draw(1)] * 8, [1.0] * 8)
    assert sampler.stage == 2
    sampler.observe([Draw(2)] * 8, [1.0] * 8)
    assert sampler.stage == 2, "there is no further one"
    sampler.review = 0.2
    drawn = Counter(draw.environment for draw in sampler.draw(2000, rng))
    assert drawn[2] / 2000 == pytest.approx(0.8, abs=0.03)
    assert drawn[0] == pytest.approx(drawn[1], rel=0.3)


def stalling(**changes: Any) -> Staged:
    usual = {"threshold": 0.9, "window": 4, "review": 0.0, "patience": 8, "relief": frozenset({1})}
    return Staged(3, **usual | changes)


def play_stage(sampler: Staged, *success: float) -> int:
    sampler.observe([Draw(sampler.stage)] * len(success), success)
    return sampler.stage


def test_a_stage_that_has_stalled_makes_way_for_relief() -> None:
    sampler = stalling()
    assert play_stage(sampler, 0.5, 0.5, 0.5) == 0, "the window is not full"
    assert play_stage(sampler, 0.5) == 0
    assert sampler.figures()["curriculum/since_rise"] == 0.0
    assert play_stage(sampler, 0.5, 0.5, 0.5, 0.5) == 0
    assert sampler.figures()["curriculum/since_rise"] == 4.0
    assert play_stage(sampler, 0.5, 0.5, 0.5) == 0
    assert play_stage(sampler, 0.5) == 1
    assert sampler.figures() == {"curriculum/stage": 1.0, "curriculum/since_rise": 0.0}
    # The next stage is only harder: whoever fails here stays here, and masters it to get on.
    assert play_stage(sampler, *[0.1] * 100) == 1
    assert play_stage(sampler, *[1.0] * 4) == 2


def test_a_stage_that_rises_has_not_stalled() -> None:
    sampler = stalling()
    for step in range(30):
        assert play_stage(sampler, *[0.2 + 0.012 * step] * 4) == 0, "slow, but it gets on"
    for _ in range(20):
        # What it loses and wins again is no rise.
        play_stage(sampler, 0.0, 0.0, 0.0, 0.0)
        play_stage(sampler, 0.55, 0.55, 0.55, 0.55)
    assert sampler.stage == 1


@pytest.mark.parametrize("changes", [{"patience": None}, {"relief": frozenset()}, {"relief": frozenset({2})}])
def test_no_stage_stalls_unless_it_may(changes: dict[str, Any]) -> None:
    assert play_stage(stalling(**changes), *[0.0] * 200) == 0


def test_a_stage_may_be_mastered_before_it_stalls() -> None:
    sampler = stalling()
    play_stage(sampler, *[0.5] * 8)
    assert play_stage(sampler, 1.0, 1.0, 1.0, 1.0) == 1


def test_stalling_is_part_of_the_state() -> None:
    whole, before = stalling(), stalling()
    for sampler in (whole, before):
        play_stage(sampler, *[0.5] * 4)
        play_stage(sampler, *[0.5] * 5)
    after = stalling()
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    for sampler in (whole, after):
        assert play_stage(sampler, 0.5, 0.5) == 0
        assert play_stage(sampler, 0.5) == 1
    old = stalling()
    old.load_state_dict({"stage": 1, "recent": [0.5]})
    assert old.state_dict() == {"stage": 1, "recent": [0.5], "best": None, "since_rise": 0}


def test_a_mixture_keeps_its_weights() -> None:
    sampler = Mixture([Fresh(0), Fresh(1), Fresh(2)], [5, 2, 1])
    total: Counter[int] = Counter()
    for seed in range(300):
        drawn = Counter(draw.environment for draw in sampler.draw(10, np.random.default_rng(seed)))
        assert abs(drawn[0] - 6.25) < 1
        assert abs(drawn[1] - 2.5) < 1
        assert sum(drawn.values()) == 10
        total += drawn
    assert total[2] / 3000 == pytest.approx(1 / 8, abs=0.02)


def test_a_mixture_tells_each_part_its_own() -> None:
    parts = [Uniform(4, 0), Uniform(4, 1)]
    sampler = Mixture(parts, [1, 1])
    draws = sampler.draw(8, np.random.default_rng(0))
    sampler.observe(draws, [float(draw.environment) for draw in draws])
    assert sampler.figures()["curriculum/pool_success/0"] == 0.0
    assert sampler.figures()["curriculum/pool_success/1"] == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(0), "at least one task"),
        (lambda: ByDifficulty(4, low=0.9, high=0.1), "0 <= low <= high <= 1"),
        (lambda: ByDifficulty(4, retry=2.0), "retry of a curriculum"),
        (lambda: Prioritised(4, by="luck"), '"variance" or "progress"'),  # type: ignore[arg-type]
        (lambda: Prioritised(4, explore=-1.0), "explore"),
        (lambda: Staged(0), "needs stages"),
        (lambda: Staged(2, window=0), "window"),
        (lambda: Staged(2, patience=0), "at least one group, not 0"),
        (lambda: Mixture([], []), "at least one environment"),
        (lambda: Mixture([Fresh()], [0.0]), "above 0"),
        (lambda: Uniform(4).load_state_dict(Uniform(5).state_dict()), "a pool of 5 tasks, not 4"),
        (lambda: Staged(1).load_state_dict({"stage": 2, "recent": []}), "has reached stage 3"),
        (lambda: Mixture([Fresh()], [1]).load_state_dict({"parts": [{}, {}]}), "mixes 2 environments and not 1"),
    ],
)
def test_wrong_values(make: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()
