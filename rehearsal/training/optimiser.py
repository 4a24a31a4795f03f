"""The optimiser, its schedule, and what a safe update is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from rehearsal.errors import TrainingDiverged
from rehearsal.training.options import TrainingOptions


def make_optimiser(parameters: Iterable[torch.nn.Parameter], options: TrainingOptions) -> torch.optim.AdamW:
    """AdamW over the matrices with weight decay, over gains and biases without."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    decayed = [parameter for parameter in trainable if parameter.ndim >= 2]
    plain = [parameter for parameter in trainable if parameter.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        foreach=True,
    )


def scheduled_share(step: int, options: TrainingOptions) -> float:
    """The share of the peak learning rate at optimiser step ``step``, counted from 0."""
    if step < options.warmup_steps:
        return (step + 1) / (options.warmup_steps + 1)
    if options.schedule == "constant":
        return 1.0
    span = max(1, options.steps - options.warmup_steps)
    progress = min(1.0, (step - options.warmup_steps) / span)
    falling = 1.0 - progress if options.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return options.final_learning_rate + (1.0 - options.final_learning_rate) * falling


@dataclass(frozen=True)
class Update:
    """One optimiser's part in an update.

    Attributes:
        name: whose weights they are, for messages.
        optimiser: its gradients are filled in.
        learning_rate: of this update.
    """

    name: str
    optimiser: torch.optim.Optimizer
    learning_rate: float


def clipped_updates(updates: Sequence[Update], max_norm: float, where: str) -> list[float]:
    """Scale the gradients of each optimiser down to ``max_norm``, take all steps, clear the gradients.

    Returns:
        the norm of each before scaling.

    Raises:
        TrainingDiverged: if one of the norms is not finite. No step is taken then, and the gradients are cleared.
    """
    norms = []
    for update in updates:
        parameters = [p for group in update.optimiser.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)))
    for update, norm in zip(updates, norms, strict=True):
        if not math.isfinite(norm):
            forget_gradients(updates)
            raise TrainingDiverged(
                f"The gradient of the {update.name} at {where} is not finite ({norm}); the update was not taken and "
                "the weights are those before it. Lower training.learning_rate, or resume from the last checkpoint."
            )
    for update in updates:
        for group in update.optimiser.param_groups:
            group["lr"] = update.learning_rate
        update.optimiser.step()
    forget_gradients(updates)
    return norms


def forget_gradients(updates: Sequence[Update]) -> None:
    """Clear the gradients of all optimisers."""
    for update in updates:
        update.optimiser.zero_grad(set_to_none=True)
