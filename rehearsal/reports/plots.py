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
from typing import Literal

from markupsafe import Markup, escape

Unit = Literal["share", "number", "tokens", "seconds"]

MAX_POINTS = 300
"""More points than this are put into buckets: they would lie closer than a pixel."""
MIN_SMOOTHED = 24
"""Fewer points than this are not smoothed."""


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
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    colour: int = 0
    markers: bool = False
    smooth: bool = False

    @property
    def empty(self) -> bool:
        return all(value is None for value in self.y)


@dataclass(frozen=True)
class Span:
    """A stretch of steps that is marked behind the lines.

    Attributes:
        begin, end: steps.
        label: said in the plot's description and shown on the mark.
    """

    begin: float
    end: float
    label: str


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
    """

    title: str
    note: str
    series: Sequence[Series]
    unit: Unit = "number"
    zero: bool = True
    whole: bool = False
    stacked: bool = False
    spans: Sequence[Span] = ()

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
    frame = _Frame(width, height, _x_range(series), (0.0, 1.0) if chart.stacked else _y_range(chart, series))
    _mark_spans(frame, chart.spans)
    _axes(frame, chart.unit)
    hover: list[dict[str, object]] = []
    # The first series is the one that matters: it is drawn last, on top of the others.
    for one in reversed(series):
        hover.insert(0, _draw_area(frame, one) if chart.stacked else _draw_line(frame, one, chart.unit))
    label = f"{chart.title}: " + "; ".join(_in_words(one, chart.unit, chart.stacked) for one in series)
    label += "".join(f"; {span.label} from step {span.begin:g}" for span in chart.spans)
    head = (
        f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" tabindex="0" aria-label="{escape(label)}" '
        f'data-hover="{escape(json.dumps(hover, ensure_ascii=False, separators=(",", ":")))}" '
        f'data-frame="{frame.left},{frame.top},{width - frame.right},{height - frame.bottom}">'
    )
    return Markup(head + "".join(frame.parts) + '<line class="cross" y1="0" y2="0" hidden=""/></svg>')


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


def spell(value: float | None, unit: Unit = "number") -> str:
    """A value as people read it: "71%", "4,120", "0.012", "3e-5", "2 h 05 min"."""
    if value is None or not math.isfinite(value):
        return "–"
    if unit == "share":
        percent = 100 * value
        return f"{percent:.0f}%" if abs(percent) >= 10 or percent == round(percent) else f"{percent:.1f}%"
    if unit == "seconds":
        return spell_seconds(value)
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1_000_000:
        return f"{value / 1_000_000:.3g}M"
    if size >= 1_000:
        return f"{value:,.0f}"
    if size >= 0.001:
        text = f"{value:.3g}" if size < 100 else f"{value:.4g}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def spell_seconds(seconds: float) -> str:
    """A duration: "0.8 s", "34 s", "12 min", "2 h 05 min", "3 d 4 h"."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round numbers from ``low`` to ``high``, both ends included where they are round."""
    span = high - low
    raw = span / max(1, count)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    digits = 2 - math.floor(math.log10(step))
    return [round(place * step, digits) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def _x_range(series: Sequence[Series]) -> tuple[float, float]:
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


def _axes(frame: _Frame, unit: Unit) -> None:
    right = frame.width - frame.right
    marks = ticks(*frame.y_range, count=4 if frame.height < 260 else 5)
    for value, text in zip(marks, _spell_ticks(marks, unit), strict=True):
        y = frame.y(value)
        frame.parts.append(f'<line class="grid" x1="{frame.left}" x2="{right}" y1="{y}" y2="{y}"/>')
        frame.parts.append(f'<text class="tick" x="{frame.left - 7}" y="{y + 4}" text-anchor="end">{text}</text>')
    count = max(2, (right - frame.left) // 60)
    for value in ticks(*frame.x_range, count=count):
        if value == round(value):
            x = frame.x(value)
            frame.parts.append(
                f'<text class="tick" x="{x}" y="{frame.height - 6}" text-anchor="middle">{value:,.0f}</text>'
            )


def _mark_spans(frame: _Frame, spans: Sequence[Span]) -> None:
    low, high = frame.x_range
    for span in spans:
        if span.end < low or span.begin > high:
            continue
        left, right = frame.x(max(span.begin, low)), frame.x(min(span.end, high))
        width = max(3.0, right - left)
        left = min(left, frame.width - frame.right - width)
        height = frame.height - frame.top - frame.bottom
        frame.parts.append(
            f'<rect class="span" x="{left:g}" y="{frame.top}" width="{width:g}" height="{height}">'
            f"<title>{escape(span.label)}</title></rect>"
            f'<line class="span-edge" x1="{left:g}" x2="{left:g}" y1="{frame.top}" y2="{frame.top + height}"/>'
        )


def _spell_ticks(marks: Sequence[float], unit: Unit) -> list[str]:
    """Ticks with as many decimals as tell them apart, the same for all of them."""
    if unit in ("number", "tokens") and len(marks) > 1:
        step, largest = marks[1] - marks[0], max(abs(mark) for mark in marks)
        if step >= 0.0005 and largest < 1_000:
            decimals = next(count for count in range(6) if abs(step * 10**count - round(step * 10**count)) < 1e-6)
            return [f"{mark:.{decimals}f}" for mark in marks]
    if unit == "share" and len(marks) > 1 and 100 * (marks[1] - marks[0]) < 0.999:
        decimals = min(4, math.ceil(-math.log10(100 * (marks[1] - marks[0])) - 1e-9))
        return [f"{100 * mark:.{decimals}f}%" for mark in marks]
    return [spell(mark, unit) for mark in marks]


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


def _draw_line(frame: _Frame, series: Series, unit: Unit) -> dict[str, object]:
    smooth = series.smooth and len(series.x) >= MIN_SMOOTHED
    mean = running_mean(series.y, window_of(len(series.x))) if smooth else []
    if series.low and series.high:
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
    for run in _runs(series, series.y):
        points = [(x, y) for _, x, y in run]
        style, radius = "faint" if smooth else "line", 4 if series.markers else 2
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


def _in_words(series: Series, unit: Unit, stacked: bool) -> str:
    known = [(x, y) for x, y in zip(series.x, series.y, strict=True) if y is not None]
    shown: Unit = "share" if stacked else unit
    (first_x, first), (last_x, last) = known[0], known[-1]
    if len(known) == 1:
        return f"{series.name} {spell(first, shown)} at step {first_x:g}"
    return f"{series.name} from {spell(first, shown)} at step {first_x:g} to {spell(last, shown)} at step {last_x:g}"
