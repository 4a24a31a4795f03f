"""Muon for the matrices of a small model, AdamW for the rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class BaseOptimiser:
    """Muon (Jordan et al. 2024) moves a matrix by the nearest orthogonal one to its momentum, so every direction in it
    is learnt at the same pace. In a model of this size that is worth several times the data: copying a name that it has
    never met, which takes two layers that have to fit each other, it learns from a quarter of the tokens.

    Updates are scaled to the size that AdamW's have (Moonlight, arXiv:2502.16982, section 2.2), so one learning rate
    serves both. Embeddings and vectors keep to AdamW, as Muon's authors advise.

    Args:
        model: whose parameters are trained.
        weight_decay: of the matrices other than the embedding.
    """

    def __init__(self, model: nn.Module, weight_decay: float) -> None:
        named = list(model.named_parameters())
        matrices = [tensor for name, tensor in named if tensor.ndim == 2 and "embed" not in name]
        others = [tensor for name, tensor in named if tensor.ndim != 2 or "embed" in name]
        # The learning rates are set before each step.
        self._both: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
        )

    def step(self, learning_rate: float) -> None:
        """Move the parameters by their gradients, and forget those."""
        for optimizer in self._both:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {str(number): optimizer.state_dict() for number, optimizer in enumerate(self._both)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for number, optimizer in enumerate(self._both):
            optimizer.load_state_dict(state[str(number)])
