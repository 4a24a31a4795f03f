"""What to do about answers that run too long."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rehearsal.errors import RecipeError
from rehearsal.rewards.lengths import overlong_penalty
from rehearsal.trajectory import SampleStop, StopReason, Trajectory


@dataclass(frozen=True)
class OverlongPenalty:
    """DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13).

    An answer of up to ``max_tokens - cache_tokens`` tokens costs nothing; from there the penalty grows linearly to 1
    at ``max_tokens`` and stays at 1 beyond. It is added to a reward in the reward's own units, so it suits rewards of
    about 1.

    Deviation: the paper's episodes are one answer. For an episode of several turns the length is the number of tokens
    that the policy sampled in all of them.

    Attributes:
        max_tokens: L_max, sampled tokens of an episode from which on the penalty is whole.
        cache_tokens: L_cache, the stretch below it over which the penalty grows.

    Raises:
        RecipeError: unless 0 < cache_tokens <= max_tokens.
    """

    max_tokens: int
    cache_tokens: int

    def __post_init__(self) -> None:
        if not 0 < self.cache_tokens <= self.max_tokens:
            raise RecipeError(
                "the overlong penalty needs cache_tokens between 1 and max_tokens, "
                f"not cache_tokens={self.cache_tokens} with max_tokens={self.max_tokens}"
            )

    def __call__(self, lengths: ArrayLike) -> NDArray[np.float64]:
        """The penalty, between -1 and 0, of answers with the given numbers of tokens; float64 of the same shape."""
        return overlong_penalty(lengths, self.max_tokens, self.cache_tokens)


def was_cut_off(trajectory: Trajectory) -> bool:
    """Whether an episode ended because there was no room for more tokens, for overlong filtering.

    Such an episode may have been on the right way: overlong filtering (arXiv:2503.14476, section 3.4) takes its tokens
    out of the policy's mask while its reward stays in the baseline of its group. An episode that used up its turns or
    its actions was not cut off in this sense: those limits are part of the task.
    """
    if trajectory.stop_reason is StopReason.CONTEXT_LIMIT:
        return True
    return bool(trajectory.turns) and trajectory.turns[-1].stop in (SampleStop.LENGTH, SampleStop.CONTEXT)
