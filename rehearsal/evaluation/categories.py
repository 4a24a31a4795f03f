"""Figures of each kind of task, and what answers cost in tokens."""

from __future__ import annotations

from collections.abc import Sequence

from rehearsal.evaluation.statistics import mean_interval, wilson_interval
from rehearsal.trajectory import Group, Trajectory


def categories_of(groups: Sequence[Group]) -> list[str]:
    """The category of each task: what the environment calls it (``info["category"]``), behind the name of the
    environment where there are several; "" where there is nothing to tell apart."""
    firsts = [next(iter(group), None) for group in groups]
    several = len({one.environment for one in firsts if one is not None}) > 1
    names = []
    for one in firsts:
        parts = [] if one is None else [one.environment if several else "", one.category]
        names.append("/".join(part for part in parts if part))
    return names


def category_figures(groups: Sequence[Group]) -> dict[str, float]:
    """Success of each category with its 95% interval: ``category/NAME/success``, ``/low``, ``/high``, ``/tasks``.

    Of tasks that were played once the interval is Wilson's; where some were played several times it is over tasks.
    Nothing where all tasks are of one kind, or success is not known.
    """
    named = categories_of(groups)
    figures: dict[str, float] = {}
    if len(set(named)) < 2:
        return figures
    for name in sorted(set(named)):
        own = [group for group, category in zip(groups, named, strict=True) if category == name]
        shares = success_shares(own)
        if shares:
            mean, low, high = share_interval(shares, once=all(len(group) < 2 for group in own))
            lead = f"category/{name or 'others'}/success"
            figures |= {lead: mean, f"{lead}/low": low, f"{lead}/high": high}
            figures[f"category/{name or 'others'}/tasks"] = float(len(shares))
    return figures


def success_shares(groups: Sequence[Group]) -> list[float]:
    """Share of each task's episodes that succeeded, of the tasks that have a result. An episode for which nothing was
    told has not succeeded where the environment tells success at all."""
    scored = [[one for one in group if not one.failed] for group in groups]
    if not any(one.success is not None for episodes in scored for one in episodes):
        return []
    return [sum(bool(one.success) for one in episodes) / len(episodes) for episodes in scored if episodes]


def share_interval(shares: Sequence[float], once: bool) -> tuple[float, float, float]:
    """Mean and 95% interval of shares of success: Wilson's where each is 0 or 1, else over tasks."""
    if once:
        return (sum(shares) / len(shares), *wilson_interval(round(sum(shares)), len(shares)))
    return mean_interval(shares)


def token_figures(groups: Sequence[Group]) -> dict[str, float]:
    """What answers cost, all episodes counted, failed ones too.

    ``tokens/sampled`` and ``tokens/shown``: tokens of an episode that the policy wrote, and that it was shown (rules,
    observations, notices and the scaffolding of the chat; each once, since the engine keeps what it has read).
    ``tokens/per_success``: tokens written for each success; left out where there is none. A server tells only what it
    wrote.
    """
    episodes = [one for group in groups for one in group]
    if not episodes:
        return {}
    sampled = sum(_sampled(one) for one in episodes)
    figures = {"tokens/sampled": sampled / len(episodes)}
    if any(one.segments for one in episodes):
        figures["tokens/shown"] = sum(one.n_tokens - one.n_sampled for one in episodes) / len(episodes)
    solved = sum(bool(one.success) for one in episodes if not one.failed)
    if solved:
        figures["tokens/per_success"] = sampled / solved
    return figures


def _sampled(one: Trajectory) -> float:
    return one.n_sampled if one.segments else one.counters.get("server_tokens", 0.0)
