"""Families of small programs, filled in with names, numbers and inputs."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from rehearsal.environments.repair.families import FAMILIES
from rehearsal.environments.repair.running import Arguments

_INPUTS = 14
"""Different inputs that are drawn for a program; fewer where there are no more."""

_NAMES: dict[str, tuple[str, ...]] = {
    "xs": ("xs", "values", "numbers", "items", "data", "nums", "row", "series"),
    "ys": ("ys", "others", "second", "right", "rest", "more"),
    "x": ("x", "value", "number", "item", "each", "num"),
    "y": ("y", "last", "previous", "other", "kept"),
    "acc": ("total", "result", "acc", "out", "answer", "made"),
    "count": ("count", "hits", "found", "seen", "tally"),
    "i": ("i", "index", "pos", "place", "at"),
    "j": ("j", "end", "back", "partner", "next_one"),
    "n": ("n", "m", "size", "limit", "amount"),
    "d": ("d", "step", "part", "divisor", "factor"),
    "word": ("word", "text", "s", "line", "name"),
    "ch": ("ch", "c", "letter", "char", "sign"),
    "words": ("words", "texts", "lines", "names", "terms"),
}
"""What a variable of a role may be called. No name serves two roles, so a program never uses one twice."""

_LETTERS = "abcdeiou"


def _number(low: int, high: int) -> Callable[[np.random.Generator, dict[str, int]], Any]:
    return lambda rng, numbers: int(rng.integers(low, high + 1))


def _ints(rng: np.random.Generator, numbers: dict[str, int], least: int = 0, low: int = -4) -> list[int]:
    """A list in which numbers come twice, and those that the program compares with come often."""
    near = [number + shift for number in numbers.values() for shift in (-1, 0, 0, 1)]
    size = int(rng.integers(least, 7))
    some = rng.integers(low, 10, size=size).tolist()
    return [int(rng.choice(near)) if near and rng.random() < 0.3 else one for one in some]


def _word(rng: np.random.Generator, numbers: dict[str, int], least: int = 0) -> str:
    made = "".join(rng.choice(list(_LETTERS), size=int(rng.integers(least, 6))))
    return made + made[::-1] if rng.random() < 0.3 else made


_KINDS: dict[str, Callable[[np.random.Generator, dict[str, int]], Any]] = {
    "ints": _ints,
    "some ints": lambda rng, numbers: _ints(rng, numbers, least=1),
    "sorted ints": lambda rng, numbers: sorted(_ints(rng, numbers)),
    "digits": lambda rng, numbers: rng.integers(0, 3, size=int(rng.integers(1, 7))).tolist(),
    "int": lambda rng, numbers: int(rng.choice([*range(-4, 12), *(3 * [*numbers.values()])])),
    "small": _number(0, 7),
    "positive": _number(1, 30),
    "large": _number(0, 999),
    "word": _word,
    "words": lambda rng, numbers: [_word(rng, numbers) for _ in range(int(rng.integers(0, 5)))],
    "some words": lambda rng, numbers: [_word(rng, numbers, 1) for _ in range(int(rng.integers(0, 5)))],
}


@dataclass(frozen=True)
class Program:
    """A correct program and what it is to be tried with.

    Attributes:
        family: the name of its family.
        function: the name of its function.
        about: what the function gives, in words.
        lines: of its source.
        calls: the arguments of different calls.
    """

    family: str
    function: str
    about: str
    lines: tuple[str, ...]
    calls: tuple[Arguments, ...]

    @cached_property
    def source(self) -> str:
        return "\n".join(self.lines)


def draw_program(rng: np.random.Generator) -> Program:
    """A program of a random family, all families alike."""
    family = FAMILIES[int(rng.integers(len(FAMILIES)))]
    fields = sorted({field for _, field, _, _ in string.Formatter().parse(family.source) if field})
    numbers: dict[str, int] = {}
    words = {"f": str(rng.choice(family.functions))}
    for field in fields:
        if field in family.numbers:
            low, high = family.numbers[field]
            numbers[field] = int(rng.integers(low, high + 1))
        elif field in _NAMES:
            words[field] = str(rng.choice(_NAMES[field]))
    lines = tuple(family.source.format(**words, **numbers).split("\n"))
    about = family.about.format(**words, **numbers)
    return Program(family.name, words["f"], about, lines, _calls(family.takes, numbers, rng))


def _calls(takes: tuple[str, ...], numbers: dict[str, int], rng: np.random.Generator) -> tuple[Arguments, ...]:
    found: dict[str, Arguments] = {}
    for _ in range(3 * _INPUTS):
        arguments = tuple(_KINDS[kind](rng, numbers) for kind in takes)
        found.setdefault(repr(arguments), arguments)
        if len(found) == _INPUTS:
            break
    return tuple(found.values())
