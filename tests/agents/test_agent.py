"""The turns of an episode: what the agent sees, what it does, what is counted and what is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rehearsal.agents.agent import Agent, Limits, PlayResult, TranscriptBuilder, check_reset, play_actions
from rehearsal.agents.protocol import Protocol
from rehearsal.environments.base import TextEnv
from rehearsal.errors import EnvironmentFault, RecipeError
from rehearsal.models.chat import ChatRenderer
from rehearsal.trajectory import Kind, SampleStop, StopReason, Turn


class Line(TextEnv):
    """Walk right to cell 3. Every step costs 0.1, the goal gives 1."""

    max_turns = 4
    max_actions_per_turn = 2

    def __init__(self, returns: Any = None) -> None:
        self.cell = 0
        self.stepped: list[str] = []
        self.returns = returns

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        self.cell = 0
        return self.view(), {"state": "0"}

    def view(self) -> str:
        return "____".replace("_", "P", 1) if self.cell == 0 else "_" * self.cell + "P" + "_" * (3 - self.cell)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.stepped.append(action)
        before = self.cell
        self.cell = max(0, min(3, self.cell + (1 if action == "Right" else -1)))
        done = self.cell == 3
        if self.returns is not None:
            if isinstance(self.returns, Exception):
                raise self.returns
            return self.returns
        info = {"state": str(self.cell), "success": done, "effective": self.cell != before}
        return self.view(), 1.0 if done else -0.1, done, False, info

    def legal_actions(self) -> list[str] | None:
        return ["Left", "Right"]


LIMITS = Limits(max_turns=4, max_actions_per_turn=2, max_actions=6)


class Game:
    """Plays texts as if they had been sampled."""

    def __init__(
        self, renderer: ChatRenderer, limits: Limits = LIMITS, env: Line | None = None, **protocol: Any
    ) -> None:
        self.env = env or Line()
        self.agent = Agent(renderer, Protocol(**protocol), limits)
        observation, info = self.env.reset()
        self.prompt = self.agent.opening("Walk right.", observation, info["state"], env)

    def say(self, text: str, stop: SampleStop = SampleStop.END) -> str:
        ids = self.agent.renderer.encode(text + ("<|im_end|>" if stop == SampleStop.END else ""))
        turn = self.agent.read(ids, np.full(len(ids), -0.5), stop)
        result = play_actions(self.env, turn, self.agent.protocol, self.agent.actions_left)
        self.prompt = self.agent.next_turn(result)
        return "" if self.prompt is None else self.agent.renderer.decode(self.prompt.token_ids)

    def act(self, *actions: str) -> str:
        return self.say(f"<think>x</think><answer>{' || '.join(actions)}</answer>")


def test_whole_episode(chatml_renderer: ChatRenderer) -> None:
    game = Game(chatml_renderer)
    agent = game.agent
    assert game.prompt is not None
    assert chatml_renderer.decode(game.prompt.token_ids) == (
        "<|im_start|>system\nWalk right.\nAnswer as <think>...</think><answer>action</answer>, up to 2 actions "
        "separated by ||.<|im_end|>\n<|im_start|>user\nP___\nTurn 1 of 4, 6 actions left.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert game.act("right", "Right") == (
        "\n<|im_start|>user\n__P_\nTurn 2 of 4, 4 actions left.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert game.act("Right") == ""
    assert agent.stop_reason == StopReason.TERMINATED
    assert agent.success is True
    assert agent.final_observation == "___P"
    assert game.env.stepped == ["Right", "Right", "Right"]
    first, second = agent.turns
    assert first.rewards == [-0.1, -0.1]
    assert (first.state, second.state) == ("0", "2")
    assert second.observation == "__P_"
    assert second.reward == 1.0
    assert (second.thought, second.actions, second.executed) == ("x", ["Right"], ["Right"])
    assert second.response == "<think>x</think><answer>Right</answer><|im_end|>"
    assert not +agent.counters


class Essay(Line):
    """Takes any text."""

    def legal_actions(self) -> list[str] | None:
        return None


def test_a_free_text_reaches_the_environment_whole(chatml_renderer: ChatRenderer) -> None:
    one = Limits(max_turns=4, max_actions_per_turn=1, max_actions=6)
    game = Game(chatml_renderer, one, Essay())
    game.act("if a", "b: print('<answer>')")
    assert game.env.stepped == ["if a || b: print('<answer>')"]
    assert not game.agent.counters["surplus_actions"] and not game.agent.counters["format_errors"]
    several = Game(chatml_renderer, LIMITS, Essay())
    several.act("a", "b")
    assert several.env.stepped == ["a", "b"]
    listed = Game(chatml_renderer, one, Line())
    listed.act("Left", "Right")
    assert listed.env.stepped == ["Left"] and listed.agent.counters["surplus_actions"] == 1


def test_segment_of_an_episode(chatml_renderer: ChatRenderer) -> None:
    game = Game(chatml_renderer)
    game.act("Right")
    game.act("Right", "Right")
    segment = game.agent.transcript.segment()
    text = {kind: chatml_renderer.decode(segment.token_ids[segment.kinds == kind]) for kind in Kind}
    assert text[Kind.OBSERVATION] == "P____P__"
    assert text[Kind.NOTICE] == "\nTurn 1 of 4, 6 actions left.\nTurn 2 of 4, 5 actions left."
    assert text[Kind.THOUGHT] == "<think>x</think>" * 2
    assert text[Kind.ACTION] == "<answer>Right</answer><|im_end|><answer>Right || Right</answer><|im_end|>"
    assert text[Kind.SYSTEM].startswith("Walk right.\nAnswer as <think>...</think>")
    assert np.isnan(segment.logprobs).tolist() == (~segment.sampled_mask).tolist()
    assert (np.diff(segment.turns) >= 0).all()
    assert sorted(set(segment.turns)) == [0, 1]
    start = int(np.flatnonzero(segment.turns == 1)[0])
    assert chatml_renderer.decode(segment.token_ids[start:]).startswith("\n<|im_start|>user\n_P__")
    # The whole is what the template gives for the whole.
    messages = [
        {"role": "system", "content": text[Kind.SYSTEM]},
        {"role": "user", "content": "P___\nTurn 1 of 4, 6 actions left."},
        {"role": "assistant", "content": "<think>x</think><answer>Right</answer>"},
        {"role": "user", "content": "_P__\nTurn 2 of 4, 5 actions left."},
        {"role": "assistant", "content": "<think>x</think><answer>Right || Right</answer>"},
    ]
    whole = chatml_renderer.tokenizer.apply_chat_template(messages, tokenize=False)
    assert chatml_renderer.decode(segment.token_ids) + "\n" == whole


def test_answer_that_cannot_be_read(chatml_renderer: ChatRenderer) -> None:
    game = Game(chatml_renderer, format_penalty=-0.25)
    shown = game.say("<think>x</think>Right")
    assert "P___\nYour last answer had no <answer> tag. Turn 2 of 4, 6 actions left." in shown
    assert game.env.stepped == []
    turn = game.agent.turns[0]
    assert (turn.valid, turn.penalty, turn.reward, turn.executed) == (False, -0.25, -0.25, [])
    assert game.agent.turns[1].state == "0"
    assert dict(+game.agent.counters) == {"format_errors": 1}
    # The warning is told once.
    assert "Your last" not in game.act("Right")


def test_illegal_actions(chatml_renderer: ChatRenderer) -> None:
    game = Game(chatml_renderer)
    shown = game.act("Jump", "Right")
    assert '"Jump" is not a legal action; legal: Left, Right. Turn 2 of 4, 6 actions left.' in shown
    assert game.env.stepped == []
    assert (game.agent.turns[0].penalty, game.agent.turns[0].valid) == (-0.1, False)
    shown = game.act("Right", "Jump")
    assert game.env.stepped == ["Right"]
    assert "_P__\n" in shown
    assert '"Jump" is not a legal action' in shown
    turn = game.agent.turns[1]
    assert (turn.executed, turn.rewards, turn.penalty, turn.valid) == (["Right"], [-0.1], -0.1, False)
    assert turn.reward == pytest.approx(-0.2)
    assert game.agent.counters["illegal_actions"] == 2
    assert game.agent.counters["skipped_actions"] == 1
    assert game.agent.actions_left == 5


def test_long_illegal_action_is_quoted_in_short(chatml_renderer: ChatRenderer) -> None:
    shown = Game(chatml_renderer).act("Jump\n" * 100)
    assert '"' + ("Jump " * 8)[:37] + '..." is not a legal action' in shown


def test_surplus_and_ineffective_actions(chatml_renderer: ChatRenderer) -> None:
    game = Game(chatml_renderer)
    shown = game.act("Left", "Right", "Right", "Right")
    assert "Your last answer had too many actions: 4, 2 allowed. Turn 2 of 4" in shown
    assert game.env.stepped == ["Left", "Right"]
    assert game.agent.turns[0].penalty == 0
    assert dict(+game.agent.counters) == {"surplus_actions": 2, "ineffective_actions": 1}


def test_actions_behind_the_end_of_the_episode_are_not_counted(chatml_renderer: ChatRenderer) -> None:
    game = Game(chatml_renderer, Limits(max_turns=4, max_actions_per_turn=4, max_actions=9))
    game.act("Right", "Right", "Right", "Jump")
    assert game.agent.stop_reason == StopReason.TERMINATED
    assert not +game.agent.counters
    assert game.agent.turns[0].valid


def test_limits_of_turns_and_actions(chatml_renderer: ChatRenderer) -> None:
    game = Game(chatml_renderer, Limits(max_turns=2, max_actions_per_turn=2, max_actions=9))
    assert "Turn 2 of 2" in game.act("Left")
    assert game.act("Left") == ""
    assert game.agent.stop_reason == StopReason.TURN_LIMIT

    game = Game(chatml_renderer, Limits(max_turns=9, max_actions_per_turn=2, max_actions=3))
    assert "Turn 2 of 9, 1 action left." in game.act("Left", "Left")
    assert game.act("Left", "Right") == ""
    assert game.agent.stop_reason == StopReason.ACTION_LIMIT
    assert game.env.stepped == ["Left", "Left", "Left"]
    assert game.agent.counters["surplus_actions"] == 1
    assert game.agent.actions_left == 0


def test_context_limit(chatml_renderer: ChatRenderer) -> None:
    opening = len(Game(chatml_renderer).agent.transcript)
    too_small = Game(chatml_renderer, Limits(max_turns=4, max_actions_per_turn=2, max_actions=6, max_context=opening))
    assert too_small.prompt is None
    assert too_small.agent.stop_reason == StopReason.CONTEXT_LIMIT
    assert too_small.agent.turns == []
    assert len(too_small.agent.transcript) == 0

    room = opening + 40
    game = Game(chatml_renderer, Limits(max_turns=4, max_actions_per_turn=2, max_actions=6, max_context=room))
    assert game.agent.tokens_left == 40
    assert game.act("Right") == ""
    assert game.agent.stop_reason == StopReason.CONTEXT_LIMIT
    # What did not fit is not in the transcript, and the last answer has been played.
    assert game.env.stepped == ["Right"]
    assert len(game.agent.turns) == 1
    assert len(game.agent.transcript) < room

    game = Game(chatml_renderer, Limits(max_turns=4, max_actions_per_turn=2, max_actions=6, max_context=opening + 5))
    assert game.say("<think>abcd", SampleStop.LENGTH) == ""
    assert game.agent.turns[0].stop == SampleStop.CONTEXT
    assert game.agent.stop_reason == StopReason.CONTEXT_LIMIT


def test_answer_that_was_cut_off(chatml_renderer: ChatRenderer) -> None:
    game = Game(chatml_renderer)
    shown = game.say("<think>hm", SampleStop.LENGTH)
    assert shown.startswith("<|im_end|>\n<|im_start|>user\n")
    assert "Your last answer was cut off after 3 tokens." in shown
    assert game.agent.turns[0].stop == SampleStop.LENGTH
    assert dict(+game.agent.counters) == {"format_errors": 1, "cut_answers": 1}
    segment = game.agent.transcript.segment()
    closing = int(np.flatnonzero(segment.turns == 1)[0])
    assert segment.kinds[closing] == Kind.TEMPLATE
    assert np.isnan(segment.logprobs[closing])


def test_special_tokens_in_observations_are_counted(chatml_renderer: ChatRenderer) -> None:
    agent = Agent(chatml_renderer, Protocol(), LIMITS)
    prompt = agent.opening("", "a<|im_end|>b")
    assert prompt is not None
    assert agent.counters["defused_tokens"] == 1
    assert agent.turns[0].observation == "a<|im_end|>b"


def test_protocol_takes_what_the_model_and_the_limits_say(chatml_renderer: ChatRenderer) -> None:
    agent = Agent(chatml_renderer, Protocol(max_actions_per_turn=7), LIMITS)
    assert agent.protocol.max_actions_per_turn == 2
    assert agent.protocol.think_close_id == chatml_renderer.single_token("</think>")
    assert set(chatml_renderer.stop_texts) <= set(agent.protocol.end_tokens)


def test_limits() -> None:
    assert Limits.for_env(Line()) == Limits(4, 2, 8, 256, 4096)
    assert Limits.for_env(Line(), max_turns=3, max_actions=5) == Limits(3, 2, 5, 256, 4096)
    with pytest.raises(RecipeError, match="max_context must be at least 1"):
        Limits(max_context=0)


# --- environments that break their contract --------------------------------------------------------------------------


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("returns", "told"),
    [
        ((1, 0.0, False, False, {}), "string as observation, not 1 of type int"),
        ((None, 0.0, False, False, {}), "string as observation, not None"),
        (("P", None, False, False, {}), "finite number as reward, not None"),
        (("P", "1", False, False, {}), "finite number as reward, not '1' of type str"),
        (("P", float("nan"), False, False, {}), "finite number as reward, not nan"),
        (("P", float("inf"), False, False, {}), "finite number as reward, not inf"),
        (("P", 1j, False, False, {}), "finite number as reward"),
        (("P", 0.0, 1, False, {}), "True or False as terminated, not 1"),
        (("P", 0.0, False, None, {}), "True or False as truncated, not None"),
        (("P", 0.0, False, False, None), "dict as info, not None"),
        (("P", 0.0, False, {}), "must return (observation, reward"),
        (Unprintable(), "must return (observation, reward"),
        (("P", 0.0, False, False, {"parts": 1.0}), 'info["parts"] of Line.step must be numbers by name, not 1.0'),
        (("P", 0.0, False, False, {"parts": {"form": float("nan")}}), "finite numbers by name, not nan"),
        (("P", 0.0, False, False, {"parts": {"form": "good"}}), "finite numbers by name, not 'good'"),
        (("P", 0.0, False, False, {"violations": "rude"}), 'info["violations"] of Line.step must be a list of names'),
        (("P", 0.0, False, False, {"obligations": [1]}), 'info["obligations"] of Line.step must be a list of names'),
        (ValueError("bad\nmove"), 'step("Right") raised ValueError: bad move.'),
        (KeyError(), 'step("Right") raised KeyError.'),
    ],
)
def test_faults_of_environments_are_told(returns: Any, told: str) -> None:
    turn = Turn("P___", actions=["Right"])
    with pytest.raises(EnvironmentFault) as caught:
        play_actions(Line(returns), turn, Protocol(), 5)
    assert "Line.step" in str(caught.value)
    assert told in str(caught.value)
    assert turn.executed == []


def test_numbers_of_other_libraries_are_rewards() -> None:
    result = play_actions(
        Line(("P", np.float32(0.5), np.bool_(False), True, {})), Turn("", actions=["Right"]), Protocol(), 5
    )
    assert result.rewards == [0.5]
    assert type(result.rewards[0]) is float
    assert (result.terminated, result.truncated, result.over) == (False, True, True)
    assert result.success is None
    assert result.state is None


def test_what_a_reward_is_made_of_is_kept_by_turn(chatml_renderer: ChatRenderer) -> None:
    game = Game(chatml_renderer)
    told = {"parts": {"speed": 0.5, "care": np.float32(1)}, "violations": ["ran"], "obligations": ("looked",)}
    game.env.returns = ("P", 0.0, False, False, told)
    game.act("Right", "Right")
    game.env.returns = ("P", 0.0, False, False, {"parts": None, "violations": None})
    game.act("Right")
    game.say("nonsense")
    first, second, third = game.agent.turns[:3]
    assert first.parts == {"speed": 1.0, "care": 2.0}
    assert (first.violations, first.obligations) == (["ran", "ran"], ["looked", "looked"])
    for turn in (second, third):
        assert (turn.parts, turn.violations, turn.obligations) == ({}, [], [])


def test_faults_outside_of_step() -> None:
    class Broken(Line):
        def parse_action(self, text: str) -> str | None:
            raise RuntimeError("lost")

    class Wrong(Line):
        def parse_action(self, text: str) -> Any:
            return 3

    with pytest.raises(EnvironmentFault, match=r"Broken\.parse_action\(\"Up\"\) raised RuntimeError: lost"):
        play_actions(Broken(), Turn("", actions=["Up"]), Protocol(), 1)
    with pytest.raises(EnvironmentFault, match=r"Wrong\.parse_action must return a string or None, not 3"):
        play_actions(Wrong(), Turn("", actions=["Up"]), Protocol(), 1)
    assert check_reset(Line(), ("P", {})) == ("P", {})
    for returned in ("P", ("P",), (1, {}), ("P", None)):
        with pytest.raises(EnvironmentFault, match=r"Line\.reset must return"):
            check_reset(Line(), returned)


def test_an_answer_that_is_not_valid_is_never_stepped() -> None:
    env = Line()
    result = play_actions(env, Turn("", actions=["Right"], valid=False), Protocol(format_penalty=-1.0), 5)
    assert result == PlayResult(penalty=-1.0)
    assert env.stepped == []


# --- properties ------------------------------------------------------------------------------------------------------

sayings = st.one_of(
    st.lists(st.sampled_from(["Left", "Right", "Jump", ""]), max_size=4).map(
        lambda actions: f"<think>x</think><answer>{' || '.join(actions)}</answer>"
    ),
    st.text(alphabet="<>/thinkaswer |", max_size=30),
)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(sayings, min_size=1, max_size=6), cut=st.booleans())
def test_books_balance_whatever_is_said(chatml_renderer: ChatRenderer, texts: list[str], cut: bool) -> None:
    game = Game(chatml_renderer)
    shown = 1
    for text in texts:
        if game.prompt is None:
            break
        game.say(text, SampleStop.LENGTH if cut else SampleStop.END)
        shown += game.prompt is not None
    agent = game.agent
    executed = [action for turn in agent.turns for action in turn.executed]
    assert executed == game.env.stepped
    assert agent.actions_left == LIMITS.max_actions - len(executed) >= 0
    assert len(agent.turns) == shown <= LIMITS.max_turns
    assert all(len(turn.rewards) == len(turn.executed) for turn in agent.turns)
    invalid = sum(not turn.valid for turn in agent.turns)
    assert invalid == agent.counters["format_errors"] + agent.counters["illegal_actions"]
    assert sum(turn.penalty for turn in agent.turns) == pytest.approx(-0.1 * invalid)
    segment = agent.transcript.segment()
    assert len(segment) == len(agent.transcript)
    sampled = chatml_renderer.decode(segment.token_ids[segment.sampled_mask])
    assert sampled == "".join(turn.response for turn in agent.turns)
    # The turn's tokens begin with what the agent was shown and end with what it said.
    for index, turn in enumerate(agent.turns):
        mask = segment.turns == index
        observation = segment.token_ids[mask & (segment.kinds == Kind.OBSERVATION)]
        assert chatml_renderer.decode(observation) == turn.observation
        assert chatml_renderer.decode(segment.token_ids[mask & segment.sampled_mask]) == turn.response


def test_transcript_refuses_what_does_not_fit_together() -> None:
    builder = TranscriptBuilder()
    assert len(builder.segment()) == 0
    with pytest.raises(ValueError, match="2 token ids came with 1 log-probabilities"):
        builder.add_sampled([1, 2], [-0.1], [Kind.ACTION, Kind.ACTION], 0)
    with pytest.raises(ValueError, match="NaN"):
        builder.add_sampled([1], [float("nan")], [Kind.ACTION], 0)
    assert len(builder) == 0
