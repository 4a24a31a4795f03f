"""Sequences into packs: no padding, and a prompt that a group shares is read once.

T packed tokens, N target tokens (those whose log-prob somebody wants).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rehearsal.models.packed import PackedPlan, Span

# A shorter common prefix is not worth the bookkeeping in attention.
_MIN_PREFIX = 16
# A smaller pack has too few tokens that share a prompt to be worth a worker of its own.
_LEAST_TOKENS = 1024


@dataclass
class PackItem:
    """One sequence to be packed.

    Attributes:
        token_ids: int32 of shape (T,).
        targets: positions (at least 1) of the tokens whose log-probs are wanted, ascending.
        group: sequences of the same group may share a prefix; they should stand next to each other.
    """

    token_ids: np.ndarray
    targets: np.ndarray
    group: int


@dataclass
class Pack:
    """One micro-batch, ready for a packed forward pass.

    Attributes:
        token_ids_T, positions_T: int64.
        plan: attention among the sequences.
        sources_N: index into T of the hidden state that predicts each target.
        targets_N: the target's token id.
        items: which of the sequences given to :func:`make_packs` it holds, in order; targets follow this order.
        saved_tokens: tokens that sharing prefixes left out.
    """

    token_ids_T: Tensor
    positions_T: Tensor
    plan: PackedPlan
    sources_N: Tensor
    targets_N: Tensor
    items: list[int]
    saved_tokens: int

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids_T)


def common_prefix(sequences: Sequence[np.ndarray]) -> int:
    """Length of the longest prefix that all sequences share."""
    length = min(len(sequence) for sequence in sequences)
    first = sequences[0][:length]
    for sequence in sequences[1:]:
        different = np.nonzero(first[:length] != sequence[:length])[0]
        if len(different):
            length = int(different[0])
    return length


@dataclass(frozen=True)
class _Run:
    """Neighbours of one group in a pack, and what they have in common.

    Attributes:
        first: token ids of the first of them.
        count: how many there are.
        tokens: their tokens, those in common counted each time.
        common: length of the longest prefix that all share.
        shortest: length of the shortest.
    """

    first: np.ndarray
    count: int
    tokens: int
    common: int
    shortest: int

    @classmethod
    def of(cls, sequence: np.ndarray) -> _Run:
        return cls(sequence, 1, len(sequence), len(sequence), len(sequence))

    def joined_by(self, sequence: np.ndarray) -> _Run:
        common = common_prefix([self.first[: self.common], sequence])
        return _Run(self.first, self.count + 1, self.tokens + len(sequence), common, min(self.shortest, len(sequence)))

    @property
    def shared(self) -> int:
        """Tokens that are packed once for all."""
        # Each sequence keeps a token of its own, so that every span is non-empty.
        length = min(self.common, self.shortest - 1) if self.count > 1 else 0
        return length if length >= _MIN_PREFIX else 0

    @property
    def packed(self) -> int:
        """Tokens that they take in a pack."""
        return self.tokens - self.shared * (self.count - 1)


def _pack(items: Sequence[PackItem], members: list[int], share: bool, device: torch.device | str) -> Pack:
    token_ids: list[np.ndarray] = []
    spans: list[Span] = []
    sources: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    position = saved = start = 0
    while start < len(members):
        stop = start
        while stop < len(members) and items[members[stop]].group == items[members[start]].group:
            stop += 1
        sequences = [items[i].token_ids for i in members[start:stop]]
        shared = 0
        if share:
            run = _Run.of(sequences[0])
            for sequence in sequences[1:]:
                run = run.joined_by(sequence)
            shared = run.shared
        prefix: tuple[tuple[int, int], ...] = ()
        if shared:
            prefix = ((position, position + shared),)
            spans.append(Span(position, position + shared))
            token_ids.append(sequences[0][:shared])
            position += shared
            saved += shared * (stop - start - 1)
        for i, sequence in zip(members[start:stop], sequences, strict=True):
            own = len(sequence) - shared
            spans.append(Span(position, position + own, prefix))
            token_ids.append(sequence[shared:])
            wanted = items[i].targets
            before = wanted - 1
            offset = prefix[0][0] if prefix else 0
            sources.append(np.where(before < shared, before + offset, before - shared + position))
            targets.append(sequence[wanted])
            position += own
        start = stop
    plan = PackedPlan(spans, position, device)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(device)

    return Pack(
        tensor(np.concatenate(token_ids)), torch.from_numpy(plan.positions_T).to(device), plan,
        tensor(np.concatenate(sources)), tensor(np.concatenate(targets)), list(members), saved,
    )  # fmt: skip


def make_packs(
    items: Sequence[PackItem], max_tokens: int, *, share_prefixes: bool = True, device: torch.device | str = "cpu",
    workers: int = 1,
) -> list[Pack]:  # fmt: skip
    """Cut sequences into packs of at most ``max_tokens``, in order, never splitting one.

    A sequence longer than that gets a pack of its own. Nothing is dropped and nothing repeated.

    Args:
        items: the sequences.
        max_tokens: of a pack.
        share_prefixes: whether a prefix that neighbours of one group have in common is packed once.
        device: of the packs.
        workers: how many packs are worked on at the same time. Packs are made smaller where that keeps them all at work
            to the end.
    """
    cuts = _cut(items, max_tokens, share_prefixes)
    if len(cuts) % workers:
        cuts = _evened(items, max_tokens, share_prefixes, cuts, len(cuts) + workers - len(cuts) % workers)
    return [_pack(items, members, share_prefixes, device) for members in cuts]


def _cut(items: Sequence[PackItem], max_tokens: int, share_prefixes: bool) -> list[list[int]]:
    """The members of each pack."""
    cuts: list[list[int]] = []
    members: list[int] = []
    # Tokens of the pack up to the last run of neighbours of one group, and that run.
    before = 0
    run: _Run | None = None
    for i, item in enumerate(items):
        joins = run is not None and share_prefixes and items[members[-1]].group == item.group
        if run is not None and joins:
            longer, behind = run.joined_by(item.token_ids), before
        else:
            longer, behind = _Run.of(item.token_ids), before + (0 if run is None else run.packed)
        if members and behind + longer.packed > max_tokens:
            cuts.append(members)
            members, longer, behind = [], _Run.of(item.token_ids), 0
        members.append(i)
        before, run = behind, longer
    if members:
        cuts.append(members)
    return cuts


def _evened(
    items: Sequence[PackItem], max_tokens: int, share_prefixes: bool, cuts: list[list[int]], most: int
) -> list[list[int]]:  # fmt: skip
    """``cuts``, or smaller ones: those of the smallest budget that makes at most ``most`` packs."""
    low, high = min(_LEAST_TOKENS, max_tokens), max_tokens
    while high - low > _LEAST_TOKENS // 8:
        budget = (low + high) // 2
        smaller = _cut(items, budget, share_prefixes)
        if len(smaller) <= most:
            cuts, high = smaller, budget
        else:
            low = budget
    return cuts
