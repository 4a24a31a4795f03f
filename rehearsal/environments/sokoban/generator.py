"""Random Sokoban levels whose shortest solution is known.

A random room gets random targets; from the solved positions all ways are played backwards, breadth first and in single
moves. The distance at which a position is found is exactly the length of its shortest solution, so a level of a wanted
length is picked rather than searched for.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rehearsal.environments.sokoban.rules import Level, cells_of

MAX_POSITIONS = 20_000
"""Positions after which the backward search of one room ends; lengths found until then are exact all the same."""


def positions_by_length(level: Level, max_length: int, max_positions: int = MAX_POSITIONS) -> list[list[int]]:
    """All positions of a board by the length of their shortest solution in moves.

    Args:
        level: gives walls and targets; its boxes and its player are not looked at.
        max_length: moves up to which to search.
        max_positions: positions after which to stop early.

    Returns:
        A list by length, from 0 on; :func:`placed` puts player and boxes there.
    """
    walls, targets = level.walls, level.targets
    bits = _player_bits(level)
    player_mask = (1 << bits) - 1
    offsets = tuple(level.offsets.values())
    layer = [targets << bits | player for player in cells_of(level.floor & ~targets)]
    seen = set(layer)
    layers = [layer]
    while layer and len(layers) <= max_length and len(seen) < max_positions:
        before: list[int] = []
        for position in layer:
            player, boxes = position & player_mask, position >> bits
            blocked = walls | boxes
            for offset in offsets:
                source = player - offset
                if blocked >> source & 1:
                    continue
                walked = boxes << bits | source
                if walked not in seen:
                    seen.add(walked)
                    before.append(walked)
                box = player + offset
                if boxes >> box & 1:
                    pulled = (boxes ^ (1 << box) ^ (1 << player)) << bits | source
                    if pulled not in seen:
                        seen.add(pulled)
                        before.append(pulled)
        layer = before
        layers.append(layer)
    return layers


def placed(level: Level, position: int) -> Level:
    """The board in one of the positions of :func:`positions_by_length`."""
    bits = _player_bits(level)
    return level.moved(position & ((1 << bits) - 1), position >> bits)


def _player_bits(level: Level) -> int:
    """A position is one number, the boxes above the player's cell: so many bits hold any cell."""
    return (level.width * level.height).bit_length()


def draw_room(rng: np.random.Generator, width: int, height: int, n_boxes: int) -> Level | None:
    """A closed room with inner walls and targets, the boxes on the targets; None where too little floor is left.

    The share of inner walls is drawn for each room between 0 and 0.35; only the largest connected part of the floor is
    kept.
    """
    cells = width * height
    share = 0.35 * rng.random()
    draws = rng.random(cells).tolist()
    floor = 0
    for row in range(1, height - 1):
        for cell in range(row * width + 1, (row + 1) * width - 1):
            if draws[cell] >= share:
                floor |= 1 << cell
    largest, rest = 0, floor
    while rest:
        part, grown = 0, rest & -rest
        while grown != part:
            part = grown
            grown |= (part << 1 | part >> 1 | part << width | part >> width) & floor
        rest &= ~part
        if part.bit_count() > largest.bit_count():
            largest = part
    if largest.bit_count() < n_boxes + 3:
        return None
    open_cells = list(cells_of(largest))
    picked = rng.permutation(len(open_cells))[: n_boxes + 1].tolist()
    targets = sum(1 << open_cells[index] for index in picked[:n_boxes])
    walls = ((1 << cells) - 1) & ~largest
    return Level(width, height, walls, targets, targets, open_cells[picked[n_boxes]])


def draw_level(rng: np.random.Generator, room: Level, min_solution: int, max_solution: int) -> Level | None:
    """A level in a room whose shortest solution has ``min_solution`` to ``max_solution`` moves; None if it has none.

    First a length is drawn, and then a position of that length.
    """
    layers = positions_by_length(room, max_solution)
    lengths = [length for length in range(min_solution, len(layers)) if layers[length]]
    if not lengths:
        return None
    layer = layers[lengths[int(rng.integers(len(lengths)))]]
    position = layer[int(rng.integers(len(layer)))]
    return placed(room, position)


def draw_levels(
    rng: np.random.Generator, width: int, height: int, n_boxes: int, min_solution: int, max_solution: int
) -> Iterator[Level | None]:
    """An endless stream of levels, each in a room of its own; None stands for a room that had none."""
    while True:
        room = draw_room(rng, width, height, n_boxes)
        yield None if room is None else draw_level(rng, room, min_solution, max_solution)
