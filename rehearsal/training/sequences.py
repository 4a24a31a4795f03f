"""The sequences of a step, flat, with the tokens that somebody may learn from.

T tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rehearsal.agents.rehearse import Hindsight
from rehearsal.algorithms.shaping import was_cut_off
from rehearsal.models.packing import PackItem
from rehearsal.trajectory import Group, Kind, Segment, Trajectory


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
    """The sequences of all episodes that did not fail.

    Args:
        groups: the episodes.
        sampled: whether what the policy sampled is among the targets.
        answers: whether what the environment answered is, see :func:`answer_mask`.
        foreseeable: whether answers are that follow from what the agent had been shown.
    """
    collected = Sequences()
    for p, group in enumerate(groups):
        for g, trajectory in enumerate(group):
            if trajectory.failed:
                continue
            for segment in trajectory.segments:
                wanted_T = np.zeros(len(segment), dtype=bool)
                if sampled:
                    wanted_T |= segment.sampled_mask
                if answers:
                    wanted_T |= answer_mask(segment) if foreseeable else surprise_mask(segment, trajectory)
                targets = np.nonzero(wanted_T)[0]
                collected.segments.append(segment)
                collected.targets.append(targets[targets > 0])
                collected.group.append(p)
                collected.sample.append(g)
                collected.turn_rewards.append(trajectory.turn_rewards)
                collected.cut_off.append(was_cut_off(trajectory))
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


def with_shuffled_answers(groups: Sequence[Group], rng: np.random.Generator) -> list[Group]:
    """The same episodes with the environment's answers dealt out among them: a world model's placebo.

    Each answer goes to the place of another one to the same turn, in the same environment, so that what is left to
    learn is how answers look in general and not what an action leads to.
    """
    parts: dict[tuple[str, int], list[tuple[tuple[int, int, int], slice, np.ndarray]]] = {}
    for p, group in enumerate(groups):
        for g, trajectory in enumerate(group):
            for i, segment in enumerate(trajectory.segments):
                for turn, part in _answers(segment):
                    held = parts.setdefault((trajectory.environment, turn), [])
                    held.append(((p, g, i), part, segment.token_ids[part]))
    changes: dict[tuple[int, int, int], list[tuple[slice, np.ndarray]]] = {}
    for held in parts.values():
        for number, (where, part, _) in zip(rng.permutation(len(held)), held, strict=True):
            changes.setdefault(where, []).append((part, held[number][2]))
    return [
        Group(
            [
                replace(
                    trajectory,
                    segments=[_spliced(s, changes.get((p, g, i), [])) for i, s in enumerate(trajectory.segments)],
                )
                for g, trajectory in enumerate(group)
            ]
        )
        for p, group in enumerate(groups)
    ]


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
    return collected


def with_other_answers(situations: Sequence[Hindsight], rng: np.random.Generator) -> list[Hindsight]:
    """The same situations with the answers dealt out among those of an environment: the placebo of rehearsing."""
    places: dict[str, list[int]] = {}
    for number, one in enumerate(situations):
        places.setdefault(one.environment, []).append(number)
    dealt = list(situations)
    for own in places.values():
        for number, other in zip(own, rng.permutation(own), strict=True):
            one, answer = situations[number], situations[other].token_ids[situations[other].first :]
            dealt[number] = replace(one, token_ids=np.concatenate([one.token_ids[: one.first], answer]))
    return dealt


def _answers(segment: Segment) -> list[tuple[int, slice]]:
    """The runs of answer tokens, with the turn of each."""
    marked_T = answer_mask(segment).astype(np.int8)
    edges = np.flatnonzero(np.diff(marked_T, prepend=0, append=0))
    return [(int(segment.turns[a]), slice(int(a), int(b))) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _spliced(segment: Segment, changes: Sequence[tuple[slice, np.ndarray]]) -> Segment:
    """The segment with some runs of tokens replaced by others, which may be longer or shorter."""
    pieces: dict[str, list[np.ndarray]] = {"token_ids": [], "logprobs": [], "kinds": [], "turns": []}
    position = 0
    for part, token_ids in [*sorted(changes, key=lambda change: change[0].start), (slice(len(segment), None), None)]:
        for name, into in pieces.items():
            into.append(getattr(segment, name)[position : part.start])
        if token_ids is not None:
            n = len(token_ids)
            pieces["token_ids"].append(token_ids)
            pieces["logprobs"].append(np.full(n, np.nan, np.float32))
            pieces["kinds"].append(np.full(n, Kind.OBSERVATION, np.int8))
            pieces["turns"].append(np.full(n, segment.turns[part.start], np.int16))
            position = part.stop
    return Segment(**{name: np.concatenate(parts) for name, parts in pieces.items()})
