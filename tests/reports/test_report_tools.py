"""Calls are shown as calls, results with their calls, errors apart; the use of tools over time, and tools given up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rehearsal.agents.calls import spell_call
from rehearsal.reports import write_report
from rehearsal.reports.calls import (
    ERRORS,
    broken_call,
    call_counts,
    call_views,
    spell_argument,
    told_above,
    use_of,
)
from rehearsal.reports.data import gather
from rehearsal.reports.diagnosis import diagnose, figure_words
from rehearsal.reports.group_archive import pack_groups, unpack
from rehearsal.reports.tool_use import MAX_LINES, tool_use
from rehearsal.training.runs import RunFolder
from rehearsal.training.trajectory_store import write_trajectories
from rehearsal.trajectory import Group, StopReason, ToolCall, Trajectory, Turn

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&</pre>"
CODE = "for i in range(3):\n    print(i)"


class Blocks(HTMLParser):
    """The kind and the text of every block of the page's episodes, in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self._depth = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag != "div":
            return
        name = dict(attrs).get("class") or ""
        if self._depth:
            self._depth += 1
        elif name.startswith("block "):
            self._depth = 1
            self.blocks.append((name.removeprefix("block "), ""))

    def handle_endtag(self, tag: str) -> None:
        self._depth -= tag == "div" and self._depth > 0

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._depth:
            kind, text = self.blocks[-1]
            self.blocks[-1] = (kind, f"{text} {' '.join(data.split())}".strip())

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def of(self, kind: str) -> list[str]:
        return [text for which, text in self.blocks if which == kind]


def told(*calls: ToolCall) -> str:
    """What the agent is shown of the results of several calls."""
    return "\n".join(f"Result {number}, {call.name}:\n{call.result}" for number, call in enumerate(calls, 1))


WRONG = ToolCall("calculator", {"expr": "2 + 2"}, "Wrong arguments: there is no argument expr.", "arguments", 0.01)
RIGHT = ToolCall("calculator", {"expression": "17 * 23"}, "391", cost=0.01)
PROGRAM = ToolCall("python", {"code": CODE, "seconds": 3, "name": "3"}, "0\n1\n2")
BROKEN = (
    '<think>Quick.</think><tool_call>\n{"name": "calculator", "arguments": {"expression": 1}\n</tool_call><|im_end|>'
)


def episode(sample: int = 0, **changes: Any) -> Trajectory:
    """A call that fails, two at once, one that cannot be read, an answer."""
    turns = [
        Turn("17 * 23", "Turn 1 of 7.", spell_call(WRONG.name, WRONG.arguments), "hm", penalty=-0.01, calls=[WRONG]),
        Turn(WRONG.result, "Call 1 of 3. Turn 2 of 7.", "...", "two", penalty=-0.01, calls=[RIGHT, PROGRAM]),
        Turn(told(RIGHT, PROGRAM), "Calls 2 to 3 of 3.", BROKEN, "Quick.", penalty=-0.1, valid=False),
        Turn(
            told(RIGHT, PROGRAM), "Your last answer had a tool call that is no valid JSON.", "<answer>391</answer>", "",
            ["391"], ["391"], [1.0],
        ),
    ]  # fmt: skip
    values: dict[str, Any] = {
        "turns": turns,
        "success": True,
        "sample": sample,
        "task": "t",
        "final_observation": "right",
    }
    counters = {"tool_calls/calculator": 2.0, "tool_calls/python": 1.0, "tool_failures/calculator": 1.0}
    return Trajectory("calculate", 3, **{**values, "counters": counters, **changes})


def figures(used: float, **more: float) -> dict[str, float]:
    called = {"train/tools/calculator/failures": 0.9, "train/tools/calculator/success_with": 0.1} if used else {}
    return {
        "train/episodes": 64.0, "train/success": 0.2, "train/tools/calls": used, "train/tools/calculator/calls": used,
        "train/tools/calculator/used": used, "train/tools/calculator/success_without": 0.2, **called, **more,
    }  # fmt: skip


def make_run(path: Path, rows: list[dict[str, float]], episodes: list[Trajectory] | None = None) -> RunFolder:
    with RunFolder.create(path, "a = 1", "rehearsal train", device="cpu") as run:
        for step, row in enumerate(rows, 1):
            run.append_metrics(step, row)
        if episodes:
            write_trajectories(run.trajectory_path("train", len(rows)), [Group(episodes)], "train", len(rows))
    return run


def page(run: RunFolder) -> Blocks:
    return Blocks(write_report(run.path).read_text(encoding="utf-8"))


def kinds(blocks: Blocks) -> Iterator[str]:
    return (kind for kind, _ in blocks.blocks if kind != "end")


def test_calls_results_and_errors_are_told_apart(tmp_path: Path) -> None:
    shown = page(make_run(tmp_path / "run", [figures(0.5)], [episode()]))
    assert list(kinds(shown)) == [
        "observation", "notice", "thought", "call", "error",
        "notice", "thought", "call", "output", "call", "output",
        "notice", "thought", "call",
        "observation", "notice", "action",
    ]  # fmt: skip
    first, second, program, broken = shown.of("call")
    assert first == "Tool call calculator expr 2 + 2 cost 0.01"
    assert second == "Tool call calculator expression 17 * 23 cost 0.01"
    assert program.startswith('Tool call python seconds 3 name "3" code for i in range(3):')
    assert shown.of("error") == ["Error wrong arguments Wrong arguments: there is no argument expr."]
    assert shown.of("output") == ["Result 391", "Result 0 1 2"]
    assert broken.startswith('Tool call not readable <tool_call> {"name": "calculator"')
    assert "</tool_call> not valid: it has a tool call that is no valid JSON" in broken
    assert "penalty −0.1" in broken
    assert "<|im_end|>" not in broken
    assert shown.of("notice")[1] == "Notice Call 1 of 3. Turn 2 of 7."
    assert "Tool calls 3, 1 failed" in shown.text
    assert "sees the result above" in shown.text
    assert "sees the results above" in shown.text
    assert '<tool_call> {"name": "calculator", "arguments": {"expr"' in shown.text, "the answer as written is there too"


def test_results_that_are_not_those_of_the_calls_before_are_shown() -> None:
    turns = [Turn("task", calls=[RIGHT]), Turn("391"), Turn("391")]
    assert [told_above(turns, place) for place in range(3)] == [False, True, False]
    turns[1].observation = "The lights went out."
    assert not told_above(turns, 1)


def test_the_last_calls_of_an_episode(tmp_path: Path) -> None:
    def ending(call: ToolCall, **changes: Any) -> Trajectory:
        return episode(turns=[Turn("task", calls=[call])], final_observation="", **changes)

    shown = page(make_run(tmp_path / "a", [figures(0.5)], [ending(RIGHT, stop_reason=StopReason.TURN_LIMIT)]))
    assert "The episode ended before the agent could read it." in shown.text
    lost = ending(ToolCall("unlock"), stop_reason=StopReason.TIMEOUT, error="It hung.", success=None)
    shown = page(make_run(tmp_path / "b", [figures(0.5)], [lost]))
    assert "Nothing came back: the episode broke off." in shown.text
    assert not shown.of("output")


@pytest.mark.parametrize("error", ["unknown", "arguments", "raised", "timeout", "busy", "limit", "later"])
def test_every_kind_of_failure_has_words(error: str) -> None:
    (view,) = call_views(Turn("o", calls=[ToolCall("t", {}, "no", error)]))
    assert view.error == ERRORS.get(error, error)
    assert view.answered


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("17 * 23", "17 * 23"), ("3", '"3"'), ("true", '"true"'), ("", '""'), (" a", '" a"'), (3, "3"), (None, "null"),
        ([1, "ä"], '[1, "ä"]'), ({"a": 1}, '{"a": 1}'), ("[" * 5000, "[" * 5000),
    ],
)  # fmt: skip
def test_values_of_arguments(value: Any, shown: str) -> None:
    assert spell_argument(value) == shown


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5))
@settings(max_examples=200, deadline=None)
def test_values_of_different_types_are_never_shown_alike(value: Any) -> None:
    shown = spell_argument(value)
    if isinstance(value, str):
        assert shown == value or json.loads(shown) == value
    else:
        assert json.loads(shown) == value


@pytest.mark.parametrize(
    ("turn", "text"),
    [
        (Turn("o", response="<answer>3</answer>", actions=["3"]), None),
        (Turn("o", response="nothing of the kind", valid=False), None),
        (Turn("o", response="<think>I could <tool_call>", thought="I could <tool_call>", valid=False), None),
        (Turn("o", response="<think>I could <tool_call></think>no", thought="I", valid=False), None),
        (Turn("o", response="well <tool_call>{}</tool_call>", valid=False), "well <tool_call>{}</tool_call>"),
        (Turn("o", response="<tool_call>{", valid=False), "<tool_call>{"),
        (Turn("o", response="hm</think> <tool_call>{<|im_end|>", thought="hm", valid=False), "<tool_call>{"),
        (Turn("o", response=spell_call("t", {}), calls=[ToolCall("t")]), None),
    ],
)
def test_calls_that_cannot_be_read(turn: Turn, text: str | None) -> None:
    broken = broken_call(turn)
    assert (None if broken is None else broken.text) == text


def test_a_call_where_none_was_expected_has_no_problem_of_its_own() -> None:
    broken = broken_call(Turn("o", response=spell_call("t", {}), valid=False))
    assert broken is not None
    assert broken.problem == ""


def test_how_episodes_used_their_tools() -> None:
    assert use_of(episode()) == "failed"
    assert call_counts(episode()) == (3, 1)
    assert use_of(episode(turns=[Turn("o", calls=[RIGHT])])) == "fine"
    assert use_of(episode(turns=[Turn("o")])) == "none"
    assert use_of(episode(turns=[Turn("o")], counters={"format_errors": 1.0})) == ""


def test_groups_side_by_side_hold_the_calls(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [figures(0.5)], [episode(), episode(1, turns=[Turn("o", actions=["1"])])])
    (group,) = unpack(pack_groups(run, []).blocks[1])
    first, second, third, last = group["episodes"][0]["turns"]
    assert first["o"] == "17 * 23"
    assert first["c"] == [{"n": "calculator", "a": [["expr", "2 + 2", 0]], "r": WRONG.result, "e": "wrong arguments"}]
    assert second["o"] is None
    assert [call["r"] for call in second["c"]] == ["391", "0\n1\n2"]
    assert second["c"][1]["a"] == [["code", CODE, 1], ["seconds", "3", 0], ["name", '"3"', 0]]
    assert third["b"][0].startswith("<tool_call>")
    assert "no valid JSON" in third["b"][1]
    assert "c" not in last
    assert last["o"] == told(RIGHT, PROGRAM)
    plain = group["episodes"][1]["turns"][0]
    assert set(plain) == {"o", "n", "t", "a", "x", "v", "r"}


def test_what_tools_and_models_say_stays_text(tmp_path: Path) -> None:
    call = ToolCall(EVIL, {EVIL: EVIL, "code": f"{EVIL}\n{EVIL}"}, EVIL)
    failed = ToolCall(EVIL, {}, EVIL, EVIL)
    turns = [
        Turn("o", calls=[call, failed]),
        Turn(EVIL, response=f"<tool_call>{EVIL}", valid=False),
    ]
    shown = page(
        make_run(tmp_path / "run", [figures(0.5, **{f"train/tools/{EVIL}/used": 0.5})], [episode(turns=turns)])
    )
    assert shown.tags.count("script") == 1
    assert "img" not in shown.tags
    assert shown.text.count("<script>alert(1)</script>") >= 9


def test_long_results_are_cut(tmp_path: Path) -> None:
    long = ToolCall("python", {"code": "x\n" * 20_000}, "y" * 40_000)
    run = make_run(tmp_path / "run", [figures(0.5)], [episode(turns=[Turn("o", calls=[long]), Turn(long.result)])])
    shown = page(run)
    assert shown.text.count("more characters in the trajectory file") == 2
    (group,) = unpack(pack_groups(run, []).blocks[1])
    assert len(group["episodes"][0]["turns"][0]["c"][0]["r"]) < 5_000


def test_tools_that_were_given_up_are_seen(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [figures(0.6 if step < 15 else 0.0) for step in range(40)])
    shown = page(run)
    assert "Tool abandoned since step 20" in shown.text
    assert "calculator given up 0 0% 60% at step 5 – – 20% –" in shown.text
    use = tool_use(gather(run.path))
    assert use is not None
    assert [chart.title for chart in use.charts] == [
        "Episodes that call a tool", "Calls that fail", "Calls an episode", "Success with and without calculator",
        "Calls of any tool",
    ]  # fmt: skip
    assert [span.begin for span in use.charts[0].spans] == [20]
    assert [len(line.x) for chart in use.charts for line in chart.series] == [40] * 6, "all over the same steps"
    found = diagnose(run.path)
    assert found.figures["train/tools/calculator/used"] == (pytest.approx(0.6), 0.0)
    assert figure_words("train/tools/calculator/used") == "episodes that call calculator"
    assert figure_words("train/success") == "success in training"


def test_a_tool_that_is_used_is_not_given_up(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [figures(0.6) for _ in range(20)])
    with run.path.joinpath("evaluations.jsonl").open("a") as out:
        out.write(json.dumps({"step": 20, "split": "test", "success": 0.5, "tools/calculator/used": 0.25}) + "\n")
    use = tool_use(gather(run.path))
    assert use is not None
    (row,) = use.rows
    assert not row.abandoned
    assert (row.used, row.failures, row.success_with, row.success_without, row.held_out) == (
        "60%", "90%", "10%", "20%", "25%",
    )  # fmt: skip
    assert "given up" not in page(run).text.replace("it was given up", "")


def test_many_tools_and_calls_of_none(tmp_path: Path) -> None:
    more = {f"train/tools/tool{i}/{name}": i / 10 for i in range(9) for name in ("calls", "used")}
    run = make_run(tmp_path / "run", [figures(0.0, **more, **{"train/tools/unknown": 0.25}) for _ in range(3)])
    use = tool_use(gather(run.path))
    assert use is not None
    assert [row.name for row in use.rows][:3] == ["tool8", "tool7", "tool6"]
    assert len(use.rows) == 10
    assert use.left_out == 8 - MAX_LINES, "the two that nobody called are not missed"
    assert all(len(chart.series) <= MAX_LINES for chart in use.charts)
    assert use.beyond == "0.25 calls of tools that do not exist"
    shown = page(run)
    assert "Only the tools that are called most have a line." in shown.text
    assert "Other metrics" not in shown.text
    assert "train/tools/tool8/used" in shown.text, "every number is in the table of numbers"


@pytest.mark.parametrize("steps", [1, 2, 4, 30])
def test_tools_that_nobody_calls(tmp_path: Path, steps: int) -> None:
    shown = page(make_run(tmp_path / "run", [figures(0.0) for _ in range(steps)]))
    assert "How it uses its tools" in shown.text
    assert "calculator 0 0% – – – 20% –" in shown.text


def test_runs_without_tools_show_nothing_of_them(tmp_path: Path) -> None:
    plain = episode(turns=[Turn("o", actions=["1"], executed=["1"], rewards=[1.0])], counters={})
    run = make_run(tmp_path / "run", [{"train/success": 0.5}], [plain])
    assert tool_use(gather(run.path)) is None
    shown = page(run)
    for words in ("How it uses its tools", "Tool calls", "Tool call", "none called"):
        assert words not in shown.text
