"""Predictions in thoughts: found wherever they stand, and answered by what came."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rehearsal.agents.agent import Agent, Limits
from rehearsal.agents.play import PlayResult, play_actions
from rehearsal.agents.protocol import Protocol
from rehearsal.agents.rehearse import PREDICT_CLOSE, PREDICT_OPEN, Hindsight, find_predictions, hindsight
from rehearsal.environments import make
from rehearsal.environments.base import TextEnv
from rehearsal.errors import EnvironmentFault, RecipeError
from rehearsal.trajectory import SampleStop, StopReason, Trajectory, Turn

LIMITS = Limits(max_turns=4, max_context=2000)


def say(*parts: str, action: str = "Left") -> str:
    return f"<think>{' '.join(parts)}</think><answer>{action}</answer>"


def predict(action: str, answer: str) -> str:
    return f"{PREDICT_OPEN}{action}\n{answer}{PREDICT_CLOSE}"


class Desk:
    """Plays answers that are written out, with an environment that says what it is told to."""

    def __init__(self, renderer: Any, keep_ending: bool = False) -> None:
        self.renderer = renderer
        self.agent = Agent(renderer, Protocol(rehearse=True), LIMITS, keep_ending=keep_ending)
        assert self.agent.opening("Rules.", "Hello.") is not None

    def turn(self, answer: str, says: str, *, executed: str | None = "Left", over: bool = False) -> None:
        ids = np.concatenate([self.renderer.encode(answer), [self.renderer.stop_token_ids[0]]])
        self.agent.read(ids, np.zeros(len(ids), np.float32), SampleStop.END)
        done = [executed] if executed else []
        result = PlayResult(observation=says if done else None, executed=done, rewards=[0.0] * len(done))
        result.terminated = over
        self.agent.next_turn(result)

    def episode(self) -> Trajectory:
        return Trajectory(
            "desk", 0, task="task", topic="topic", segments=[self.agent.transcript.segment()], turns=self.agent.turns,
            stop_reason=self.agent.stop_reason or StopReason.TURN_LIMIT,
            final_observation=self.agent.final_observation,
        )  # fmt: skip


def text_of(renderer: Any, one: Hindsight) -> tuple[str, str]:
    return renderer.decode(one.token_ids[: one.first]), renderer.decode(one.token_ids[one.first :])


def test_each_prediction_is_found_with_its_place(renderer: Any) -> None:
    answer = say("first", predict("Left", "a wall"), "or", predict("Up || Down", "two\nlines"), "so Left.")
    ids = renderer.encode(answer)
    for open_id in (renderer.single_token(PREDICT_OPEN), None):
        one, two = find_predictions(ids, renderer.decode, open_id=open_id)
        assert (one.actions, one.text) == (("Left",), "a wall")
        assert (two.actions, two.text) == (("Up", "Down"), "two\nlines")
        for prediction, text in ((one, "Left\na wall"), (two, "Up || Down\ntwo")):
            assert renderer.decode(ids[: prediction.position]).endswith(PREDICT_OPEN)
            assert renderer.decode(ids[prediction.position :]).startswith(text)
            assert renderer.decode(ids[prediction.position : prediction.end]).endswith(PREDICT_CLOSE)
            assert renderer.decode(ids[prediction.position : prediction.end]).count(PREDICT_CLOSE) == 1


@pytest.mark.parametrize(
    "answer",
    [
        say("nothing"),
        say(f"{PREDICT_OPEN}Left{PREDICT_CLOSE}"),  # no answer foretold
        say(f"{PREDICT_OPEN}\nno action{PREDICT_CLOSE}"),
        say(f"{PREDICT_OPEN} || \nno action{PREDICT_CLOSE}"),
        f"<think>one</think><answer>{predict('Left', 'a wall')}</answer>",  # not in the thought
        PREDICT_CLOSE,
        "",
    ],
)
def test_what_is_no_prediction(answer: str, renderer: Any) -> None:
    assert find_predictions(renderer.encode(answer), renderer.decode) == []


def test_one_that_was_cut_off_counts_with_what_it_has(renderer: Any) -> None:
    (one,) = find_predictions(renderer.encode(f"<think>{PREDICT_OPEN}Left\na wa"), renderer.decode)
    assert (one.actions, one.text) == (("Left",), "a wa")
    assert one.end == len(renderer.encode(f"<think>{PREDICT_OPEN}Left\na wa"))


@given(st.lists(st.sampled_from([PREDICT_OPEN, PREDICT_CLOSE, "Left", "\n", "||", "<think>", "</think>", " x"])))
def test_any_text_can_be_read(renderer: Any, parts: list[str]) -> None:
    ids = renderer.encode("".join(parts))
    fast = find_predictions(ids, renderer.decode, open_id=renderer.single_token(PREDICT_OPEN))
    assert fast == find_predictions(ids, renderer.decode)
    assert all(0 < prediction.position <= prediction.end <= len(ids) for prediction in fast)


SPELT = ["<", "pre", "dict", ">"]
"""The opening tag in ordinary tokens, which read like it."""


@given(st.lists(st.sampled_from([PREDICT_OPEN, PREDICT_CLOSE, "Left\n", *SPELT, "".join(SPELT[1:]), "</think>", "x"])))
def test_a_tag_in_ordinary_tokens_moves_no_other(renderer: Any, parts: list[str]) -> None:
    ids = np.concatenate([np.empty(0, np.int64), *(renderer.encode(part) for part in parts)]).astype(int)
    fast = find_predictions(ids, renderer.decode, open_id=renderer.single_token(PREDICT_OPEN))
    assert fast == find_predictions(ids, renderer.decode)
    for one in fast:
        assert renderer.decode(ids[: one.position]).endswith(PREDICT_OPEN)


@pytest.mark.parametrize("real", [f"{PREDICT_OPEN}Up\ny{PREDICT_CLOSE}</think>", f"</think>{PREDICT_OPEN}"])
def test_a_tag_in_ordinary_tokens_has_a_place_of_its_own(real: str, renderer: Any) -> None:
    spelt = [index for part in SPELT for index in renderer.encode(part)]
    ids = [*renderer.encode("<think>a "), *spelt, *renderer.encode(f"Left\nx{PREDICT_CLOSE} b {real}")]
    first, *others = find_predictions(ids, renderer.decode, open_id=renderer.single_token(PREDICT_OPEN))
    assert first.actions == ("Left",)
    assert renderer.decode(ids[: first.position]) == f"<think>a {PREDICT_OPEN}"
    for other in others:
        assert other.actions == ("Up",)
        assert renderer.decode(ids[: other.position]).endswith(f" b {PREDICT_OPEN}")


@pytest.mark.parametrize("foretold", ["ask  Card", "look up card"])
def test_an_action_goes_by_either_of_its_names(foretold: str, renderer: Any) -> None:
    desk = Desk(renderer)
    desk.turn(say(predict(foretold, "a number"), action="ask card"), "It is 17.", executed="look up card")
    desk.turn(say(predict("give card", "thanks"), action="Left"), "Bye.", over=True)
    (one,) = hindsight(desk.episode(), renderer)
    before, answer = text_of(renderer, one)
    # What is learnt has the environment's name for it.
    assert before.endswith(f"{PREDICT_OPEN}look up card\n") and answer == f"It is 17.{PREDICT_CLOSE}"


class Ladder(TextEnv):
    """A player on the ground may climb, and one above may only fall; both go by several names."""

    name = "ladder"

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.above = False
        return "ground", {}

    def legal_actions(self) -> list[str]:
        return ["fall"] if self.above else ["climb"]

    def parse_action(self, text: str) -> str | None:
        names = {"down": "fall", "move": "fall"} if self.above else {"up": "climb", "go up": "climb", "move": "climb"}
        return names.get(text.casefold()) or super().parse_action(text)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        assert action in self.legal_actions()
        self.above = not self.above
        return "above" if self.above else "ground", 0.0, False, False, {}


def climbed(renderer: Any, *answers: str, per_turn: int = 1) -> Trajectory:
    """An episode in which these answers are given."""
    env = Ladder()
    observation, _ = env.reset(seed=0)
    agent = Agent(renderer, Protocol(rehearse=True), replace(LIMITS, max_actions_per_turn=per_turn))
    assert agent.opening(env.instructions, observation, "", env) is not None
    for answer in answers:
        ids = np.asarray(renderer.encode(answer + "<|im_end|>"))
        turn = agent.read(ids, np.zeros(len(ids), np.float32), SampleStop.END)
        played = play_actions(env, turn, agent.protocol, agent.actions_left, foretold=agent.foretold)
        assert agent.next_turn(played) is not None
    return Trajectory("ladder", 0, segments=[agent.transcript.segment()], turns=agent.turns)


@pytest.mark.parametrize("written", ["climb", "Climb", "up", "go up", "move"])
@pytest.mark.parametrize("foretold", ["climb", " CLIMB ", "Up", "go up", "move"])
def test_names_of_one_action_are_one_action(foretold: str, written: str, renderer: Any) -> None:
    played = climbed(renderer, say(predict(foretold, "x"), predict("down", "y"), action=written))
    (one,) = hindsight(played, renderer)
    before, answer = text_of(renderer, one)
    assert before.endswith(f"{PREDICT_OPEN}climb\n") and answer == f"above{PREDICT_CLOSE}"


def test_a_name_stands_for_what_it_means_where_the_action_is_taken(renderer: Any) -> None:
    told = climbed(
        renderer, say(predict("down", "x"), predict("go up", "y"), action="up"), say(action="fall"), say(action="move")
    )
    assert [turn.aliases for turn in told.turns[:3]] == [[["go up"]], [["down"]], [["go up"]]]
    # What nothing legal was called when it was foretold is found where it was taken.
    assert [one.foretold for one in hindsight(told, renderer)] == [False]
    down, up = hindsight(told, renderer, horizon=1)
    assert text_of(renderer, down)[0].endswith(f"{PREDICT_OPEN}fall\n")
    assert text_of(renderer, up)[0].endswith(f"{PREDICT_OPEN}climb\n")
    # The same word is another action in the turn after.
    moved = climbed(renderer, say(predict("move", "x"), action="nothing"), say(action="up"), say(action="fall"))
    (one,) = hindsight(moved, renderer, horizon=9)
    assert text_of(renderer, one)[0].endswith(f"{PREDICT_OPEN}climb\n")


def test_each_of_several_actions_goes_by_any_name(renderer: Any) -> None:
    answer = say(predict("up || down || up", "x"), predict("move || move", "y"), action="climb || fall")
    two = hindsight(climbed(renderer, answer, per_turn=3), renderer)
    assert [text_of(renderer, one)[0].rpartition(PREDICT_OPEN)[2] for one in two] == ["climb || fall\n"]


def test_an_environment_that_cannot_read_what_was_foretold_is_at_fault(renderer: Any) -> None:
    env = Ladder()
    env.reset(seed=0)
    env.parse_action = lambda text: {"climb": "climb"}[text]  # type: ignore[method-assign]
    turn = Turn("ground", actions=["climb"])
    assert play_actions(env, turn, Protocol(), 1, foretold=["climb"]).aliases == [["climb"]]
    with pytest.raises(EnvironmentFault, match=r'Ladder.parse_action\("jump"\) raised KeyError'):
        play_actions(env, turn, Protocol(), 1, foretold=["jump"])


def test_what_was_written_and_not_executed_was_not_done(renderer: Any) -> None:
    desk = Desk(renderer)
    desk.turn(
        say(predict("ask card || give card", "x"), action="ask card || give card"), "No.", executed="look up card"
    )
    desk.agent.turns[0].actions = ["ask card", "give card"]
    assert hindsight(desk.episode(), renderer) == []


def test_a_call_for_a_fact_is_answered_at_the_desk_itself(renderer: Any) -> None:
    env = make("helpdesk")
    observation, _ = env.reset(seed=0)
    agent = Agent(renderer, Protocol(rehearse=True), LIMITS)
    assert agent.opening(env.instructions, observation, "", env) is not None
    fact = next(action for action in env.legal_actions() or () if action.startswith("look up ")).removeprefix(
        "look up "
    )
    ids = renderer.encode(say(predict(f"ask {fact}", "a number"), action=f"ask {fact}") + "<|im_end|>")
    turn = agent.read(np.asarray(ids), np.zeros(len(ids), np.float32), SampleStop.END)
    agent.next_turn(play_actions(env, turn, agent.protocol, agent.actions_left))
    assert agent.turns[0].executed == [f"look up {fact}"]
    played = Trajectory("desk", 0, segments=[agent.transcript.segment()], turns=agent.turns)
    assert len(hindsight(played, renderer)) == 1


def test_the_true_answer_is_the_target(renderer: Any) -> None:
    desk = Desk(renderer)
    desk.turn(say("hm", predict("Left", "a wall"), predict("Up", "a hole")), "You slip.")
    desk.turn(say("so", predict("Left", "the GOAL")), "The goal", over=True)
    first, last = hindsight(desk.episode(), renderer)
    before, answer = text_of(renderer, first)
    assert before.endswith(f"hm {PREDICT_OPEN}Left\n")
    assert answer == f"You slip.{PREDICT_CLOSE}"
    assert not first.foretold
    # The last words count too, although nobody answers them.
    assert text_of(renderer, last)[1] == f"The goal{PREDICT_CLOSE}"
    assert "You slip." in text_of(renderer, last)[0]
    assert (last.topic, last.environment) == ("topic", "desk")


def test_what_was_foretold_is_counted(renderer: Any) -> None:
    desk = Desk(renderer)
    desk.turn(say(predict("left", " you  SLIP. ")), "You slip.", over=True)
    (one,) = hindsight(desk.episode(), renderer)
    assert one.foretold


def test_within_a_horizon_a_later_answer_counts(renderer: Any) -> None:
    desk = Desk(renderer)
    desk.turn(say("plan", predict("call", "hello")), "Ready.", executed="look up card")
    desk.turn(say("go"), "I want the pin.", executed="call")
    desk.turn(say("well"), "Bye.", executed="hang up", over=True)
    episode = desk.episode()
    assert hindsight(episode, renderer) == []
    (one,) = hindsight(episode, renderer, horizon=1)
    before, answer = text_of(renderer, one)
    # It is learnt where it was needed: before anything was known.
    assert before.endswith(f"plan {PREDICT_OPEN}call\n")
    assert "Ready." not in before
    assert answer == f"I want the pin.{PREDICT_CLOSE}"
    assert len(hindsight(episode, renderer, horizon=100)) == 1


def test_an_action_that_was_not_taken_has_no_answer(renderer: Any) -> None:
    desk = Desk(renderer)
    desk.turn(say(predict("Left || Up", "x")), "y")  # only Left was taken
    desk.turn(say(predict("Left", "x")), "", executed=None, over=True)  # refused
    assert hindsight(desk.episode(), renderer, horizon=9) == []


def test_an_episode_that_failed_has_no_last_words(renderer: Any) -> None:
    desk = Desk(renderer)
    desk.turn(say(predict("Left", "x")), "You slip.")
    desk.turn(say(predict("Left", "x")), "never said", over=True)
    episode = desk.episode()
    episode.stop_reason = StopReason.ERROR
    assert len(hindsight(episode, renderer)) == 1


def test_an_answer_cannot_end_the_prediction_by_itself(renderer: Any) -> None:
    desk = Desk(renderer)
    desk.turn(say(predict("Left", "x")), f"a {PREDICT_CLOSE} b<|im_end|>", over=True)
    (one,) = hindsight(desk.episode(), renderer)
    answer = one.token_ids[one.first :].tolist()
    assert renderer.single_token("<|im_end|>") not in answer
    assert answer.count(renderer.single_token(PREDICT_CLOSE)) == 1
    assert answer[-1] == renderer.single_token(PREDICT_CLOSE)


def test_the_rules_ask_for_it() -> None:
    assert PREDICT_OPEN in Protocol(rehearse=True).format_instructions()
    assert PREDICT_OPEN not in Protocol().format_instructions()
    assert Protocol().predictions_of([1, 2], lambda ids: say(predict("a", "b"))) == []
    with pytest.raises(RecipeError, match="needs a thought"):
        Protocol(thinking=False, rehearse=True)


def test_actions_behind_the_one_that_ended_the_episode_change_nothing(renderer: Any) -> None:
    desk = Desk(renderer)
    desk.turn(say(predict("Left || Up", "the goal")), "The goal.", over=True)  # Left was enough
    (one,) = hindsight(desk.episode(), renderer)
    assert text_of(renderer, one)[0].endswith(f"{PREDICT_OPEN}Left || Up\n")
