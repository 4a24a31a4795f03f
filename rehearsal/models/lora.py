"""Weights of linear layers with their low-rank adapters multiplied out.

A narrow model's adapters are hardly smaller than its matrices, so it is cheaper to add them to the weights once a pass
than to send every token through them; gradients then reach the factors through the sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_low_rank(module: nn.Module) -> bool:
    """Whether a module is a layer with PEFT's low-rank adapters."""
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def is_plain_low_rank(module: Any) -> bool:
    """Whether such a layer is a float32 linear one with adapters of the plain kind, which can be multiplied out."""
    if not is_low_rank(module) or type(module.base_layer) is not nn.Linear or module.merged:
        return False
    names = list(module.lora_A)
    return (
        type(module).__name__ == "Linear"
        and not module.lora_variant
        and not any(module.lora_bias.get(name) for name in names)
        and all(type(module.lora_dropout[name]) is nn.Identity or not module.lora_dropout[name].p for name in names)
        and all(p.dtype == torch.float32 for p in module.parameters())
    )


def full_weight(module: Any) -> Tensor:
    """The weight of a linear layer, (out, in), with the active adapters added; part of the graph where they are."""
    if not is_low_rank(module):
        return module.weight
    weight = module.base_layer.weight
    if module.disable_adapters:
        return weight
    for name in module.active_adapters:
        if name in module.lora_A:
            weight = torch.addmm(
                weight, module.lora_B[name].weight, module.lora_A[name].weight, alpha=float(module.scaling[name])
            )
    return weight


def full_bias(module: Any) -> Tensor | None:
    """The bias of a linear layer, with or without adapters."""
    return (module.base_layer if is_low_rank(module) else module).bias


def plain_state(model: Any) -> dict[str, Tensor]:
    """The weights of a model as if it had no adapters, with the active ones added, by the names of the bare model.

    Copies without gradients for the layers that have adapters, the parameters themselves for all others.
    """
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    adapted = {name: module for name, module in lm.named_modules() if is_low_rank(module)}
    state: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if ".lora_" in name:
                continue
            owner, _, last = name.rpartition(".")
            outer = owner.removesuffix(".base_layer")
            if outer in adapted and last == "weight":
                state[f"{outer}.{last}"] = full_weight(adapted[outer])
            else:
                state[f"{outer}.{last}" if outer in adapted else name] = parameter.detach()
    return state
