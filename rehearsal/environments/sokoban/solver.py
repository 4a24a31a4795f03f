"""Shortest solutions of Sokoban levels.

A* over pushes: a state is the set of boxes and the player's cell right after a push, an edge is a walk and one push,
and its cost is the number of moves, walking included. The estimate of what is left is, summed over boxes, the pushes
to the nearest target on an otherwise empty board. It never overestimates and falls by at most one a push, so the first
solution taken from the queue is a shortest one in moves and no state has to be opened twice. Boxes are never pushed
onto cells from which an empty board has no way to a target.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from functools import lru_cache

from rehearsal.environments.sokoban.rules import Level, cells_of, reach, walk

SOLVED = "solved"
UNSOLVABLE = "unsolvable"
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Solution:
    """What a search came to.

    Attributes:
        status: ``SOLVED``, ``UNSOLVABLE`` (proven) or ``UNKNOWN`` (the bound on nodes was reached).
        moves: the actions of a shortest solution in moves, walking and pushing counted alike; empty unless solved.
        nodes: states taken from the queue.
    """

    status: str
    moves: tuple[str, ...]
    nodes: int


@lru_cache(maxsize=256)
def push_distances(width: int, height: int, walls: int, targets: int) -> tuple[int, ...]:
    """For each cell the least pushes that bring a box from there to any target of an otherwise empty board.

    -1 where no box may ever stand, walls included. The player is taken to be wherever a push needs it.
    """
    distance = [-1] * (width * height)
    queue = deque(cells_of(targets))
    for cell in queue:
        distance[cell] = 0
    while queue:
        cell = queue.popleft()
        for offset in (-width, width, -1, 1):
            # Undo a push: the box comes from cell - offset, and the player stood behind it.
            box, player = cell - offset, cell - 2 * offset
            if walls >> box & 1 or player < 0 or player >= width * height or walls >> player & 1:
                continue
            if distance[box] < 0:
                distance[box] = distance[cell] + 1
                queue.append(box)
    return tuple(distance)


def solve(level: Level, max_nodes: int = 50_000) -> Solution:
    """Find a shortest solution in moves.

    Args:
        level: the board.
        max_nodes: states to open before giving up; 50,000 take about two seconds.
    """
    distance = push_distances(level.width, level.height, level.walls, level.targets)
    dead = sum(1 << cell for cell, pushes in enumerate(distance) if pushes < 0)
    if level.boxes & dead:
        return Solution(UNSOLVABLE, (), 0)
    start = (level.boxes, level.player)
    came_from: dict[tuple[int, int], tuple[tuple[int, int], int]] = {}  # state -> (state before, offset of the push)
    cost = {start: 0}
    closed: set[tuple[int, int]] = set()
    queue = [(sum(distance[cell] for cell in cells_of(level.boxes)), 0, level.boxes, level.player)]
    nodes = 0
    while queue:
        estimate, minus_moves, boxes, player = heapq.heappop(queue)
        state = (boxes, player)
        if state in closed:
            continue
        if boxes == level.targets:
            return Solution(SOLVED, _trace(level, came_from, state), nodes)
        if nodes >= max_nodes:
            return Solution(UNKNOWN, (), nodes)
        nodes += 1
        closed.add(state)
        moves, left = -minus_moves, estimate + minus_moves
        blocked = level.walls | boxes
        for offset in level.offsets.values():
            # One shift tests all boxes at once: free of dead cells and boxes ahead, room for the player behind.
            pushable = boxes & _shift(~(blocked | dead), -offset) & _shift(~blocked, offset)
            if not pushable:
                continue
            stands = _shift(pushable, -offset)
            for walked, layer in enumerate(reach(level, player, boxes)):
                for stand in cells_of(layer & stands):
                    box = stand + offset
                    following = (boxes ^ (1 << box) ^ (1 << (box + offset)), box)
                    total = moves + walked + 1
                    if following in closed or cost.get(following, total + 1) <= total:
                        continue
                    cost[following] = total
                    came_from[following] = (state, offset)
                    remaining = left - distance[box] + distance[box + offset]
                    heapq.heappush(queue, (total + remaining, -total, *following))
                stands &= ~layer
                if not stands:
                    break
    return Solution(UNSOLVABLE, (), nodes)


def _shift(mask: int, offset: int) -> int:
    return mask << offset if offset > 0 else mask >> -offset


def _trace(
    level: Level, came_from: dict[tuple[int, int], tuple[tuple[int, int], int]], state: tuple[int, int]
) -> tuple[str, ...]:
    """The actions from the start to ``state``: each push with the walk before it."""
    names = {offset: action for action, offset in level.offsets.items()}
    pieces: list[list[str]] = []
    while state in came_from:
        before, offset = came_from[state]
        boxes, player = before
        pieces.append([*walk(level, player, boxes, state[1] - offset), names[offset]])
        state = before
    return tuple(action for piece in reversed(pieces) for action in piece)
