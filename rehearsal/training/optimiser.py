"""The optimiser, its schedule, and what a safe update is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rehearsal.errors import TrainingDiverged
from rehearsal.training.options import TrainingOptions


class MasterAdamW(torch.optim.AdamW):
    """AdamW that keeps a float32 copy of each weight of lower precision.

    A bfloat16 number has eight bits: next to a weight of 0.02 the nearest other one is 1e-4 away, so an update of 1e-6
    is rounded away, and so are a thousand of them. The copies, the master weights, take gradients, moments and updates
    in float32; the model's weights are the copies, rounded (Micikevicius et al. 2018, arXiv:1710.03740). A float32
    weight is its own master, and everything is as with plain AdamW.

    ``param_groups`` holds the masters. Whoever computes gradients adds them to :meth:`master`, so that they are summed
    in float32 too.

    Args:
        groups: parameter groups with the model's weights.
        **options: of AdamW.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **options: Any) -> None:
        groups = list(groups)
        self._weights: list[Tensor] = [weight for group in groups for weight in group["params"]]
        self._masters: list[Tensor] = [_master_of(weight) for weight in self._weights]
        self._of = {id(weight): master for weight, master in zip(self._weights, self._masters, strict=True)}
        own = [{**group, "params": [self.master(weight) for weight in group["params"]]} for group in groups]
        super().__init__(own, **options)

    def master(self, weight: Tensor) -> Tensor:
        """The float32 copy of a weight; the weight itself where it is float32, or not one of this optimiser's."""
        return self._of.get(id(weight), weight)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the masters, and the model's weights with them."""
        loss = super().step(closure)
        for weight, master in self._copies():
            weight.copy_(master)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Moments, and the masters of weights of lower precision by their number."""
        masters = {
            number: master for number, master in enumerate(self._masters) if master is not self._weights[number]
        }  # fmt: skip
        return {**super().state_dict(), "masters": masters}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up moments and masters. Rates, betas and decay stay those that it was made with.

        The model's weights must have been restored before. Where the state has no master for one of lower precision, it
        begins as the weight.
        """
        options = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        for group, own in zip(self.param_groups, options, strict=True):
            group.update(own)
        stored = state_dict.get("masters", {})
        for number, (weight, master) in enumerate(zip(self._weights, self._masters, strict=True)):
            master.copy_(stored.get(number, weight))

    def _copies(self) -> Iterator[tuple[Tensor, Tensor]]:
        for weight, master in zip(self._weights, self._masters, strict=True):
            if master is not weight:
                yield weight, master


def _master_of(weight: Tensor) -> Tensor:
    return weight.detach().float() if is_low_precision(weight) else weight


def is_low_precision(weight: Tensor) -> bool:
    """Whether a weight has fewer bits than float32."""
    return weight.is_floating_point() and torch.finfo(weight.dtype).bits < 32


def training_bytes(parameters: Iterable[Tensor]) -> tuple[int, int]:
    """What gradients and optimiser take for these weights, in bytes: gradients in the masters' precision, two moments,
    and the masters of weights of lower precision."""
    gradients = optimiser = 0
    for weight in parameters:
        element = max(4, weight.element_size())
        gradients += element * weight.numel()
        optimiser += (2 * element + (element if is_low_precision(weight) else 0)) * weight.numel()
    return gradients, optimiser


def make_optimiser(parameters: Iterable[torch.nn.Parameter], options: TrainingOptions) -> MasterAdamW:
    """AdamW over the matrices with weight decay, over gains and biases without; see :class:`MasterAdamW`."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    decayed = [parameter for parameter in trainable if parameter.ndim >= 2]
    plain = [parameter for parameter in trainable if parameter.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return MasterAdamW(
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


def not_finite(updates: Sequence[Update]) -> str | None:
    """Whose gradients, as far as they are summed up, are not finite; None if all are."""
    for update in updates:
        held = [p.grad for group in update.optimiser.param_groups for p in group["params"] if p.grad is not None]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in held):
            return update.name
    return None


def forget_gradients(updates: Sequence[Update]) -> None:
    """Clear the gradients of all optimisers."""
    for update in updates:
        update.optimiser.zero_grad(set_to_none=True)
