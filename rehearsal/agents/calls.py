"""Tool calls in an answer, in the form that Hermes and Qwen models are trained on:

    <tool_call>
    {"name": "search", "arguments": {"query": "pin code"}}
    </tool_call>

Several calls may follow each other. What is read here is the text of an answer behind its thought.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from rehearsal.trajectory import ToolCall

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
CALL_FORM = f'{CALL_OPEN}{{"name": ..., "arguments": {{...}}}}{CALL_CLOSE}'
"""What a call looks like, for people and models."""

MAX_DEPTH = 32
"""How deep the values of arguments may be nested."""


@dataclass(frozen=True)
class ParsedCalls:
    """Attributes:
    calls: in order; empty if something is wrong.
    problem: what is wrong, as what an answer can *have*; "" if nothing is.
    """

    calls: tuple[ToolCall, ...] = ()
    problem: str = ""


def parse_calls(text: str) -> ParsedCalls:
    """Read an answer that is nothing but tool calls. Never raises, and takes time in proportion to the length.

    A call ends where its JSON does: a tag that stands inside a string of it is text like any other. Either all calls
    can be read or none counts: an answer that is half executed could not be taken back.

    Args:
        text: begins with ``<tool_call>``; blanks may stand around each call and its JSON, and nothing else.
    """
    calls: list[ToolCall] = []
    position = 0
    while text.startswith(CALL_OPEN, position):
        begin = _skip(text, position + len(CALL_OPEN))
        try:
            value, end = _DECODER.raw_decode(text, begin)
        except RecursionError:
            return ParsedCalls(problem="a tool call that is nested too deeply")
        except ValueError as error:
            return ParsedCalls(problem=_broken(text, begin, error))
        end = _skip(text, end)
        if not text.startswith(CALL_CLOSE, end):
            what = "an unclosed tool call" if end >= len(text) else "text behind the JSON of a tool call"
            return ParsedCalls(problem=what)
        problem = _problem_of(value)
        if problem:
            return ParsedCalls(problem=problem)
        calls.append(ToolCall(value["name"], value.get("arguments", {})))
        position = _skip(text, end + len(CALL_CLOSE))
    if position < len(text):
        mixed = text.startswith("<answer>", position)
        return ParsedCalls(problem="both tool calls and an answer" if mixed else "text outside the tags")
    return ParsedCalls(tuple(calls))


def spell_call(name: str, arguments: Any) -> str:
    """A call as a model writes it; what :func:`parse_calls` reads."""
    written = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"{CALL_OPEN}\n{written}\n{CALL_CLOSE}"


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _broken(text: str, begin: int, error: ValueError) -> str:
    """Where the JSON breaks, in few words; some models close a call before its braces."""
    if isinstance(error, json.JSONDecodeError):
        # The decoder counts from the beginning of the answer, which the agent cannot see.
        where = f"{error.msg.removesuffix(' at')} at character {error.pos - begin + 1}"
    else:
        where = str(error).split(";")[0][:60]
    return f"a tool call that is no valid JSON ({where})"


def _problem_of(value: Any) -> str:
    if not isinstance(value, dict):
        return "a tool call that is no JSON object"
    if not isinstance(value.get("name"), str) or not value["name"].strip():
        return 'a tool call without a "name"'
    if not isinstance(value.get("arguments", {}), dict):
        return 'a tool call whose "arguments" are no JSON object'
    odd = [key for key in value if key not in ("name", "arguments")]
    if odd:
        return f'a tool call with "{odd[0][:40]}" beside "name" and "arguments"'
    if _is_deep(value):
        return "a tool call that is nested too deeply"
    return ""


def _is_deep(value: Any) -> bool:
    """Whether a value is nested deeper than what others can take without running out of stack."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True
