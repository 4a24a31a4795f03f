"""What is added to the rewards of training episodes, and the parts of which a reward is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rehearsal.errors import EnvironmentFault, RecipeError
from rehearsal.rewards.lengths import cosine_length_reward, kimi_length_reward
from rehearsal.rewards.repetition import repetition_penalty
from rehearsal.rewards.turns import TurnCredits
from rehearsal.trajectory import Group, Trajectory, all_trajectories

ENVIRONMENT = "reward"
"""The part that is neither shaping nor told in ``info["parts"]``: what environment and harness gave."""
OVERLONG = "overlong"
"""The part that the overlong penalty is."""
SHAPING = ("length", "repetition", "violations", "obligations", "call")
"""The parts that :class:`RewardShaping` adds."""


@dataclass(frozen=True)
class RewardShaping:
    """Amounts that come on top of the rewards of an environment, in training alone.

    They are written into ``Turn.shaping``, so filters, advantages, figures and stored episodes all see one reward.
    Evaluation plays without them.

    Attributes:
        length: "kimi" or "cosine" (see :mod:`rehearsal.rewards.lengths`), by the tokens that an episode sampled, with
            ``success`` as what is right. The cosine takes the place of a reward of 1 or 0: its distance from that is
            what is added.
        length_weight: what it is multiplied by.
        length_tokens: of an episode, at which the cosine reaches its second value.
        repetition: what an answer costs that says the same again and again, times the share of its n-grams that do;
            each answer's share of an episode is one over their number.
        repetition_ngram: n.
        violation: what a turn costs that broke a rule (``info["violations"]``).
        obligation: what a duty earns, in the turn in which it is done first (``info["obligations"]``).
        gated: whether duties count only in episodes that succeed.
        call: what the first tool call of an episode earns that brought a result.

    Raises:
        RecipeError: for amounts out of range, or a cosine that is not told its length.
    """

    length: Literal["none", "kimi", "cosine"] = "none"
    length_weight: float = 1.0
    length_tokens: int | None = None
    repetition: float = 0.0
    repetition_ngram: int = 3
    violation: float = 0.0
    obligation: float = 0.0
    gated: bool = True
    call: float = 0.0

    def __post_init__(self) -> None:
        for name in ("repetition", "violation", "obligation", "call"):
            amount = getattr(self, name)
            if not (amount >= 0 and math.isfinite(amount)):
                raise RecipeError(f"rewards.{name} is an amount of at least 0, not {amount}")
        if (self.length == "cosine") != (self.length_tokens is not None):
            raise RecipeError(
                "rewards.length_tokens, the tokens of an episode at which the cosine ends, goes with rewards.length "
                "set to cosine: give both or neither"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The parts that it adds."""
        amounts = {
            "length": self.length != "none", "repetition": self.repetition, "violations": self.violation,
            "obligations": self.obligation, "call": self.call,
        }  # fmt: skip
        return tuple(name for name, amount in amounts.items() if amount)

    def apply(self, groups: Sequence[Group]) -> None:
        """Write the amounts into the turns of these episodes; an episode that failed or never answered gets none.

        Raises:
            EnvironmentFault: where length goes by success and the environment tells none.
        """
        if not self.names:
            return
        for trajectory in all_trajectories(groups):
            if not trajectory.failed and trajectory.turns:
                self._by_turns(trajectory)
        if self.length != "none":
            for group in groups:
                self._by_length(group)

    def _by_turns(self, trajectory: Trajectory) -> None:
        turns, success = trajectory.turns, bool(trajectory.success)
        nothing: list[Sequence[str]] = [()] * len(turns)
        duties_T = [turn.obligations for turn in turns]
        told_T = [["told"] if any(not call.error for call in turn.calls) else [] for turn in turns]
        added: dict[str, NDArray[np.float64]] = {
            "repetition": self._repetition(trajectory) if self.repetition else np.zeros(len(turns)),
            "violations": TurnCredits(self.violation, 0.0)([turn.violations for turn in turns], nothing, success),
            "obligations": TurnCredits(0.0, self.obligation, self.gated)(nothing, duties_T, success),
            "call": TurnCredits(0.0, self.call, gated=False)(nothing, told_T, success),
        }
        for name, amounts_T in added.items():
            if name in self.names:
                for turn, amount in zip(turns, amounts_T.tolist(), strict=True):
                    turn.shaping[name] = amount

    def _repetition(self, trajectory: Trajectory) -> NDArray[np.float64]:
        """By turn, so that the answer that repeats itself bears it."""
        penalties_T = np.zeros(len(trajectory.turns))
        for segment in trajectory.segments:
            sampled = segment.sampled_mask
            for turn in np.unique(segment.turns[sampled]).tolist():
                said = segment.token_ids[sampled & (segment.turns == turn)].tolist()
                penalties_T[turn] += repetition_penalty(said, self.repetition_ngram, self.repetition)
        return penalties_T / len(trajectory.turns)

    def _by_length(self, group: Group) -> None:
        played = [trajectory for trajectory in group if not trajectory.failed and trajectory.turns]
        if not played:
            return
        if all(trajectory.success is None for trajectory in played):
            raise EnvironmentFault(
                f'rewards.length = "{self.length}" goes by success, and the environment tells none: report it as '
                'info["success"], or set rewards.length to none.'
            )
        lengths_G = [trajectory.n_sampled for trajectory in played]
        passed_G = np.array([bool(trajectory.success) for trajectory in played])
        if self.length == "kimi":
            amounts_G = kimi_length_reward([lengths_G], [passed_G])[0]
        else:
            assert self.length_tokens is not None
            amounts_G = cosine_length_reward(lengths_G, passed_G, self.length_tokens) - passed_G
        for trajectory, amount in zip(played, amounts_G.tolist(), strict=True):
            # The length is known at the end.
            trajectory.turns[-1].shaping["length"] = self.length_weight * amount


def parts_matrix(groups: Sequence[Group], names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Parts of the rewards of all groups, each of shape (P, G); NaN where there is no reward.

    A part is the sum over the turns of an episode. Where the environment tells of it in some episodes, those in which
    it does not have 0 of it: an agent that never answered has not kept the form either.

    Args:
        groups: P groups of up to G episodes.
        names: :data:`ENVIRONMENT`, some of :data:`SHAPING`, or what the environment tells in ``info["parts"]``.

    Raises:
        EnvironmentFault: for a part that no episode has, unless all of them failed.
    """
    width = max((len(group) for group in groups), default=0)
    parts = {name: np.full((len(groups), width), np.nan) for name in names}
    told: set[str] = set()
    for row, group in enumerate(groups):
        for column, trajectory in enumerate(group):
            if trajectory.failed:
                continue
            mine = trajectory.parts
            told |= set(mine)
            for name, part_PG in parts.items():
                part_PG[row, column] = mine.get(name, 0.0)
    for name in names:
        if told and name not in told and name not in SHAPING:
            raise EnvironmentFault(
                f"algorithm.options.parts names {name}, and no episode has such a part; there are "
                f"{', '.join(sorted(told))}."
            )
    return parts


def checked_parts(weights: Mapping[str, float], overlong: bool) -> dict[str, float]:
    """The weights of the parts of a reward, as a recipe gives them.

    Raises:
        RecipeError: for a weight that is no number, or an overlong penalty that has none.
    """
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise RecipeError(f"the weight of {name} in option 'parts' must be a number, not {weight!r}")
    if weights and overlong != (OVERLONG in weights):
        raise RecipeError(
            f"{OVERLONG!r} among the weights of option 'parts' goes with 'overlong_max_tokens': give both or neither"
        )
    return {name: float(weight) for name, weight in weights.items()}
