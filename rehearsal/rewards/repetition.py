"""A penalty for saying the same again and again."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from rehearsal.errors import RewardError


def repetition_penalty(tokens: Sequence[Hashable] | str, n: int = 3, most: float = 1.0) -> float:
    """-most x the share of n-grams that have stood there before (arXiv:2502.03373, as in open-r1).

    0 where every n-gram is new, near ``-most`` where one is repeated for ever; 0 for fewer than n tokens.

    Group-normalised: it is nearly the same for all answers of a healthy group and cancels in the mean; dividing by the
    standard deviation makes the noise of a group of equal rewards its whole signal, so do not divide, or keep groups
    without other variance out of it.

    Args:
        tokens: token ids, or a text, of which words count without their case.
        n: length of the n-grams.
        most: the largest penalty, in units of the reward, at least 0.

    Raises:
        RewardError: for n below 1 or a negative penalty.
    """
    if n < 1 or most < 0:
        raise RewardError(f"The repetition penalty needs n of at least 1 and most of at least 0, not {n} and {most}.")
    sequence: Sequence[Hashable] = tokens.lower().split() if isinstance(tokens, str) else tokens
    total = len(sequence) - n + 1
    if total < 1:
        return 0.0
    distinct = len({tuple(sequence[start : start + n]) for start in range(total)})
    return -most * (1.0 - distinct / total) if distinct < total else 0.0
