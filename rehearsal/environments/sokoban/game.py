"""Sokoban as a text environment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rehearsal.environments.episode import SpatialEnv, spell_positions, whole_number
from rehearsal.environments.sokoban.generator import draw_level, draw_room
from rehearsal.environments.sokoban.levels import read_levels
from rehearsal.environments.sokoban.rules import ACTIONS, Level, cells_of, step
from rehearsal.environments.sokoban.solver import SOLVED, UNKNOWN, Solution, solve
from rehearsal.environments.splits import content_split, draw_in_split
from rehearsal.errors import EnvironmentFault, RecipeError

STEP_REWARD = -0.1
BOX_REWARD = 1.0
DONE_REWARD = 10.0

_MAX_ROOMS = 1_000


class Sokoban(SpatialEnv):
    """Push all boxes onto targets.

    Rewards as published (gym_sokoban, and RAGEN, arXiv:2504.20073): -0.1 a step, +1 for a box pushed onto a target, -1
    for one pushed off, +10 when all are stored. The episode ends then, and is truncated after ``max_steps`` actions.
    Moving against a wall, or a box that cannot move, is legal and changes nothing.

    Levels are made by reverse play, so the shortest solution is known: by default it has 1 to 10 moves, which fits into
    5 turns of 2 actions. RAGEN's own levels come from gym_sokoban's search, which bounds its depth but not the length
    of the solution. Its symbols are kept except for the check mark of a stored box, here ``*``, so that all symbols are
    single ASCII characters.

    Args:
        size: rows and columns, walls included, 4 to 100; two numbers for height and width. 6 unless levels are given.
        boxes: how many; at least three cells inside the outer wall are left for floor. 1 unless levels are given.
        min_solution: moves of the shortest solution, at least. 1 unless levels are given.
        max_solution: moves of the shortest solution, at most. 10 unless levels are given.
        max_steps: actions after which the episode is truncated.
        view: "grid", "coordinates" or "both".
        levels: a file or folder of levels in XSokoban or Boxoban format to draw from, in place of made ones. They are
            split by content, whatever their file is called.

    Raises:
        RecipeError: for a parameter out of its range, levels that cannot be read, or sizes given together with levels.
    """

    name = "sokoban"
    max_turns = 5
    max_actions_per_turn = 2

    def __init__(
        self,
        size: int | Sequence[int] | None = None,
        boxes: int | None = None,
        min_solution: int | None = None,
        max_solution: int | None = None,
        max_steps: int = 100,
        view: str = "grid",
        levels: str | Path | None = None,
    ) -> None:
        super().__init__(max_steps, view)
        made = {"size": size, "boxes": boxes, "min_solution": min_solution, "max_solution": max_solution}
        self._stock: dict[str, list[Level]] | None = None
        if levels is not None:
            given = [name for name, value in made.items() if value is not None]
            if given:
                raise RecipeError(f"With levels from a file, {given[0]} has no meaning; leave it out.")
            self._stock = {"train": [], "validation": [], "test": []}
            for level in read_levels(levels):
                self._stock[content_split(level.layout)].append(level)
            self._levels_path = str(levels)
        sides = [6, 6] if size is None else [size, size] if isinstance(size, int) else list(size)
        if len(sides) != 2:
            raise RecipeError(f"size must be one number or two, height and width, not {size!r}.")
        self.height, self.width = (whole_number("size", side, 4, 100) for side in sides)
        most = max(1, (self.height - 2) * (self.width - 2) - 3)
        self.boxes = whole_number("boxes", 1 if boxes is None else boxes, 1, most)
        self.min_solution = whole_number("min_solution", 1 if min_solution is None else min_solution, 1, 500)
        longest = max(10, self.min_solution) if max_solution is None else max_solution
        self.max_solution = whole_number("max_solution", longest, self.min_solution, 500)
        if self._stock is None and self.min_solution > self.max_steps:
            raise RecipeError(f"min_solution {self.min_solution} does not fit into max_steps {self.max_steps}.")
        self._level: Level | None = None
        self._solution: tuple[Level, Solution] | None = None

    @property
    def instructions(self) -> str:
        """The rules in a few lines; see :attr:`TextEnv.instructions`."""
        lines = [
            "Push every box onto a target. You push a box by walking into it. You cannot pull, nor push two boxes."
        ]
        if self.view != "coordinates":
            lines.append("Symbols: # wall, _ floor, O target, X box, * box on target, P player, S player on target.")
        if self.view != "grid":
            lines.append("Positions are (row,column), from (0,0) at the top left. The border is wall all around.")
        lines.append(f"Actions: {', '.join(ACTIONS)}.")
        return "\n".join(lines)

    def legal_actions(self) -> list[str]:
        """All four moves, always."""
        return list(ACTIONS)

    def task_count(self, split: str) -> int | None:
        """The levels of the split where they come from a file."""
        return None if self._stock is None else len(self._stock[split])

    def _draw(self, split: str) -> str:
        if self._stock is not None:
            stock = self._stock[split]
            if not stock:
                raise EnvironmentFault(
                    f"None of the Sokoban levels in {self._levels_path} belongs to the {split} split; give more levels."
                )
            self._level = self._pick(stock)
        else:
            self._level = self._made(split)
        return self._level.content

    def _made(self, split: str) -> Level:
        longest = min(self.max_solution, self.max_steps)
        for _ in range(_MAX_ROOMS):
            # The split is that of the room, so it is asked for before the room is searched.
            room = draw_in_split(
                lambda: draw_room(self.np_random, self.width, self.height, self.boxes), lambda room: room.layout, split
            )
            level = draw_level(self.np_random, room, self.min_solution, longest)
            if level is not None:
                return level
        raise EnvironmentFault(
            f"None of {_MAX_ROOMS} rooms has a level whose shortest solution takes {self.min_solution} to {longest} "
            "moves; relax the environment's parameters."
        )

    @property
    def level(self) -> Level:
        """The present position.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        self._need_reset()
        assert self._level is not None
        return self._level

    def _foreseeable(self, action: str) -> bool:
        return True

    def _act(self, action: str) -> tuple[float, bool, bool, bool]:
        before = self.level
        player, boxes = step(before, before.player, before.boxes, before.offsets[action])
        stored = (boxes & before.targets).bit_count() - (before.boxes & before.targets).bit_count()
        self._level = before.moved(player, boxes)
        solved = self._level.solved
        reward = STEP_REWARD + BOX_REWARD * stored + (DONE_REWARD if solved else 0.0)
        return reward, solved, solved, player != before.player

    def _rows(self) -> list[str]:
        assert self._level is not None
        return self._level.rows("#", "_", "O", "X", "*", "P", "S")

    def _coordinates(self) -> str:
        level = self._level
        assert level is not None
        parts = [("player", [level.player]), ("boxes", cells_of(level.boxes)), ("targets", cells_of(level.targets))]
        text = " ".join(f"{name} {spell_positions(map(level.at, cells))}" for name, cells in parts)
        walls = spell_positions(self._inner_walls(level))
        return f"{text} walls {walls}" if walls else text

    @staticmethod
    def _inner_walls(level: Level) -> list[tuple[int, int]]:
        inside = (level.at(cell) for cell in cells_of(level.walls))
        return [(r, c) for r, c in inside if 0 < r < level.height - 1 and 0 < c < level.width - 1]

    def describe(self) -> dict[str, Any]:
        """``height``, ``width``, ``player``, ``boxes``, ``targets`` and ``walls`` (without the border), all sorted."""
        level = self.level
        return {
            "height": level.height,
            "width": level.width,
            "player": level.at(level.player),
            "boxes": [level.at(cell) for cell in cells_of(level.boxes)],
            "targets": [level.at(cell) for cell in cells_of(level.targets)],
            "walls": self._inner_walls(level),
        }

    def _solve(self) -> Solution:
        """The solution of the present position, kept until it changes."""
        if self._solution is None or self._solution[0] != self.level:
            self._solution = (self.level, solve(self.level))
        return self._solution[1]

    def oracle(self) -> list[str] | None:
        """A shortest solution in moves; [] from a dead end, None where the search of a large level was given up."""
        self._need_reset()
        if self._over:
            return []
        solution = self._solve()
        return None if solution.status == UNKNOWN else list(solution.moves)

    def optimal_success(self) -> float | None:
        """1 where a shortest solution fits into the steps that are left, else 0; None where the search was given up."""
        self._need_reset()
        if self._over:
            return float(self._success)
        solution = self._solve()
        if solution.status == UNKNOWN:
            return None
        return float(solution.status == SOLVED and len(solution.moves) <= self.steps_left)
