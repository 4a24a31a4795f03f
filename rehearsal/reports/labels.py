"""Finds room for words on a drawing that is full of points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Point = tuple[float, float]
LETTER = 7.4
"""Width of a letter of a word in the widest of the fonts that a browser may take, at 12 units."""
_HEIGHT = 13.0
_BASE = 10.0
_STEPS = 6
_RADII = (12, 18, 26, 36, 48, 62)
_ANGLES = 16


@dataclass(frozen=True)
class Box:
    """A rectangle; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def baseline(self) -> float:
        """Where the letters of a word that fills the box stand."""
        return round(self.top + _BASE, 1)

    def holds(self, point: Point, pad: float = 0.0) -> bool:
        return (
            self.left - pad <= point[0] <= self.right + pad and self.top - pad <= point[1] <= self.bottom + pad
        )  # fmt: skip

    def meets(self, other: Box, pad: float = 3.0) -> bool:
        beside = self.right + pad <= other.left or other.right + pad <= self.left
        return not (beside or self.bottom + pad <= other.top or other.bottom + pad <= self.top)


@dataclass
class Room:
    """What of a drawing is taken.

    Attributes:
        frame: words stay inside of it.
        points: of the path that is drawn; words keep off them, and off the lines between them where they can.
        taken: boxes of the words that are there already.
    """

    frame: Box
    points: Sequence[Point]
    taken: list[Box] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._path = [
            (start[0] + (end[0] - start[0]) * part / _STEPS, start[1] + (end[1] - start[1]) * part / _STEPS)
            for start, end in itertools.pairwise(self.points)
            for part in range(1, _STEPS)
        ]

    def choose(self, candidates: Iterable[Box]) -> Box:
        """The box with the least under it, the first of equals; it is taken from then on."""
        best = min(candidates, key=self._cost)
        self.taken.append(best)
        return best

    def around(self, point: Point, word: str) -> Box:
        """The box with the least under it near a point, the nearest of equals; it is taken from then on."""
        width = len(word) * LETTER
        boxes = []
        for radius in _RADII:
            for turn in range(_ANGLES):
                angle = 2 * math.pi * turn / _ANGLES
                dx, dy = math.cos(angle), math.sin(angle)
                # The near side of the box, and not its middle, is so far away.
                x = point[0] + dx * (radius + width / 2)
                y = point[1] + dy * (radius + _HEIGHT / 2)
                boxes.append(Box(x - width / 2, y - _HEIGHT / 2, x + width / 2, y + _HEIGHT / 2))
        return self.choose(boxes)

    def _cost(self, box: Box) -> float:
        frame = self.frame
        outside = max(frame.left - box.left, box.right - frame.right, frame.top - box.top, box.bottom - frame.bottom)
        over = 1_000 * sum(box.meets(other) for other in self.taken) + (1_000 if outside > 0 else 0)
        return over + 10 * sum(box.holds(point, 4) for point in self.points) + sum(map(box.holds, self._path))


def nearest_edge(box: Box, point: Point) -> Point:
    """The point of a box that lies nearest to another."""
    return min(max(point[0], box.left), box.right), min(max(point[1], box.top), box.bottom)
