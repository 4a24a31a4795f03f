"""Which plots a report draws, from which metrics, and what each of them tells."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from rehearsal.reports.chart_plans import PLANS, Plan
from rehearsal.reports.data import ReportData
from rehearsal.reports.gradients import gradient_charts, more_gradient_charts
from rehearsal.reports.plots import Chart, Series
from rehearsal.reports.signal_plans import FOLDED, SIGNAL_PLANS
from rehearsal.reports.spans import Span
from rehearsal.reports.verdict import number

Values = Sequence[float | None]


@dataclass(frozen=True)
class ChartGroup:
    """Plots that answer one question.

    Attributes:
        title: the question.
        charts: the plots.
        folded: whether they wait behind a line that opens them.
    """

    title: str
    charts: Sequence[Chart]
    folded: bool = False


_TIME_PARTS = {
    "time/generation": "generation",
    "time/learning": "learning",
    "time/diagnostics": "diagnostics",
    "time/other": "other",
}
_STOPS = "train/stop/"
_LOSSES = "policy/loss/"
_PROBES = "probe/"
_GAPS = re.compile(r"(?P<lead>probe/(?:.+/)?)(?P<kind>[^/]+)/accuracy")
_COLOURS = 5
_GRADIENTS = ("gradient/policy/norm",)
"""Whose verdicts are marked on the plots of gradients."""
_BEFORE_GRADIENTS = "Do thoughts depend on their prompts?"


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
    return Chart(
        "Success", note, series, "share", whole=True, spans=finding_spans(data), metrics=["train/success"]
    )  # fmt: skip


def finding_spans(data: ReportData, needs: Sequence[str] = ()) -> list[Span]:
    """Where the diagnostics found something wrong; with ``needs``, only what was read off these metrics.

    The number of a verdict is its place among all of them, so that it is the same on every plot.
    """
    last = data.steps[-1] if data.steps else 0
    return [
        Span(one.began, last if one.ended is None else one.ended, one.rule.title, place, one.ended is not None)
        for place, one in enumerate(data.findings, start=1)
        if not needs or any(fnmatchcase(name, one.rule.needs) for name in needs)
    ]


def spread_chart(data: ReportData) -> Chart:
    """In-group variances over the steps: the middle one, and bands of the middle half and of the middle four fifths."""
    names = {name: f"signal/variance_q{name}" for name in (10, 25, 50, 75, 90)}
    quantiles = {name: data.series(metric) for name, metric in names.items()}
    middle = quantiles[50]
    series = [
        Series("middle group", data.steps, middle, colour=0),
        Series("mean", data.steps, data.series("signal/variance_mean"), colour=1),
        Series("half of all groups", data.steps, middle, quantiles[25], quantiles[75], colour=0, layers=2),
        Series("four fifths of all", data.steps, middle, quantiles[10], quantiles[90], colour=0, layers=1),
    ]
    return Chart(
        "Variance inside groups",
        "Variance of the rewards of a group: the middle group, and the bands that hold half and four fifths of them. "
        "At zero there is nothing to learn from.",
        series, spans=finding_spans(data, ("signal/dead_groups", "signal/reward_std_in_group")),
        metrics=[*names.values(), "signal/variance_mean"],
    )  # fmt: skip


def signal_groups(data: ReportData) -> list[ChartGroup]:
    """The plots of the page of signal that have values."""
    groups = []
    for title, plans in SIGNAL_PLANS.items():
        groups.append(ChartGroup(title, [_chart(data, plan) for plan in plans], title in FOLDED))
        if title == _BEFORE_GRADIENTS:
            spans = finding_spans(data, _GRADIENTS)
            marked = [chart if chart.places else replace(chart, spans=spans) for chart in gradient_charts(data)]
            groups.append(ChartGroup("Do rewards move the weights, or something else?", marked))
    groups.append(ChartGroup("What gradients have in common", more_gradient_charts(data), folded=True))
    return _filled(groups)


def chart_groups(data: ReportData) -> list[ChartGroup]:
    """The plots of the learning curves that have values, by question."""
    groups = []
    for title, plans in PLANS.items():
        charts = [_chart(data, one) for plan in plans for one in _by_environment(data, plan)]
        if title == "The policy":
            charts += list(_losses(data))
        if title == "How fast it runs":
            charts.insert(1, _time_shares(data))
        groups.append(ChartGroup(title, charts))
        if title == "What it knows of the world":
            groups.append(ChartGroup("Gaps by kind", list(_gaps(data)), folded=True))
    return _filled(groups)


def other_charts(data: ReportData, shown: Iterable[Chart], tabled: Iterable[str] = ()) -> ChartGroup:
    """A plot for every figure that no other plot shows, so that nothing that was recorded is left out.

    Args:
        data: the run.
        shown: all other plots of the page.
        tabled: figures that a table tells in their place.
    """
    used = {name for chart in shown for name in chart.metrics} | set(tabled)
    rest = [name for name in data.metric_names if name not in used and not name.startswith(_STOPS)]
    charts = [
        Chart(name, "", [_measured(data, name, name, True)], zero=False, spans=finding_spans(data, [name]),
              metrics=[name])
        for name in rest
    ]  # fmt: skip
    return ChartGroup("Other metrics", charts, folded=True)


def _filled(groups: Iterable[ChartGroup]) -> list[ChartGroup]:
    filled = [replace(group, charts=[chart for chart in group.charts if not chart.empty]) for group in groups]
    return [group for group in filled if group.charts]


def stop_shares(data: ReportData) -> dict[str, list[float | None]]:
    """Share of training episodes by stop reason, over the steps."""
    return {name.removeprefix(_STOPS): data.series(name) for name in data.metric_names if name.startswith(_STOPS)}


def _by_importance(data: ReportData) -> Iterator[tuple[str, Sequence[Mapping[str, Any]]]]:
    """The judged split first, then the others by name."""
    for split in sorted(data.evaluations, key=lambda split: (split != data.verdict.split, split)):
        yield split, data.evaluations[split]


def _line(data: ReportData, name: str, label: str, colour: int) -> Series:
    return Series(label, data.steps, data.series(name), colour=colour, smooth=True)


def _measured(data: ReportData, name: str, label: str, smooth: bool, low: Values = (), high: Values = ()) -> Series:
    """A metric as a line. One that is measured now and then has no gaps, only fewer points.

    ``low`` and ``high`` are the ends of its interval in each of the run's steps, where there are any.
    """
    values = data.series(name)
    known = [place for place, value in enumerate(values) if value is not None]
    if not known or len(known) > len(values) / 2:
        known = list(range(len(values)))
    else:
        smooth = False
    x, y = [data.steps[place] for place in known], [values[place] for place in known]
    if not any(end is not None for end in low):
        return Series(label, x, y, smooth=smooth)
    return Series(label, x, y, [low[place] for place in known], [high[place] for place in known], smooth=smooth)


def _probed(data: ReportData, name: str, label: str, colour: int, low: str = "", high: str = "") -> Series:
    """A figure of a probe, at the evaluations that it was taken at.

    Steps tell it too, for the rules of the verdict, but the first one as of step 1, and the last one, after which no
    step comes, not at all.
    """

    def over_steps(one: str) -> dict[int, float]:
        told = zip(data.steps, data.series(one), strict=True)
        return data.evaluated(one) or {step: value for step, value in told if value is not None}

    values, lows, highs = over_steps(name), over_steps(low), over_steps(high)
    known = bool(lows)
    return Series(
        label, list(values), list(values.values()), [lows.get(step) for step in values] if known else (),
        [highs.get(step) for step in values] if known else (), colour=colour, markers=True,
    )  # fmt: skip


def _probe_names(data: ReportData) -> list[str]:
    """The figures of probes, in the order of their first appearance."""
    rows = [row for rows in data.evaluations.values() for row in rows]
    told = [name for row in rows for name, value in row.items() if number(value) is not None]
    return [name for name in dict.fromkeys([*data.metric_names, *told]) if name.startswith(_PROBES)]


def _by_environment(data: ReportData, plan: Plan) -> list[Plan]:
    """The plan; of probes, which have figures of their own in each environment of several, one for each."""
    if not all(name.startswith(_PROBES) for name in plan.metrics):
        return [plan]
    ends = [name.removeprefix(_PROBES) for name in plan.metrics]
    leads: dict[str, None] = {}
    for name in _probe_names(data):
        for end in ends:
            if name == f"{_PROBES}{end}" or name.endswith(f"/{end}"):
                leads[name.removesuffix(end)] = None
    return [
        replace(
            plan, title=plan.title + _where(lead),
            metrics={lead + name.removeprefix(_PROBES): label for name, label in plan.metrics.items()},
        )
        for lead in leads
    ]  # fmt: skip


def _where(lead: str) -> str:
    environment = lead.removeprefix(_PROBES).rstrip("/")
    return f" ({environment})" if environment else ""


def _planned(data: ReportData, plan: Plan, name: str) -> Series:
    label = plan.metrics[name]
    if name.startswith(_PROBES):
        return _probed(data, name, label, 0)
    if name not in plan.errors:
        return _measured(data, name, label, plan.smooth)
    pairs = list(zip(data.series(name), data.series(plan.errors[name]), strict=True))
    low, high = (
        [None if value is None or error is None else value + factor * error for value, error in pairs]
        for factor in (-1.96, 1.96)
    )
    return _measured(data, name, label, plan.smooth, low, high)


def _chart(data: ReportData, plan: Plan) -> Chart:
    present = {*data.metric_names, *_probe_names(data)}
    shown = [name for name in plan.metrics if name in present]
    series = [_planned(data, plan, name) for name in shown]
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
    errors = [plan.errors[name] for name in shown if name in plan.errors]
    return Chart(
        plan.title, plan.note, [replace(one, colour=_colour(one, place)) for place, one in enumerate(series)],
        plan.unit, plan.zero, spans=finding_spans(data, [*plan.metrics, *plan.marks]), metrics=[*shown, *errors],
    )  # fmt: skip


def _colour(series: Series, place: int) -> int:
    """Held-out values come first and have the same colour in every plot, and training another."""
    return 1 if series.name == "train" else place


def _losses(data: ReportData) -> Iterator[Chart]:
    for name in data.metric_names:
        if name.startswith(_LOSSES):
            objective = name.removeprefix(_LOSSES)
            note = "What the policy objective minimises. Its height means little." if objective == "policy" else ""
            yield Chart(
                f"Loss: {objective.replace('_', ' ')}", note, [_line(data, name, "loss", 0)], zero=False, metrics=[name]
            )


def _time_shares(data: ReportData) -> Chart:
    present = set(data.metric_names)
    series = [
        Series(label, data.steps, data.series(name), colour=place)
        for place, (name, label) in enumerate(_TIME_PARTS.items())
        if name in present
    ]
    return Chart("Where the time goes", "Share of each step.", series, "share", stacked=True, metrics=list(_TIME_PARTS))


def _gaps(data: ReportData) -> Iterator[Chart]:
    """What was probed of the policy's knowledge of the world, one plot a kind of gap and environment."""
    kinds: dict[str, list[str]] = {}
    for match in filter(None, map(_GAPS.fullmatch, _probe_names(data))):
        kinds.setdefault(match["lead"], []).append(match["kind"])
    for lead, own in kinds.items():
        for kind in own:
            names = {name: f"{lead}{kind}/{name}" for name in ("accuracy", "exact", "chance", "low", "high")}
            lines = [
                _probed(data, names["accuracy"], "best guess", 0, names["low"], names["high"]),
                _probed(data, names["exact"], "word for word", 1),
                _probed(data, names["chance"], "chance", 2),
            ]
            note = "Share of gaps filled right." + (" The band is the 95% interval." if any(lines[0].low) else "")
            yield Chart(f"Gaps: {kind}{_where(lead)}", note, lines, "share", metrics=list(names.values()))
        # Those by which actions are told apart are the same gaps once more, and there are no more colours.
        drawn = [kind for kind in own if kind != "by_forward"][:_COLOURS]
        lines = [_probed(data, f"{lead}{kind}/count", kind, place) for place, kind in enumerate(drawn)]
        counts = [f"{lead}{kind}/count" for kind in own]
        yield Chart(f"Gaps asked{_where(lead)}", "How many there were of each kind.", lines, metrics=counts)
