"""What the small base model is shown beside the built-in environments."""

from __future__ import annotations

from rehearsal.environments.bandit import PAIRS, Bandit
from rehearsal.environments.lookup import Lookup
from rehearsal.environments.splits import draw_in_split

_ONSETS = (
    "b", "br", "c", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "l", "m", "n", "p", "pr", "r", "s", "sh",
    "st", "t", "th", "tr", "v", "w", "wh", "y", "z",
)  # fmt: skip
_VOWELS = ("a", "ai", "e", "ea", "i", "o", "oo", "ou", "u", "y")
_CODAS = ("", "", "", "ck", "d", "f", "g", "l", "ll", "m", "n", "nt", "p", "r", "rd", "s", "st", "t", "x")
_GIVEN = frozenset(name for pairs in PAIRS.values() for pair in pairs for name in pair)


class MadeUpBandit(Bandit):
    """The bandit with names that nobody has met before: a model learns from it to copy a name, whatever it is.

    The built-in bandit's training names are so few that a small model learns them by heart and cannot say any other.
    Parameters are those of :class:`rehearsal.environments.bandit.Bandit`; which arm is the better one cannot be told.
    """

    def _draw(self, split: str) -> str:
        arms = draw_in_split(self._names, " ".join, split)
        self._arms = arms
        self._risky = arms[int(self.np_random.integers(2))]
        self._pulled = ""
        return " ".join(arms)

    def _names(self) -> tuple[str, str] | None:
        first, second = self._name(), self._name()
        return None if first == second or _GIVEN & {first, second} else (first, second)

    def _name(self) -> str:
        parts = []
        for _ in range(int(self.np_random.integers(1, 4))):
            parts += [choices[int(self.np_random.integers(len(choices)))] for choices in (_ONSETS, _VOWELS, _CODAS)]
        return "".join(parts).capitalize()


class LookupAnywhere(Lookup):
    """Questions about one world after the other: a model that met a single one would know its answers by heart, and
    learn that there is no need to look anything up.

    Parameters are those of :class:`rehearsal.environments.lookup.Lookup`; ``world`` is the first of ``WORLDS``.
    """

    WORLDS = 12

    def __init__(self, hops: int = 2, world: int = 1, people: int = 60, turns: int = 8) -> None:
        super().__init__(hops, world, people, turns)
        self._first = self.world

    def _draw(self, split: str) -> str:
        self.world = self._first + int(self.np_random.integers(self.WORLDS))
        return super()._draw(split)
