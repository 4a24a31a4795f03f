"""Tool calls in an answer: what is read, what is refused, and that no text breaks the reading."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rehearsal.agents.calls import parse_calls, spell_call
from rehearsal.agents.protocol import Protocol
from rehearsal.errors import RecipeError
from rehearsal.trajectory import Kind

TOOLS = Protocol(tools=True)
BARE = Protocol(thinking=False, tools=True, max_calls_per_turn=2)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
arguments = st.dictionaries(st.text(max_size=6), json_values, max_size=3)


def test_a_call_behind_a_thought() -> None:
    parsed = TOOLS.parse(
        '<think>hm</think>\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    )
    assert (parsed.thought, parsed.valid, parsed.actions, parsed.problem) == ("hm", True, (), "")
    assert [(call.name, call.arguments) for call in parsed.calls] == [("add", {"a": 1})]


def test_several_calls_and_those_beyond_the_limit() -> None:
    text = "\n".join(spell_call("t", {"i": i}) for i in range(4))
    parsed = BARE.parse(text)
    assert [call.arguments for call in parsed.calls] == [{"i": 0}, {"i": 1}]
    assert parsed.valid
    assert parsed.surplus_calls == 2
    assert parsed.problem == "too many calls: 4, 2 allowed"


def test_an_answer_is_still_an_answer() -> None:
    parsed = TOOLS.parse("<think>x</think><answer>Left</answer>")
    assert (parsed.valid, parsed.actions, parsed.calls) == (True, ("Left",), ())


def test_without_tools_a_call_is_no_answer() -> None:
    text = f"<think>x</think>{spell_call('t', {})}"
    assert Protocol().parse(text).problem == "no <answer> tag"
    assert Protocol(thinking=False).parse("<answer><tool_call></answer>").actions == ("<tool_call>",)
    assert "tool" not in Protocol().format_instructions()


def test_the_tag_may_stand_in_a_string() -> None:
    spelled = spell_call("write", {"text": "</tool_call><tool_call><answer>"})
    assert BARE.parse(spelled).calls[0].arguments == {"text": "</tool_call><tool_call><answer>"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"name": "t", "arguments": {"a": }}', "no valid JSON"),
        ("{'name': 't'}", "no valid JSON"),
        ("", "no valid JSON"),
        ('{"name": "t"', "no valid JSON"),
        ('{"name": "t", "arguments": {"a": NaN}}', "no valid JSON (NaN is no JSON)"),
        ('{"name": "t", "arguments": {"a": ' + "9" * 5000 + "}}", "no valid JSON"),
        ('["t"]', "no JSON object"),
        ('{"arguments": {}}', 'without a "name"'),
        ('{"name": 3, "arguments": {}}', 'without a "name"'),
        ('{"name": "t", "arguments": [1]}', '"arguments" are no JSON object'),
        ('{"name": "t", "arguments": "{}"}', '"arguments" are no JSON object'),
        ('{"name": "t", "arguments": {}, "id": 1}', '"id" beside'),
        ('{"name": "t"} and more', "text behind the JSON"),
        ('{"name": "t", "arguments": {"a": ' + "[" * 40 + "]" * 40 + "}}", "nested too deeply"),
        ('{"name": "t", "arguments": {"a": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_calls_execute_nothing(text: str, problem: str) -> None:
    for whole in (f"<tool_call>{text}</tool_call>", f"{spell_call('fine', {})}<tool_call>{text}</tool_call>"):
        parsed = BARE.parse(whole)
        assert (parsed.valid, parsed.calls) == (False, ())
        assert problem in parsed.problem
        assert 'a call is <tool_call>{"name": ..., "arguments": {...}}</tool_call>' in parsed.problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (spell_call("t", {}) + "<answer>Left</answer>", "both tool calls and an answer"),
        ("<answer>Left</answer>" + spell_call("t", {}), "both an answer and tool calls"),
        ("I call " + spell_call("t", {}), "text outside the tags"),
        (spell_call("t", {}) + " done", "text outside the tags"),
        ('<tool_call>{"name": "t"}', "an unclosed tool call"),
        ("Left", "neither <answer> nor <tool_call>"),
        ("<answer>a</tool_call></answer>", "a tag inside the answer"),
    ],
)
def test_calls_and_answers_do_not_mix(text: str, problem: str) -> None:
    parsed = BARE.parse(text)
    assert (parsed.valid, parsed.calls, parsed.actions) == (False, (), ())
    assert parsed.problem.startswith(problem)


def test_where_the_json_breaks_is_counted_from_its_beginning() -> None:
    assert "delimiter at character 6)" in BARE.parse('<tool_call>\n  {"a" 1}</tool_call>').problem


fragments = st.lists(
    st.sampled_from(["<tool_call>", "</tool_call>", "<answer>", "</answer>", "<think>", "</think>", "{", "}", '"name"',
                     ":", '"t"', '"arguments"', "[", "]", ",", " ", "\n", "<|im_end|>", "\\ud800", "1e999", "x"])
    | st.text(max_size=4), max_size=20,
).map("".join)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(text=fragments, thinking=st.booleans(), opened=st.booleans())
def test_no_text_makes_parsing_raise(text: str, thinking: bool, opened: bool) -> None:
    protocol = Protocol(thinking=thinking, tools=True)
    parsed = protocol.parse(text, opened)
    assert parsed.valid == bool(parsed.actions or parsed.calls)
    assert not (parsed.actions and parsed.calls)
    assert parsed.valid or parsed.problem
    # What needs no tools is read the same with and without them.
    plain = Protocol(thinking=thinking).parse(text, opened)
    if "tool_call" not in text:
        assert (plain.actions, plain.valid, plain.thought) == (parsed.actions, parsed.valid, parsed.thought)


@settings(max_examples=200, deadline=None)
@given(calls=st.lists(st.tuples(st.text(min_size=1, max_size=6).filter(str.strip), arguments), min_size=1, max_size=3))
def test_what_is_spelled_is_read(calls: list[tuple[str, dict[str, Any]]]) -> None:
    text = " \n".join(spell_call(name, given) for name, given in calls)
    read = parse_calls(text)
    assert read.problem == ""
    assert [(call.name, json.dumps(call.arguments)) for call in read.calls] == [
        (name, json.dumps(given)) for name, given in calls
    ]


@pytest.mark.parametrize("unit", ["<tool_call>", '<tool_call>{"name":"t"}</tool_call>', "[", "{", '{"a":', " "])
def test_huge_answers_take_linear_time(unit: str) -> None:
    def seconds(count: int) -> float:
        start = time.thread_time()
        BARE.parse("<tool_call>" + unit * count)
        return time.thread_time() - start

    assert seconds(100_000) < 10.0


def test_tokens_of_calls_are_actions(chatml_renderer: Any) -> None:
    answer = f"<think>x <tool_call></think>{spell_call('t', {'a': 1})}<|im_end|>"
    ids = chatml_renderer.encode(answer)
    kinds = TOOLS.kinds_of(ids, chatml_renderer.decode)
    assert chatml_renderer.decode(ids[kinds == Kind.THOUGHT]) == "<think>x <tool_call></think>"
    assert chatml_renderer.decode(ids[kinds == Kind.ACTION]) == f"{spell_call('t', {'a': 1})}<|im_end|>"


def test_the_format_is_told_in_a_line() -> None:
    line = TOOLS.format_instructions()
    assert line == (
        "Answer as <think>...</think><answer>action</answer>; or call a tool as <think>...</think>"
        '<tool_call>{"name": ..., "arguments": {...}}</tool_call>, up to 4 calls.'
    )
    assert "up to" not in Protocol(tools=True, max_calls_per_turn=1).format_instructions()
    with pytest.raises(RecipeError, match="max_calls_per_turn"):
        Protocol(max_calls_per_turn=0)
