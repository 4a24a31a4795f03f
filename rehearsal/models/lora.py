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


def bare_name(name: str) -> str:
    """The name that a module or parameter has in the model without adapters."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def plain_state(model: Any) -> dict[str, Tensor]:
    """The weights of a model as if it had no adapters, with the active ones added, by the names of the bare model.

    Copies without gradients for what has adapters, the parameters themselves for all else. Layers of any kind that
    :func:`obstacle` lets pass: linear ones, transposed ones (GPT-2), and the stacked matrices of experts.
    """
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    adapted: dict[str, Any] = {}
    for name, module in lm.named_modules():
        if is_low_rank(module):
            adapted[f"{bare_name(name)}.{getattr(module, 'parameter_name', 'weight')}"] = module
    state: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if ".lora_" not in name:
                bare = bare_name(name)
                state[bare] = _summed(parameter, adapted[bare]) if bare in adapted else parameter.detach()
    return state


def plain_buffers(model: Any) -> dict[str, Tensor]:
    """What else of a model is stored, by the names of the bare model."""
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = {name for name, _ in lm.named_buffers()}
    return {bare_name(name): tensor for name, tensor in lm.state_dict().items() if name in names}


def _summed(parameter: Tensor, module: Any) -> Tensor:
    """A parameter with the active adapters of its layer added, in the precision of whichever has more."""
    if is_plain_low_rank(module):
        return full_weight(module)
    names = [] if module.disable_adapters else [name for name in module.active_adapters if name in module.lora_A]
    if not names:
        return parameter.detach()
    total = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
    for name in names:
        total = total + module.get_delta_weight(name)
    return total.to(parameter.dtype)


def obstacle(model: Any) -> str | None:
    """Why the adapters of a model could not be multiplied into its weights, as the end of a sentence; None if they can.

    Asked when adapters are put into a model: at the end of a run it would be too late.
    """
    from peft.utils import AuxiliaryTrainingWrapper

    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    owners: dict[int, int] = {}
    for _, parameter in lm.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, module in lm.named_modules():
        layer = bare_name(name)
        if isinstance(module, AuxiliaryTrainingWrapper):
            return (
                f"{layer} is trained beside the low-rank factors (modules_to_save or trainable_token_indices), which "
                "is not kept apart between adapters"
            )
        if not is_low_rank(module):
            continue
        if module.lora_variant:
            kind = type(next(iter(module.lora_variant.values()))).__name__
            return f"{layer} has an adapter of another kind than plain LoRA ({kind})"
        if any(module.lora_bias.values()):
            return f"the factors of {layer} have biases (lora_bias)"
        base = module.get_base_layer()
        weight = getattr(base, getattr(module, "parameter_name", "weight"), None)
        if not _multiplies_out(module, base, weight):
            return f"an adapter of {layer} ({type(base).__name__}) cannot be multiplied into its weight"
        if owners.get(id(weight), 1) > 1:
            return f"{layer} shares its weight with another layer, which would be changed too"
    return None


def _multiplies_out(module: Any, base: nn.Module, weight: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return False  # quantised
    kind = type(module).__name__
    return (kind == "Linear" and isinstance(base, nn.Linear | Conv1D)) or kind == "ParamWrapper"


def rewrites_weights(model: Any) -> bool:
    """Whether a forward pass puts other weights into a model for a moment, as it does where stacked matrices of experts
    have adapters. Several threads must not run such a model at the same time."""
    return any(is_low_rank(module) and hasattr(module, "parameter_name") for module in model.modules())
