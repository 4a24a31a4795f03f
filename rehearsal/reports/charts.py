"""Which plots a report draws, from which metrics, and what each of them tells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rehearsal.diagnostics.tool_use import TOOL_FIGURES
from rehearsal.reports.chart_plans import PLANS, SIGNAL_PLANS, Plan
from rehearsal.reports.data import ReportData
from rehearsal.reports.plots import Chart, Series, Span
from rehearsal.reports.verdict import number


@dataclass(frozen=True)
class ChartGroup:
    """Plots that answer one question."""

    title: str
    charts: Sequence[Chart]


_SIGNAL = ("probe/", "signal/", "information/", "gradient/", "behaviour/", "time/diagnostics")
_TIME_PARTS = {
    "time/generation": "generation",
    "time/learning": "learning",
    "time/diagnostics": "diagnostics",
    "time/other": "other",
}
_SHOWN_ELSEWHERE = {"train/success", "train/episodes"}
_STOPS = "train/stop/"
_LOSSES = "policy/loss/"


def success_chart(data: ReportData) -> Chart:
    """Held-out success with its interval, and success in training behind it."""
    series = [
        Series(
            f"held-out ({split})" if split != "train" else "evaluation (train)",
            [row["step"] for row in rows],
            [number(row.get("success")) for row in rows],
            [number(row.get("success_low")) for row in rows],
            [number(row.get("success_high")) for row in rows],
            colour=place,
            markers=True,
        )
        for place, (split, rows) in enumerate(_by_importance(data))
    ]
    series = [one for one in series if not one.empty]
    if "train/success" in data.metric_names:
        colour = max(1, len(series))
        series.append(Series("training", data.steps, data.series("train/success"), colour=colour, smooth=True))
    note = "Share of episodes solved."
    if any(value is not None for one in series for value in one.low):
        note += " The band is the 95% interval of the held-out evaluation."
    return Chart("Success", note, series, "share", whole=True, spans=finding_spans(data))


def finding_spans(data: ReportData, needs: Sequence[str] = ()) -> list[Span]:
    """Where the diagnostics found something wrong; with ``needs``, only what was read off these metrics."""
    last = data.steps[-1] if data.steps else 0
    return [
        Span(one.began, last if one.ended is None else one.ended, one.rule.title)
        for one in data.findings
        if not needs or one.rule.needs in needs
    ]


def spread_chart(data: ReportData) -> Chart:
    """In-group variances over the steps: the middle one, and bands of the middle half and of the middle four fifths."""
    quantiles = {name: data.series(f"signal/variance_q{name}") for name in (10, 25, 50, 75, 90)}
    series = [
        Series("middle group, half of all", data.steps, quantiles[50], quantiles[25], quantiles[75], colour=0),
        Series("four fifths of all", data.steps, quantiles[50], quantiles[10], quantiles[90], colour=0),
    ]
    return Chart(
        "Variance inside groups",
        "Variance of the rewards of a group: the middle group, and the bands that hold half and four fifths of them. "
        "At zero there is nothing to learn from.",
        series, spans=finding_spans(data, ("signal/dead_groups", "signal/reward_std_in_group")),
    )  # fmt: skip


def signal_groups(data: ReportData) -> list[ChartGroup]:
    """The plots of the page of signal that have values."""
    groups = [ChartGroup(title, [_chart(data, plan) for plan in plans]) for title, plans in SIGNAL_PLANS.items()]
    filled = [ChartGroup(group.title, [chart for chart in group.charts if not chart.empty]) for group in groups]
    return [group for group in filled if group.charts]


def chart_groups(data: ReportData) -> list[ChartGroup]:
    """The plots that have values, by question; metrics that nobody planned for come last."""
    used = {*_SHOWN_ELSEWHERE, *_TIME_PARTS}
    groups = []
    for title, plans in PLANS.items():
        charts = [_chart(data, plan) for plan in plans]
        used |= {name for plan in plans for name in plan.metrics}
        if title == "The policy":
            charts += list(_losses(data))
        if title == "How fast it runs":
            charts.insert(1, _time_shares(data))
        groups.append(ChartGroup(title, [chart for chart in charts if not chart.empty]))
    used |= {name for plans in SIGNAL_PLANS.values() for plan in plans for name in plan.metrics}
    elsewhere = (_STOPS, _LOSSES, TOOL_FIGURES, *_SIGNAL)
    rest = [name for name in data.metric_names if name not in used and not name.startswith(elsewhere)]
    other = [Chart(name, "", [_line(data, name, name, 0)], zero=False) for name in rest]
    return [group for group in (*groups, ChartGroup("Other metrics", other)) if group.charts]


def stop_shares(data: ReportData) -> dict[str, list[float | None]]:
    """Share of training episodes by stop reason, over the steps."""
    return {name.removeprefix(_STOPS): data.series(name) for name in data.metric_names if name.startswith(_STOPS)}


def _by_importance(data: ReportData) -> Iterator[tuple[str, Sequence[Mapping[str, Any]]]]:
    """The judged split first, then the others by name."""
    for split in sorted(data.evaluations, key=lambda split: (split != data.verdict.split, split)):
        yield split, data.evaluations[split]


def _line(data: ReportData, name: str, label: str, colour: int) -> Series:
    return Series(label, data.steps, data.series(name), colour=colour, smooth=True)


def _measured(data: ReportData, name: str, label: str, smooth: bool) -> Series:
    """A metric as a line. One that is measured now and then has no gaps, only fewer points."""
    values = data.series(name)
    known = [(step, value) for step, value in zip(data.steps, values, strict=True) if value is not None]
    if not known or len(known) > len(values) / 2:
        return Series(label, data.steps, values, smooth=smooth)
    return Series(label, [step for step, _ in known], [value for _, value in known])


def _chart(data: ReportData, plan: Plan) -> Chart:
    present = set(data.metric_names)
    series = [_measured(data, name, label, plan.smooth) for name, label in plan.metrics.items() if name in present]
    if plan.evaluated and data.verdict.split:
        rows = data.evaluations[data.verdict.split]
        low, high = f"{plan.evaluated}_low", f"{plan.evaluated}_high"
        evaluated = Series(
            f"held-out ({data.verdict.split})",
            [row["step"] for row in rows],
            [number(row.get(plan.evaluated)) for row in rows],
            [number(row.get(low)) for row in rows],
            [number(row.get(high)) for row in rows],
            markers=True,
        )
        if not evaluated.empty:
            series.insert(0, evaluated)
    coloured = [
        Series(one.name, one.x, one.y, one.low, one.high, _colour(one, place), one.markers, one.smooth)
        for place, one in enumerate(series)
    ]
    return Chart(
        plan.title, plan.note, coloured, plan.unit, plan.zero, spans=finding_spans(data, list(plan.metrics))
    )  # fmt: skip


def _colour(series: Series, place: int) -> int:
    """Held-out values have the same colour in every plot, and training another."""
    if series.markers:
        return 0
    return 1 if series.name == "train" else place


def _losses(data: ReportData) -> Iterator[Chart]:
    for name in data.metric_names:
        if name.startswith(_LOSSES):
            objective = name.removeprefix(_LOSSES)
            note = "What the policy objective minimises. Its height means little." if objective == "policy" else ""
            yield Chart(f"Loss: {objective.replace('_', ' ')}", note, [_line(data, name, "loss", 0)], zero=False)


def _time_shares(data: ReportData) -> Chart:
    present = set(data.metric_names)
    series = [
        Series(label, data.steps, data.series(name), colour=place)
        for place, (name, label) in enumerate(_TIME_PARTS.items())
        if name in present
    ]
    return Chart("Where the time goes", "Share of each step.", series, "share", stacked=True)
