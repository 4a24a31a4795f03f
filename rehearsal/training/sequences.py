"""The sequences of a step, flat, with the tokens that somebody may learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rehearsal.algorithms.shaping import was_cut_off
from rehearsal.models.packing import PackItem
from rehearsal.trajectory import Group, Segment


@dataclass
class Sequences:
    """The sequences of a step with their target tokens, in order of group and sample."""

    segments: list[Segment] = field(default_factory=list)
    targets: list[np.ndarray] = field(default_factory=list)
    group: list[int] = field(default_factory=list)
    sample: list[int] = field(default_factory=list)
    turn_rewards: list[np.ndarray] = field(default_factory=list)
    cut_off: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.segments)

    def items(self) -> list[PackItem]:
        return [
            PackItem(segment.token_ids, targets, group)
            for segment, targets, group in zip(self.segments, self.targets, self.group, strict=True)
        ]


def collect(groups: Sequence[Group]) -> Sequences:
    """The sequences of all episodes that did not fail."""
    collected = Sequences()
    for p, group in enumerate(groups):
        for g, trajectory in enumerate(group):
            if trajectory.failed:
                continue
            for segment in trajectory.segments:
                targets = np.nonzero(segment.sampled_mask)[0]
                collected.segments.append(segment)
                collected.targets.append(targets[targets > 0])
                collected.group.append(p)
                collected.sample.append(g)
                collected.turn_rewards.append(trajectory.turn_rewards)
                collected.cut_off.append(was_cut_off(trajectory))
    return collected
