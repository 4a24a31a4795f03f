"""Frozen lake: walk over ice from a random start to a random goal without falling into a hole."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv

from rehearsal.environments.episode import Position, SpatialEnv, real_number, spell_positions, whole_number
from rehearsal.environments.splits import draw_in_split

ACTIONS = ("Left", "Down", "Right", "Up")
"""In Gymnasium's order: the index of a name is the number that Gymnasium's environment takes."""

_TIE = 1e-9
"""Values closer than this count as equal, so that rounding does not choose between two plans."""


@dataclass(frozen=True)
class Lake:
    """A level. Cells are numbered by rows: ``cell = row * size + column``.

    Attributes:
        size: rows and columns.
        tiles: one letter a cell as Gymnasium spells it: S start, G goal, F frozen, H hole.
        distance: moves from each cell to the goal over frozen cells alone, -1 where there is no way.
    """

    size: int
    tiles: str
    distance: tuple[int, ...]

    @property
    def start(self) -> int:
        return self.tiles.index("S")

    @property
    def goal(self) -> int:
        return self.tiles.index("G")

    @property
    def holes(self) -> list[int]:
        return [cell for cell, tile in enumerate(self.tiles) if tile == "H"]

    @cached_property
    def rows(self) -> list[str]:
        return [self.tiles[row * self.size : (row + 1) * self.size] for row in range(self.size)]

    @property
    def content(self) -> str:
        return "/".join(self.rows)

    @property
    def layout(self) -> str:
        """What every screen of the level shows, wherever the player stands: holes and goal."""
        return self.content.replace("S", "F")


def _distances(size: int, tiles: str) -> tuple[int, ...]:
    """Breadth-first search from the goal; see :attr:`Lake.distance`."""
    distance = [-1] * len(tiles)
    goal = tiles.index("G")
    distance[goal] = 0
    queue = deque([goal])
    while queue:
        cell = queue.popleft()
        row, column = divmod(cell, size)
        around = []
        if row > 0:
            around.append(cell - size)
        if row < size - 1:
            around.append(cell + size)
        if column > 0:
            around.append(cell - 1)
        if column < size - 1:
            around.append(cell + 1)
        for neighbour in around:
            if distance[neighbour] < 0 and tiles[neighbour] != "H":
                distance[neighbour] = distance[cell] + 1
                queue.append(neighbour)
    return tuple(distance)


def draw_lake(rng: np.random.Generator, size: int, frozen: float, max_distance: int) -> Lake | None:
    """Draw a lake, or None where the draw has no safe way of at most ``max_distance`` moves from start to goal.

    Args:
        rng: the source of chance.
        size: rows and columns.
        frozen: probability that a cell other than start and goal is frozen.
        max_distance: moves.
    """
    cells = size * size
    tiles = ["F" if draw < frozen else "H" for draw in rng.random(cells).tolist()]
    start = int(rng.integers(cells))
    goal = int(rng.integers(cells - 1))
    goal += goal >= start
    tiles[start] = "S"
    tiles[goal] = "G"
    text = "".join(tiles)
    lake = Lake(size, text, _distances(size, text))
    return lake if 0 < lake.distance[start] <= max_distance else None


class FrozenLake(SpatialEnv):
    """Gymnasium's FrozenLake with random start and goal, in text.

    The moves, the slipping and the reward (+1 on the goal, otherwise 0) are Gymnasium's own. An episode ends on the
    goal or in a hole, and is truncated after ``max_steps`` actions. Lakes whose shortest safe way is longer than
    ``max_steps`` are not drawn. Settings of RAGEN (arXiv:2504.20073, github.com/RAGEN-AI/RAGEN): 4x4, frozen share
    0.9, 5 turns of up to 2 actions. Mended here:

    - the published prompt speaks of coordinates up to (5,5) on a 4x4 lake; here the legend follows the size;
    - "slippery" has meant a success rate of 1/3, 0.8, 0.98 and 1 in different published settings; here ``slip`` is the
      probability that a move does not go where it was meant to go (1 - Gymnasium's ``success_rate``), and then it goes
      to either side of that direction with equal probability, never backwards;
    - the published symbol of the player on the goal is a check mark; here it is the letter V, so that all symbols are
      single ASCII characters;
    - published splits differ in seed alone; here they differ in holes and goal, so that no screen of an episode, not
      even from the middle of it, is one of another split.

    Args:
        size: rows and columns, 2 to 16.
        frozen: probability that a cell other than start and goal is frozen, 0.05 to 1.
        slip: probability from 0 to 1 that a move slips.
        max_steps: actions after which the episode is truncated.
        view: "grid", "coordinates" or "both".

    Raises:
        RecipeError: for a parameter out of its range.
    """

    name = "frozenlake"
    max_turns = 5
    max_actions_per_turn = 2

    def __init__(
        self, size: int = 4, frozen: float = 0.9, slip: float = 0.0, max_steps: int = 10, view: str = "grid"
    ) -> None:
        super().__init__(max_steps, view)
        self.size = whole_number("size", size, 2, 16)
        self.frozen = real_number("frozen", frozen, 0.05, 1.0)
        self.slip = real_number("slip", slip, 0.0, 1.0)
        self._lake: Lake | None = None
        self._inner: FrozenLakeEnv
        self._values_HS: np.ndarray | None = None

    @property
    def instructions(self) -> str:
        """The rules in a few lines; see :attr:`TextEnv.instructions`."""
        lines = ["Walk over the frozen lake to the goal. Do not step into a hole."]
        if self.view != "coordinates":
            lines.append("Symbols: P player, _ frozen, O hole, G goal, X player in a hole, V player on the goal.")
        if self.view != "grid":
            last = self.size - 1
            lines.append(
                f"Positions are (row,column), from (0,0) at the top left to ({last},{last}) at the bottom right."
            )
        lines.append(f"Actions: {', '.join(ACTIONS)}. A move into the border leaves you where you are.")
        if self.slip > 0:
            lines.append(
                f"The ice is slippery: a move goes where you want with probability {1 - self.slip:g}, "
                f"and to each side of that direction with probability {self.slip / 2:g}."
            )
        return "\n".join(lines)

    def legal_actions(self) -> list[str]:
        """All four moves, always."""
        return list(ACTIONS)

    def _draw(self, split: str) -> str:
        lake = draw_in_split(
            lambda: draw_lake(self.np_random, self.size, self.frozen, self.max_steps), lambda lake: lake.layout, split
        )
        if self._lake is None or lake.tiles != self._lake.tiles:
            self._lake = lake
            self._values_HS = None
            if self.slip > 0:
                self._inner = FrozenLakeEnv(desc=lake.rows, is_slippery=True, success_rate=1.0 - self.slip)
            else:
                self._inner = FrozenLakeEnv(desc=lake.rows, is_slippery=False)
        self._inner.np_random = self.np_random
        self._inner.reset()
        return lake.content

    def _foreseeable(self, action: str) -> bool:
        # The whole grid is shown: without slipping everything else follows.
        return self.slip == 0

    def _act(self, action: str) -> tuple[float, bool, bool, bool]:
        before = self._player
        self._inner.np_random = self.np_random  # slips come from the episode's own stream
        _, reward, terminated, _, _ = self._inner.step(ACTIONS.index(action))
        return float(reward), bool(terminated), self._player == self._level.goal, self._player != before

    @property
    def _level(self) -> Lake:
        self._need_reset()
        assert self._lake is not None
        return self._lake

    @property
    def _player(self) -> int:
        return int(self._inner.s)

    def _rows(self) -> list[str]:
        lake = self._lake
        assert lake is not None
        cells = list(lake.tiles.translate(_SYMBOLS))
        cells[self._player] = {"G": "V", "H": "X"}.get(lake.tiles[self._player], "P")
        text = "".join(cells)
        return [text[row * lake.size : (row + 1) * lake.size] for row in range(lake.size)]

    def _coordinates(self) -> str:
        lake = self._lake
        assert lake is not None
        text = f"player {spell_positions([self._at(self._player)])} goal {spell_positions([self._at(lake.goal)])}"
        holes = spell_positions(map(self._at, lake.holes))
        return f"{text} holes {holes}" if holes else text

    def _at(self, cell: int) -> Position:
        return divmod(cell, self.size)

    def describe(self) -> dict[str, Any]:
        """``size``, ``player``, ``goal``, ``holes`` (sorted) and ``slip``."""
        lake = self._level
        return {
            "size": self.size,
            "player": self._at(self._player),
            "goal": self._at(lake.goal),
            "holes": [self._at(cell) for cell in lake.holes],
            "slip": self.slip,
        }

    def optimal_success(self) -> float:
        """The probability that the best player reaches the goal within the steps that are left (value iteration)."""
        lake = self._level
        if self._over:
            return float(self._player == lake.goal)
        return float(self._plan_values()[self.steps_left, self._player])

    def oracle(self) -> list[str]:
        """The best plan along the most likely outcomes: without slipping, a shortest safe way.

        Each action maximises the probability of success within the steps that are left; among equals it takes the one
        whose most likely outcome is closest to the goal.
        """
        self._need_reset()
        plan: list[str] = []
        cell = self._player
        for left in range(self.steps_left, 0, -1):
            if self._level.tiles[cell] in "GH":
                break
            action = self._best_action(cell, left)
            plan.append(ACTIONS[action])
            cell = self._likely_next(cell, action)
        return plan

    def _likely_next(self, cell: int, action: int) -> int:
        return int(max(self._inner.P[cell][action], key=lambda outcome: outcome[0])[1])

    def _best_action(self, cell: int, left: int) -> int:
        before_S = self._plan_values()[left - 1]
        chances = [sum(p * before_S[to] for p, to, _, _ in self._inner.P[cell][a]) for a in range(len(ACTIONS))]
        best = max(chances)

        def way(action: int) -> int:
            distance = self._level.distance[self._likely_next(cell, action)]
            return distance if distance >= 0 else len(self._level.tiles)

        return min((a for a in range(len(ACTIONS)) if chances[a] >= best - _TIE), key=way)

    def _plan_values(self) -> np.ndarray:
        """``values_HS[h, s]``: probability of success from cell s with h steps left; float64 (max_steps + 1, cells).

        Computed once a lake, from Gymnasium's own transition table.
        """
        if self._values_HS is None:
            cells, actions, outcomes = self.size**2, len(ACTIONS), 3
            chance_SAK = np.zeros((cells, actions, outcomes))
            next_SAK = np.zeros((cells, actions, outcomes), dtype=np.int64)
            for cell, by_action in self._inner.P.items():
                for action, table in by_action.items():
                    for k, (probability, to, _, _) in enumerate(table):
                        chance_SAK[cell, action, k] = probability
                        next_SAK[cell, action, k] = to
            values_HS = np.zeros((self.max_steps + 1, cells))
            values_HS[0, self._level.goal] = 1.0
            for left in range(1, self.max_steps + 1):
                values_HS[left] = (chance_SAK * values_HS[left - 1][next_SAK]).sum(axis=2).max(axis=1)
            self._values_HS = values_HS
        return self._values_HS


_SYMBOLS = str.maketrans({"S": "_", "F": "_", "H": "O"})
