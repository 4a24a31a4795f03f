"""The floors of the house: a room imports only rooms below it, and no modules import each other in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "rehearsal"

FLOORS = {
    "errors": 0,
    "naming": 0,
    "parsing": 0,
    "signals": 0,
    "texts": 0,
    "time_limit": 0,
    "usage": 0,
    "trajectory": 1,
    "environments": 1,
    "rewards": 1,
    "sandbox": 1,
    "models": 2,
    "generation": 2,
    "algorithms": 2,
    "agents": 3,
    "memory": 3,
    "rollout": 4,
    "diagnostics": 4,
    "training": 5,
    "evaluation": 5,
    "reports": 6,
    "display": 6,
    "recipes": 6,
    "cli": 7,
    "__main__": 8,
}
"""Rooms, ground floor first. What people type stands above what they see, because it uses it."""

SAME_FLOOR = {
    ("naming", "errors"),
    ("rewards", "trajectory"),
    ("environments", "rewards"),  # tasks with verifiable answers
    ("rewards", "sandbox"),  # code is checked by running it
    ("environments", "sandbox"),  # programs that agents write are tried by running them
    ("generation", "models"),  # the engine runs the model
    ("training", "evaluation"),  # the loop plays held-out tasks on its way
    ("evaluation", "training"),  # evaluating a run by name reads its recipe and its checkpoint
}
"""Imports between rooms of one floor that are meant: (who, whom). That no circle comes of them is tested below."""

KNOWS_NOTHING_OF = {
    "trajectory": set(FLOORS) - {"trajectory"},
    "errors": set(FLOORS) - {"errors"},
    "environments": {"models", "trajectory"},
    "rewards": {"models", "training"},
    "sandbox": set(FLOORS) - {"sandbox", "errors", "naming", "signals", "usage"},
    "models": {"environments"},
    "generation": {"environments"},
    "algorithms": {"environments", "models", "generation"},
}
"""Rooms that a room must not know although they are not above it. Most of what is above is forbidden by the floors."""

PUBLIC = "__init__"
"""The package's own module names the public interface and may name anything; others take only its version from it."""


def room_of(module: str) -> str:
    """``rehearsal.training.loop`` is in the room "training"; ``rehearsal`` itself is PUBLIC."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else PUBLIC


def modules() -> dict[str, Path]:
    """All modules of the package by dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports_of(tree: ast.Module, *, lazy: bool) -> Iterator[str]:
    """Modules of the package that a module imports: at any place, or (``lazy=False``) only while it is being loaded."""
    inside = set()
    if not lazy:
        for node in ast.walk(tree):
            typing_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
            if typing_only or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                inside.update(id(part) for part in ast.walk(node))
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "rehearsal")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute, so that rooms can be read off them"
            if node.module is None or node.module.split(".")[0] != "rehearsal":
                continue
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def parsed(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def may_import(who: str, whom: str) -> bool:
    """Whether a module of room ``who`` may import one of room ``whom``."""
    if who in (whom, PUBLIC) or whom == "errors":
        return True
    if whom in KNOWS_NOTHING_OF.get(who, ()):
        return False
    return FLOORS[whom] < FLOORS[who] or (who, whom) in SAME_FLOOR


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(module) for module in MODULES} - {PUBLIC}
    assert rooms <= set(FLOORS), f"rooms without a floor: {sorted(rooms - set(FLOORS))}"
    assert {"trajectory", "training", "cli"} <= rooms, "the package was not found"


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) != PUBLIC])
def test_a_room_imports_only_rooms_below_it(module: str) -> None:
    who = room_of(module)
    wrong = []
    for imported in imports_of(parsed(module), lazy=True):
        whom = room_of(imported)
        if whom == PUBLIC:
            names = {
                alias.name
                for node in ast.walk(parsed(module))
                if isinstance(node, ast.ImportFrom) and node.module == "rehearsal"
                for alias in node.names
            }
            if names != {"__version__"}:
                wrong.append("rehearsal (take the name from its own module)")
        elif not may_import(who, whom):
            wrong.append(imported)
    assert not wrong, f"{module} may not import {', '.join(sorted(set(wrong)))}"


def test_nothing_imports_the_command_line() -> None:
    importers = {m for m in MODULES for imported in imports_of(parsed(m), lazy=True) if room_of(imported) == "cli"}
    assert {module for module in importers if room_of(module) != "cli"} == {"rehearsal.__main__"}


def test_modules_import_each_other_in_no_circle() -> None:
    graph = {module: set(imports_of(parsed(module), lazy=False)) & set(MODULES) for module in MODULES}
    done: set[str] = set()

    def visit(module: str, way: list[str]) -> None:
        assert module not in way, f"a circle of imports: {' -> '.join([*way[way.index(module) :], module])}"
        if module not in done:
            for imported in sorted(graph[module] - {module}):
                visit(imported, [*way, module])
            done.add(module)

    for module in graph:
        visit(module, [])


@pytest.mark.parametrize(
    ("who", "whom", "allowed"),
    [
        ("training", "algorithms", True),
        ("algorithms", "training", False),
        ("environments", "models", False),
        ("models", "environments", False),
        ("models", "generation", False),
        ("generation", "models", True),
        ("trajectory", "environments", False),
        ("training", "reports", False),
        ("reports", "training", True),
        ("display", "cli", False),
        ("environments", "errors", True),
    ],
)
def test_the_rule_itself(who: str, whom: str, allowed: bool) -> None:
    assert may_import(who, whom) is allowed
