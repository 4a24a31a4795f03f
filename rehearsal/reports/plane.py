"""The plane of information against entropy, and the path of a run through its four regimes."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup, escape

from rehearsal.diagnostics import Thresholds
from rehearsal.reports.data import ReportData
from rehearsal.reports.plots import spell, ticks

_PREFIX = "information/first/sequence/"
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 8, 40
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
        if self.saturated < len(self.steps) / 2:
            return ""
        return (
            f"In {self.saturated} of {len(self.steps)} measurements the estimate is at its ceiling: with "
            f"{self.prompts} prompts it says that thoughts tell them apart, and no more. More prompts "
            "(diagnostics.prompts, or a larger diagnostics.max_share) raise the ceiling."
        )

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
    for text, px, py, anchor in (
        ("varied, about the prompt", right - 6, top + 12, "end"),
        ("compressed", left + 6, top + 12, "start"),
        ("template", right - 6, bottom - 7, "end"),
        ("collapsed", left + 6, bottom - 7, "start"),
    ):
        parts.append(f'<text class="corner" x="{px}" y="{py}" text-anchor="{anchor}">{text}</text>')
    points = list(zip(map(x, plane.varied), map(y, plane.bound), strict=True))
    if len(points) > 1:
        parts.append('<path class="line c0" d="M' + "L".join(f"{px:g},{py:g}" for px, py in points) + '"/>')
    for place, (px, py) in enumerate(points):
        ends = place in (0, len(points) - 1)
        title = (
            f"step {plane.steps[place]:,}: H(Z|X) {spell(plane.varied[place])} nats, "
            f"I(X;Z) {spell(plane.bound[place], 'share')} of its ceiling; {plane.regime(place)}"
        )
        dot = f'class="dot c0" cx="{px}" cy="{py}" r="{5.5 if ends else 3}"'
        parts.append(f"<circle {dot}><title>{escape(title)}</title></circle>")
    for place, word in ((0, "start"), (len(points) - 1, "end")):
        px, py = points[place]
        side = "end" if px > right - 60 else "start"
        shift = -10 if side == "end" else 10
        above = 18 if place == 0 else 32 if abs(px - points[0][0]) < 60 else 18
        if len(points) > 1 or place == 0:
            parts.append(f'<text class="mark" x="{px + shift}" y="{py + above}" text-anchor="{side}">{word}</text>')
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
