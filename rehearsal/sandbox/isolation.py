"""How well a sandbox holds: the levels."""

from __future__ import annotations

import enum
import functools


@functools.total_ordering
class Isolation(enum.Enum):
    """Levels of isolation, weakest first. Each has the measures of those before it, by the same or stronger means."""

    RLIMITS = "rlimits"
    """A process with limits, a clean environment, no descriptors and no capabilities, and no network where the filter
    of system calls is known for the processor. It reads and writes whatever its user may."""
    FILTERS = "filters"
    """Also behind seccomp and Landlock: no file outside of a few read-only folders and its scratch folder, no signals
    to others."""
    NAMESPACES = "namespaces"
    """In namespaces of its own: other processes, files, users and networks do not exist, and nothing outlives it."""
    BUBBLEWRAP = "bubblewrap"
    """The same, with the outer wall built by bubblewrap, a small program that is kept and audited by many."""

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Isolation):
            return NotImplemented
        order = list(Isolation)
        return order.index(self) < order.index(other)
