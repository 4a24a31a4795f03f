"""The critic of PPO: a copy of the policy's decoder with one number as output."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from rehearsal.models.packed import causal_lm


class Critic(nn.Module):
    """Predicts the return from the state before each token.

    It starts from the policy's weights at the time it is made, with a zero output: its first values are 0, so the first
    advantages are the returns and no random value misleads the first updates.
    """

    def __init__(self, policy: Any) -> None:
        super().__init__()
        lm = causal_lm(policy)
        self.decoder = copy.deepcopy(lm.get_decoder())
        self.decoder.requires_grad_(True)
        width = lm.config.get_text_config().hidden_size
        reference = next(self.decoder.parameters())
        self.value = nn.Linear(width, 1, device=reference.device, dtype=torch.float32)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    @property
    def config(self) -> Any:
        return self.decoder.config

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def values(self, hidden_ND: Tensor) -> Tensor:
        """Values of shape (N,), float32."""
        return self.value(hidden_ND.float())[:, 0]
