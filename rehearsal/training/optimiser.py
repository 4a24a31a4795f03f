"""The optimiser, its schedule, and what a safe update is."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from rehearsal.errors import TrainingDiverged
from rehearsal.training.recipe import TrainingOptions


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


def clipped_update(
    optimiser: torch.optim.Optimizer, max_norm: float, learning_rate: float, where: str
) -> tuple[float, float]:
    """Scale the gradients down to ``max_norm``, take the step, clear the gradients.

    Returns:
        the norm before scaling, and the norm of what was applied.

    Raises:
        TrainingDiverged: if the norm is not finite. The step is not taken and the gradients are cleared.
    """
    parameters = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm, error_if_nonfinite=False, foreach=True)
    value = float(norm)
    if not math.isfinite(value):
        optimiser.zero_grad(set_to_none=True)
        raise TrainingDiverged(
            f"The gradient at {where} is not finite ({value}); the update was not taken and the weights are those before "
            "it. Lower training.learning_rate, or resume from the last checkpoint."
        )
    for group in optimiser.param_groups:
        group["lr"] = learning_rate
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return value, min(value, max_norm)
