"""The places of an engine: who holds which part of the pool of keys and values, and what forks take over."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from rehearsal.generation.cache import KeyValuePool, Saved


class Guest(Protocol):
    """What holds a place, or waits for one."""

    slot: int
    """Its place; -1 without one."""
    computed: int
    """How many of its tokens have keys and values in its place."""
    prefix: SharedPrefix | None
    """What it takes over from the one that it was forked from, while it has not done so."""
    shared: SharedPrefix | None
    """What its own forks take over from it."""
    last_used: int

    @property
    def length(self) -> int: ...


@dataclass
class SharedPrefix:
    """The first ``length`` tokens that forks have in common, computed once."""

    length: int
    holders: set[int] = field(default_factory=set)
    """Places whose keys and values begin with these tokens."""
    filler: Guest | None = None
    """The one that is computing them now."""
    waiting: int = 0
    """Forks that have no place yet."""
    saved: Saved | None = None
    """A copy for those who wait, made when the last holder left."""

    @property
    def coming(self) -> bool:
        """Whether somebody computes the tokens now, and nobody has them yet."""
        present = bool(self.holders) or self.saved is not None
        return not present and self.filler is not None and self.filler.slot >= 0


G = TypeVar("G", bound=Guest)


class Places(Generic[G]):
    """``capacity`` places in a pool; each guest has one at most.

    Args:
        pool: where keys and values lie.
        capacity: the number of places.
    """

    def __init__(self, pool: KeyValuePool, capacity: int) -> None:
        self._pool = pool
        self._guests: list[G | None] = [None] * capacity
        # A heap: the lowest free place is taken first, so what is sampled does not depend on what was played before,
        # not even by the rounding of another order of rows.
        self._free = list(range(capacity))
        self._prefixes: list[list[SharedPrefix]] = [[] for _ in range(capacity)]

    def __len__(self) -> int:
        """The places that are taken."""
        return len(self._guests) - len(self._free)

    def __iter__(self) -> Iterator[G]:
        return (guest for guest in self._guests if guest is not None)

    def __getitem__(self, slot: int) -> G:
        guest = self._guests[slot]
        assert guest is not None
        return guest

    @property
    def full(self) -> bool:
        return not self._free

    def share(self, parent: G, child: G) -> None:
        """Let a fork that has no place yet take over what its parent has computed, or will have."""
        # The last token is computed by each fork itself, because its output is what the first draw needs. In the middle
        # of an episode so is what the parent has not read yet.
        length = parent.length - 1
        if parent.slot >= 0 and 0 < parent.computed < length:
            length = parent.computed
        if length < 1:
            return
        prefix = parent.shared
        if prefix is None or prefix.length != length:
            prefix = SharedPrefix(length)
            if parent.slot >= 0 and parent.computed >= length:
                self._hold(prefix, parent.slot)
            parent.shared = prefix
        prefix.waiting += 1
        child.prefix = prefix

    def take(self, guest: G) -> int | None:
        """Give a place to a guest who has none; there must be a free one.

        Returns:
            the number of tokens whose keys and values it took over from others. None if it got no place, because it
            should wait for a sibling that computes their prompt now.
        """
        prefix, taken_over = guest.prefix, 0
        if prefix is not None and prefix.coming:
            return None
        slot = heapq.heappop(self._free)
        self._guests[slot] = guest
        guest.slot = slot
        if prefix is not None:
            prefix.waiting -= 1
            if prefix.holders:
                self._pool.copy(min(prefix.holders), slot, prefix.length)
            elif prefix.saved is not None:
                self._pool.load(slot, prefix.length, prefix.saved)
            else:
                prefix.filler = guest
            if prefix.filler is not guest:
                taken_over = prefix.length
                self._hold(prefix, slot)
                guest.prefix = None
        guest.computed = taken_over
        return taken_over

    def filled(self, guest: G) -> None:
        """Called when a guest has computed more: siblings that wait for their common prompt may take it over now."""
        prefix = guest.prefix
        if prefix is not None and guest.computed >= prefix.length:
            self._hold(prefix, guest.slot)
            guest.prefix = prefix.filler = None

    def interrupted(self, guest: G) -> None:
        """Called when a guest with a place stops computing: siblings must not wait for one that stands still."""
        prefix, guest.prefix = guest.prefix, None
        if prefix is not None:
            prefix.filler = None

    def leave(self, guest: G) -> None:
        """Free a guest's place; what others still wait for is kept aside."""
        slot = guest.slot
        for prefix in self._prefixes[slot]:
            if prefix.waiting > 0 and prefix.holders == {slot}:
                prefix.saved = self._pool.save(slot, prefix.length)
            prefix.holders.discard(slot)
        self._prefixes[slot] = []
        self._guests[slot] = None
        guest.slot, guest.computed = -1, 0
        heapq.heappush(self._free, slot)

    def release(self, guest: G) -> None:
        """Part with a guest for good, whether it has a place or not."""
        prefix, guest.prefix = guest.prefix, None
        if prefix is not None:
            if prefix.filler is guest:
                prefix.filler = None
            if guest.slot < 0:
                prefix.waiting -= 1
        if guest.slot >= 0:
            self.leave(guest)

    def _hold(self, prefix: SharedPrefix, slot: int) -> None:
        prefix.holders.add(slot)
        self._prefixes[slot].append(prefix)
