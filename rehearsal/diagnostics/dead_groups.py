"""Why there is nothing to compare: the causes of dead groups, and which of them has a say.

A group is dead where all its rewards are equal: every episode succeeds, none does, or the reward is the same for both.
Most runs have some of each, so the verdicts share the whole mixture out among themselves: wherever too many groups are
dead, exactly one of them speaks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from rehearsal.diagnostics.series import Series

Cause = Literal["too_easy", "too_hard", "no_signal", "all_or_nothing"]
"""The rules of the verdict that name a cause."""


@dataclass(frozen=True)
class DeadGroups:
    """Recent shares of the groups.

    Attributes:
        dead: all dead groups; NaN where groups are not compared.
        solved: of them those in which every episode succeeds.
        failed: those in which none does.
        equal: those with equal rewards for success and failure, or where success is not known.
        success: of the episodes; NaN where it is not known.
    """

    dead: float
    solved: float
    failed: float
    equal: float
    success: float

    @property
    def mixture(self) -> str:
        """The causes in words, those that round to nothing left out."""
        causes = (
            (self.solved, "because all succeed"),
            (self.failed, "because none does"),
            (self.equal, "whether they succeed or not"),
        )
        return ", ".join(f"in {100 * share:.0f}% {words}" for share, words in causes if share >= 0.005)


def dead_groups(series: Series) -> DeadGroups:
    """The shares of a run as it stands after its last step."""

    def share(cause: str) -> float:
        found = series.recent(f"signal/dead_groups_{cause}")
        return 0.0 if math.isnan(found) else found

    return DeadGroups(
        series.recent("signal/dead_groups"), share("solved"), share("failed"), share("equal"),
        series.recent("train/success"),
    )  # fmt: skip


def cause_of(found: DeadGroups, *, dead: float, solved: float, done: float) -> Cause | None:
    """The one rule that names the cause; None while there is enough to compare.

    Tasks that are solved are no defect: a run that learns has more and more of them, and what it can still learn is in
    the others. So where most dead groups are solved ones, too many are dead when they are too many of the others.

    Args:
        found: the shares.
        dead: share of dead groups from which on there is no signal to speak of.
        solved: share of solved groups from which on tasks are too easy.
        done: success from which on tasks that are solved or beyond reach are no complaint.
    """
    if found.solved >= solved:
        return "too_easy"
    if not found.dead >= dead:
        return None
    if found.failed > found.dead / 2:
        return "too_hard"
    if found.equal > found.dead / 2:
        return "no_signal"
    beyond_reach = found.failed >= (1 - found.solved) / 2
    if min(found.solved, found.failed) >= found.dead / 5 and beyond_reach and not found.success >= done:
        return "all_or_nothing"
    if found.solved > found.dead / 2 and found.dead - found.solved < dead * (1 - found.solved):
        return None
    return "no_signal"
