"""The batch that a policy learns from: the target tokens of a step, flat, with all that is known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rehearsal.algorithms.batch import TokenBatch
from rehearsal.algorithms.credit import SequenceRewards, one_scale, token_advantages
from rehearsal.algorithms.intrinsic import mixed_advantages
from rehearsal.algorithms.presets import Algorithm
from rehearsal.algorithms.reward_parts import OVERLONG, parts_matrix
from rehearsal.errors import TrainingDiverged
from rehearsal.training.passes import Passes
from rehearsal.training.sequences import Sequences
from rehearsal.trajectory import SAMPLED_KINDS, Group, Kind, rewards_matrix

AFTER_DIVERGENCE = "Lower training.learning_rate, or resume from the last checkpoint."


def policy_batch(
    groups: Sequence[Group], sequences: Sequences, algorithm: Algorithm, passes: Passes, *, step: int,
    keep: np.ndarray | None = None, families: Sequence[int] | None = None, reference: Any | None = None,
    recompute: bool = False, answers: bool = False, truncated: bool = False,
) -> tuple[TokenBatch, dict[str, float]]:  # fmt: skip
    """Advantages, old log-probs, and what else objectives read.

    Args:
        groups: the episodes of the step.
        sequences: their sequences.
        algorithm: for the advantages.
        passes: the models.
        step: number of the step, for messages.
        keep: bool of shape (P,) or (P, G), the groups or episodes that the policy may learn from; all if None.
        families: for each group the environment that it was played in; one for all if None.
        reference: the frozen policy, or None.
        recompute: whether old log-probs are taken anew, and not those of sampling.
        answers: whether a world model learns from the environment's answers among the targets.
        truncated: whether the log-probs of sampling are over a part of the vocabulary.

    Returns:
        the batch, and figures worth telling about it.

    Raises:
        TrainingDiverged: if a model says something that is not finite.
    """
    figures: dict[str, float] = {}
    segments, targets = sequences.segments, sequences.targets
    lengths = [len(wanted) for wanted in targets]
    sequence_N = np.repeat(np.arange(len(sequences)), lengths)

    def flat(name: str) -> np.ndarray:
        return np.concatenate([getattr(s, name)[wanted] for s, wanted in zip(segments, targets, strict=True)])

    kinds_N, turns_N, rollout_N = flat("kinds"), flat("turns"), flat("logprobs")
    sampled_N = np.isin(kinds_N, SAMPLED_KINDS)
    keep_S = np.ones(len(sequences), dtype=bool)
    if keep is not None:
        keep = np.asarray(keep, dtype=bool)
        keep_S &= keep[sequences.group] if keep.ndim == 1 else keep[sequences.group, sequences.sample]
    if algorithm.mask_truncated:
        keep_S &= ~np.asarray(sequences.cut_off, dtype=bool)
    values_N = np.concatenate(passes.values_of(sequences.items())) if passes.critic is not None else None
    check_finite("values of the critic", values_N, step)
    family_S = None if families is None else np.asarray(families)[sequences.group]
    advantages_N, returns_N = token_advantages(
        algorithm,
        SequenceRewards(
            rewards_PG=rewards_matrix(groups),
            sequence_group_S=np.asarray(sequences.group),
            sequence_sample_S=np.asarray(sequences.sample),
            sampled_N=sampled_N,
            turns_N=turns_N.astype(np.int64),
            sequence_N=sequence_N,
            turn_rewards=sequences.turn_rewards,
            values_N=values_N,
            policy_S=keep_S,
            family_S=family_S,
            parts=parts_matrix(groups, [name for name in algorithm.parts if name != OVERLONG]),
        ),
    )
    if family_S is not None:
        # Answers among the targets have no advantage; where nobody learns them the scale must be the same.
        advantages_N = one_scale(advantages_N, family_S[sequence_N], keep_S[sequence_N] & sampled_N)
    if algorithm.self_certainty:
        certainty_N = np.concatenate(passes.certainties(sequences.items()))
        check_finite("self-certainty of the policy", certainty_N, step)
        rewards_PG = rewards_matrix(groups)
        episode_S = np.asarray(sequences.group) * rewards_PG.shape[1] + np.asarray(sequences.sample)
        advantages_N = mixed_advantages(
            advantages_N, certainty_N, episode_S[sequence_N], sampled_N, (rewards_PG.shape[0], rewards_PG.shape[1]),
            ~np.isnan(rewards_PG), weight=algorithm.self_certainty, reward_weight=algorithm.reward_weight,
        )  # fmt: skip
        if sampled_N.any():  # else there are only answers, of failed episodes
            figures["signal/self_certainty"] = float(certainty_N[sampled_N].mean(dtype=np.float64))
    old_N = rollout_N
    if recompute:
        old_N = np.concatenate(passes.score(sequences.items()))
        check_finite("log-probs of the policy", old_N, step)
    reference_N = None
    if reference is not None:
        reference_N = np.concatenate(passes.score(sequences.items(), reference))
        check_finite("log-probs of the reference", reference_N, step)

    def tensor(array: np.ndarray | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(np.ascontiguousarray(array))

    batch = TokenBatch(
        token_ids_N=torch.from_numpy(flat("token_ids").astype(np.int64)),
        kinds_N=torch.from_numpy(kinds_N),
        turns_N=torch.from_numpy(turns_N.astype(np.int64)),
        sequence_N=torch.from_numpy(sequence_N),
        n_sequences=len(sequences),
        advantages_N=torch.from_numpy(advantages_N),
        policy_mask_N=torch.from_numpy(keep_S[sequence_N] & sampled_N),
        rollout_logprobs_N=torch.from_numpy(rollout_N),
        old_logprobs_N=torch.from_numpy(old_N),
        reference_logprobs_N=tensor(reference_N),
        old_values_N=tensor(values_N),
        returns_N=tensor(returns_N),
        observation_mask_N=tensor(kinds_N == Kind.OBSERVATION) if answers else None,
        truncated=truncated,
    )
    return batch, figures


def check_finite(what: str, array_N: np.ndarray | None, step: int) -> None:
    """Raise :class:`TrainingDiverged` unless all numbers are finite."""
    if array_N is not None and not np.isfinite(array_N).all():
        raise TrainingDiverged(f"The {what} at step {step + 1} are not finite; no update was taken. {AFTER_DIVERGENCE}")
