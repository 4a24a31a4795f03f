"""What a verifier makes of several samples: best-of-n."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rehearsal.errors import RewardError
from rehearsal.evaluation.samples import best_of_n, counts_up_to
from rehearsal.evaluation.statistics import mean_interval
from rehearsal.rewards.answers import without_thought
from rehearsal.rewards.pool import VerifierPool
from rehearsal.rewards.registry import verifier as make_verifier
from rehearsal.rewards.verifier import Failure, Score, Task
from rehearsal.trajectory import Group, Trajectory, Turn


def best_of_figures(groups: Sequence[Group], scores: Sequence[Sequence[float | None]]) -> dict[str, float]:
    """Success of the sample that a verifier's score picks out of k, k = 1, 2, 4, ... up to the number of samples.

    Args:
        groups: the episodes of each task.
        scores: of each episode, in the same order; None where the verifier could not say.

    Returns:
        ``best@k`` with its 95% bootstrap interval over tasks (``best@k/low``, ``best@k/high``), and ``unverified``, the
        share of finished episodes without a score, which are not picked from. Nothing where success is not known.
    """
    tasks: list[tuple[list[float], list[float]]] = []
    finished = missing = 0
    for group, own in zip(groups, scores, strict=True):
        played = [(one, score) for one, score in zip(group, own, strict=True)
                  if not one.failed and one.success is not None]  # fmt: skip
        finished += len(played)
        missing += sum(score is None for _, score in played)
        known = [(score, float(bool(one.success))) for one, score in played if score is not None]
        if known:
            tasks.append(([score for score, _ in known], [value for _, value in known]))
    if not finished:
        return {}
    figures = {"unverified": missing / finished}
    for k in counts_up_to(max((len(values) for _, values in tasks), default=0)):
        found = [best_of_n(proxies, values, k) for proxies, values in tasks if len(values) >= k]
        mean, low, high = mean_interval(found)
        figures |= {f"best@{k}": mean, f"best@{k}/low": low, f"best@{k}/high": high}
    return figures


def verify_episodes(
    groups: Sequence[Group], name: str, options: Mapping[str, Any] | None = None, timeout: float = 60.0
) -> list[list[float | None]]:
    """What a verifier thinks of each episode; None for failed ones and where it could not say.

    The verifier reads the answer, and of several turns all of them, with what the environment said in between. Its task
    is the first observation. It is told neither a reference nor what the environment said last, which is often the
    verdict: one that knows the solution would tell pass@k.

    Args:
        groups: the episodes of each task.
        name, options: of the verifier, see :func:`rehearsal.rewards.registry.verifier`.
        timeout: seconds that a check may take.

    Raises:
        RewardError: if there is no such verifier, or it could say nothing about any episode.
    """
    episodes = [one for group in groups for one in group if not one.failed and one.turns]
    pool = VerifierPool(make_verifier(name, **(options or {})), timeout=timeout)
    try:
        found = pool.verify([told(one) for one in episodes], [Task(one.turns[0].observation) for one in episodes])
    finally:
        pool.close()
    first = next((result for result in found if isinstance(result, Failure)), None)
    if first is not None and not any(isinstance(result, Score) for result in found):
        raise RewardError(f"The verifier {name} could say nothing about any of {len(found)} episodes: {first.message}")
    scores = {id(one): result.value for one, result in zip(episodes, found, strict=True) if isinstance(result, Score)}
    return [[scores.get(id(one)) for one in group] for group in groups]


def told(episode: Trajectory) -> str:
    """An episode as a completion: the answer; of several turns the answers, with what was said between them.

    An answer is what the environment was given of it, as a verifier reads it in training: the actions, without thought,
    tags and the tokens that end a turn. The environment's last words are left out: many end an episode with "right" or
    "wrong".
    """
    parts: list[str] = []
    for number, turn in enumerate(episode.turns):
        parts += [turn.observation] if number else []
        parts.append(_answer(turn))
    return "\n\n".join(parts).strip()


def _answer(turn: Turn) -> str:
    if turn.executed:
        return "\n".join(turn.executed)
    if turn.calls:
        return "\n".join(f"{call.name}({json.dumps(dict(call.arguments))})" for call in turn.calls)
    return without_thought(turn.response)
