"""The parts that a report is made of. A part registers itself; the page prints all of them in order.

To add one::

    @section("calibration", "Calibration", order=45)
    def calibration(data: ReportData, templates: jinja2.Environment) -> Markup | None:
        ...  # HTML that refers to nothing outside the page, or None where there is nothing to show
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jinja2
from markupsafe import Markup

from rehearsal.diagnostics import Series, unheard
from rehearsal.reports.charts import (
    chart_groups,
    other_charts,
    signal_groups,
    spread_chart,
    stop_shares,
    success_chart,
)
from rehearsal.reports.data import ReportData, moment
from rehearsal.reports.episodes import CHANGES
from rehearsal.reports.plane import draw_plane, plane_of
from rehearsal.reports.recipe import highlighted
from rehearsal.reports.scales import spell_seconds
from rehearsal.reports.tables import evaluation_rows, metric_rows, stop_rows
from rehearsal.reports.tool_use import tool_use

Render = Callable[[ReportData, jinja2.Environment], Markup | None]


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        key: its HTML id, and the target of its link at the top.
        title: its heading; "" for a part without heading and link.
        order: parts are printed by this number, small ones first.
        render: makes its HTML, or None where there is nothing to show: then the part is left out.
    """

    key: str
    title: str
    order: int
    render: Render


SECTIONS: dict[str, Section] = {}
"""All parts by key."""


def section(key: str, title: str, *, order: int) -> Callable[[Render], Render]:
    """Register a function as a part of the page; a part of the same key is replaced."""

    def register(render: Render) -> Render:
        SECTIONS[key] = Section(key, title, order, render)
        return render

    return register


def _fill(templates: jinja2.Environment, name: str, **values: object) -> Markup:
    return Markup(templates.get_template(name).render(**values))


@section("overview", "", order=0)
def overview(data: ReportData, templates: jinja2.Environment) -> Markup:
    """What was trained on what, the verdict, and the curve of success."""
    facts = {
        "Model": data.model or "not recorded",
        "Environment": data.environment or "not recorded",
        "Steps": f"{data.steps[-1]:,}" if data.steps else "none",
        "Training time": spell_seconds(data.seconds) if data.seconds is not None else "not recorded",
        "Device": data.info.device or "not recorded",
        **data.usage_words,
        "Started": moment(data.info.started) or "not recorded",
        "Version": data.info.version or "not recorded",
    }
    train = [value for value in data.series("train/success") if value is not None]
    return _fill(
        templates,
        "overview.html.jinja",
        data=data,
        facts=facts,
        chart=success_chart(data),
        train=(train[0], train[-1]) if train else None,
    )


@section("signal", "Signal", order=10)
def signal(data: ReportData, templates: jinja2.Environment) -> Markup | None:
    """Whether the learning signal is real: what was found wrong, the plane, the figures behind it, and the groups."""
    groups, spread = signal_groups(data), spread_chart(data)
    if not (groups or not spread.empty or data.findings or data.archive.blocks):
        return None
    unsaid, called = unheard(Series(data.metrics)), {one.rule.name for one in data.findings}
    plane = plane_of(data)
    return _fill(
        templates,
        "signal.html.jinja",
        findings=data.findings,
        steps=len(data.steps),
        unjudged=[rule.title.lower() for rule in unsaid.unmeasured],
        too_early=[rule.title.lower() for rule in unsaid.early if rule.name not in called],
        steered=[rule.title.lower() for rule in unsaid.steered],
        plane=None if plane is None else draw_plane(plane),
        warning="" if plane is None else plane.warning,
        spread=spread,
        groups=groups,
        archive=data.archive,
    )


@section("learning", "Learning curves", order=20)
def learning(data: ReportData, templates: jinja2.Environment) -> Markup | None:
    """All other curves, by the question that they answer."""
    groups, tools = chart_groups(data), tool_use(data)
    elsewhere = [success_chart(data), spread_chart(data), *(tools.charts if tools else ())]
    shown = [chart for group in (*groups, *signal_groups(data)) for chart in group.charts]
    rest = other_charts(data, [*shown, *elsewhere], tools.tabled if tools else ())
    if rest.charts:
        groups.append(rest)
    return _fill(templates, "learning.html.jinja", groups=groups, tools=tools) if groups or tools else None


@section("before-after", "Before and after", order=40)
def before_after(data: ReportData, templates: jinja2.Environment) -> Markup | None:
    """The same held-out tasks at the first and the last evaluation, side by side."""
    if not data.episodes.pairs:
        return None
    return _fill(templates, "before_after.html.jinja", choice=data.episodes, changes=CHANGES)


@section("episodes", "Episodes", order=60)
def episodes(data: ReportData, templates: jinja2.Environment) -> Markup | None:
    """Whole episodes, turn by turn, to browse."""
    if not data.episodes.episodes:
        return None
    return _fill(templates, "episodes.html.jinja", choice=data.episodes)


@section("numbers", "Numbers", order=80)
def numbers(data: ReportData, templates: jinja2.Environment) -> Markup | None:
    """Evaluations, metrics at the start and at the end, stop reasons."""
    evaluations, metrics = evaluation_rows(data), metric_rows(data)
    stops = stop_rows(data, stop_shares(data))
    if not (evaluations or metrics or stops or data.info.summary):
        return None
    return _fill(
        templates,
        "numbers.html.jinja",
        evaluations=evaluations,
        metrics=metrics,
        stops=stops,
        stop_steps=list(data.episodes.stops),
        summary=data.info.summary,
    )


@section("recipe", "Recipe", order=90)
def recipe(data: ReportData, templates: jinja2.Environment) -> Markup | None:
    """What was typed and what it resolved to."""
    if not (data.recipe_text or data.info.command):
        return None
    return _fill(templates, "recipe.html.jinja", info=data.info, recipe=highlighted(data.recipe_text))
