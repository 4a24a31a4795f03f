"""Line plots and stacked areas as plain SVG text: small, sharp at any size, coloured by the page's own style sheet.

A plot carries its values in a ``data-hover`` attribute; the page's script shows them under the pointer. Without the
script it is still a whole picture.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

from rehearsal.reports.scales import Unit, spell, spell_ticks, ticks
from rehearsal.reports.spans import Mark, Span, draw_ground, draw_names, height_of, lay_out

MAX_POINTS = 300
"""More points than this are put into buckets: they would lie closer than a pixel."""
MIN_SMOOTHED = 24
"""Fewer points than this are not smoothed."""
_LARGE = 260
"""A plot of this height has room for twice as many rows of names."""
_ROWS_OF_NAMES = 5
_ROW = 15
"""Height of a row of words under the plot."""


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: for the legend.
        x: steps, ascending.
        y: values; None leaves a gap.
        low: lower ends of the intervals, drawn as a band; None where there is none.
        high: upper ends.
        colour: 0 to 4; each also has a dash pattern of its own, so that a print in grey can be read.
        markers: whether each point gets a dot (few points, each measured by itself).
        smooth: whether a running mean is drawn over the values, which are then faint.
        layers: 0 for a line. More for a band without a line, from ``low`` to ``high``: how many bands, this one with
            them, lie over each other there, so that the legend shows how dark it is.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    colour: int = 0
    markers: bool = False
    smooth: bool = False
    layers: int = 0

    @property
    def empty(self) -> bool:
        return all(value is None for value in self.y)


@dataclass(frozen=True)
class Chart:
    """A plot with its title and a sentence about how to read it.

    Attributes:
        title: short.
        note: what it means and what to look for.
        series: what is drawn.
        unit: how values are written.
        zero: whether the axis begins at zero; a "share" goes from 0 to 1 where ``whole`` says so.
        whole: whether the axis of a share ends at 100%.
        stacked: whether the series are areas that add up to a whole.
        spans: what is marked behind the lines.
        places: names of the places 1, 2, ... of the scale, where it is not made of training steps.
        below: a second row of names under them.
        across: what the scale is, where it is not made of training steps.
        metrics: names of the recorded figures that it shows.
    """

    title: str
    note: str
    series: Sequence[Series]
    unit: Unit = "number"
    zero: bool = True
    whole: bool = False
    stacked: bool = False
    spans: Sequence[Span] = ()
    places: Sequence[str] = ()
    below: Sequence[str] = ()
    across: str = ""
    metrics: Sequence[str] = ()

    @property
    def empty(self) -> bool:
        if self.stacked:  # zeros have no shares
            return not any(value for series in self.series for value in series.y)
        return all(series.empty for series in self.series)


@dataclass
class _Frame:
    """Where values lie on the drawing, in its own units."""

    width: int
    height: int
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    left: int = 46
    right: int = 14
    top: int = 10
    bottom: int = 24
    parts: list[str] = field(default_factory=list)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return round(self.left + (value - low) / (high - low) * (self.width - self.left - self.right), 1)

    def y(self, value: float) -> float:
        low, high = self.y_range
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return round(self.height - self.bottom - share * (self.height - self.top - self.bottom), 1)


def draw(chart: Chart, width: int = 400, height: int = 190) -> Markup:
    """The chart as one ``<svg>`` element; "" if it has no values."""
    if chart.empty:
        return Markup("")
    series = [bucketed(one) for one in chart.series if not one.empty]
    if chart.stacked:
        series = _stack(series)
    frame = _Frame(width, height, _x_range(chart, series), (0.0, 1.0) if chart.stacked else _y_range(chart, series))
    marks = lay_out(chart.spans, frame.x, frame.x_range, most=_ROWS_OF_NAMES if height < _LARGE else 2 * _ROWS_OF_NAMES)
    above, under = height_of(marks), _ROW * (bool(chart.below) + bool(chart.across))
    height += above + under  # the plot keeps its size, the drawing grows
    frame.top, frame.bottom, frame.height = frame.top + above, frame.bottom + under, height
    frame.parts.append(draw_ground(marks, frame.top, frame.height - frame.bottom))
    _axes(frame, chart)
    hover: list[dict[str, object]] = []
    # The first series is the one that matters: it is drawn last, on top of the others.
    for one in reversed(series):
        hover.insert(0, _draw_area(frame, one) if chart.stacked else _draw_line(frame, one, chart.unit))
    label = f"{chart.title}: " + "; ".join(_in_words(chart, one) for one in series)
    label += "".join(_span_in_words(mark) for mark in marks)
    frame.parts.append(draw_names(marks))
    head = (
        f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" tabindex="0" aria-label="{escape(label)}" '
        f'data-hover="{escape(json.dumps(hover, ensure_ascii=False, separators=(",", ":")))}" '
        f'data-frame="{frame.left},{frame.top},{width - frame.right},{height - frame.bottom}"'
        f"{_told('places', list(chart.places))}{_told('spans', [_span_told(mark) for mark in marks])}>"
    )
    return Markup(head + "".join(frame.parts) + '<line class="cross" y1="0" y2="0" hidden=""/></svg>')


def _told(name: str, values: list[Any]) -> str:
    """A list as an attribute for the page's script; nothing where it is empty."""
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    return f' data-{name}="{escape(text)}"' if values else ""


def _span_told(mark: Mark) -> list[float | str]:
    return [mark.left, mark.right, f"{mark.span.number} {mark.span.label}"]


def _span_in_words(mark: Mark) -> str:
    span = mark.span
    ended = f" to step {span.end:g}" if span.over else ""
    return f"; {span.number} {span.label} from step {span.begin:g}{ended}"


def bucketed(series: Series) -> Series:
    """The series with at most :data:`MAX_POINTS` points, each the mean of its neighbours (the union of intervals)."""
    count = len(series.x)
    if count <= MAX_POINTS:
        return series
    bounds = [round(place * count / MAX_POINTS) for place in range(MAX_POINTS + 1)]
    parts = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]

    def means(values: Sequence[float | None]) -> list[float | None]:
        kept = [[value for value in values[part] if value is not None] for part in parts]
        return [sum(some) / len(some) if some else None for some in kept]

    return Series(
        series.name,
        [series.x[part.stop - 1] for part in parts],
        means(series.y),
        means(series.low) if series.low else (),
        means(series.high) if series.high else (),
        series.colour,
        series.markers,
        series.smooth,
        series.layers,
    )


def running_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """The mean of the ``window`` values around each place, fewer at the ends; None where all of them are missing.

    It is centred: a mean of past values alone would show every change later than it happened.
    """
    reach = window // 2
    means: list[float | None] = []
    for place in range(len(values)):
        some = [value for value in values[max(0, place - reach) : place + reach + 1] if value is not None]
        means.append(sum(some) / len(some) if some else None)
    return means


def window_of(count: int) -> int:
    """How many values a running mean takes: a twelfth of all, at least 3."""
    return max(3, count // 12)


def _x_range(chart: Chart, series: Sequence[Series]) -> tuple[float, float]:
    if chart.places:
        return 0.5, len(chart.places) + 0.5
    values = [x for one in series for x in one.x]
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 1, high + 1)


def _y_range(chart: Chart, series: Sequence[Series]) -> tuple[float, float]:
    if chart.unit == "share" and chart.whole:
        return 0.0, 1.0
    values = [y for one in series for part in (one.y, one.low, one.high) for y in part if y is not None]
    low, high = min(values), max(values)
    if chart.zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-9 * max(abs(high), abs(low)) or high - low < 1e-30:
        pad = abs(high) / 2 if abs(high) > 1e-20 else 1.0
        low, high = (low, high + pad) if chart.zero and low >= 0 else (low - pad, high + pad)
    marks = ticks(low, high)
    step = marks[1] - marks[0] if len(marks) > 1 else high - low
    # Whole steps of the scale, so that the topmost line of the grid is labelled.
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def _axes(frame: _Frame, chart: Chart) -> None:
    right = frame.width - frame.right
    marks = ticks(*frame.y_range, count=4 if frame.height - frame.top < 250 else 5)
    for value, text in zip(marks, spell_ticks(marks, chart.unit), strict=True):
        y = frame.y(value)
        frame.parts.append(f'<line class="grid" x1="{frame.left}" x2="{right}" y1="{y}" y2="{y}"/>')
        frame.parts.append(f'<text class="tick" x="{frame.left - 7}" y="{y + 4}" text-anchor="end">{text}</text>')
    count = max(2, (right - frame.left) // 60)
    steps = {value: f"{value:,.0f}" for value in ticks(*frame.x_range, count=count) if value == round(value)}
    rows = [dict(enumerate(chart.places, start=1)) if chart.places else steps, dict(enumerate(chart.below, start=1))]
    base = frame.height - frame.bottom + 18
    for number, row in enumerate(rows):
        frame.parts += [_tick(frame.x(value), base + _ROW * number, text) for value, text in row.items()]
    if chart.across:
        frame.parts.append(_tick((frame.left + right) / 2, frame.height - 4, chart.across))


def _tick(x: float, y: float, text: str) -> str:
    return f'<text class="tick" x="{x:g}" y="{y:g}" text-anchor="middle">{escape(text)}</text>'


def _runs(series: Series, values: Sequence[float | None]) -> Iterator[list[tuple[int, float, float]]]:
    """Stretches without a gap, as (place, x, value)."""
    run: list[tuple[int, float, float]] = []
    for place, (x, value) in enumerate(zip(series.x, values, strict=True)):
        if value is None:
            if run:
                yield run
            run = []
        else:
            run.append((place, x, value))
    if run:
        yield run


def _path(frame: _Frame, points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{frame.x(x):g},{frame.y(y):g}" for x, y in points)


def _draw_band(frame: _Frame, series: Series) -> None:
    ends = zip(series.low, series.high, strict=True)
    known = [None if low is None or high is None else 1.0 for low, high in ends]
    for run in _runs(series, known):
        upper = [(x, series.high[place] or 0.0) for place, x, _ in run]
        lower = [(x, series.low[place] or 0.0) for place, x, _ in reversed(run)]
        frame.parts.append(f'<path class="band c{series.colour}" d="{_path(frame, upper + lower)}Z"/>')
        if len(run) == 1:
            x = frame.x(run[0][1])
            span = f'y1="{frame.y(lower[0][1])}" y2="{frame.y(upper[0][1])}"'
            frame.parts.append(f'<line class="whisker c{series.colour}" x1="{x}" x2="{x}" {span}/>')


def _draw_line(frame: _Frame, series: Series, unit: Unit) -> dict[str, object]:
    if series.low and series.high:
        _draw_band(frame, series)
    if series.layers:
        rows = zip(series.x, series.low, series.high, strict=True)
        ends = [
            [frame.x(x), None, x, f"{spell(low, unit)}–{spell(high, unit)}"]
            for x, low, high in rows
            if low is not None and high is not None
        ]
        return {"n": series.name, "c": series.colour, "p": ends}
    smooth = series.smooth and len(series.x) >= MIN_SMOOTHED
    mean = running_mean(series.y, window_of(len(series.x))) if smooth else []
    for run in _runs(series, series.y):
        points = [(x, y) for _, x, y in run]
        style, radius = "faint" if smooth else "line", 4 if series.markers else 3
        if len(points) > 1:
            frame.parts.append(f'<path class="{style} c{series.colour}" d="{_path(frame, points)}"/>')
        if series.markers or len(points) == 1:
            frame.parts.extend(
                f'<circle class="dot c{series.colour}" cx="{frame.x(x)}" cy="{frame.y(y)}" r="{radius}"/>'
                for x, y in points
            )
    for run in _runs(series, mean) if smooth else ():
        frame.parts.append(f'<path class="line c{series.colour}" d="{_path(frame, [(x, y) for _, x, y in run])}"/>')
    points_told = []
    for run in _runs(series, series.y):
        for place, x, y in run:
            text = spell(y, unit)
            if series.low and series.high and series.low[place] is not None and series.high[place] is not None:
                text += f" ({spell(series.low[place], unit)}–{spell(series.high[place], unit)})"
            if smooth:
                text += f", mean {spell(mean[place], unit)}"
            points_told.append([frame.x(x), frame.y(y), x, text])
    return {"n": series.name, "c": series.colour, "p": points_told}


def _stack(series: Sequence[Series]) -> list[Series]:
    """Each series as a share of the sum, with ``low`` and ``high`` the edges of its area."""
    count = len(series[0].x)
    totals = [sum(one.y[place] or 0.0 for one in series) for place in range(count)]
    below = [0.0] * count
    stacked = []
    for one in series:
        shares = [(one.y[place] or 0.0) / totals[place] if totals[place] > 0 else None for place in range(count)]
        above = [base + (share or 0.0) for base, share in zip(below, shares, strict=True)]
        stacked.append(Series(one.name, one.x, shares, below, above, one.colour))
        below = above
    return stacked


def _draw_area(frame: _Frame, series: Series) -> dict[str, object]:
    told = []
    for run in _runs(series, series.y):
        upper = [(x, series.high[place] or 0.0) for place, x, _ in run]
        lower = [(x, series.low[place] or 0.0) for place, x, _ in reversed(run)]
        frame.parts.append(f'<path class="area c{series.colour}" d="{_path(frame, upper + lower)}Z"/>')
        told += [[frame.x(x), frame.y(series.high[place] or 0.0), x, spell(share, "share")] for place, x, share in run]
    return {"n": series.name, "c": series.colour, "p": told}


def _in_words(chart: Chart, series: Series) -> str:
    unit: Unit = "share" if chart.stacked else chart.unit
    known = [place for place, value in enumerate(series.y) if value is not None]

    def value(place: int) -> str:
        if series.layers:
            return f"{spell(series.low[place], unit)}–{spell(series.high[place], unit)}"
        return spell(series.y[place], unit)

    def where(place: int) -> str:
        x = series.x[place]
        return chart.places[int(x) - 1] if chart.places else f"step {x:g}"

    first, last = known[0], known[-1]
    if first == last:
        return f"{series.name} {value(first)} at {where(first)}"
    return f"{series.name} from {value(first)} at {where(first)} to {value(last)} at {where(last)}"
