"""What the small base model is shown beside the built-in environments."""

from __future__ import annotations

from typing import Any

from rehearsal.environments.bandit import PAIRS, Bandit
from rehearsal.environments.episode import EpisodeEnv
from rehearsal.environments.lookup import Lookup
from rehearsal.environments.splits import draw_in_split

_ONSETS = (
    "b", "br", "c", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "l", "m", "n", "p", "pr", "r", "s", "sh",
    "st", "t", "th", "tr", "v", "w", "wh", "y", "z",
)  # fmt: skip
_VOWELS = ("a", "ai", "e", "ea", "i", "o", "oo", "ou", "u", "y")
_CODAS = ("", "", "", "ck", "d", "f", "g", "l", "ll", "m", "n", "nt", "p", "r", "rd", "s", "st", "t", "x")
_GIVEN = frozenset(name for pairs in PAIRS.values() for pair in pairs for name in pair)


def made_up_name(rng: Any) -> str:
    """A name of one to three syllables that need not mean anything to anybody."""
    parts = []
    for _ in range(int(rng.integers(1, 4))):
        parts += [choices[int(rng.integers(len(choices)))] for choices in (_ONSETS, _VOWELS, _CODAS)]
    return "".join(parts).capitalize()


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
        return made_up_name(self.np_random)


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


class Recite(EpisodeEnv):
    """Repeat a line, or say what goes with a name: nothing but reading off what stands there.

    A small model that is only ever shown a few hundred names and numbers learns them by heart, and says one of those
    where it meets another. Lines that are never the same twice leave it no way but to look: what it learns from them
    serves wherever something has to be copied, be it a sum, the name of a company or a word from a document.
    """

    name = "recite"
    max_turns = 1
    max_actions_per_turn = 1

    def __init__(self) -> None:
        super().__init__(max_steps=1)
        self._line = self._asked = self._wanted = ""

    @property
    def instructions(self) -> str:
        """The rules in a few lines; see :attr:`TextEnv.instructions`."""
        return "Repeat the line. If it ends with a question, say what goes with the name."

    def _draw(self, split: str) -> str:
        self._line, self._wanted = draw_in_split(self._random_line, lambda drawn: drawn[0], split)
        return self._line

    def _random_line(self) -> tuple[str, str]:
        rng = self.np_random
        if rng.random() < 0.6:
            line = " ".join(self._part() for _ in range(int(rng.integers(1, 6))))
            return line, line
        pairs = {made_up_name(rng): self._part() for _ in range(int(rng.integers(2, 5)))}
        asked = list(pairs)[int(rng.integers(len(pairs)))]
        told = " ".join(f"{name}: {part}." for name, part in pairs.items())
        return f"{told} {asked}?", pairs[asked]

    def _part(self) -> str:
        rng = self.np_random
        kind = int(rng.integers(3))
        if kind == 0:
            return str(int(rng.integers(10 ** int(rng.integers(1, 6)))))
        if kind == 1:
            return made_up_name(rng)
        numbers = [str(int(rng.integers(10 ** int(rng.integers(1, 4))))) for _ in range(2)]
        return f" {'+-*'[int(rng.integers(3))]} ".join(numbers)

    def _act(self, action: str) -> tuple[float, bool, bool, bool]:
        right = action == self._wanted
        return float(right), True, right, True

    def _observation(self) -> str:
        return ("right" if self._success else "wrong") if self._over else self._line

    def _state(self) -> str:
        return self._line

    def oracle(self) -> list[str]:
        """What has to be said; nothing once something was."""
        self._need_reset()
        return [] if self._over else [self._wanted]

    def describe(self) -> dict[str, Any]:
        """Nothing: players say it anyway."""
        self._need_reset()
        return {}
