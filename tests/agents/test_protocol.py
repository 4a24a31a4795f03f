"""Reading answers and telling thought from action."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rehearsal.agents.protocol import Parsed, Protocol
from rehearsal.environments.base import TextEnv
from rehearsal.errors import RecipeError
from rehearsal.trajectory import Kind

THINKING = Protocol(max_actions_per_turn=2)
PLAIN = Protocol(thinking=False, max_actions_per_turn=2)


@pytest.mark.parametrize(
    ("text", "thought", "actions"),
    [
        ("<think>go left</think><answer>Left</answer>", "go left", ("Left",)),
        ("<think>\n go left \n</think>\n\n<answer> Left </answer>\n<|im_end|>", "go left", ("Left",)),
        ("<think></think><answer>Left || Down</answer><|im_end|><|endoftext|>", "", ("Left", "Down")),
        ("  <think>a</think><answer>Left||Down</answer>", "a", ("Left", "Down")),
        ("<think>a</think><answer>Left ||</answer>", "a", ("Left",)),
        ("<think>say <answer>Up</answer></think><answer>Left</answer>", "say <answer>Up</answer>", ("Left",)),
        ("<think>a<think>b</think><answer>1 < 2 | 3</answer>", "a<think>b", ("1 < 2 | 3",)),
    ],
)
def test_valid_answers(text: str, thought: str, actions: tuple[str, ...]) -> None:
    assert THINKING.parse(text) == Parsed(thought, actions, True)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "nothing in it"),
        ("<|im_end|>", "nothing in it"),
        ("Left", "no <think> tag"),
        ("<answer>Left</answer>", "no <think> tag"),
        ("Well, <think>a</think><answer>Left</answer>", "text outside the tags"),
        ("<think>a<answer>Left</answer>", "an unclosed thought"),
        ("<think>", "an unclosed thought"),
        ("<think>a</think>", "no <answer> tag"),
        ("<think>a</think>Left", "no <answer> tag"),
        ("<think>a</think>so <answer>Left</answer>", "text outside the tags"),
        ("<think>a</think><answer>Left</answer>!", "text outside the tags"),
        ("<think>a</think></think><answer>Left</answer>", "text outside the tags"),
        ("<think>a</think><answer>Left</answer><answer>Up</answer>", "text outside the tags"),
        ("<think>a</think><answer>Left", "an unclosed answer"),
        ("<think>a</think><answer><answer>Left</answer>", "a tag inside the answer"),
        ("<think>a</think><answer></answer>", "an empty answer"),
        ("<think>a</think><answer> || ||</answer>", "an empty answer"),
    ],
)
def test_broken_answers_have_no_actions(text: str, problem: str) -> None:
    parsed = THINKING.parse(text)
    assert (parsed.valid, parsed.actions, parsed.problem) == (False, (), problem)


def test_surplus_actions_are_left_out_and_counted() -> None:
    parsed = THINKING.parse("<think>a</think><answer>A || B || C || D</answer>")
    assert parsed == Parsed("a", ("A", "B"), True, "too many actions: 4, 2 allowed", 2)


ONE_TEXT = Protocol(free_text=True)


@pytest.mark.parametrize(
    "answer",
    [
        "||v|| = sqrt(v . v)",
        "The norm of v is ||v||, that of w ||w||.",
        "```sh\ntest -f a || exit 1\n```",
        "| a || b |\n|---||---|",
        "||",
        "Write <answer> before it.",
        "So <answer>4</answer> is how it is written.",
        "re.findall('<answer>(.*?)</answer>', text)  # || of tags",
        "<answer><answer>a</answer></answer>",
    ],
)
def test_a_single_free_text_is_the_whole_answer(answer: str) -> None:
    text = f"<think>a</think><answer> {answer} </answer><|im_end|>"
    assert ONE_TEXT.parse(text) == Parsed("a", (answer,), True)
    assert ONE_TEXT.parse(f"a</think><answer>{answer}</answer>", opened_thought=True) == Parsed("a", (answer,), True)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<answer>4</answer><answer>5</answer>", "text outside the tags"),
        ("<answer>4</answer> or <answer>5</answer>", "text outside the tags"),
        ("<answer>a <answer>4</answer></answer> or <answer>5</answer>", "text outside the tags"),
        ("<answer>4</answer></answer>", "text outside the tags"),
        ("<answer>4</answer>.", "text outside the tags"),
        ("<answer>4", "an unclosed answer"),
        ("<answer> </answer>", "an empty answer"),
        ("<answer>4<think>5</think></answer>", "a tag inside the answer"),
    ],
)
def test_a_free_text_answer_is_one(text: str, problem: str) -> None:
    parsed = ONE_TEXT.parse(f"<think>a</think>{text}")
    assert (parsed.valid, parsed.actions, parsed.problem) == (False, (), problem)
    assert not ONE_TEXT.parse("<think>a</think><answer>4<tool_call></answer>").problem
    assert Protocol(free_text=True, tools=True).parse("<think>a</think><answer>4<tool_call></answer>").problem


def test_several_free_texts_are_told_apart_as_ever() -> None:
    several = Protocol(free_text=True, max_actions_per_turn=2)
    text = "<think>a</think><answer>x || y || z</answer>"
    assert several.parse(text) == THINKING.parse(text)
    assert Protocol().parse(text).actions == ("x",), "and where actions are listed"


def test_without_thinking() -> None:
    assert PLAIN.parse("<answer>Left</answer><|im_end|>") == Parsed("", ("Left",), True)
    assert PLAIN.parse("<think>a</think><answer>Left</answer>").problem == "text outside the tags"
    assert PLAIN.parse("Left").problem == "no <answer> tag"
    assert PLAIN.parse(" ").problem == "nothing in it"


def test_thought_that_the_prompt_opened() -> None:
    assert THINKING.parse("a</think><answer>Left</answer>", opened_thought=True) == Parsed("a", ("Left",), True)
    assert THINKING.parse("<think>a</think><answer>L</answer>", opened_thought=True) == Parsed("a", ("L",), True)
    assert THINKING.parse("<answer>Left</answer>", opened_thought=True).problem == "an unclosed thought"
    assert PLAIN.parse("a</think><answer>Left</answer>", opened_thought=True).valid


def test_other_separators_and_end_tokens() -> None:
    protocol = Protocol(action_separator=";", max_actions_per_turn=3, end_tokens=("[END]",))
    assert protocol.parse("<think>a</think><answer>A;B</answer> [END] [END]").actions == ("A", "B")
    assert not protocol.parse("<think>a</think><answer>A;B</answer><|im_end|>").valid


fragments = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "||", "a", " ", "\n", "<", ">", "<|im_end|>", "</s>", "é", "\x00"]
)


@settings(max_examples=300, deadline=None)
@given(text=st.lists(fragments, max_size=12).map("".join) | st.text(), opened=st.booleans(), thinking=st.booleans())
def test_parsing_never_raises_and_is_consistent(text: str, opened: bool, thinking: bool) -> None:
    free = ONE_TEXT.parse(text, opened)
    assert free.valid == bool(free.actions) != bool(free.problem)
    assert all(action == action.strip() and action in text for action in free.actions) and free.surplus == 0
    protocol = Protocol(thinking=thinking, max_actions_per_turn=2)
    parsed = protocol.parse(text, opened)
    assert parsed.valid == bool(parsed.actions)
    assert parsed.valid or parsed.problem
    assert len(parsed.actions) <= 2
    assert all(action and action == action.strip() and action in text for action in parsed.actions)
    assert parsed.surplus == 0 or parsed.valid
    assert protocol.parse(text + " <|im_end|>\n", opened) == parsed


@pytest.mark.parametrize(
    "unit", ["<|im_end|>", "</s> ", "<think>", "</think>", "<answer>", "</answer>", "||", "a ", "<"]
)
def test_huge_answers_take_linear_time(unit: str) -> None:
    text = "<think>a</think><answer>" + unit * 200_000
    # Of the processor, not of the clock: with quadratic time it would be minutes.
    start = time.process_time()
    THINKING.parse(text)
    ONE_TEXT.parse(text)
    assert time.process_time() - start < 10.0


class AnyText(TextEnv):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        return "", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "", 0.0, True, False, {}


def test_instructions_are_short_and_name_the_format() -> None:
    assert Protocol().format_instructions() == "Answer as <think>...</think><answer>action</answer>."
    assert Protocol(thinking=False).format_instructions() == "Answer as <answer>action</answer>."
    assert Protocol(max_actions_per_turn=2, action_separator=";").format_instructions() == (
        "Answer as <think>...</think><answer>action</answer>, up to 2 actions separated by ;."
    )
    assert "<answer>your answer</answer>" in Protocol().format_instructions(AnyText())


@pytest.mark.parametrize(
    "settings_",
    [
        {"max_actions_per_turn": 0},
        {"format_penalty": 0.1},
        {"format_penalty": float("nan")},
        {"action_separator": " "},
        {"action_separator": "answer"},
        {"action_separator": "</answer>;"},
    ],
)
def test_settings_that_cannot_be_used(settings_: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        Protocol(**settings_)


# --- kinds -----------------------------------------------------------------------------------------------------------

VOCABULARY = ["<think>", "</think>", "</", "think", ">", "><", "a", " b", "<answer>", "Left", "</answer>", "<|im_end|>"]
CLOSE_ID = 1


def decode(ids: Sequence[int]) -> str:
    return "".join(VOCABULARY[i] for i in ids)


def ids_of(*tokens: str) -> list[int]:
    return [VOCABULARY.index(token) for token in tokens]


def thought_length(protocol: Protocol, ids: Sequence[int], opened: bool = False) -> int:
    kinds = protocol.kinds_of(ids, decode, opened)
    assert kinds.dtype == np.int8
    assert len(kinds) == len(ids)
    length = int((kinds == Kind.THOUGHT).sum())
    assert (kinds[:length] == Kind.THOUGHT).all()
    assert (kinds[length:] == Kind.ACTION).all()
    return length


@pytest.mark.parametrize("close_id", [None, CLOSE_ID])
def test_kinds_of_sampled_tokens(close_id: int | None) -> None:
    protocol = Protocol(think_close_id=close_id)
    answer = ids_of("<answer>", "Left", "</answer>", "<|im_end|>")
    assert thought_length(protocol, [*ids_of("<think>", "a", "</think>"), *answer]) == 3
    assert thought_length(protocol, [*ids_of("<think>", "a", "</", "think", ">"), *answer]) == 5
    # The token that completes the tag belongs to the thought, with whatever else it carries.
    assert thought_length(protocol, [*ids_of("<think>", "a", "</", "think", "><"), *answer]) == 5
    # Spelled out first, then as one token: the thought ends where a reader sees it end.
    assert thought_length(protocol, ids_of("<think>", "</", "think", ">", "a", "</think>")) == 4
    assert thought_length(protocol, ids_of("<think>", "a", " b", "<|im_end|>")) == 4
    assert thought_length(protocol, ids_of("a", " b"), opened=True) == 2
    assert thought_length(protocol, ids_of("a", "</think>", "Left"), opened=True) == 2
    assert thought_length(protocol, answer) == 0
    assert thought_length(protocol, []) == 0


def test_kinds_without_thinking() -> None:
    ids = ids_of("<think>", "a", "</think>", "<answer>", "Left", "</answer>")
    assert thought_length(PLAIN, ids) == 0
    assert thought_length(PLAIN, ids, opened=True) == 3


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.integers(0, len(VOCABULARY) - 1), max_size=40),
    opened=st.booleans(),
    close_id=st.sampled_from([None, CLOSE_ID]),
)
def test_kinds_agree_with_a_plain_search(ids: list[int], opened: bool, close_id: int | None) -> None:
    length = thought_length(Protocol(think_close_id=close_id), ids, opened)
    ends = [end for end in range(len(ids) + 1) if "</think>" in decode(ids[:end])]
    if ends:
        assert length == ends[0]
    else:
        assert length == (len(ids) if opened or decode(ids).startswith("<think>") or False else 0)


def test_few_decodings_of_long_answers() -> None:
    calls: list[int] = []

    def counted(ids: Sequence[int]) -> str:
        calls.append(len(ids))
        return decode(ids)

    ids = [*ids_of("<think>"), *ids_of("a") * 5000, *ids_of("</", "think", ">"), *ids_of("a") * 3000]
    assert (Protocol().kinds_of(ids, counted) == Kind.THOUGHT).sum() == 5004
    assert len(calls) <= 16
    calls.clear()
    ids[5001:5004] = ids_of("</think>")
    assert (Protocol(think_close_id=CLOSE_ID).kinds_of(ids, counted) == Kind.THOUGHT).sum() == 5002
    assert len(calls) == 1
