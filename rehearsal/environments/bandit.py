"""Bandit: two named arms and one pull; the names hint at how the arms pay."""

from __future__ import annotations

from typing import Any

from rehearsal.environments.episode import EpisodeEnv, real_number
from rehearsal.environments.splits import draw_in_split
from rehearsal.errors import RecipeError

PAIRS: dict[str, tuple[tuple[str, str], ...]] = {
    "train": (
        ("Clerk", "Pirate"),
        ("Gardener", "Gambler"),
        ("Baker", "Stuntman"),
        ("Notary", "Prospector"),
        ("Nurse", "Daredevil"),
        ("Tailor", "Smuggler"),
        ("Anchor", "Rocket"),
        ("Turtle", "Falcon"),
        ("Harbor", "Storm"),
        ("Savings", "Lottery"),
        ("Brick", "Firework"),
        ("Oak", "Comet"),
    ),
    "validation": (
        ("Archivist", "Explorer"),
        ("Shepherd", "Matador"),
        ("Cottage", "Volcano"),
        ("Granite", "Lightning"),
        ("Ox", "Cheetah"),
        ("Pension", "Roulette"),
    ),
    "test": (
        ("Accountant", "Adventurer"),
        ("Farmer", "Outlaw"),
        ("Janitor", "Inventor"),
        ("Barber", "Racer"),
        ("Snail", "Tiger"),
        ("Lighthouse", "Tornado"),
        ("Bond", "Jackpot"),
        ("Stone", "Wildfire"),
    ),
}
"""Names by split, each pair a steady one and a risky one. No name occurs twice."""


class Bandit(EpisodeEnv):
    """One choice between a steady arm and a risky arm, known by name only.

    The steady arm pays ``low`` every time: its expectation is ``low``, 0.15 by default. The risky arm pays ``high``
    with probability ``chance`` and otherwise 0: its expectation is ``high * chance``, 0.25 by default, so it is the
    better one. Success means that the arm of higher expectation was pulled, whatever it paid. The task is RAGEN's
    (arXiv:2504.20073), with names of our own. The paper gives 0.15 for the steady arm while the published code pays
    0.1; the paper's number is the default here, and ``low=0.1`` gives the code's.

    With ``reversed=True`` the names mislead (published as BanditRev): the steady-sounding name pays like the risky arm
    and the other way round. The instructions stay the same, so that only rewards can tell.

    The order in which the two arms are shown is random. What the splits do not share is for ``held_out`` to say. With
    "names" the three splits have no name in common, so held-out success asks for knowledge of what words mean, which
    only a model that has read about the world can have. With "pairs" every steady name of the training split may stand
    beside every risky one, and the splits have no such pair in common, in either order: what was learnt of each name
    has to carry over to company that it was never seen in. That is a fair test of a model without general language.

    Args:
        low: what the steady arm pays.
        high: what the risky arm pays when it pays.
        chance: the probability that it pays.
        reversed: whether the names mislead.
        held_out: "names" or "pairs".

    Raises:
        RecipeError: for a parameter out of its range, or where both arms have the same expectation.
    """

    name = "bandit"
    max_turns = 1
    max_actions_per_turn = 1

    def __init__(
        self, low: float = 0.15, high: float = 1.0, chance: float = 0.25, reversed: bool = False,
        held_out: str = "names",
    ) -> None:  # fmt: skip
        super().__init__(max_steps=1)
        self.low = real_number("low", low, 0.0, 1e6)
        self.high = real_number("high", high, 0.0, 1e6)
        self.chance = real_number("chance", chance, 0.0, 1.0)
        self.reversed = bool(reversed)
        if self.low == self.high * self.chance:
            raise RecipeError(
                f"Both arms pay {self.low:g} on average, so neither is better; change low, high or chance."
            )
        if held_out not in ("names", "pairs"):
            raise RecipeError(f'held_out must be "names" or "pairs", not {held_out!r}.')
        self.held_out = held_out
        self._arms = ("", "")
        self._risky = ""
        self._pulled = ""

    @property
    def instructions(self) -> str:
        """The rules in a few lines; see :attr:`TextEnv.instructions`."""
        return (
            "There are two arms and you pull one of them, once. Each arm pays in its own way, and its name hints at "
            "how.\nPull the arm that pays more on average. The action is the name of the arm."
        )

    def legal_actions(self) -> list[str]:
        """The names of the two arms, in the order in which they are shown."""
        self._need_reset()
        return list(self._arms)

    def _draw(self, split: str) -> str:
        if self.held_out == "pairs":
            steady, risky = draw_in_split(self._any_pair, " ".join, split)
        else:
            pairs = PAIRS[split]
            steady, risky = pairs[int(self.np_random.integers(len(pairs)))]
        self._arms = (steady, risky) if self.np_random.random() < 0.5 else (risky, steady)
        self._risky = steady if self.reversed else risky
        self._pulled = ""
        return " ".join(self._arms)

    def _any_pair(self) -> tuple[str, str]:
        known = PAIRS["train"]
        steady, risky = self.np_random.integers(len(known), size=2).tolist()
        return known[steady][0], known[risky][1]

    def _act(self, action: str) -> tuple[float, bool, bool, bool]:
        self._pulled = action
        # The draw is made for either arm, so that the same seed pays the same, whatever was pulled before.
        lucky = self.np_random.random() < self.chance
        reward = (self.high if lucky else 0.0) if action == self._risky else self.low
        return reward, True, action == self._best, True

    @property
    def _best(self) -> str:
        if self.high * self.chance > self.low:
            return self._risky
        return next(arm for arm in self._arms if arm != self._risky)

    def _observation(self) -> str:
        return f"pulled {self._pulled}" if self._pulled else f"arms {self._arms[0]} {self._arms[1]}"

    def _state(self) -> str:
        return f"{self._arms[0]} {self._arms[1]} {self._pulled}".strip()

    def oracle(self) -> list[str]:
        """The arm of higher expectation, or nothing once an arm was pulled."""
        self._need_reset()
        return [] if self._over else [self._best]

    def optimal_success(self) -> float:
        """1 before the pull; afterwards 1 or 0."""
        self._need_reset()
        return float(self._success) if self._over else 1.0

    def describe(self) -> dict[str, Any]:
        """``arms`` as shown, ``risky`` (the one that pays by chance), ``best`` and ``pulled`` ("" before)."""
        self._need_reset()
        return {"arms": list(self._arms), "risky": self._risky, "best": self._best, "pulled": self._pulled}
