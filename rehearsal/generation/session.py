"""The one interface through which everything samples: training, evaluation, search, remote servers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from rehearsal.generation.sampling import SamplingParams
from rehearsal.trajectory import SampleStop


@dataclass
class Sampled:
    """What one call of :meth:`Session.sample` brought.

    Attributes:
        token_ids: int32 of shape (T,), the token that ended the turn included.
        logprobs: float32 of shape (T,), under the distribution sampled from; NaN where a server gives none.
        stop: why sampling ended.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    stop: SampleStop


@dataclass
class EngineStats:
    """Counts since the engine was made or :meth:`Engine.reset_stats` was called."""

    tokens_sampled: int = 0
    tokens_prefilled: int = 0
    tokens_shared: int = 0
    """Prompt tokens that a fork took over from its parent instead of computing them."""
    forwards: int = 0
    evictions: int = 0
    """Waiting episodes whose keys and values gave way to others and were computed again."""
    peak_sessions: int = 0
    seconds: float = 0.0
    retries: int = 0
    extra: dict[str, float] = field(default_factory=dict)


class Session(Protocol):
    """One growing context. It remembers what it has read, so each call costs only its new tokens."""

    @property
    def length(self) -> int:
        """Tokens so far."""

    @property
    def room(self) -> int:
        """Tokens that still fit into the context."""

    def extend(self, token_ids: Sequence[int] | np.ndarray) -> None:
        """Append tokens that were not sampled. Costs nothing until the next sample."""

    async def sample(self, params: SamplingParams) -> Sampled:
        """Sample up to ``params.max_tokens`` tokens and append them."""

    def fork(self, key: int) -> Session:
        """A session with the same context and the noise stream ``key``; what both share is computed once."""

    def close(self) -> None:
        """Give back the place. Closing twice is harmless."""


class Engine(Protocol):
    """Serves many sessions at once."""

    stats: EngineStats
    max_context: int
    capacity: int
    """How many sessions can hold their keys and values at the same time."""
    gives_logprobs: bool

    def session(self, key: int) -> Session:
        """A new, empty session whose sampling noise is the stream ``key`` (see ``stream_key``)."""

    def reset_stats(self) -> None: ...
