"""Tools from functions, and the toolbox: whatever a tool or an agent does, there is a result."""

from __future__ import annotations

import asyncio
import enum
import functools
import sys
import threading
import time
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rehearsal.agents.toolbox import FunctionTools, Toolbox, Toolkit, ToolLimits, ToolSource
from rehearsal.agents.tools import ArgumentError, Tool, ToolFailure, as_tool, tool_from
from rehearsal.environments.base import TextEnv
from rehearsal.errors import EnvironmentFault, RecipeError, ToolError
from rehearsal.trajectory import ToolCall


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


def forecast(city: str, days: int = 1, unit: Literal["C", "F"] = "C", places: list[str] | None = None) -> str:
    """The forecast
    for a city.

    More words that nobody needs.

    Args:
        city: its name,
            as on the map
        days (int): from today
    """
    return f"{city} {days!r} {unit} {places}"


def box_of(*functions: Any, **limits: Any) -> Toolbox:
    return Toolbox([as_tool(function) for function in functions], ToolLimits(**limits))


def call(box: Toolbox, tool_name: str, **arguments: Any) -> Any:
    return box.execute(ToolCall(tool_name, arguments))


# Tools from functions


def test_the_schema_of_a_function() -> None:
    tool = tool_from(forecast)
    assert tool.name == "forecast"
    assert tool.description == "The forecast for a city. More words that nobody needs."
    assert tool.schema["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "its name, as on the map"},
            "days": {"type": "integer", "default": 1, "description": "from today"},
            "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
            "places": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["city"],
    }
    assert tool.signature == 'forecast(city: string, days: integer = 1, unit: "C" | "F" = "C", places: array, optional)'


def test_a_coroutine_that_hangs_is_cancelled() -> None:
    """A thread cannot be stopped; what waits in a coroutine can be, and its thread ends with it."""
    ended = threading.Event()

    async def wait() -> str:
        """Waits."""
        try:
            await asyncio.sleep(600)
        finally:
            ended.set()
        return ""

    box = Toolbox([tool_from(wait)], ToolLimits(timeout=0.1))
    assert box.execute(ToolCall("wait", {})).error == "timeout"
    assert ended.wait(20)


def test_methods_partials_coroutines_and_odd_names() -> None:
    class Shop:
        def sell(self, schema: str, copy: int = 2, /, model_config: bool = False) -> str:
            """Sells a thing."""
            return f"{schema} {copy} {model_config}"

    def both(a: int, b: int) -> int:
        """Adds."""
        return a + b

    async def slowly(a: float) -> float:
        """Doubles."""
        return 2 * a

    sell = tool_from(Shop().sell)
    assert list(sell.parameters["properties"]) == ["schema", "copy", "model_config"]
    box = box_of(sell, functools.partial(both, b=3), slowly)
    assert call(box, "sell", schema="x", model_config="true").text == "x 2 True"
    assert call(box, "both", a=4).text == "7"
    assert call(box, "slowly", a="1.5").text == "3.0"


def test_enums_and_nested_values() -> None:
    def paint(colour: Colour, sizes: dict[str, list[int]]) -> Any:
        """Paints."""
        return [colour.value, sizes]

    box = box_of(paint)
    assert call(box, "paint", colour="red", sizes={"a": ["1", 2.0]}).text == '["red", {"a": [1, 2]}]'
    assert call(box, "paint", colour="green", sizes={}).error == "arguments"


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda x: x, "cannot name a tool|no docstring"),
        (len, "has no type"),
        (int, "no tool"),
        ("forecast", "no tool"),
    ],
)
def test_what_is_no_tool(function: Any, told: str) -> None:
    with pytest.raises(ToolError, match=told):
        as_tool(function)


def test_functions_that_cannot_be_told_of() -> None:
    def untyped(a, b: int):  # type: ignore[no-untyped-def]
        """Does."""

    def endless(*words: str) -> None:
        """Does."""

    def undocumented(a: int) -> None: ...

    def strange(a: threading.Lock) -> None:  # type: ignore[valid-type]
        """Does."""

    for function, told in ((untyped, "parameter a"), (endless, "any number"), (undocumented, "no docstring"),
                           (strange, "strange")):  # fmt: skip
        with pytest.raises(ToolError, match=told):
            tool_from(function)
    with pytest.raises(ToolError, match="cannot name a tool"):
        Tool("a b", "x", {}, lambda arguments: "")


# Arguments


def test_arguments_are_converted_where_nothing_is_lost() -> None:
    box = box_of(forecast)
    assert call(box, "forecast", city=42, days="3", places=["a"]).text == "42 3 C ['a']"
    assert call(box, "forecast", city="x", days=2.0).text == "x 2 C None"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "city is missing"),
        ({"city": "x", "town": "y"}, "there is no argument town"),
        ({"city": "x", "days": "two"}, 'days cannot be "two": input should be a valid integer'),
        ({"city": "x", "days": 1.5}, "days cannot be 1.5"),
        ({"city": None}, "city cannot be null"),
        ({"city": "x", "unit": "K"}, "'C' or 'F'"),
        ({"city": "x", "places": "a"}, 'places cannot be "a": input should be a valid list'),
        ({"city": "x", "days": "x" * 500}, "xxx...: input should be"),
    ],
)
def test_bad_arguments_are_told_with_the_signature(arguments: dict[str, Any], told: str) -> None:
    result = box_of(forecast).execute(ToolCall("forecast", arguments))
    assert result.error == "arguments"
    assert result.text == ""
    assert told in result.note
    assert "Call it as forecast(city: string, days: integer = 1" in result.note
    assert len(result.note) < 600


def test_unknown_tools_are_told_what_there_is() -> None:
    result = call(box_of(forecast), "forcast", city="x")
    assert result.error == "unknown"
    assert result.note.startswith('There is no tool "forcast". Did you mean forecast? There are: forecast(city: string')
    assert "\ud800" not in call(box_of(forecast), "\ud800" * 3).note
    assert len(call(box_of(forecast), "x" * 100_000).note) < 300


# What tools do


def raises(error: BaseException) -> Any:
    def tool() -> str:
        """Raises."""
        raise error

    return tool


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("no\n  such thing"), "Error: ValueError: no such thing"),
        (KeyError(), "Error: KeyError"),
        (ToolFailure("not today"), "Error: not today"),
        (SystemExit(3), "Error: SystemExit: 3"),
        (StopIteration(), "Error: StopIteration"),
        (MemoryError(), "Error: MemoryError"),
        (RuntimeError("x" * 10_000), "Error: RuntimeError: " + "x" * 500),
        (UnicodeError("\ud800"), "Error: UnicodeError: ?"),
    ],
)
@pytest.mark.parametrize("fast", [True, False])
def test_what_a_tool_raises_is_told_to_the_agent(error: BaseException, told: str, fast: bool) -> None:
    result = call(box_of(tool_from(raises(error), fast=fast)), "tool")
    assert (result.text, result.error) == (told, "raised")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("text", "text"), (None, ""), (3, "3"), ({"a": [1, None]}, '{"a": [1, null]}'), ("\ud800x", "?x"),
        ({1, 2}, '"{1, 2}"'), (float("nan"), "NaN"), (b"x", '"b\'x\'"'), ("汉", "汉"),
    ],
)  # fmt: skip
def test_what_a_tool_returns_becomes_text(value: Any, text: str) -> None:
    def tool() -> Any:
        """Returns."""
        return value

    result = call(box_of(tool), "tool")
    assert (result.text, result.error) == (text, "")
    assert (result.note == "(no output)") == (text == "")


def test_a_value_without_a_text_is_an_error() -> None:
    class Odd:
        def __str__(self) -> str:
            raise ValueError("odd")

        __repr__ = __str__

    def tool() -> Any:
        """Returns."""
        return Odd()

    assert call(box_of(tool), "tool").error == "raised"


def test_long_results_are_cut_with_a_note() -> None:
    def tool() -> str:
        """Returns."""
        return "a" * 1001

    result = call(box_of(tool, max_characters=1000), "tool")
    assert result.text == "a" * 1000
    assert result.note == "(cut: the first 1000 of 1001 characters)"
    assert call(box_of(tool, max_characters=1001), "tool").note == ""


def test_a_tool_may_print(capsys: pytest.CaptureFixture[str]) -> None:
    def tool() -> int:
        """Prints."""
        print("hello")
        print("there", file=sys.stderr)
        return 1

    assert call(box_of(tool), "tool").text == "1"


def test_a_tool_that_hangs_is_left_and_the_next_call_is_told_so() -> None:
    leave = threading.Event()

    def hang(seconds: float = 0.0) -> str:
        """Hangs."""
        leave.wait(20)
        return "late"

    box = Toolbox([tool_from(hang), as_tool(forecast)], ToolLimits(timeout=1.0), own=["hang"])
    start = time.perf_counter()
    results: list[Any] = []
    # Time limits hold off the main thread too.
    thread = threading.Thread(target=lambda: results.append(call(box, "hang")))
    thread.start()
    thread.join()
    assert time.perf_counter() - start < 15
    assert (results[0].error, results[0].text) == ("timeout", "")
    assert results[0].note == "hang took longer than 1 s and was left."
    assert call(box, "hang").error == "busy"
    assert box.disturbed
    assert call(box, "forecast", city="x").error == ""
    leave.set()
    deadline = time.monotonic() + 60
    while box.disturbed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert call(box, "hang").text == "late"
    assert not box.disturbed


def test_the_time_limit_of_a_tool_comes_first() -> None:
    def nap() -> str:
        """Sleeps."""
        time.sleep(0.3)
        return "up"

    assert call(box_of(tool_from(nap, timeout=20.0), timeout=0.01), "nap").text == "up"
    box = box_of(tool_from(nap, timeout=20.0), tool_from(forecast, fast=True), timeout=0.01)
    assert box.seconds_for([ToolCall("nap"), ToolCall("forecast"), ToolCall("nothing")]) == 20.0


# Limits


def test_limits_are_reached_exactly() -> None:
    box = Toolbox([as_tool(forecast), tool_from(raises(ValueError()), name="bad")],
                  ToolLimits(max_calls=4, per_tool={"forecast": 2}, cost=0.25))  # fmt: skip
    assert box.calls_left == 4
    errors = [call(box, name, **given).error for name, given in (
        ("forecast", {"city": "x"}), ("forecast", {}), ("forecast", {"city": "x"}), ("nothing", {}), ("bad", {}),
        ("bad", {}), ("nothing", {}),
    )]  # fmt: skip
    assert errors == ["", "arguments", "limit", "unknown", "raised", "limit", "limit"]
    assert (box.used, box.calls_left, dict(box.calls)) == (4, 0, {"forecast": 2, "bad": 1})
    assert call(box, "bad").note == "No tool calls are left: all 4 are used."


def test_costs() -> None:
    box = Toolbox([as_tool(forecast), tool_from(forecast, name="dear", cost=2.0)], ToolLimits(max_calls=3, cost=0.5))
    told, results = box.play(
        [ToolCall("forecast", {"city": "x"}), ToolCall("dear", {}), ToolCall("no"), ToolCall("no")]
    )
    assert [one.cost for one in told] == [0.5, 2.0, 0.5, 0.0]
    assert [one.result for one in told] == [result.told for result in results]
    assert [one.error for one in told] == ["", "arguments", "unknown", "limit"]
    assert box.count_notice(told) == "Calls 1 to 3 of 3; cost 3."
    dear = Toolbox([as_tool(forecast)], ToolLimits(cost=0.25))
    assert dear.count_notice(dear.play([ToolCall("forecast", {"city": "x"})])[0]) == "Cost 0.25."


def test_counts_are_told() -> None:
    box = Toolbox([as_tool(forecast), as_tool(raises(ValueError()))], ToolLimits(max_calls=4, per_tool={"forecast": 3}))

    def notice(*names: str) -> str:
        return box.count_notice(box.play([ToolCall(name, {"city": "x"}) for name in names])[0])

    assert notice("forecast") == "Call 1 of 4; forecast 1 of 3."
    assert notice("forecast", "nothing") == "Calls 2 to 3 of 4; forecast 2 of 3."
    assert notice("tool", "forecast") == "Call 4 of 4."
    assert notice("forecast") == ""
    unlimited = box_of(forecast)
    assert unlimited.count_notice(unlimited.play([ToolCall("forecast", {"city": "x"})])[0]) == ""
    assert unlimited.calls_left is None


@pytest.mark.parametrize("limits", [
    {"max_calls": 0}, {"max_calls_per_turn": True}, {"per_tool": {"a": 0}}, {"cost": -1.0}, {"cost": float("nan")},
    {"timeout": 0.0}, {"max_characters": 0},
])  # fmt: skip
def test_limits_that_cannot_be_used(limits: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        ToolLimits(**limits)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(["forecast", "tool"]) | st.text(max_size=5),
       arguments=st.dictionaries(st.sampled_from(["city", "days", "unit"]) | st.text(max_size=3),
                                 st.text(max_size=4) | st.integers() | st.none() | st.lists(st.integers(), max_size=2)
                                 | st.floats(), max_size=4))  # fmt: skip
def test_no_call_raises(name: str, arguments: dict[str, Any]) -> None:
    box = Toolbox([tool_from(forecast, fast=True), tool_from(raises(OSError()), fast=True)])
    result = box.execute(ToolCall(name, arguments))
    result.told.encode()
    assert (result.error == "") == (name == "forecast" and result.text != "")


# Kits


class Counter(ToolSource):
    """A source whose tools remember something."""

    def __init__(self) -> None:
        self.closed: list[int] = []
        self.opened = 0

    def open(self) -> list[Tool]:
        number = self.opened = self.opened + 1
        seen: list[str] = []

        def remember(word: str) -> str:
            """Remembers."""
            seen.append(word)
            return " ".join(seen)

        return [Tool("remember", "Remembers.", tool_from(remember).parameters, lambda a: remember(**a),
                     close=lambda: self.closed.append(number))]  # fmt: skip

    def close(self) -> None:
        self.closed.append(0)


class Plain(TextEnv):
    tools: Any = ()
    fast = True

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        return "", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "", 0.0, False, False, {}


def test_episodes_do_not_share_what_tools_remember() -> None:
    source = Counter()
    kit = Toolkit([source])
    one, other = kit.open(Plain()), kit.open(Plain())
    assert one is not None and other is not None
    assert call(one, "remember", word="a").text == "a"
    assert call(other, "remember", word="b").text == "b"
    assert call(one, "remember", word="c").text == "a c"
    one.close()
    one.close()
    assert source.closed == [1]
    kit.close()
    assert source.closed == [1, 0]
    assert not kit.fast
    assert Toolkit([FunctionTools(tool_from(forecast, fast=True))]).fast


def test_tools_of_the_environment_come_first() -> None:
    env = Plain()
    env.tools = (forecast,)
    box = Toolkit([Counter()]).open(env)
    assert box is not None
    assert list(box.tools) == ["forecast", "remember"]
    assert box.tools["forecast"].fast
    assert Toolkit().open(Plain()) is None
    env.tools = (forecast, forecast)
    source = Counter()
    with pytest.raises(ToolError, match="Two tools are called forecast"):
        Toolkit([source]).open(env)
    assert source.closed == [1], "what was opened on the way is closed"
    env.tools = (lambda x: x,)
    with pytest.raises(EnvironmentFault, match=r"Plain\.tools cannot be used"):
        Toolkit().open(env)


def test_locked_tools_are_tools_that_there_are_not() -> None:
    env = Plain()
    env.tools = (forecast,)
    kit = Toolkit([Counter(), FunctionTools(tool_from(forecast, name="other"))], names=["counter", "more"])
    box = kit.open(env, locked=("counter",))
    assert box is not None
    assert list(box.tools) == ["forecast", "other"]
    told = call(box, "remember", word="a")
    assert told.error == "unknown"
    assert told.note.startswith('There is no tool "remember".') and "There are: forecast(" in told.note
    box = kit.open(env, locked=["forecast", "more"])
    assert box is not None and list(box.tools) == ["remember"]
    assert kit.open(env, locked=["forecast", "more", "counter"]) is None, "as if there were none at all"
    box = kit.open(env, locked=["remember"])
    assert box is not None and "remember" in box.tools, "sources are locked by their own names"
    with pytest.raises(ToolError, match="1 sources of tools and 2 names"):
        Toolkit([Counter()], names=["a", "b"])


def test_checks_of_tools_may_fail_too() -> None:
    def check(arguments: Any) -> Any:
        raise ArgumentError("never right") if arguments else ValueError("broken")

    box = Toolbox([Tool("t", "x", {}, lambda a: "", check)])
    assert call(box, "t", a=1).note == "Wrong arguments: never right. Call it as t()."
    assert call(box, "t").error == "raised"
