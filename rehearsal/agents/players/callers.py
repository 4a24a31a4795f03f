"""What scripted players know of environments where tools help: little, unless they ask."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import cache

import numpy as np

from rehearsal.agents.players.worlds import World
from rehearsal.environments.base import TextEnv
from rehearsal.environments.lookup_world import SENTENCES, lookup_world
from rehearsal.trajectory import ToolCall


class CalculateWorld(World):
    """Thinks like this: "95 * 13 + 7. say 1200." without a tool, "95 * 13 + 7. ask calculator." before a call, and
    "95 * 13 + 7. got 1242. say 1242." after it.

    In its head it rounds every product and every sum to two digits, so it is right where numbers are small.

    Args:
        hasty: the share of calls that ask for a part of the line, so that the result is no answer to it.
    """

    def __init__(self, hasty: float = 0.3) -> None:
        self.hasty = hasty

    def facts(self, env: TextEnv) -> str:
        """The line."""
        return f"{env.describe()['line']}."

    def intention(self, env: TextEnv, actions: Sequence[str], rng: np.random.Generator) -> str:
        """The number that is about to be said."""
        return f"say {' '.join(actions)}."

    def call(
        self, env: TextEnv, tools: Collection[str], heard: Sequence[ToolCall], rng: np.random.Generator
    ) -> ToolCall | None:
        """The line, or a part of it, once."""
        if "calculator" not in tools or self.informed(env, heard):
            return None
        line = env.describe()["line"]
        if rng.random() < self.hasty:
            line = " ".join(line.split()[:3])
        return ToolCall("calculator", {"expression": line})

    def told(self, env: TextEnv, heard: Sequence[ToolCall]) -> str:
        """What the calculator said last."""
        return "".join(f"got {number}." for number in self.informed(env, heard))

    def informed(self, env: TextEnv, heard: Sequence[ToolCall]) -> list[str]:
        """The number that the calculator said last."""
        return [call.result.strip() for call in heard if not call.error][-1:]

    def oracle(self, env: TextEnv) -> list[str]:
        """The number that comes of rounding all the way."""
        return [str(_estimate(env.describe()["line"]))]

    def random(self, env: TextEnv, rng: np.random.Generator) -> str:
        """A number of no more digits than the estimate."""
        return str(int(rng.integers(10 ** len(str(abs(_estimate(env.describe()["line"])))))))


class LookupWorld(World):
    """Thinks like this: "Ada Bala: works for, makes. ask open.", then "Ada Bala: works for, makes. Ada Bala works for
    Corex. ask open.", at last "Ada Bala: works for, makes. Corex makes boats. say boats.".

    Args:
        patience: the probability of each further call; who has no more patience says what it knows last.
        direct: the share of calls that open a document by its name; the others search for it.
    """

    def __init__(self, patience: float = 0.75, direct: float = 0.6) -> None:
        self.patience = patience
        self.direct = direct

    def facts(self, env: TextEnv) -> str:
        """Whom the question is about, and what has to be found."""
        seen = env.describe()
        return f"{seen['documents'][0]}: {', '.join(seen['relations'])}."

    def intention(self, env: TextEnv, actions: Sequence[str], rng: np.random.Generator) -> str:
        """The answer that is about to be given."""
        return f"say {' '.join(actions)}."

    def call(
        self, env: TextEnv, tools: Collection[str], heard: Sequence[ToolCall], rng: np.random.Generator
    ) -> ToolCall | None:
        """The document that is next, or a search for it."""
        seen, known = env.describe(), self._known(env, heard)
        wanted = [name for name in ("open", "search") if name in tools]
        if not wanted or len(known) == len(seen["documents"]) or (heard and rng.random() >= self.patience):
            return None
        title = known[-1][1] if known else seen["documents"][0]
        searched = any(call.name == "search" and call.arguments.get("query") == title for call in heard)
        if "open" in tools and (searched or "search" not in tools or rng.random() < self.direct):
            return ToolCall("open", {"document": title})
        return ToolCall("search", {"query": title})

    def told(self, env: TextEnv, heard: Sequence[ToolCall]) -> str:
        """What was found last."""
        known = self._known(env, heard)
        if not known:
            return ""
        (title, found), relation = known[-1], env.describe()["relations"][len(known) - 1]
        return f"{title} {relation} {found}."

    def informed(self, env: TextEnv, heard: Sequence[ToolCall]) -> list[str]:
        """What was found last, whether or not it is what was asked for."""
        return [found for _, found in self._known(env, heard)][-1:]

    def oracle(self, env: TextEnv) -> list[str]:
        """Nothing: nobody can know it."""
        return []

    def random(self, env: TextEnv, rng: np.random.Generator) -> str:
        """Something of the kind that is asked for."""
        kinds = _values()[env.describe()["relations"][-1]]
        return kinds[int(rng.integers(len(kinds)))]

    def _known(self, env: TextEnv, heard: Sequence[ToolCall]) -> list[tuple[str, str]]:
        """Who and what of the hops that were read, in order."""
        seen = env.describe()
        ends = [*seen["documents"][1:], *(env.oracle() or [])]
        read = [call.result for call in heard if not call.error]
        found = []
        for title, relation, other in zip(seen["documents"], seen["relations"], ends, strict=False):
            written = [sentence.format(one=title, other=other) for sentence in SENTENCES[relation]]
            if not any(sentence in text for sentence in written for text in read):
                break
            found.append((title, other))
        return found


def _estimate(line: str) -> int:
    """A line of sums and products, rounded to two digits at every step."""
    total, sign = 0, 1
    for place, part in enumerate(re.split(r" ([-+]) ", line)):
        if place % 2:
            sign = -1 if part == "-" else 1
            continue
        product = 1
        for number in part.split(" * "):
            product = _rounded(product * int(number))
        total = _rounded(total + sign * product)
    return total


def _rounded(number: int) -> int:
    return int(float(f"{number:.2g}"))


@cache
def _values() -> dict[str, tuple[str, ...]]:
    """What there is of every relation, in some world that nobody is asked about."""
    found: dict[str, set[str]] = {}
    for (_, relation), other in lookup_world(2**32 - 1, "train", 60).facts.items():
        found.setdefault(relation, set()).add(other)
    return {relation: tuple(sorted(others)) for relation, others in found.items()}
