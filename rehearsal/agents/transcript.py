"""The tokens of an episode, collected as they are made."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rehearsal.models.chat import Rendered
from rehearsal.trajectory import Segment


class TranscriptBuilder:
    """Collects token ids, log-probabilities, kinds and turns, and gives them as a :class:`Segment`."""

    def __init__(self) -> None:
        self._token_ids: list[np.ndarray] = []
        self._logprobs: list[np.ndarray] = []
        self._kinds: list[np.ndarray] = []
        self._turns: list[np.ndarray] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add_rendered(self, rendered: Rendered, turn: int) -> None:
        """Add tokens that the policy was shown; their log-probabilities are NaN."""
        self._add(rendered.token_ids, np.full(len(rendered), np.nan, dtype=np.float32), rendered.kinds, turn)

    def add_sampled(
        self,
        token_ids: Sequence[int] | np.ndarray,
        logprobs: Sequence[float] | np.ndarray,
        kinds: Sequence[int] | np.ndarray,
        turn: int,
    ) -> None:
        """Add tokens that the policy sampled, with the log-probability of each and its kind.

        Raises:
            ValueError: if the lengths differ or a log-probability is NaN: an engine that loses them must not go unseen.
        """
        logprobs = np.asarray(logprobs, dtype=np.float32)
        if np.isnan(logprobs).any():
            raise ValueError("every sampled token needs a log-probability, and some are NaN")
        self._add(np.asarray(token_ids, dtype=np.int32), logprobs, np.asarray(kinds, dtype=np.int8), turn)

    def _add(self, token_ids: np.ndarray, logprobs: np.ndarray, kinds: np.ndarray, turn: int) -> None:
        if not len(token_ids) == len(logprobs) == len(kinds):
            raise ValueError(
                f"{len(token_ids)} token ids came with {len(logprobs)} log-probabilities and {len(kinds)} kinds"
            )
        self._token_ids.append(token_ids)
        self._logprobs.append(logprobs)
        self._kinds.append(kinds)
        self._turns.append(np.full(len(token_ids), turn, dtype=np.int16))
        self._length += len(token_ids)

    def segment(self) -> Segment:
        """All tokens so far."""
        return Segment(
            token_ids=np.concatenate([np.empty(0, np.int32), *self._token_ids]),
            logprobs=np.concatenate([np.empty(0, np.float32), *self._logprobs]),
            kinds=np.concatenate([np.empty(0, np.int8), *self._kinds]),
            turns=np.concatenate([np.empty(0, np.int16), *self._turns]),
        )
