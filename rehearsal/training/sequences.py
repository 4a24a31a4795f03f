"""The sequences of a step, flat, with the tokens that somebody may learn from.

T tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rehearsal.agents.rehearse import Hindsight
from rehearsal.algorithms.shaping import was_cut_off
from rehearsal.models.packing import PackItem
from rehearsal.trajectory import Group, Kind, Segment, Trajectory


@dataclass
class Sequences:
    """The sequences of a step with their target tokens, in order of group and sample.

    ``failed`` says which are of failed episodes, whose targets are answers alone.
    """

    segments: list[Segment] = field(default_factory=list)
    targets: list[np.ndarray] = field(default_factory=list)
    group: list[int] = field(default_factory=list)
    sample: list[int] = field(default_factory=list)
    turn_rewards: list[np.ndarray] = field(default_factory=list)
    cut_off: list[bool] = field(default_factory=list)
    failed: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.segments)

    def episodes(self) -> list[tuple[int, int]]:
        """Group and sample of each sequence's episode."""
        return list(zip(self.group, self.sample, strict=True))

    def items(self) -> list[PackItem]:
        # Nothing behind the last target has a say in any of them.
        return [
            PackItem(segment.token_ids[: targets[-1] + 1] if len(targets) else segment.token_ids[:1], targets, group)
            for segment, targets, group in zip(self.segments, self.targets, self.group, strict=True)
        ]


def collect(
    groups: Sequence[Group], sampled: bool = True, answers: bool = False, foreseeable: bool = True
) -> Sequences:
    """The sequences of a step.

    A failed episode has no reward, so what was sampled in it teaches the policy nothing. What the environment answered
    before it broke is as true as any other answer: where answers are learnt, those are.

    Args:
        groups: the episodes.
        sampled: whether what the policy sampled is among the targets.
        answers: whether what the environment answered is, see :func:`answer_mask`.
        foreseeable: whether answers are that follow from what the agent had been shown.
    """
    collected = Sequences()
    for p, group in enumerate(groups):
        for g, trajectory in enumerate(group):
            if trajectory.failed and not answers:
                continue
            for segment in trajectory.segments:
                wanted_T = np.zeros(len(segment), dtype=bool)
                if sampled and not trajectory.failed:
                    wanted_T |= segment.sampled_mask
                if answers:
                    wanted_T |= answer_mask(segment) if foreseeable else surprise_mask(segment, trajectory)
                targets = np.nonzero(wanted_T)[0]
                if trajectory.failed and not len(targets):
                    continue
                collected.segments.append(segment)
                collected.targets.append(targets[targets > 0])
                collected.group.append(p)
                collected.sample.append(g)
                collected.turn_rewards.append(trajectory.turn_rewards)
                collected.cut_off.append(was_cut_off(trajectory))
                collected.failed.append(trajectory.failed)
    return collected


def answer_mask(segment: Segment) -> np.ndarray:
    """bool of shape (T,): the environment's answers. The first observation answers no action and is not among them."""
    return (segment.kinds == Kind.OBSERVATION) & (segment.turns > 0)


def surprise_mask(segment: Segment, trajectory: Trajectory) -> np.ndarray:
    """bool of shape (T,): the answers that do not follow from what the agent had been shown before, as far as the
    environment tells it."""
    # The words at the start of a turn answer what was done in the turn before.
    known = np.array([False, *(turn.foreseeable for turn in trajectory.turns)])
    return answer_mask(segment) & ~known[segment.turns]


def collect_situations(situations: Sequence[Hindsight]) -> Sequences:
    """Sequences whose targets are the true answers to what was rehearsed."""
    collected = Sequences()
    for number, one in enumerate(situations):
        length = len(one.token_ids)
        kinds = np.full(length, int(Kind.NOTICE), np.int8)
        kinds[one.first :] = int(Kind.OBSERVATION)
        collected.segments.append(
            Segment(one.token_ids, np.full(length, np.nan, np.float32), kinds, np.zeros(length, np.int16))
        )
        collected.targets.append(np.arange(one.first, length))
        # One group for all: they begin with the same rules.
        collected.group.append(0)
        collected.sample.append(number)
        collected.turn_rewards.append(np.zeros(1))
        collected.cut_off.append(False)
        collected.failed.append(False)
    return collected
