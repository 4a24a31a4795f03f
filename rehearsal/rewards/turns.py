"""Credits for single turns: a rule that was broken, a duty that was done."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rehearsal.errors import RewardError


@dataclass(frozen=True)
class TurnCredits:
    """Penalties for violations and credit for obligations, by turn (RLVP, arXiv:2607.07435).

    A turn with at least one violation costs ``penalty``. Each obligation earns ``credit`` once, in the turn that
    discharges it first, so doing it again earns nothing. With ``gated``, obligations count only in episodes that
    succeed (the paper's variant c4), while violations always cost.

    Four rules of the paper: punish only what can be checked; keep the outcome primary (with penalties alone an agent
    learns to do nothing: success went to 0); pair each penalty with a credit; and see that a compliant way exists.

    Group-normalised: summed into the reward of an episode, these tell apart episodes of equal outcome, so groups in
    which all fail, or all succeed, teach compliance. Added up they compete with the outcome in the same standard
    deviation; normalise them apart (:func:`rehearsal.rewards.groups.normalised_apart`) to keep a rare success from
    drowning in them. Given to the turn's own reward instead, with an estimator that goes by turns, the blame stays with
    the turn that earned it.

    Attributes:
        penalty: what a turn with a violation costs, at least 0.
        credit: what an obligation earns, at least 0.
        gated: whether obligations count only with success.

    Raises:
        RewardError: for negative amounts.
    """

    penalty: float = 0.5
    credit: float = 0.5
    gated: bool = True

    def __post_init__(self) -> None:
        if self.penalty < 0 or self.credit < 0:
            raise RewardError(
                "penalty and credit of a turn are amounts of at least 0, "
                f"not penalty={self.penalty} and credit={self.credit}"
            )

    def __call__(
        self, violations_T: Sequence[Collection[str]], obligations_T: Sequence[Collection[str]], success: bool
    ) -> NDArray[np.float64]:
        """The credits of an episode of T turns.

        Args:
            violations_T: names of the rules that each turn broke.
            obligations_T: names of the duties that each turn did.
            success: whether the episode reached its goal.

        Returns:
            float64 of shape (T,).

        Raises:
            RewardError: for sequences of different lengths.
        """
        if len(violations_T) != len(obligations_T):
            raise RewardError(
                f"There are violations of {len(violations_T)} turns and obligations of {len(obligations_T)}."
            )
        credits_T = np.zeros(len(violations_T))
        done: set[str] = set()
        for turn, (broken, duties) in enumerate(zip(violations_T, obligations_T, strict=True)):
            if broken:
                credits_T[turn] -= self.penalty
            new = set(duties) - done
            done |= new
            if success or not self.gated:
                credits_T[turn] += self.credit * len(new)
        return credits_T
