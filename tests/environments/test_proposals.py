"""Episodes that go on after a wrong answer: the same task, other luck, and an end."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rehearsal.environments import make
from rehearsal.environments.base import TextEnv
from rehearsal.environments.calculate import Calculate
from rehearsal.environments.check import check_env
from rehearsal.environments.proposals import Proposals
from rehearsal.errors import EnvironmentFault, RecipeError


class Fickle(TextEnv):
    """Shows another task at every reset."""

    name = "fickle"
    fast = True

    def __init__(self) -> None:
        self.resets = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.resets += 1
        return "?", {"task": str(self.resets)}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "no", 0.0, True, False, {"success": False}


def wrong_for(env: TextEnv) -> str:
    solution = env.oracle()
    assert solution
    return str(int(solution[0]) + 1)


@given(seed=st.integers(0, 2**31 - 1), proposals=st.integers(1, 4))
def test_a_wrong_answer_may_be_followed_by_another(seed: int, proposals: int) -> None:
    env = Proposals(Calculate(), proposals)
    first, info = env.reset(seed=seed, options={"split": "test", "chance": 3})
    solution = env.oracle()
    for number in range(1, proposals):
        shown, reward, terminated, truncated, after = env.step(wrong_for(env))
        assert (reward, terminated, truncated, after["success"]) == (0.0, False, False, False)
        assert shown == f"wrong\nAnswers left: {proposals - number}."
        assert after["task"] == info["task"] and after["split"] == "test"
        assert env.rejected is not None
        assert env.oracle() == solution and env.describe()["line"] == first
    shown, _, terminated, _, after = env.step(wrong_for(env))
    assert terminated and not after["success"] and shown == "wrong"
    assert env.rejected is None


def test_a_right_answer_ends_the_episode() -> None:
    env = Proposals(Calculate(), 3)
    env.reset(seed=1)
    env.step(wrong_for(env))
    solution = env.oracle()
    assert solution
    shown, reward, terminated, _, info = env.step(solution[0])
    assert (shown, reward, terminated, info["success"]) == ("right", 1.0, True, True)


def test_with_one_proposal_everything_is_as_without() -> None:
    plain, wrapped = Calculate(), Proposals(Calculate(), 1)
    assert wrapped.instructions == plain.instructions
    assert wrapped.reset(seed=5) == plain.reset(seed=5)
    assert wrapped.step("no number") == plain.step("no number")


def test_attempts_of_many_actions_begin_again_from_the_start_with_other_luck() -> None:
    chances: list[Any] = []
    inner = make("frozenlake", size=3)
    original = inner.reset

    def reset(*, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        chances.append((options or {}).get("chance"))
        return original(seed=seed, options=options)

    inner.reset = reset  # type: ignore[method-assign]
    env = Proposals(inner, 2)
    assert not env.one_answer
    assert "After a wrong attempt there may be another, 2 in all." in env.instructions
    first, _ = env.reset(seed=0)
    shown, over = "", False
    while env.rejected is None and not over:
        shown, _, terminated, truncated, _ = env.step("Up")
        over = terminated or truncated
    assert env.rejected == "Up" and not over
    assert shown.endswith(f"Attempts left: 1. From the start:\n{first}")
    assert chances[0] is None and chances[1] not in (None, 0)


def test_an_unseeded_episode_keeps_its_task() -> None:
    env = Proposals(Calculate(), 2)
    first, _ = env.reset()
    env.step(wrong_for(env))
    assert env.describe()["line"] == first


def test_the_contract_holds() -> None:
    report = check_env(Proposals(Calculate(), 2))
    assert report.ok, str(report)


def test_what_cannot_be_tried_again() -> None:
    env = Proposals(Fickle(), 2)
    env.reset(seed=0)
    with pytest.raises(EnvironmentFault, match="another task"):
        env.step("x")
    with pytest.raises(RecipeError, match="proposals must be a whole number"):
        Proposals(Calculate(), 0)
