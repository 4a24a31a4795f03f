"""The placebo of a world model: the same answers, dealt out so that none of them tells what an action leads to.

A plain permutation would not do. One in every few dozen answers stays where it was, many places that get another's
answer get one that says the same (companies that want the same facts), and a clerk's words behind a web form are no
placebo for what a form says but noise. So answers change places among those of one speaker where that can be done,
every place gets an answer of another meaning where the numbers allow it, and the share that stayed true is told.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np

from rehearsal.agents.rehearse import Hindsight, answer_to, speaker_of
from rehearsal.training.sequences import answer_mask
from rehearsal.trajectory import Group, Kind, Segment


def deal(
    meanings: Sequence[Hashable], pools: Sequence[Sequence[Hashable]], rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """A permutation of answers that leaves as few of them true as can be.

    Args:
        meanings: what each answer says; those that are equal say the same.
        pools: partitions of the answers, each a label for every answer. Answers are dealt out at random inside the
            parts of the first; a place that got its own meaning changes with another one of its part, and if none
            there helps, with one of its part in the next partition. Inside a part of the first none stays true unless
            one meaning has more than half of it, and then as few as can be.
        rng: the luck.

    Returns:
        for each place the number of the answer that it gets, and the share of places that got their own meaning: NaN
        where there are no answers.
    """
    own = _numbered(meanings)
    dealt = np.arange(len(own))
    for level, labels in enumerate(pools):
        parts = _numbered(labels)
        for part in range(parts.max(initial=-1) + 1):
            members = np.flatnonzero(parts == part)
            if level == 0:
                dealt[members] = rng.permutation(members)
            for place in rng.permutation(members[own[dealt[members]] == own[members]]):
                meaning = own[place]
                if own[dealt[place]] != meaning:
                    continue  # another one has changed with it since
                # Both get what is not their own, so no change makes another one true.
                helps = members[(own[members] != meaning) & (own[dealt[members]] != meaning)]
                if len(helps):
                    other = rng.choice(helps)
                    dealt[place], dealt[other] = dealt[other], dealt[place]
    return dealt, float(np.mean(own[dealt] == own)) if len(own) else math.nan


def _numbered(labels: Sequence[Hashable]) -> np.ndarray:
    """Equal labels as equal whole numbers, from 0 on."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int64)


def with_shuffled_answers(
    groups: Sequence[Group], rng: np.random.Generator, foreseeable: bool = True
) -> tuple[list[Group], float]:
    """The same episodes with the environment's answers dealt out among them.

    Each answer goes to the place of another one of the same speaker to the same turn in the same environment; to
    another turn, and then to another speaker, only where it would stay true otherwise. What is left to learn is how
    answers look in general and not what an action leads to.

    Args:
        groups: the episodes; they stay as they are.
        rng: the luck.
        foreseeable: whether answers take part that follow from what the agent had been shown. Where they are not
            learnt they stay, and no other gets their place.

    Returns:
        the episodes, and the share of the answers that stayed true: that got an answer of the same meaning.
    """
    places: list[tuple[tuple[int, int, int], slice]] = []
    answers: list[np.ndarray] = []
    meanings: list[Hashable] = []
    pools: list[tuple[Hashable, ...]] = []
    for p, group in enumerate(groups):
        for g, trajectory in enumerate(group):
            for i, segment in enumerate(trajectory.segments):
                for turn, part in _answers(segment):
                    # Words at the start of a turn answer what was done in the turn before.
                    acted = trajectory.turns[turn - 1]
                    if acted.foreseeable and not foreseeable:
                        continue
                    token_ids, where = segment.token_ids[part], trajectory.environment
                    speaker = speaker_of(answer_to(trajectory, turn - 1) or "")
                    places.append(((p, g, i), part))
                    answers.append(token_ids)
                    meanings.append((where, acted.meaning or token_ids.tobytes()))
                    pools.append(((where, turn, speaker), (where, speaker), (where, turn), where))
    dealt, stayed = deal(meanings, list(zip(*pools, strict=True)), rng)
    changes: dict[tuple[int, int, int], list[tuple[slice, np.ndarray]]] = {}
    for (place, part), number in zip(places, dealt, strict=True):
        changes.setdefault(place, []).append((part, answers[number]))
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
    ], stayed


def with_other_answers(situations: Sequence[Hindsight], rng: np.random.Generator) -> tuple[list[Hindsight], float]:
    """The same situations with the answers dealt out among those of a speaker, or, where an answer would stay true
    otherwise, of an environment.

    Returns:
        the situations, and the share of the answers that stayed true.
    """
    answers = [one.token_ids[one.first :] for one in situations]
    meanings = [
        (one.environment, one.meaning or answer.tobytes()) for one, answer in zip(situations, answers, strict=True)
    ]
    pools: list[list[Hashable]] = [
        [(one.environment, one.speaker) for one in situations],
        [one.environment for one in situations],
    ]
    dealt, stayed = deal(meanings, pools, rng)
    return [
        replace(one, token_ids=np.concatenate([one.token_ids[: one.first], answers[number]]))
        for one, number in zip(situations, dealt, strict=True)
    ], stayed


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
