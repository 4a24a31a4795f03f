"""The rules of Sokoban, for boards of any size with any number of boxes.

Cells are numbered by rows, ``cell = row * width + column``, and sets of cells are whole numbers with one bit a cell:
floods and comparisons of whole boards are then a handful of integer operations. Every level is closed in by walls, so
a step from a cell that the player can reach never wraps around the edge of the board.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from rehearsal.environments.episode import Position

ACTIONS = ("Up", "Down", "Left", "Right")


def cells_of(mask: int) -> Iterator[int]:
    """The cells of a set, in reading order."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


@dataclass(frozen=True)
class Level:
    """A board and where everything stands on it.

    Attributes:
        width: columns.
        height: rows.
        walls: set of cells.
        targets: set of cells, as many as boxes.
        boxes: set of cells.
        player: cell.
    """

    width: int
    height: int
    walls: int
    targets: int
    boxes: int
    player: int

    @cached_property
    def offsets(self) -> dict[str, int]:
        """How far each action moves, in cells."""
        return {"Up": -self.width, "Down": self.width, "Left": -1, "Right": 1}

    @property
    def solved(self) -> bool:
        return self.boxes == self.targets

    @property
    def floor(self) -> int:
        """All cells that are not walls."""
        return ((1 << self.width * self.height) - 1) & ~self.walls

    @property
    def content(self) -> str:
        """Canonical text: XSokoban symbols, rows joined by slashes."""
        return "/".join(self.rows("#", " ", ".", "$", "*", "@", "+"))

    @property
    def layout(self) -> str:
        """What every position of the level shares: walls and targets, in the symbols of ``content``."""
        return self.moved(-1, 0).content

    def rows(self, wall: str, floor: str, target: str, box: str, stored: str, player: str, ready: str) -> list[str]:
        """The board as text, one string a row.

        Args:
            wall: the symbol of a wall.
            floor: of empty floor.
            target: of an empty target.
            box: of a box beside the targets.
            stored: of a box on a target.
            player: of the player beside the targets.
            ready: of the player on a target.
        """
        lines = []
        for row in range(self.height):
            line = []
            for cell in range(row * self.width, (row + 1) * self.width):
                bit = 1 << cell
                on_target = bool(self.targets & bit)
                if self.walls & bit:
                    line.append(wall)
                elif cell == self.player:
                    line.append(ready if on_target else player)
                elif self.boxes & bit:
                    line.append(stored if on_target else box)
                else:
                    line.append(target if on_target else floor)
            lines.append("".join(line))
        return lines

    def at(self, cell: int) -> Position:
        """Row and column of a cell."""
        return divmod(cell, self.width)

    def moved(self, player: int, boxes: int) -> Level:
        """The same board with player and boxes elsewhere."""
        return Level(self.width, self.height, self.walls, self.targets, boxes, player)


def step(level: Level, player: int, boxes: int, offset: int) -> tuple[int, int]:
    """Player and boxes after a move by ``offset`` cells; both unchanged where a wall or a second box is in the way."""
    to = player + offset
    bit = 1 << to
    if level.walls & bit:
        return player, boxes
    if boxes & bit:
        beyond = 1 << (to + offset)
        if (level.walls | boxes) & beyond:
            return player, boxes
        return to, boxes ^ bit ^ beyond
    return to, boxes


def reach(level: Level, player: int, boxes: int) -> Iterator[int]:
    """The cells that the player gets to without pushing, by distance: the sets at 0, 1, 2, ... moves."""
    free = level.floor & ~boxes
    width = level.width
    layer = 1 << player
    while layer:
        yield layer
        free &= ~layer
        layer = (layer << 1 | layer >> 1 | layer << width | layer >> width) & free


def walk(level: Level, player: int, boxes: int, to: int) -> list[str]:
    """The actions of a shortest walk to a cell that the player can reach without pushing."""
    layers = []
    for layer in reach(level, player, boxes):
        layers.append(layer)
        if layer >> to & 1:
            break
    actions: list[str] = []
    cell = to
    for layer in reversed(layers[:-1]):
        for action, offset in level.offsets.items():
            if layer >> (cell - offset) & 1:
                actions.append(action)
                cell -= offset
                break
    return actions[::-1]
