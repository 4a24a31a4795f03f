"""What scripted players know of the environments: what there is to see, how to say it, and simple ways to act.

A thought of a scripted player has two parts. The facts (where things stand, what a sum comes to) are always right,
whoever plays; the intention is the player's own, and as good as the player is. A model trained on such episodes learns
to see correctly from all of them, and to act as well as the mixture does.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rehearsal.environments.arithmetic import Node
from rehearsal.environments.bandit import PAIRS
from rehearsal.environments.base import TextEnv
from rehearsal.environments.episode import Position
from rehearsal.errors import RecipeError
from rehearsal.parsing import parse_python
from rehearsal.trajectory import ToolCall

MOVES: dict[str, Position] = {"Left": (0, -1), "Down": (1, 0), "Right": (0, 1), "Up": (-1, 0)}
"""Rows and columns that each move adds."""


class World:
    """An environment as scripted players see it; this one serves environments that nobody wrote a world for."""

    def facts(self, env: TextEnv) -> str:
        """What there is to see, in few words; "" where the environment describes nothing. Always true."""
        parts = []
        for name, value in env.describe().items():
            words = " ".join(_words(value))
            parts.append(f"{name} {words}" if words else f"no {name}")
        return ", ".join(parts) + "." if parts else ""

    def intention(self, env: TextEnv, actions: Sequence[str], rng: np.random.Generator) -> str:
        """What the player is about to do, in few words."""
        return f"go {' '.join(actions)}."

    def rehearsals(self, env: TextEnv, actions: Sequence[str], rng: np.random.Generator) -> list[tuple[str, str]]:
        """Actions that the player rehearses before it acts, and what it expects as an answer.

        Here its own actions, and what the environment would say to them; where chance has a say, what it might say.
        """
        return [(" || ".join(actions), imagined(env, actions, rng))]

    def call(
        self, env: TextEnv, tools: Collection[str], heard: Sequence[ToolCall], rng: np.random.Generator
    ) -> ToolCall | None:
        """What a player who reaches for tools asks next.

        Args:
            env: in its present state.
            tools: names of those that there are.
            heard: the calls of the episode so far, with their results.
            rng: the player's own chance.

        Returns:
            None where there is nothing (more) that it would ask.
        """
        return None

    def told(self, env: TextEnv, heard: Sequence[ToolCall]) -> str:
        """What tools have told so far, in few words; "" where that is nothing of use. Always true."""
        return ""

    def informed(self, env: TextEnv, heard: Sequence[ToolCall]) -> list[str]:
        """The actions that follow from what tools have told; [] where none do."""
        return []

    def random(self, env: TextEnv, rng: np.random.Generator) -> str:
        """Any action.

        Raises:
            RecipeError: where any text is an action, so that there is nothing to draw from.
        """
        legal = env.legal_actions()
        if not legal:
            raise RecipeError(
                f"The environment {env.name} lists no legal actions to draw from: use the player that follows the "
                "oracle with epsilon 0."
            )
        return legal[int(rng.integers(len(legal)))]

    def oracle(self, env: TextEnv) -> list[str]:
        """The environment's own best plan; [] from a dead end.

        Raises:
            RecipeError: where it has none.
        """
        plan = env.oracle()
        if plan is None:
            raise RecipeError(f"The environment {env.name} knows no best actions (its oracle() is None).")
        return plan

    def blind(self, env: TextEnv, n: int, rng: np.random.Generator) -> list[str]:
        """Up to ``n`` actions of somebody who goes straight for the goal and does not look at what is in the way."""
        return [self.random(env, rng) for _ in range(n)]


def imagined(env: TextEnv, actions: Sequence[str], rng: np.random.Generator) -> str:
    """What an environment might answer to actions, from the state that it is in; it stays there."""
    copied = copy.deepcopy(env)
    # Chance of its own: a player that foretells where it will slip has seen the dice.
    copied.unwrapped.np_random = np.random.default_rng(int(rng.integers(2**32)))
    observation, over = "", False
    for action in actions:
        if not over:
            observation, _, terminated, truncated, _ = copied.step(action)
            over = terminated or truncated
    return observation


class FrozenLakeWorld(World):
    """Thinks like this: "me 1 2, goal 3 0: down 2 left 2, hole down. go Left." (positions are row and column)."""

    def facts(self, env: TextEnv) -> str:
        """Both positions, the way between them, and the holes next to the player."""
        seen = env.describe()
        player, goal = seen["player"], seen["goal"]
        near = [move.lower() for move in MOVES if moved(player, move) in seen["holes"]]
        holes = f", hole {' '.join(near)}" if near else ""
        return f"me {spelled(player)}, goal {spelled(goal)}: {way(player, goal)}{holes}."

    def rehearsals(self, env: TextEnv, actions: Sequence[str], rng: np.random.Generator) -> list[tuple[str, str]]:
        """Now and then another move first, then its own."""
        return _another_first(env, rng) + super().rehearsals(env, actions, rng)

    def blind(self, env: TextEnv, n: int, rng: np.random.Generator) -> list[str]:
        """Towards the goal, over holes."""
        seen = env.describe()
        return _straight(seen["player"], seen["goal"], n, rng)


class SokobanWorld(World):
    """Thinks of the first box: "me 2 3, box 3 3, target 3 1: left 2, box down. push left from 3 4: down 1 right 1. go
    Right."."""

    def facts(self, env: TextEnv) -> str:
        """Positions of the player, of the first box beside the targets and of the first empty target, the way between
        these two, and the walls and boxes next to the player."""
        box, target = self._task(env)
        seen = env.describe()
        player = seen["player"]
        if box is None or target is None:
            return f"me {spelled(player)}, all boxes stored."
        near = ""
        for name, cells in (("wall", _walls(seen)), ("box", seen["boxes"])):
            moves = [move.lower() for move in MOVES if moved(player, move) in cells]
            near += f", {name} {' '.join(moves)}" if moves else ""
        return f"me {spelled(player)}, box {spelled(box)}, target {spelled(target)}: {way(box, target)}{near}."

    def intention(self, env: TextEnv, actions: Sequence[str], rng: np.random.Generator) -> str:
        """The side to push from, the way there and the moves.

        The side belongs to the plan if these moves push, or the best plan begins with them; otherwise to a push that
        brings the first box closer.
        """
        box, _ = self._task(env)
        if box is None:
            return super().intention(env, actions, rng)
        seen = env.describe()
        first = _first_push(seen["player"], seen["boxes"], actions)
        if first is None:
            plan = env.oracle() or []
            if plan[: len(actions)] == list(actions):
                first = _first_push(seen["player"], seen["boxes"], plan)
        if first is None:
            first = (box, self._push(env, rng))
        box, push = first
        stand = (box[0] - MOVES[push][0], box[1] - MOVES[push][1])
        return f"push {push.lower()} from {spelled(stand)}: {way(seen['player'], stand)}. go {' '.join(actions)}."

    def rehearsals(self, env: TextEnv, actions: Sequence[str], rng: np.random.Generator) -> list[tuple[str, str]]:
        """Now and then another move first, then its own."""
        return _another_first(env, rng) + super().rehearsals(env, actions, rng)

    def blind(self, env: TextEnv, n: int, rng: np.random.Generator) -> list[str]:
        """To the side of the box that faces away from the target, and push, through walls and boxes alike."""
        box, target = self._task(env)
        if box is None or target is None:
            return super().blind(env, n, rng)
        push = self._push(env, rng)
        stand = (box[0] - MOVES[push][0], box[1] - MOVES[push][1])
        actions = _straight(env.describe()["player"], stand, n, rng)
        return actions + [push] * (n - len(actions))

    def _task(self, env: TextEnv) -> tuple[Position | None, Position | None]:
        seen = env.describe()
        box = next((box for box in seen["boxes"] if box not in seen["targets"]), None)
        target = next((target for target in seen["targets"] if target not in seen["boxes"]), None)
        return box, target

    def _push(self, env: TextEnv, rng: np.random.Generator) -> str:
        box, target = self._task(env)
        assert box is not None
        assert target is not None
        pushes = [move for move in MOVES if _closer(box, target, move)]
        return pushes[int(rng.integers(len(pushes)))]


_SOUNDS = {name: ("steady", "risky")[i] for pairs in PAIRS.values() for pair in pairs for i, name in enumerate(pair)}
"""What the names suggest: the first of each pair is the steady one."""


class BanditWorld(World):
    """Thinks like this: "Clerk steady, Pirate risky. pull Pirate.".

    What a name sounds like is a fact (unknown for names that the environment does not have); that the arm pays in that
    way is not.
    """

    def facts(self, env: TextEnv) -> str:
        """What the names suggest, in the order in which the arms are shown."""
        return ", ".join(f"{arm} {_SOUNDS.get(arm, 'unknown')}" for arm in env.describe()["arms"]) + "."

    def intention(self, env: TextEnv, actions: Sequence[str], rng: np.random.Generator) -> str:
        """The arm to be pulled."""
        return f"pull {' '.join(actions)}."

    def blind(self, env: TextEnv, n: int, rng: np.random.Generator) -> list[str]:
        """The first arm."""
        return list(env.describe()["arms"][:1])


class CountdownWorld(World):
    """Thinks like this: "2 3 5 for 16: 2 * 3 = 6, 6 + 5 = 11 no; 3 + 5 = 8, 8 * 2 = 16 yes."; the last try counts."""

    def facts(self, env: TextEnv) -> str:
        """The numbers and the target."""
        seen = env.describe()
        return f"{' '.join(map(str, seen['numbers']))} for {seen['target']}:"

    def intention(self, env: TextEnv, actions: Sequence[str], rng: np.random.Generator) -> str:
        """Up to one try that failed, then the answer, step by step; each step is computed right."""
        seen = env.describe()
        tries = []
        if rng.random() < 0.4:
            failed = self._combine(seen["numbers"], seen["operations"], rng)
            if failed is not None and failed.value != seen["target"]:
                tries.append(f"{_steps(failed)} no")
        answer = _tree(actions[0])
        tries.append(f"{_steps(answer)} {'yes' if answer.value == seen['target'] else 'no'}")
        return "; ".join(tries) + "."

    def random(self, env: TextEnv, rng: np.random.Generator) -> str:
        """All the numbers combined at random, with positive whole numbers on the way."""
        seen = env.describe()
        for _ in range(100):
            tree = self._combine(seen["numbers"], seen["operations"], rng)
            if tree is not None:
                return str(tree)
        return self.oracle(env)[0]  # the puzzle hardly allows anything but its solution

    def blind(self, env: TextEnv, n: int, rng: np.random.Generator) -> list[str]:
        """One operation for everything."""
        seen = env.describe()
        signs = [sign for sign in seen["operations"] if sign in "+*"]
        if not signs:
            return [self.random(env, rng)]
        return [f" {signs[int(rng.integers(len(signs)))]} ".join(map(str, seen["numbers"]))]

    @staticmethod
    def _combine(numbers: Sequence[int], operations: str, rng: np.random.Generator) -> Node | None:
        nodes = [Node(number) for number in numbers]
        while len(nodes) > 1:
            first = nodes.pop(int(rng.integers(len(nodes))))
            second = nodes.pop(int(rng.integers(len(nodes))))
            results = {"+": first.value + second.value, "*": first.value * second.value}
            if first.value > second.value:
                results["-"] = first.value - second.value
            if first.value % second.value == 0:
                results["/"] = first.value // second.value
            possible = [sign for sign in operations if sign in results]
            if not possible:
                return None
            sign = possible[int(rng.integers(len(possible)))]
            nodes.append(Node(results[sign], sign, first, second))
        return nodes[0]


def spelled(position: Position) -> str:
    """Row and column: "1 2"."""
    return f"{position[0]} {position[1]}"


def moved(position: Position, move: str) -> Position:
    """The position one move further."""
    return position[0] + MOVES[move][0], position[1] + MOVES[move][1]


def way(start: Position, end: Position) -> str:
    """The displacement in words: "down 2 left 1"; "here" for none."""
    rows, columns = end[0] - start[0], end[1] - start[1]
    parts = []
    if rows:
        parts.append(f"{'down' if rows > 0 else 'up'} {abs(rows)}")
    if columns:
        parts.append(f"{'right' if columns > 0 else 'left'} {abs(columns)}")
    return " ".join(parts) or "here"


def _another_first(env: TextEnv, rng: np.random.Generator) -> list[tuple[str, str]]:
    if rng.random() >= 0.25:
        return []
    move = tuple(MOVES)[int(rng.integers(len(MOVES)))]
    return [(move, imagined(env, [move], rng))]


def _closer(start: Position, end: Position, move: str) -> bool:
    rows, columns = MOVES[move]
    return rows * (end[0] - start[0]) > 0 or columns * (end[1] - start[1]) > 0


def _straight(start: Position, end: Position, n: int, rng: np.random.Generator) -> list[str]:
    """Up to ``n`` moves from start to end, down and across in random order."""
    actions: list[str] = []
    while len(actions) < n and start != end:
        open_moves = [move for move in MOVES if _closer(start, end, move)]
        actions.append(open_moves[int(rng.integers(len(open_moves)))])
        start = moved(start, actions[-1])
    return actions


def _walls(seen: Mapping[str, Any]) -> set[Position]:
    """The walls of a described Sokoban position, the border among them."""
    height, width = seen["height"], seen["width"]
    border = {(r, c) for r in range(height) for c in range(width) if r in (0, height - 1) or c in (0, width - 1)}
    return border | set(seen["walls"])


def _first_push(player: Position, boxes: Iterable[Position], moves: Sequence[str]) -> tuple[Position, str] | None:
    """The first box that the moves walk into, and the direction. Walls are not looked at."""
    standing = set(boxes)
    for move in moves:
        if move not in MOVES:
            return None
        player = moved(player, move)
        if player in standing:
            return player, move
    return None


def _words(value: Any) -> list[str]:
    """A described value as words; a list of positions becomes a list of numbers."""
    if isinstance(value, list | tuple):
        return [word for part in value for word in _words(part)]
    return [str(value)]


def _tree(expression: str) -> Node:
    """An expression of positive whole numbers, in which every step is whole, as a tree."""

    def visit(node: ast.expr) -> Node:
        if isinstance(node, ast.Constant):
            return Node(int(str(node.value)))
        assert isinstance(node, ast.BinOp)
        left, right = visit(node.left), visit(node.right)
        if isinstance(node.op, ast.Add):
            return Node(left.value + right.value, "+", left, right)
        if isinstance(node.op, ast.Sub):
            return Node(left.value - right.value, "-", left, right)
        if isinstance(node.op, ast.Mult):
            return Node(left.value * right.value, "*", left, right)
        return Node(left.value // right.value, "/", left, right)

    return visit(parse_python(expression, "eval").body)


def _steps(tree: Node) -> str:
    """The steps of an expression, innermost first: "3 + 5 = 8, 8 * 2 = 16"."""
    steps: list[str] = []

    def visit(node: Node) -> None:
        if node.left is None or node.right is None:
            return
        visit(node.left)
        visit(node.right)
        steps.append(f"{node.left.value} {node.sign} {node.right.value} = {node.value}")

    visit(tree)
    return ", ".join(steps) or str(tree.value)
