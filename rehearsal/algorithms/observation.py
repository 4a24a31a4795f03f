"""Learning from what the environment says: the next-token loss on its words, and what keeps other words as they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from rehearsal.algorithms.aggregation import Aggregation
from rehearsal.algorithms.batch import PolicyOutput, TokenBatch, TokenLoss
from rehearsal.trajectory import SAMPLED_KINDS


@dataclass(frozen=True)
class WorldObjective:
    """What the objectives of a world model have in common."""

    coefficient: float = 1.0
    aggregation: Aggregation = field(default_factory=Aggregation)
    parameters: str = "world"
    name: str = "world"

    needs_entropy: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    needs_values: ClassVar[bool] = False


@dataclass(frozen=True)
class ObservationLoss(WorldObjective):
    """-log p(token | what came before) of the environment's own words: a world model.

    Its mask is made of answers to the agent's actions: neither templates nor the notices of our own harness, which are
    learnt by heart within tens of steps and then teach nothing (ECHO, arXiv:2605.24517), nor the first observation,
    which answers no action. It knows no filter: an episode that teaches the policy nothing tells as much about the
    world as any other.

    Over parameters that the policy learns with too (``parameters="all"``) the coefficient matters: ECHO found 0.01 to
    0.05 good, 0.1 harmful, and at 0.2 an agent that brings about what is easily foretold. Over an adapter of its own
    the coefficient means nothing to AdamW, and the ratio of the learning rates is what is tuned.

    It must never become a reward or part of an advantage: normalised within a group in which all fail, it takes over
    whatever its weight (arXiv:2607.21273).

    Metrics: ``prediction_loss``, nats a token; ``top_probability``, the share of tokens with a probability above 1/2.
    """

    def mask(self, batch: TokenBatch) -> Tensor:
        """The tokens that the world model learns from."""
        if batch.observation_mask_N is None:
            raise ValueError("the observation objective needs observation_mask_N in its batch")
        return batch.observation_mask_N

    def __call__(self, batch: TokenBatch, output: PolicyOutput) -> TokenLoss:
        mask_N = self.mask(batch)
        loss_N = torch.where(mask_N, -output.logprobs_N, output.logprobs_N.new_zeros(()))
        with torch.no_grad():
            metrics_N = {"prediction_loss": loss_N.detach(), "top_probability": (loss_N < 0.6931).float()}
        return TokenLoss(loss_N, mask_N, metrics_N)


@dataclass(frozen=True)
class HoldLoss(WorldObjective):
    """max(0, old log p - log p) on the agent's own words: what was said stays as likely as it was.

    A world adapter is summed with the policy's, so learning answers by it moves everything else that is said too: names
    are copied wrong, thoughts lose their form. The gradient here is that of the words' log-probability as soon as they
    have become less likely than they were after the policy's own update, and nothing where they have not.

    Metrics: ``lost``, nats a token; ``less_likely``, the share of tokens that lost anything.
    """

    name: str = "hold"

    def mask(self, batch: TokenBatch) -> Tensor:
        """The tokens that the policy sampled."""
        return torch.isin(batch.kinds_N.long(), torch.tensor(SAMPLED_KINDS, device=batch.kinds_N.device))

    def __call__(self, batch: TokenBatch, output: PolicyOutput) -> TokenLoss:
        mask_N = self.mask(batch)
        lost_N = torch.where(mask_N, batch.old_logprobs_N - output.logprobs_N, output.logprobs_N.new_zeros(()))
        loss_N = lost_N.clamp(min=0.0)
        with torch.no_grad():
            metrics_N = {"lost": loss_N.detach(), "less_likely": (lost_N > 0).float()}
        return TokenLoss(loss_N, mask_N, metrics_N)
