"""One episode's place in the local engine: its tokens, and its wait for the next ones."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rehearsal.errors import GenerationError
from rehearsal.generation.places import SharedPrefix
from rehearsal.generation.sampling import SamplingParams
from rehearsal.generation.session import Sampled
from rehearsal.trajectory import SampleStop


class Host(Protocol):
    """What a session asks of its engine."""

    max_context: int

    def submit(self, session: LocalSession) -> None:
        """Sample for a session, which waits for it."""

    def withdraw(self, session: LocalSession) -> None:
        """Stop sampling for a session; it keeps its place and what is computed of its context."""

    def share(self, parent: LocalSession, child: LocalSession) -> None:
        """Let a fork take over its parent's keys and values."""

    def release(self, session: LocalSession) -> None:
        """Free what a session holds; it is closed."""


class LocalSession:
    """A session of the local engine; see :class:`rehearsal.generation.session.Session`."""

    def __init__(self, engine: Host, key: int, adapters: tuple[str, ...] | None = None) -> None:
        self._engine = engine
        self.key = key
        self.adapters = adapters
        self.token_ids = np.empty(engine.max_context, dtype=np.int32)
        self._length = 0
        # As :class:`rehearsal.generation.places.Guest` says.
        self.slot = -1
        self.computed = 0
        self.prefix: SharedPrefix | None = None
        self.shared: SharedPrefix | None = None
        self.last_used = 0
        self.params: SamplingParams | None = None
        self.future: asyncio.Future[Sampled] | None = None
        self.closed = False

    @property
    def length(self) -> int:
        return self._length

    @property
    def room(self) -> int:
        return self._engine.max_context - self._length

    def extend(self, token_ids: Sequence[int] | np.ndarray) -> None:
        if self.future is not None:
            raise GenerationError("A session cannot be extended while it samples; wait for sample() first.")
        n = len(token_ids)
        if n > self.room:
            raise GenerationError(
                f"{n} more tokens do not fit: {self._length} of {self._engine.max_context} tokens of context are used. "
                "Raise max_context or shorten the episode."
            )
        self.token_ids[self._length : self._length + n] = token_ids
        self._length += n

    async def sample(self, params: SamplingParams) -> Sampled:
        if self.closed:
            raise GenerationError("This session is closed; open a new one.")
        if self._length == 0:
            raise GenerationError("A session needs at least one token before it can sample; call extend() first.")
        if self.future is not None:
            raise GenerationError("This session is sampling already; wait for the first call to return.")
        if self.room == 0:
            return Sampled(np.empty(0, np.int32), np.empty(0, np.float32), SampleStop.CONTEXT)
        begin = self._length
        self.params = params
        self.future = asyncio.get_running_loop().create_future()
        self._engine.submit(self)
        try:
            return await self.future
        except asyncio.CancelledError:
            # The caller never saw an answer that came in the same moment, so it is not part of the context.
            self._length = begin
            self._engine.withdraw(self)
            raise
        finally:
            self.future = None
            self.params = None

    def fork(self, key: int) -> LocalSession:
        if self.future is not None:
            raise GenerationError("A session cannot be forked while it samples; wait for sample() first.")
        child = LocalSession(self._engine, key, self.adapters)
        child.token_ids[: self._length] = self.token_ids[: self._length]
        child._length = self._length
        self._engine.share(self, child)
        return child

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._engine.release(self)

    def append(self, token_ids: np.ndarray, logprobs: np.ndarray, stop: SampleStop) -> None:
        """Called by the engine with what it sampled; whoever awaits it gets it."""
        self.token_ids[self._length : self._length + len(token_ids)] = token_ids
        self._length += len(token_ids)
        if self.future is not None and not self.future.done():
            self.future.set_result(Sampled(token_ids.copy(), logprobs.copy(), stop))

    def fail(self, error: Exception) -> bool:
        """Called by the engine; whether anybody was told."""
        if self.future is None or self.future.done():
            return False
        self.future.set_exception(error)
        return True
