"""Low-rank adapters: one for the policy, one for the world model, both at work in every forward pass.

The adapters themselves are PEFT's. What is added here is what a policy and a world model over one base need: both are
summed in the forward pass, in generation as in training; each has its own parameters, which an objective names; and no
gradient is lost on the way. PEFT's own switches would lose some: choosing an adapter also freezes the others, and doing
so between a forward and its backward pass leaves gradients out without a word. So adapters are never chosen by freezing
here. All of them require gradients all the time, a loss is differentiated by the parameters that it names and by no
others (``torch.autograd.grad``), and :func:`active_adapters` says which of them a pass runs through, with forward and
backward pass inside one block.

The layout of two adapters that learn from different tokens is that of DART (arXiv:2602.00994); the sum of both in every
pass is what lets what one learns reach the other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rehearsal.errors import ModelError
from rehearsal.models.lora import bare_name, is_low_rank, obstacle

POLICY = "policy"
WORLD = "world"
MERGED = "merged"
"""Name of the folder with all adapters as one."""

_BASE_FILE = "rehearsal_base.json"


@dataclass(frozen=True)
class AdapterSettings:
    """Which adapters there are.

    Attributes:
        policy_rank: rank of the policy's adapter; 0 for none.
        world_rank: rank of the world model's adapter; 0 for none.
        alpha: an adapter's output is scaled by alpha / rank.
        rank_stabilised: scaled by alpha / sqrt(rank) instead (arXiv:2312.03732).
        targets: "all-linear" (every linear layer but the output head), or the last parts of module names.

    Raises:
        ModelError: for values that cannot be used.
    """

    policy_rank: int = 32
    world_rank: int = 32
    alpha: int = 32
    rank_stabilised: bool = False
    targets: str | tuple[str, ...] = "all-linear"

    def __post_init__(self) -> None:
        if self.policy_rank < 0 or self.world_rank < 0:
            raise ModelError("The rank of an adapter must not be negative; 0 leaves it out.")
        if not self.alpha > 0:
            raise ModelError(f"alpha must be above 0, not {self.alpha}.")
        if not self.targets or (isinstance(self.targets, str) and self.targets != "all-linear"):
            raise ModelError('The targets of adapters are "all-linear" or a list of module names such as ["q_proj"].')

    @property
    def ranks(self) -> dict[str, int]:
        """The ranks of those that there are, by name."""
        return {name: rank for name, rank in ((POLICY, self.policy_rank), (WORLD, self.world_rank)) if rank}


def add_adapters(model: Any, settings: AdapterSettings, seed: int = 0) -> Any:
    """Put adapters into a model, in place; at first they change nothing.

    Args:
        model: a Hugging Face causal LM. Its own weights are frozen if there is at least one adapter.
        settings: which adapters.
        seed: of their first weights. Each adapter has a stream of its own, so one does not change the other.

    Returns:
        the model wrapped by PEFT, or ``model`` itself if all ranks are 0.

    Raises:
        ModelError: if the model has adapters already, or has no layer that the targets name, or one whose adapter could
            not be multiplied into its weight. The model is as it was then.
    """
    if hasattr(model, "peft_config"):
        raise ModelError("The model has adapters already; load the base and its adapters apart.")
    before = _trainable(model)
    wrapped = model
    for name, rank in settings.ranks.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2 * seed + (name == WORLD))
            wrapped = _add(wrapped, name, _config(settings, rank))
    if wrapped is not model:
        if reason := obstacle(wrapped):
            _take_out(wrapped, list(settings.ranks), before)
            raise ModelError(f"No adapter can be put into this model: {reason}; leave it out of adapters.targets.")
        _settle(wrapped)
    return wrapped


def _config(settings: AdapterSettings, rank: int) -> Any:
    from peft import LoraConfig

    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    return LoraConfig(
        r=rank, lora_alpha=settings.alpha, use_rslora=settings.rank_stabilised, target_modules=targets,
        lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip


def _add(model: Any, name: str, config: Any) -> Any:
    from peft import get_peft_model

    try:
        if hasattr(model, "peft_config"):
            model.add_adapter(name, config)
            return model
        return get_peft_model(model, config, adapter_name=name)
    except (ValueError, TypeError) as error:
        raise ModelError(f"No adapter can be put into this model: {' '.join(str(error).split())[:200]}") from error


def _settle(model: Any) -> None:
    """All adapters active, all of them with gradients, nothing else with one."""
    names = adapter_names(model)
    model.base_model.set_adapter(names)
    own = {id(parameter) for name in names for parameter in adapter_parameters(model, name).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in own)
    model.eval()


def _trainable(model: Any) -> list[tuple[nn.Parameter, bool]]:
    return [(parameter, parameter.requires_grad) for parameter in model.parameters()]


def _take_out(wrapped: Any, names: Sequence[str], before: list[tuple[nn.Parameter, bool]]) -> None:
    """Leave a model as it was before these adapters were put into it."""
    if set(adapter_names(wrapped)) == set(names):
        wrapped.unload()
    else:
        for name in names:
            wrapped.delete_adapter(name)
    for parameter, trained in before:
        parameter.requires_grad_(trained)


def adapter_names(model: Any) -> list[str]:
    """The adapters of a model, in the order in which they were added; none for a model without."""
    return list(getattr(model, "peft_config", {}))


def adapter_parameters(model: Any, name: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter, by name.

    Raises:
        ModelError: if there is no such adapter.
    """
    found = {
        key: parameter
        for key, parameter in model.named_parameters()
        if "lora_" in key and key.endswith((f".{name}.weight", f".{name}"))
    }
    if not found:
        there = ", ".join(adapter_names(model)) or "none"
        raise ModelError(f'The model has no adapter "{name}" (there are: {there}); add it, or name another one.')
    return found


def trained_parameters(model: Any, name: str) -> list[nn.Parameter]:
    """What an objective with ``parameters=name`` updates: an adapter, or everything that is trained for "all".

    Raises:
        ModelError: if there is no such adapter.
    """
    if name == "all":
        return [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(adapter_parameters(model, name).values())


def check_adapters(model: Any) -> None:
    """Look at the adapters of a model that others may have made.

    Raises:
        ModelError: if they are more than low-rank factors, so that they could neither be kept apart nor multiplied out.
    """
    if adapter_names(model) and (reason := obstacle(model)):
        raise ModelError(f"The adapters of this model cannot be trained here: {reason}.")


def active_names(model: Any) -> tuple[str, ...]:
    """The adapters that a forward pass goes through now."""
    if not adapter_names(model):
        return ()  # asked in every step of an engine: no walk through a model that has none
    for module in model.modules():
        if is_low_rank(module):
            return () if module.disable_adapters else tuple(module.active_adapters)
    return ()


@contextlib.contextmanager
def active_adapters(model: Any, names: Sequence[str] | None) -> Iterator[None]:
    """Run through these adapters, and no others, inside the block. Gradients are left as they are.

    Forward and backward pass of a loss belong into the same block: activations that are computed again (gradient
    checkpointing) would otherwise be those of other adapters.

    Args:
        model: from :func:`add_adapters`, or any other for which the block does nothing.
        names: adapters; none of them if empty, those that are active already if None.

    Raises:
        ModelError: if there is no such adapter.
    """
    if names is None or not adapter_names(model):
        if names:
            adapter_parameters(model, names[0])  # raises
        yield
        return
    before = active_names(model)
    activate(model, tuple(names))
    try:
        yield
    finally:
        activate(model, before)


def activate(model: Any, names: tuple[str, ...]) -> None:
    """Run through these adapters, and no others, from now on. Gradients are left as they are.

    Raises:
        ModelError: if there is no such adapter.
    """
    if active_names(model) == names:
        return
    known = adapter_names(model)
    for name in names:
        if name not in known:
            raise ModelError(f'The model has no adapter "{name}" (there are: {", ".join(known)}).')
    wanted = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    for module in model.modules():
        if is_low_rank(module):
            module.enable_adapters(bool(names))
            if names:
                module.set_adapter(list(names))
    # Both calls freeze what they switch off. A frozen parameter has no gradient, and nobody would be told.
    for parameter in model.parameters():
        parameter.requires_grad_(wanted[id(parameter)])


# Folders


def save_adapters(model: Any, folder: str | Path) -> list[Path]:
    """Write each adapter as a PEFT folder, and all of them as one more, ``merged``, if there are several.

    Returns:
        the folders.
    """
    folder = Path(folder)
    names = adapter_names(model)
    written: list[Path] = []
    for name in names:
        own = adapter_parameters(model, name).items()
        state: dict[str, Tensor] = {_plain_key(key, name): parameter for key, parameter in own}
        written.append(_write(model, folder / name, model.peft_config[name], state))
    if len(names) > 1:
        config, state = concatenated(model, names)
        written.append(_write(model, folder / MERGED, config, state))
    return written


def concatenated(model: Any, names: Sequence[str]) -> tuple[Any, dict[str, Tensor]]:
    """Several adapters as one of summed rank that gives the same logits.

    The factors of all adapters stand side by side, and the scale of each is multiplied into its second factor, so that
    the sum needs a scale of 1 whatever the ranks and their stabilisation are. Ranks are those of the tensors: a
    configuration may give each layer another one.

    Returns:
        a PEFT configuration and the tensors by the names that PEFT saves them under.
    """
    from peft import LoraConfig

    state: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    modules: list[str] = []
    stacks: list[str] = []
    for key, module in model.named_modules():
        if not is_low_rank(module):
            continue
        # The factors of stacked matrices (experts) are stacked too: rows of the first by matrix and then by rank,
        # columns of the second by rank and then by matrix.
        count = getattr(module, "num_experts", 1)
        inputs, outputs = [], []
        for name in names:
            if name in module.lora_A:  # another leaves this layer alone
                first, second = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach()
                inputs.append(first.unflatten(0, (count, -1)))
                outputs.append(second.unflatten(1, (-1, count)) * float(module.scaling[name]))
        if not inputs:
            continue
        state[f"{key}.lora_A.weight"] = torch.cat(inputs, dim=1).flatten(0, 1)
        state[f"{key}.lora_B.weight"] = torch.cat(outputs, dim=1).flatten(1, 2)
        place = bare_name(key.removeprefix("base_model.model."))
        if hasattr(module, "parameter_name"):
            place = f"{place}.{module.parameter_name}"
            stacks.append(place)
        else:
            modules.append(place)
        ranks[place] = sum(len(factors[0]) for factors in inputs)
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {re.escape(place): rank for place, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        r=usual, lora_alpha=usual, rank_pattern=dict(others), alpha_pattern=dict(others),
        target_modules=sorted(modules) or None, target_parameters=sorted(stacks) or None, lora_dropout=0.0, bias="none",
        fan_in_fan_out=any(model.peft_config[name].fan_in_fan_out for name in names), task_type="CAUSAL_LM",
    )  # fmt: skip
    config.base_model_name_or_path = model.peft_config[names[0]].base_model_name_or_path
    return config, state


def _plain_key(key: str, name: str) -> str:
    return key.replace(f".{name}.weight", ".weight")


def _write(model: Any, folder: Path, config: Any, state: dict[str, Tensor]) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    inference, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = inference
    (folder / _BASE_FILE).write_text(json.dumps({"base": base_digest(model)}) + "\n")
    return folder


def load_adapter(model: Any, folder: str | Path, name: str) -> Any:
    """Load an adapter from a PEFT folder, beside those that are there; all are active afterwards.

    Several policy adapters over one base are a population of agents: give each a name, and sessions of the local
    engine say which one they play with.

    Args:
        model: the base, or a model with adapters already.
        folder: what :func:`save_adapters`, or PEFT, wrote.
        name: what to call it.

    Returns:
        the model wrapped by PEFT.

    Raises:
        ModelError: if the folder holds no adapter, one of another base, or one that is more than low-rank factors. The
            model is as it was then.
    """
    from peft import LoraConfig

    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} is not the folder of an adapter: it has no adapter_config.json.")
    if name in adapter_names(model):
        raise ModelError(f'The model has an adapter "{name}" already; choose another name.')
    try:
        config = LoraConfig.from_pretrained(str(folder))
        state = _read_tensors(folder)
    except Exception as error:  # whatever a third-party reader raises is about this folder
        raise ModelError(f"The adapter {folder} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if reason := _more_than_factors(config):
        raise ModelError(f"The adapter {folder} cannot be used: {reason}; only adapters of plain LoRA can.")
    stored = folder / _BASE_FILE
    if stored.is_file() and json.loads(stored.read_text())["base"] not in (base_digest(model), _exact_digest(model)):
        raise ModelError(f"The adapter {folder} was trained over another base; load the model that it belongs to.")
    config.inference_mode = False
    if getattr(config, "lora_dropout", 0.0):
        logging.getLogger(__name__).warning("The adapter %s has dropout, which is not used here.", folder)
        config.lora_dropout = 0.0
    before = _trainable(model)
    wrapped = _add(model, name, config)
    if reason := obstacle(wrapped):
        _take_out(wrapped, [name], before)
        raise ModelError(f"The adapter {folder} cannot be used: {reason}.")
    own = {_plain_key(key, name): parameter for key, parameter in adapter_parameters(wrapped, name).items()}
    wrong = sorted(set(own) ^ set(state)) or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        _take_out(wrapped, [name], before)
        raise ModelError(f"The adapter {folder} belongs to another base: {wrong[0]} does not fit.")
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(state[key])
    _settle(wrapped)
    return wrapped


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    file = folder / "adapter_model.safetensors"
    if file.is_file():
        return load_file(file)
    return torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)


_BESIDE_FACTORS = {
    "use_dora": "it has magnitudes beside its factors (DoRA)",
    "lora_bias": "its factors have biases (lora_bias)",
    "modules_to_save": "whole modules were trained with it (modules_to_save)",
    "trainable_token_indices": "rows of the embeddings were trained with it (trainable_token_indices)",
}


def _more_than_factors(config: Any) -> str | None:
    """What an adapter consists of beside low-rank factors, as part of a sentence; None if of nothing."""
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        return f"it is of the kind {getattr(config.peft_type, 'value', config.peft_type)}"
    if config.bias != "none":
        return f"biases of the base were trained with it (bias = {config.bias})"
    return next((told for name, told in _BESIDE_FACTORS.items() if getattr(config, name, None)), None)


def base_digest(model: Any) -> str:
    """What tells one base from another: shapes and the first numbers of all its own weights.

    The numbers are taken to the precision of bfloat16, so that a base is the same in float32 and in bfloat16.
    """
    return _digest(model, torch.bfloat16)


def _exact_digest(model: Any) -> str:
    """The digest in folders that were written when it told apart what a base was rounded to."""
    return _digest(model, torch.float32)


def _digest(model: Any, precision: torch.dtype) -> str:
    digest = hashlib.blake2b(digest_size=12)
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    for key, parameter in lm.named_parameters():
        if "lora_" in key:
            continue
        some = parameter.detach().flatten()[:256].to(precision).float().cpu().numpy()
        digest.update(f"{bare_name(key)}{tuple(parameter.shape)}".encode() + some.tobytes())
    return digest.hexdigest()


def summary(model: Any) -> dict[str, int]:
    """Parameters of each adapter, by name."""
    return {
        name: sum(math.prod(parameter.shape) for parameter in adapter_parameters(model, name).values())
        for name in adapter_names(model)
    }
