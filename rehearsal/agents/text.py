"""Agents over text instead of tokens: for models behind a server that takes messages and shows no tokens.

The turn-taking is that of :class:`rehearsal.agents.agent.Agent`; only what it shows is kept as messages instead of
being turned into tokens. Such an episode has turns and rewards and no segments: it serves evaluation, never training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from rehearsal.agents.agent import Agent, Limits
from rehearsal.agents.protocol import Protocol
from rehearsal.models.chat import ChatRenderer, Piece, Rendered
from rehearsal.trajectory import SampleStop, Turn

_NOTHING = Rendered(np.empty(0, np.int32), np.empty(0, np.int8))


class _Messages:
    """Stands where a chat renderer does, and collects messages."""

    opens_thought = False
    shows_tools = False
    stop_texts: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.pending: list[tuple[str, str]] = []
        self.answer = ""

    def first(self, system: Sequence[Piece], user: Sequence[Piece]) -> Rendered:
        self.pending.append(("system", "".join(piece.text for piece in system)))
        return self.after_answer((), user)

    def with_tools(self, schemas: Sequence[Any]) -> _Messages:
        # The agent tells of them in the rules: a server that was given them would take the calls out of the answers.
        return self

    def takes_results(self, count: int) -> bool:
        return False

    def after_answer(
        self, sampled_ids: Sequence[int] | np.ndarray, pieces: Sequence[Piece], role: str = "user",
        more: Sequence[Sequence[Piece]] = (),
    ) -> Rendered:  # fmt: skip
        self.pending.append(("user", "".join(piece.text for piece in pieces)))
        return _NOTHING

    def decode(self, token_ids: Sequence[int] | np.ndarray) -> str:
        return self.answer

    def single_token(self, text: str) -> int | None:
        return None


class TextAgent(Agent):
    """One episode of an agent whose tokens nobody sees.

    Args:
        protocol: the answer format.
        limits: what the episode may use; ``max_context`` is the server's affair.
    """

    def __init__(self, protocol: Protocol, limits: Limits) -> None:
        self._messages = _Messages()
        # Messages instead of tokens: of a renderer it has just what an agent calls.
        super().__init__(cast(ChatRenderer, self._messages), protocol, limits)

    @property
    def tokens_left(self) -> int:
        return self.limits.max_tokens_per_turn

    def take_messages(self) -> list[tuple[str, str]]:
        """The messages (role, text) that were not taken yet."""
        taken, self._messages.pending = self._messages.pending, []
        return taken

    def read_text(self, text: str, stop: SampleStop) -> Turn:
        """Take an answer as text, and read it; see :meth:`rehearsal.agents.agent.Agent.read`."""
        self._messages.answer = text
        return self.read((), (), stop)
