"""Stretches of steps that are marked on a plot: a light ground, numbered edges, and names above that keep apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import escape

LANE = 17
"""Height of a row of names, in units of the drawing."""
_BADGE = 7.5
_GAP = 6
_LETTER = 7.1
"""Width of a letter of a name in the widest of the fonts that a browser may take, so that names never touch."""
_MARGIN = 10
"""How far a name may reach past the right end of the scale."""
_NARROWEST = 3.0


@dataclass(frozen=True)
class Span:
    """A stretch of steps that is marked behind the lines.

    Attributes:
        begin, end: steps.
        label: its name.
        number: what it is called by wherever there is no room for the name; the same all over a page.
        over: whether it ended by itself, and not with the run.
    """

    begin: float
    end: float
    label: str
    number: int = 1
    over: bool = False


@dataclass(frozen=True)
class Mark:
    """Where a span lies on the drawing, in its units.

    Attributes:
        span: which.
        lane: row of its name, from 0 at the top.
        left, right: ends of the stretch.
        badge: middle of the number.
        text: where the name begins, or ends if ``before``; None where there is no room for names.
        before: whether the name stands before its number.
    """

    span: Span
    lane: int
    left: float
    right: float
    badge: float
    text: float | None
    before: bool = False

    @property
    def reach(self) -> tuple[float, float]:
        """What it takes of its row, from left to right."""
        low, high = self.badge - _BADGE, self.badge + _BADGE
        if self.text is None:
            return low, high
        width = name_width(self.span.label)
        low, high = (min(low, self.text - width), high) if self.before else (low, max(high, self.text + width))
        return min(low, self.left), max(high, self.right)


def name_width(text: str) -> float:
    """Room that a name needs."""
    return len(text) * _LETTER


def lay_out(spans: Sequence[Span], place: Callable[[float], float], ends: tuple[float, float], most: int) -> list[Mark]:
    """Give every span that lies on the scale a row in which its name and its bar touch no other.

    Args:
        spans: in any order.
        place: from a step to the drawing.
        ends: first and last step of the scale.
        most: rows of names there is room for; where they would be more, numbers stand alone.
    """
    low, high = ends
    shown = sorted(
        (one for one in spans if one.end >= low and one.begin <= high), key=lambda one: (one.begin, one.number)
    )
    marks = []
    for named in (True, False):
        marks = _rows([_mark(one, place, ends, named) for one in shown])
        if not marks or max(mark.lane for mark in marks) < most:
            break
    return marks


def _mark(span: Span, place: Callable[[float], float], ends: tuple[float, float], named: bool) -> Mark:
    least, most = place(ends[0]), place(ends[1])
    right = place(min(span.end, ends[1]))
    left = min(place(max(span.begin, ends[0])), most - _NARROWEST)
    right = max(right, left + _NARROWEST)
    if not named:
        return Mark(span, 0, left, right, left, None)
    width, beside = name_width(span.label), _BADGE + 4
    if left + beside + width <= most + _MARGIN:
        return Mark(span, 0, left, right, left, left + beside)
    if left - beside - width >= least:
        return Mark(span, 0, left, right, left, left - beside, before=True)
    # Too long for either side of its edge: it ends where the scale ends, and the bar below it shows where it belongs.
    badge = most + _MARGIN - width - beside
    return Mark(span, 0, left, right, badge, badge + beside)


def _rows(marks: Sequence[Mark]) -> list[Mark]:
    filled: list[list[tuple[float, float]]] = []
    placed = []
    for mark in marks:
        low, high = mark.reach
        lane = next(
            (
                number
                for number, taken in enumerate(filled)
                if all(high + _GAP <= begin or end + _GAP <= low for begin, end in taken)
            ),
            len(filled),
        )
        if lane == len(filled):
            filled.append([])
        filled[lane].append((low, high))
        placed.append(Mark(mark.span, lane, mark.left, mark.right, mark.badge, mark.text, mark.before))
    return placed


def ground(marks: Sequence[Mark]) -> list[tuple[float, float]]:
    """The stretches that any of the spans covers, joined: where several overlap the ground is no darker."""
    joined: list[tuple[float, float]] = []
    for left, right in sorted((mark.left, mark.right) for mark in marks):
        if joined and left <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], right))
        else:
            joined.append((left, right))
    return joined


def draw_ground(marks: Sequence[Mark], top: float, bottom: float) -> str:
    """The ground and the edges, which lie behind the lines of the plot."""
    parts = [
        f'<rect class="span" x="{left:g}" y="{top:g}" width="{right - left:g}" height="{bottom - top:g}"/>'
        for left, right in ground(marks)
    ]
    edges: dict[float, float] = {}  # dashes that lie over each other make a solid line
    for mark in marks:
        above = _base(mark) if mark.badge != mark.left else _base(mark) - LANE / 2
        edges[mark.left] = min(above, edges.get(mark.left, above))
    parts += [_line("span-edge", x, x, above, bottom) for x, above in edges.items()]
    for mark in marks:
        if mark.span.over:
            parts.append(_line("span-edge span-end", mark.right, mark.right, top, bottom))
    return "".join(parts)


def draw_names(marks: Sequence[Mark]) -> str:
    """Numbers, names and bars, in rows from the top of the drawing."""
    parts = []
    for mark in marks:
        base, span = _base(mark), mark.span
        if mark.text is not None:
            parts.append(_line("span-bar", mark.left, mark.right, base, base))
    for mark in marks:
        base, span = _base(mark), mark.span
        title = f"<title>{escape(span.number)} {escape(span.label)}</title>"
        parts.append(
            f'<g class="span-mark">{title}<circle cx="{mark.badge:g}" cy="{base - 8:g}" r="{_BADGE}"/>'
            f'<text class="span-number" x="{mark.badge:g}" y="{base - 4.6:g}" text-anchor="middle">{span.number}</text>'
        )
        if mark.text is not None:
            side = "end" if mark.before else "start"
            name = escape(span.label)
            width = name_width(span.label)
            begin = mark.text - width if mark.before else mark.text
            parts.append(  # edges of other spans pass behind the name
                f'<rect class="span-back" x="{begin:.1f}" y="{base - 15:g}" width="{width:.1f}" height="13"/>'
                f'<text class="span-name" x="{mark.text:g}" y="{base - 4:g}" text-anchor="{side}">{name}</text>'
            )
        parts.append("</g>")
    return "".join(parts)


def height_of(marks: Sequence[Mark]) -> int:
    """Room that the names need above the plot."""
    return LANE * (1 + max(mark.lane for mark in marks)) + 3 if marks else 0


def _base(mark: Mark) -> float:
    return LANE * (mark.lane + 1)


def _line(style: str, x1: float, x2: float, y1: float, y2: float) -> str:
    return f'<line class="{style}" x1="{x1:g}" x2="{x2:g}" y1="{y1:g}" y2="{y2:g}"/>'
