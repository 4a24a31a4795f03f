"""What a simulated user says: of what, in which tokens, and never the solution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rehearsal.agents.agent import Agent, Limits, play_actions
from rehearsal.agents.calls import spell_call
from rehearsal.agents.feedback import (
    Feedback,
    JudgeFeedback,
    ScriptedFeedback,
    _of_answer,
    gives_away,
    solution_of,
    with_feedback,
)
from rehearsal.agents.protocol import Protocol
from rehearsal.agents.toolbox import FunctionTools, Toolkit, ToolLimits
from rehearsal.agents.toolkit.calculator import Calculator
from rehearsal.environments import make
from rehearsal.environments.calculate import Calculate
from rehearsal.environments.proposals import Proposals
from rehearsal.models.chat import ChatRenderer
from rehearsal.rewards.judge_client import JudgeClient
from rehearsal.rewards.verifier import VerificationError
from rehearsal.trajectory import Kind, SampleStop


class Says:
    """Says what it is told to."""

    fast = True
    seconds = 0.0

    def __init__(self, text: str) -> None:
        self.text = text
        self.asked = 0

    def say(self, env: Any, agent: Any, result: Any) -> str:
        self.asked += 1
        return self.text


class Game:
    """An episode of calculate, played by hand."""

    def __init__(self, renderer: ChatRenderer, feedback: Feedback | None, turns: int = 4, tools: bool = False,
                 **limits: Any) -> None:  # fmt: skip
        self.env = Proposals(Calculate(terms=2), 2)
        self.feedback = feedback
        self.agent = Agent(renderer, Protocol(thinking=False), Limits(max_turns=turns, max_actions=2))
        first, _ = self.env.reset(seed=3)
        toolkit = Toolkit([Calculator(), FunctionTools(broken)] if tools else [], ToolLimits(**limits))
        self.prompt = self.agent.opening(self.env.instructions, first, env=self.env, toolbox=toolkit.open(self.env))
        self.solution = int((self.env.oracle() or [""])[0])

    def say(self, text: str) -> str:
        """An answer, and the notice before the next one."""
        ids = self.agent.renderer.encode(f"{text}<|im_end|>")
        turn = self.agent.read(ids, [-1.0] * len(ids), SampleStop.END)
        result = play_actions(self.env, turn, self.agent.protocol, self.agent.actions_left, self.agent.toolbox)
        result = with_feedback(self.feedback, self.env, self.agent, result)
        self.prompt = self.agent.next_turn(result)
        return "" if self.prompt is None else self.agent.turns[-1].notice

    def answer(self, value: object) -> str:
        return self.say(f"<answer>{value}</answer>")


def broken(x: int) -> int:
    """Fails."""
    raise OSError("stuck")


def test_a_number_gets_a_hint_of_its_size(chatml_renderer: ChatRenderer) -> None:
    for off, word in ((7, "high"), (-7, "low")):
        game = Game(chatml_renderer, ScriptedFeedback())
        notice = game.answer(game.solution + off)
        assert f"That is not right: your number is too {word}." in notice
        assert notice.endswith("Turn 2 of 4, 1 action left.")
        assert game.agent.counters["feedback"] == 1
    assert "there is none in it" in Game(chatml_renderer, ScriptedFeedback()).answer("many")
    game = Game(chatml_renderer, ScriptedFeedback())
    assert "Give the number alone" in game.answer(f"it is {game.solution}")


def test_the_user_is_a_notice_and_nothing_else_changes(chatml_renderer: ChatRenderer) -> None:
    texts = {}
    for name, user in (("with", ScriptedFeedback()), ("without", None)):
        game = Game(chatml_renderer, user)
        game.answer(game.solution + 1)
        game.say("no tags at all")
        segment = game.agent.transcript.segment()
        texts[name] = {kind: chatml_renderer.decode(segment.token_ids[segment.kinds == kind]) for kind in Kind}
    assert "too high" in texts["with"][Kind.NOTICE] and "could not read" in texts["with"][Kind.NOTICE]
    assert "too high" not in texts["without"][Kind.NOTICE]
    for kind in set(Kind) - {Kind.NOTICE}:
        assert texts["with"][kind] == texts["without"][kind], kind


def test_tools_are_commented_on(chatml_renderer: ChatRenderer) -> None:
    game = Game(chatml_renderer, ScriptedFeedback(), turns=7, tools=True, max_calls=3)
    assert "If that settles it" in game.say(spell_call("calculator", {"expression": "1 + 1"}))
    assert "The tool failed." in game.say(spell_call("broken", {"x": 1}))
    assert "did not take these arguments" in game.say(spell_call("broken", {"y": 1}))
    assert "You have no calls left." in game.say(spell_call("calculator", {"expression": "1"}))
    fresh = Game(chatml_renderer, ScriptedFeedback(), tools=True)
    assert "no such tool" in fresh.say(spell_call("oracle", {}))
    # Who has tools and guesses is told of them; who has used one is not.
    assert "use one before you answer" in Game(chatml_renderer, ScriptedFeedback(), tools=True).answer("no")
    assert "use one before you answer" not in game.answer("no")
    last = Game(chatml_renderer, ScriptedFeedback(), turns=2, tools=True)
    assert "last turn" in last.say(spell_call("calculator", {"expression": "2"}))


def test_where_nobody_would_read_it_nobody_is_asked(chatml_renderer: ChatRenderer) -> None:
    user = Says("Well.")
    game = Game(chatml_renderer, user, turns=1)
    game.answer("no")
    game = Game(chatml_renderer, user)
    game.answer(game.solution)  # right, so the episode is over
    assert user.asked == 0
    game = Game(chatml_renderer, user)
    game.answer("no")
    game.answer("no")  # the second of two proposals
    assert user.asked == 1


def test_a_remark_with_the_solution_is_withheld(chatml_renderer: ChatRenderer) -> None:
    game = Game(chatml_renderer, None)
    for text in (f"It is {game.solution}.", f"Try {game.solution:,}!", f"{game.solution}.0 perhaps"):
        told = Game(chatml_renderer, Says(text))
        assert "perhaps" not in told.answer("no") and told.agent.counters["withheld_feedback"] == 1
        assert told.agent.counters["feedback"] == 0
    kept = Game(chatml_renderer, Says(f"Not {game.solution}1."))
    assert f"Not {game.solution}1." in kept.answer("no")


@given(solution=st.text(min_size=1, max_size=30), answer=st.text(max_size=30))
def test_no_scripted_remark_quotes_anything(solution: str, answer: str) -> None:
    # The remarks are few, so what they say of any solution is which of them it is.
    fixed = {_of_answer(given, wanted) for given, wanted in (
        ("1", "2"), ("2", "1"), ("x", "1"), ("x 1", "1"), ("a b", "c"), ("red fox", "red hen"),
        ("the hen it is", "hen"),
    )}  # fmt: skip
    assert _of_answer(answer, solution) in fixed
    assert len(fixed) == 7


@pytest.mark.parametrize(
    ("said", "solution", "found"),
    [
        ("The capital is Paris.", "paris", True), ("Paris is near.", "the Paris", True), ("Parisian", "Paris", False),
        ("It is 1,234.", "1234", True), ("about 12", "12.0", True), ("more than 11", "12", False),
        ("it is 72", "48 + 24 = <<48+24=72>>72 #### 72", True), ("anything", None, False), ("anything", "", False),
        ("in 1889", "Paris in 1889", False),
    ],
)  # fmt: skip
def test_what_gives_a_solution_away(said: str, solution: str | None, found: bool) -> None:
    assert gives_away(said, solution) is found


def test_moves_that_change_nothing() -> None:
    env = make("frozenlake", size=3)
    assert solution_of(env) is None  # it has actions to choose from, and no answer
    env.reset(seed=0)


# A model as the user


def judge(monkeypatch: pytest.MonkeyPatch, replies: Sequence[str], asked: list[Any]) -> JudgeFeedback:
    client = JudgeClient("http://localhost:9/v1", "user", max_retries=0)

    def reply(request: httpx.Request) -> httpx.Response:
        asked.append(request.read().decode())
        text = replies[min(len(asked), len(replies)) - 1]
        usage = {"prompt_tokens": 10, "completion_tokens": 2}
        return httpx.Response(200, json={"choices": [{"message": {"content": text}}], "usage": usage})

    monkeypatch.setattr(client, "_client", httpx.Client(transport=httpx.MockTransport(reply)))
    return JudgeFeedback(client)


def test_a_model_comments_and_is_not_told_the_solution(
    chatml_renderer: ChatRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    user = judge(monkeypatch, ["  Add the tens\nfirst. "], asked)
    game = Game(chatml_renderer, user)
    assert "Add the tens first." in game.answer("banana")
    assert "banana" in asked[0] and game.env.describe()["line"] in asked[0]
    assert "wrong" in asked[0]  # what came of it
    assert str(game.solution) not in asked[0]
    assert user.client.cost.completion_tokens == 2


def test_a_model_that_says_nothing_is_an_error_and_no_remark(
    chatml_renderer: ChatRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    with pytest.raises(VerificationError, match="cannot be read"):
        Game(chatml_renderer, judge(monkeypatch, [" "], asked)).answer("no")
    assert len(asked) == 2
