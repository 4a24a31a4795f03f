"""The plane of information against entropy, and the path of a run through its four regimes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from markupsafe import Markup, escape

from rehearsal.diagnostics import Thresholds
from rehearsal.reports.data import ReportData
from rehearsal.reports.diagnosis import ceiling_warning
from rehearsal.reports.labels import Box, Room, nearest_edge
from rehearsal.reports.scales import spell, ticks

_PREFIX = "information/first/sequence/"
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 8, 40
_CORNER_LETTER = 6.8
_BESIDE = 15
"""Farther from its point than this a word needs a line to it."""
_HIGHEST = 1.16
"""Upper end of the scale: room above 100% for the names of the regimes."""


@dataclass(frozen=True)
class Plane:
    """What a run's thoughts said, step by step.

    Attributes:
        steps: where it was measured.
        varied: H(Z|X) in nats: how varied thoughts are under one prompt.
        bound: I(X;Z) over its ceiling: how much they depend on the prompt.
        varied_limit: below this thoughts count as few.
        bound_limit: below this they count as not depending on the prompt.
        saturated: in how many of the measurements the estimate reached its ceiling.
        prompts: how many prompts the last measurement compared.
    """

    steps: list[int]
    varied: list[float]
    bound: list[float]
    varied_limit: float
    bound_limit: float
    saturated: int = 0
    prompts: int = 0

    @property
    def warning(self) -> str:
        """A sentence for people who take the ceiling for a good mark; "" where the estimate is below it."""
        return ceiling_warning(self.saturated, len(self.steps), self.prompts)

    def regime(self, place: int) -> str:
        """Which of the four regimes a point lies in, in words."""
        bound, varied = self.bound[place] >= self.bound_limit, self.varied[place] >= self.varied_limit
        return REGIMES[bound, varied]


REGIMES = {
    (True, True): "varied, and about the prompt",
    (True, False): "compressed: few, and about the prompt",
    (False, True): "template: varied, and not about the prompt",
    (False, False): "collapsed: few, and not about the prompt",
}
"""By whether thoughts depend on the prompt, and whether they are varied."""


def plane_of(data: ReportData, thresholds: Thresholds | None = None) -> Plane | None:
    """The plane, or None where information was never measured. The limits are those of the verdict."""
    limits = thresholds or Thresholds()
    rows = zip(
        data.steps, data.series(f"{_PREFIX}conditional_entropy"), data.series(f"{_PREFIX}share"), strict=True
    )  # fmt: skip
    known = [(step, varied, bound) for step, varied, bound in rows if varied is not None and bound is not None]
    if not known:
        return None
    steps, varied, bound = (list(column) for column in zip(*known, strict=True))
    start = sum(varied[:3]) / len(varied[:3])
    prompts = [value for value in data.series("information/first/prompts") if value is not None]
    return Plane(
        steps, varied, bound, limits.varied * start, limits.information_low,
        sum(value == 1.0 for value in data.series(f"{_PREFIX}saturated")), int(prompts[-1]) if prompts else 0,
    )  # fmt: skip


def draw_plane(plane: Plane, width: int = 460, height: int = 330) -> Markup:
    """The plane as one ``<svg>`` element."""
    most = max(*plane.varied, 2.2 * plane.varied_limit, 1e-6) * 1.08
    low = min(0.0, *plane.bound)

    def x(value: float) -> float:
        return round(_LEFT + max(0.0, value) / most * (width - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        return round(height - _BOTTOM - (value - low) / (_HIGHEST - low) * (height - _TOP - _BOTTOM), 1)

    parts = []
    left, right, top, bottom = x(0), x(most), y(_HIGHEST), y(low)
    across, down = x(plane.varied_limit), y(plane.bound_limit)
    parts.append(
        f'<rect class="regime bad" x="{across}" y="{down}" width="{right - across:g}" height="{bottom - down:g}"/>'
        f'<rect class="regime warn" x="{left}" y="{down}" width="{across - left:g}" height="{bottom - down:g}"/>'
    )
    for value in ticks(0, 1, 4):
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y(value)}" y2="{y(value)}"/>')
        text = spell(value, "share")
        parts.append(f'<text class="tick" x="{left - 7}" y="{y(value) + 4}" text-anchor="end">{text}</text>')
    for value in ticks(0, most, 5):
        parts.append(f'<text class="tick" x="{x(value)}" y="{bottom + 16}" text-anchor="middle">{spell(value)}</text>')
    parts.append(f'<line class="limit" x1="{across}" x2="{across}" y1="{top}" y2="{bottom}"/>')
    parts.append(f'<line class="limit" x1="{left}" x2="{right}" y1="{down}" y2="{down}"/>')
    points = list(zip(map(x, plane.varied), map(y, plane.bound), strict=True))
    room = Room(Box(left, top, right, bottom), points)
    parts += _name_regimes(room, (left, across, right), (top, down, bottom))
    if len(points) > 1:
        parts.append('<path class="line c0" d="M' + "L".join(f"{px:g},{py:g}" for px, py in points) + '"/>')
    for place, (px, py) in enumerate(points):
        ends = place in (0, len(points) - 1)
        title = (
            f"step {plane.steps[place]:,}: H(Z|X) {spell(plane.varied[place])} nats, "
            f"I(X;Z) {spell(plane.bound[place], 'share')} of its ceiling; {plane.regime(place)}"
        )
        style = "dot c0 begin" if place == 0 else "dot c0"
        dot = f'class="{style}" cx="{px}" cy="{py}" r="{5.5 if ends else 3}"'
        parts.append(f"<circle {dot}><title>{escape(title)}</title></circle>")
    for point, word in ((points[0], "start"), (points[-1], "end"))[: len(points)]:
        parts.append(_name_point(room, point, word))
    middle = (left + right) / 2
    parts.append(
        f'<text class="tick" x="{middle:g}" y="{height - 6}" text-anchor="middle">'
        "H(Z|X), nats: how varied thoughts are under one prompt</text>"
    )
    label = (
        f"Information against entropy: from step {plane.steps[0]} ({plane.regime(0)}) to step {plane.steps[-1]} "
        f"({plane.regime(len(plane.steps) - 1)})"
    )
    return Markup(
        f'<svg class="plane" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def _name_regimes(room: Room, xs: tuple[float, float, float], ys: tuple[float, float, float]) -> list[str]:
    """The names of the four regimes, each in the corner of its own where the run's path leaves the most room."""
    parts = []
    for text, column, row in (
        ("varied, about the prompt", 1, 0), ("compressed", 0, 0), ("template", 1, 1), ("collapsed", 0, 1),
    ):  # fmt: skip
        width, (left, right) = len(text) * _CORNER_LETTER, (xs[column] + 6, xs[column + 1] - 6)
        high, low = ys[row] + 3, ys[row + 1] - 16
        beside, above = (left, right - width), (high, low)
        # The outer corner first, where one looks for a name.
        outer = [(a, b) for b in (above[row], above[1 - row]) for a in (beside[column], beside[1 - column])]
        box = room.choose(Box(a, b, a + width, b + 13) for a, b in outer)
        end = box.right == right
        side, px = ("end", box.right) if end else ("start", box.left)
        parts.append(f'<text class="corner" x="{px:g}" y="{box.baseline}" text-anchor="{side}">{text}</text>')
    return parts


def _name_point(room: Room, point: tuple[float, float], word: str) -> str:
    """A word beside a point; with a line to it where there is no room at its side."""
    box = room.around(point, word)
    ax, ay = nearest_edge(box, point)
    line = ""
    if math.dist((ax, ay), point) > _BESIDE:
        line = f'<line class="leader" x1="{point[0]:g}" x2="{ax:.1f}" y1="{point[1]:g}" y2="{ay:.1f}"/>'
    middle = (box.left + box.right) / 2
    return f'{line}<text class="mark" x="{middle:.1f}" y="{box.baseline}" text-anchor="middle">{word}</text>'
