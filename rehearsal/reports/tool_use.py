"""How agents used their tools over a run: curves by tool, a table of where they stand, and whether one was given up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rehearsal.diagnostics import Series as Rows
from rehearsal.diagnostics import Thresholds
from rehearsal.diagnostics.tool_use import TOOL_FIGURES, abandoned_tools, tool_names
from rehearsal.reports.charts import finding_spans
from rehearsal.reports.data import ReportData
from rehearsal.reports.plots import Chart, Series
from rehearsal.reports.scales import spell
from rehearsal.reports.verdict import number

MAX_LINES = 5
"""Tools that get a line; as many as there are colours."""
RECENT = 5
"""Steps that "now" means, as in the rules of the verdict."""

_FIGURES = ("calls", "used", "failures", "success_with", "success_without")
_BEYOND = {
    "unknown": "of tools that do not exist",
    "refused": "beyond the limit of an episode",
    "surplus": "beyond the limit of an answer",
}


@dataclass(frozen=True)
class ToolRow:
    """A tool as text; "–" where there is no value. Values are means over the last :data:`RECENT` steps.

    Attributes:
        name: of the tool.
        calls: an episode.
        used: share of the episodes that call it.
        most: the highest mean of that share over five steps (of the present stage), and the last of them.
        failures: share of its calls that fail.
        success_with: success of the episodes that call it.
        success_without: of the others.
        held_out: share of the held-out episodes that call it, at the last evaluation.
        abandoned: whether it was given up.
    """

    name: str
    calls: str
    used: str
    most: str
    failures: str
    success_with: str
    success_without: str
    held_out: str
    abandoned: bool


@dataclass(frozen=True)
class ToolUse:
    """What a report says of the tools of a run.

    Attributes:
        charts: of the tools that are called most.
        rows: one a tool, those called most first.
        left_out: how many tools that were called have no line.
        beyond: calls that belong to no tool, in words; "" if there were none.
        tabled: the metrics that the rows tell.
    """

    charts: Sequence[Chart]
    rows: Sequence[ToolRow]
    left_out: int
    beyond: str
    tabled: Sequence[str] = ()


def tool_use(data: ReportData) -> ToolUse | None:
    """What was measured of tools; None for a run without any."""
    calls = {name: data.series(f"{TOOL_FIGURES}{name}/calls") for name in tool_names(data.metric_names)}
    if not calls:
        return None
    # Over the whole run, so that a tool that was given up keeps its line.
    totals = {name: sum(value or 0.0 for value in values) for name, values in calls.items()}
    names = sorted(totals, key=lambda name: -totals[name])
    called = [name for name in names if totals[name]]
    # Where nobody called any, that is what there is to see.
    shown = (called or names)[:MAX_LINES]
    charts = [*_shares(data, shown), *_successes(data, shown), *_altogether(data)]
    return ToolUse(
        [chart for chart in charts if not chart.empty], _rows(data, names), len(called or names) - len(shown),
        _beyond(data), [f"{TOOL_FIGURES}{name}/{figure}" for name in names for figure in _FIGURES],
    )  # fmt: skip


def _shares(data: ReportData, names: Sequence[str]) -> Iterator[Chart]:
    spans = finding_spans(data, [f"{TOOL_FIGURES}calls"])
    yield Chart(
        "Episodes that call a tool",
        "Share of the episodes that call it. Falling towards zero without a gain in success: it was given up.",
        _lines(data, names, "used"), "share", spans=spans,
    )  # fmt: skip
    yield Chart(
        "Calls that fail",
        "Share of the calls that bring an error. An agent whose first calls fail may stop calling.",
        _lines(data, names, "failures"), "share", spans=spans,
    )  # fmt: skip
    yield Chart(
        "Calls an episode", "Of the episodes that had the tool.", _lines(data, names, "calls"), spans=spans
    )  # fmt: skip


def _successes(data: ReportData, names: Sequence[str]) -> Iterator[Chart]:
    for name in names:
        lines = [
            _line(data, f"{name}/success_{which}", label, place)
            for place, (which, label) in enumerate({"with": "called it", "without": "did not"}.items())
        ]
        # A tool that nobody calls, or everybody does, compares with nothing.
        if not any(line.empty for line in lines):
            yield Chart(f"Success with and without {name}", "", lines, "share", whole=True)


def _altogether(data: ReportData) -> Iterator[Chart]:
    """Calls whatever the tool, and those of none; without lines that never leave zero, unless there is no other."""
    words = {"calls": "of all tools", **_BEYOND}
    metrics = [f"{TOOL_FIGURES}{figure}" for figure in words]
    lines = [
        _line(data, figure, label, place)
        for place, (figure, label) in enumerate(words.items())
        if figure == "calls" or any(data.series(f"{TOOL_FIGURES}{figure}"))
    ]
    yield Chart(
        "Calls of any tool", "An episode. Those beyond a limit, or of tools that do not exist, are not carried out.",
        [line for line in lines if not line.empty], spans=finding_spans(data, metrics[:1]), metrics=metrics,
    )  # fmt: skip
    yield Chart(
        "Cost of calls", "An episode, as the tools charge it.", [_line(data, "cost", "cost", 0)],
        metrics=[f"{TOOL_FIGURES}cost"],
    )  # fmt: skip


def _lines(data: ReportData, names: Sequence[str], figure: str) -> list[Series]:
    lines = [_line(data, f"{name}/{figure}", name, place) for place, name in enumerate(names)]
    return [line for line in lines if not line.empty]


def _line(data: ReportData, figure: str, label: str, colour: int) -> Series:
    # With its gaps: where nobody calls there is no share of failures, and a line across would make one up.
    return Series(label, data.steps, data.series(f"{TOOL_FIGURES}{figure}"), colour=colour, smooth=True)


def _rows(data: ReportData, names: Sequence[str]) -> list[ToolRow]:
    run, limits = Rows(data.metrics), Thresholds()
    given_up = abandoned_tools(run, share=limits.tool_use, certain=limits.certain, done=limits.success_done)
    evaluations = data.evaluations.get(data.verdict.split or "", ())
    rows = []
    for name in names:
        key = f"{TOOL_FIGURES}{name}"
        end = {figure: _recent(data, f"{key}/{figure}") for figure in _FIGURES}
        best, rows_of_best = run.best(f"{key}/used"), run.best_rows(f"{key}/used")
        # Early in a run there are not enough steps to tell, and a tool that was never called has no best.
        most = f"{spell(best, 'share')} at step {data.steps[int(rows_of_best[-1])]:,}" if best > 0 else "–"
        held_out = number(evaluations[-1].get(f"tools/{name}/used")) if evaluations else None
        rows.append(
            ToolRow(
                name, spell(end["calls"]), spell(end["used"], "share"), most, spell(end["failures"], "share"),
                spell(end["success_with"], "share"), spell(end["success_without"], "share"), spell(held_out, "share"),
                any(one.name == name for one in given_up),
            )
        )  # fmt: skip
    return rows


def _beyond(data: ReportData) -> str:
    told = []
    for figure, words in _BEYOND.items():
        end = _recent(data, f"{TOOL_FIGURES}{figure}")
        if end:
            told.append(f"{spell(end)} calls {words}")
    return ", ".join(told)


def _recent(data: ReportData, name: str) -> float | None:
    known = [value for value in data.series(name)[-RECENT:] if value is not None]
    return sum(known) / len(known) if known else None
