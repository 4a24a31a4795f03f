"""The episodes of one step, and what is told of them beside their rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rehearsal.algorithms.filters import Kept
from rehearsal.algorithms.presets import Algorithm
from rehearsal.algorithms.shaping import was_cut_off
from rehearsal.diagnostics import signal_metrics
from rehearsal.rollout import rollout_metrics
from rehearsal.trajectory import Group


@dataclass
class Batch:
    """The episodes of one step.

    Attributes:
        groups: all that were played.
        kept: what the policy learns from, and why.
        rounds: how often groups were played; more than 1 where some were replaced.
    """

    groups: list[Group]
    kept: Kept
    rounds: int = 1


def learned_from(batch: Batch, algorithm: Algorithm) -> Kept:
    """What the policy really learns from: what the filter keeps, less what the algorithm leaves out because it was cut
    off. The reasons say so."""
    keep_PG, reasons = batch.kept.keep_PG.copy(), list(batch.kept.reasons)
    for p, group in enumerate(batch.groups if algorithm.mask_truncated else []):
        cut_G = np.zeros(keep_PG.shape[1], dtype=bool)
        cut_G[: len(group)] = [was_cut_off(episode) for episode in group]
        left_out = int((keep_PG[p] & cut_G).sum())
        keep_PG[p] &= ~cut_G
        if left_out and keep_PG[p].any():
            reasons[p] += f"; less {left_out} of its episodes, cut off"
        elif left_out:
            reasons[p] = "dropped: all that the filter kept of it was cut off"
    return Kept(keep_PG, batch.kept.rated_PG, tuple(reasons))


def kept_figures(batch: Batch, algorithm: Algorithm) -> dict[str, float]:
    """How much of a batch the policy learns from, so that fewer samples are never taken for a better signal.

    What the filter keeps: ``signal/kept_groups`` of the groups that were played (``signal/played_groups``, in
    ``signal/rounds`` rounds), and ``signal/kept_share`` of their episodes that have a reward. ``signal/kept_episodes``
    is that less what the algorithm leaves out, see :func:`learned_from`.
    """
    return {
        "signal/kept_groups": float(batch.kept.keep_P.sum()),
        "signal/kept_share": batch.kept.share,
        "signal/kept_episodes": float(learned_from(batch, algorithm).keep_PG.sum()),
        "signal/played_groups": float(len(batch.groups)),
        "signal/rounds": float(batch.rounds),
    }


def by_environment(batch: Batch, families: Sequence[int] | None, names: Sequence[str]) -> dict[str, float]:
    """What the environments of a mixture do apart, as ``environment/NAME/...``: success, reward, dead groups, and the
    share of its episodes with a reward that the filter keeps. Nothing where there is one environment.

    Args:
        batch: of the step.
        families: for each group the number of its environment; None for one environment.
        names: of the environments.
    """
    figures: dict[str, float] = {}
    families_P = np.asarray([] if families is None else families)
    for family in np.unique(families_P):
        members = np.flatnonzero(families_P == family)
        groups = [batch.groups[group] for group in members]
        found = {**rollout_metrics(groups), **signal_metrics(groups)}
        for figure in ("train/success", "train/reward", "signal/dead_groups"):
            if figure in found:
                figures[f"environment/{names[int(family)]}/{figure.split('/')[1]}"] = found[figure]
        figures[f"environment/{names[int(family)]}/kept_share"] = batch.kept.of(members).share
    return figures
