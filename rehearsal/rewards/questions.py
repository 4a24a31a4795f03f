"""Answers to questions: exact match and overlap of words, as SQuAD and HotpotQA score them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from rehearsal.errors import RewardError
from rehearsal.rewards.answers import answer_of, normalise, reference_texts
from rehearsal.rewards.verifier import Score, Task

_CLOSED = frozenset({"yes", "no", "noanswer"})


def exact_match(answer: str, gold: str) -> bool:
    """Whether two answers are the same after normalisation."""
    return normalise(answer) == normalise(gold)


def token_f1(answer: str, gold: str, *, closed: bool = True) -> float:
    """Harmonic mean of precision and recall of the words of two normalised answers, counted with multiplicity (SQuAD,
    arXiv:1606.05250).

    Args:
        answer: of the agent.
        gold: the right one.
        closed: whether "yes", "no" and "noanswer" match nothing but themselves, as in HotpotQA's evaluation
            (github.com/hotpotqa/hotpot); in SQuAD's they are words like others.
    """
    answer, gold = normalise(answer), normalise(gold)
    if closed and answer != gold and (answer in _CLOSED or gold in _CLOSED):
        return 0.0
    words, wanted = answer.split(), gold.split()
    if not words or not wanted:
        # Nothing is right where nothing is wanted, as in SQuAD 2.0.
        return float(words == wanted)
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted))


@dataclass(frozen=True)
class Question:
    """Exact match or F1 with the best of several gold answers.

    The answer is what stands in ``<answer>`` after the thought, or else everything after it.

    Attributes:
        metric: what the value is: ``exact`` (1 or 0) or ``f1`` (0 to 1). Both are in the parts.
        threshold: of the metric, from which on an answer passes. With 1 only a full match passes.
        closed: see :func:`token_f1`.

    Raises:
        RewardError: for another metric or a threshold outside (0, 1].
        VerificationError: for a reference that holds no texts.
    """

    metric: Literal["exact", "f1"] = "exact"
    threshold: float = 1.0
    closed: bool = True
    name: str = "question"

    def __post_init__(self) -> None:
        if self.metric not in ("exact", "f1"):
            raise RewardError(f'The metric of a question is "exact" or "f1", not {self.metric!r}.')
        if not 0 < self.threshold <= 1:
            raise RewardError(f"The threshold of a question must lie above 0 and at most at 1, not {self.threshold}.")

    def verify(self, completion: str, task: Task) -> Score:
        golds = reference_texts(task)
        answer = answer_of(completion)
        parts = {
            "exact": max(float(exact_match(answer, gold)) for gold in golds),
            "f1": max(token_f1(answer, gold, closed=self.closed) for gold in golds),
        }
        value = parts[self.metric]
        return Score(value, value >= self.threshold, parts, f"{answer[:100]!r} for {golds[0][:100]!r}")
