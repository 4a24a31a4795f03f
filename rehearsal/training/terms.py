"""The terms of the loss on one pack, and what they have to tell."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rehearsal.algorithms.aggregation import StepTotals, token_weights
from rehearsal.algorithms.batch import Objective, PolicyOutput, TokenBatch
from rehearsal.algorithms.objectives import PolicyObjective
from rehearsal.algorithms.observation import WorldObjective

WEIGHT, WEIGHT_SQUARED = "policy/weight", "policy/weight_squared"


@dataclass
class PackFigures:
    """What one pack has to tell: sums over tokens with their counts, and totals that are sums already."""

    numbers: Tensor
    finite: bool = True
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    totals: set[str] = field(default_factory=set)

    def add(self, name: str, values_N: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(values_N.sum())
        self.counts[name] = self.counts.get(name, 0.0) + len(values_N)

    def add_total(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.totals.add(name)


def term_of(
    objective: Objective, micro: TokenBatch, output: PolicyOutput, totals: StepTotals, figures: PackFigures
) -> Tensor:
    """An objective's part in the loss of the step, on the tokens of one pack."""
    result = objective(micro, output)
    weights_N = token_weights(objective.aggregation, result.mask_N, micro.sequence_N, totals)
    loss = objective.coefficient * (result.loss_N * weights_N).sum()
    world = isinstance(objective, WorldObjective)
    room = objective.name if world else "policy"
    figures.add_total(f"{room}/loss" if world else f"policy/loss/{objective.name}", float(loss.detach()))
    for name, values_N in result.metrics_N.items():
        figures.add(f"{room}/{name}", values_N[result.mask_N])
    if isinstance(objective, PolicyObjective):
        _sampling_figures(micro, output, figures)
    return loss


def _sampling_figures(micro: TokenBatch, output: PolicyOutput, figures: PackFigures) -> None:
    """How far the learner's policy is from the one that sampled: k3 estimate of the KL, and the entropy.

    Log-probs of truncated sampling are over a part of the vocabulary and the learner's over all of it. The policy is
    then compared with itself at the start of the step, and nothing tells whether engine and learner agree.
    """
    mask_N = micro.policy_mask_N
    before_N = micro.old_logprobs_N if micro.truncated else micro.rollout_logprobs_N
    difference = (output.logprobs_N.detach() - before_N)[mask_N]
    figures.add("policy/kl_sampling", torch.expm1(difference) - difference)
    if not micro.truncated:
        figures.add("policy/mismatch", difference.abs())
    # A log-ratio beyond this is a sign of its own; its square must not drown everything else.
    weights = difference.clamp(-20.0, 20.0).exp()
    figures.add(WEIGHT, weights)
    figures.add(WEIGHT_SQUARED, weights**2)
    # Without an entropy objective the entropy is estimated from what was sampled: E[-log p].
    entropy_N = -micro.rollout_logprobs_N if output.entropy_N is None else output.entropy_N.detach()
    figures.add("policy/entropy", entropy_N[mask_N])
