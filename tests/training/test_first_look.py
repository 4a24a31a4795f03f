"""A policy that does nothing its environment understands is told of at once, with what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rehearsal.environments.base import TextEnv
from rehearsal.environments.registry import register
from rehearsal.training.first_look import first_look
from rehearsal.training.observer import SilentObserver
from rehearsal.training.recipe import Recipe
from rehearsal.training.run import train
from rehearsal.training.runs import RunFolder
from rehearsal.trajectory import Group, SampleStop, StopReason, ToolCall, Trajectory, Turn


def episodes(*turns: Turn, stop: StopReason = StopReason.TURN_LIMIT) -> list[Group]:
    return [Group([Trajectory("made-up", 0, turns=[turn], stop_reason=stop) for turn in turns])]


def illegal(text: str = "Left") -> Turn:
    return Turn("o", response=f"<answer>{text}</answer>", actions=[text], valid=False)


def unreadable(text: str, stop: SampleStop = SampleStop.END) -> Turn:
    return Turn("o", response=text, valid=False, stop=stop)


def acted() -> Turn:
    return Turn("o", response="<answer>Up</answer>", actions=["Up"], executed=["Up"])


def test_illegal_actions_are_told_with_an_example() -> None:
    said = first_look(episodes(*[illegal("Left")] * 6, *[illegal("Right")] * 4))
    assert said is not None
    assert said.startswith(
        'The policy wrote no legal action in 10 of 10 turns, such as "Left"; your environment was never stepped; '
    )
    assert "parse_action" in said
    assert said.endswith(".") and "\n" not in said


def test_unreadable_answers_are_told_with_an_example() -> None:
    said = first_look(episodes(*[unreadable("I would\nrather not. " * 9)] * 5))
    assert said is not None
    assert 'such as "I would rather not. I would rather' in said and '..."' in said
    assert "keeps the answer format" in said
    cut = first_look(episodes(*[unreadable("<think>Well", SampleStop.LENGTH)] * 5))
    assert cut is not None and "raise agent.max_tokens_per_turn" in cut
    empty = first_look(episodes(*[unreadable("")] * 5))
    assert empty is not None and '"(nothing)"' in empty


def test_now_and_then_is_told_as_such() -> None:
    said = first_look(episodes(*[illegal()] * 99, acted()))
    assert said is not None
    assert "in 99 of 100 turns" in said and "stepped in 1 of them alone" in said


@pytest.mark.parametrize(
    "turns",
    [
        [],
        [illegal()] * 3,
        [acted()] * 10,
        [*[illegal()] * 9, acted()],
        [Turn("o", calls=[ToolCall("search")])] * 10,
        [Turn("o", actions=["Up", "Fly"], executed=["Up"], valid=False)] * 10,
    ],
)
def test_whoever_acts_or_has_hardly_begun_is_left_alone(turns: list[Turn]) -> None:
    assert first_look(episodes(*turns)) is None


def test_episodes_that_failed_say_nothing_of_the_policy() -> None:
    assert first_look(episodes(*[illegal()] * 10, stop=StopReason.ERROR)) is None


def test_the_base_model_is_named() -> None:
    said = first_look(episodes(*[illegal()] * 10), base=True)
    assert said is not None and "the base model knows the built-in environments alone" in said
    said = first_look(episodes(*[unreadable("<think>Aougavea", SampleStop.LENGTH)] * 10), base=True)
    assert said is not None and "the base model knows" in said and "max_tokens_per_turn" not in said


class Foreign(TextEnv):
    """Actions that no policy of ours has ever written."""

    name = "foreign"
    fast = True
    instructions = "Speak.\nActions: xyzzy, plugh."
    stepped = 0

    def legal_actions(self) -> list[str]:
        return ["xyzzy", "plugh"]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        return "Nothing happens.", {"success": False}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        type(self).stepped += 1
        return "Done.", 1.0, True, False, {"success": True}


register("test-foreign", Foreign)


class Listener(SilentObserver):
    def __init__(self) -> None:
        self.heard: list[str] = []

    def warning(self, sentence: str) -> None:
        self.heard.append(sentence)


@pytest.mark.parametrize("evaluated", [True, False], ids=["first evaluation", "first step"])
def test_a_run_says_so_once_and_writes_it_down(evaluated: bool, small: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = small(
        environment__name="test-foreign", environment__params={}, training__steps=2, evaluation__every=0,
        evaluation__episodes=4 if evaluated else 0,
    )  # fmt: skip
    listener = Listener()
    train(recipe, output=tmp_path / "run", observer=listener)
    assert Foreign.stepped == 0
    (said,) = listener.heard
    assert re.search(r"no legal action in (\d+) of \1 turns", said)
    assert RunFolder.open(tmp_path / "run").info.warnings == [said]


def test_a_run_that_acts_hears_nothing(small: Callable[..., Recipe], tmp_path: Path) -> None:
    listener = Listener()
    train(small(training__steps=1), output=tmp_path / "run", observer=listener)
    assert listener.heard == []
