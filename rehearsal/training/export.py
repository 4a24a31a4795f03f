"""The policy of a checkpoint as an ordinary Hugging Face folder, also of a run that never came to its end."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from rehearsal.errors import CheckpointError
from rehearsal.models.adapters import active_adapters, adapter_names, save_adapters
from rehearsal.models.load import Policy, save_policy
from rehearsal.training.checkpoint import (
    checkpoints,
    load_checkpoint,
    restore_weights,
    standing_checkpoints,
    step_of,
    tensor_errors,
    trainable_weights,
)
from rehearsal.training.playing import active_in, policy_of
from rehearsal.training.recipe import resolve_recipe
from rehearsal.training.runs import RunFolder
from rehearsal.training.storage import flush_tree, storage_errors


def export_policy(
    run: str | Path, folder: str | Path, step: int | None = None, policy: Policy | None = None
) -> Path:  # fmt: skip
    """Write the policy of a run's checkpoint as a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load.

    Adapters are multiplied into the weights there, as in the ``policy`` folder of a finished run, and stand beside them
    as PEFT folders in ``adapters``. The run may be at work, and is not changed.

    Args:
        run: its folder.
        folder: to write; it must not exist yet, or be empty.
        step: after how many steps; None for the newest checkpoint, or the one that the run went back to on a verdict.
        policy: the model that the run began with, where it was given in Python and ``model.path`` does not name it.

    Returns:
        the folder.

    Raises:
        CheckpointError: if there is no such checkpoint, if it is damaged, or if the folder cannot be written.
        ModelError: if the model that the run began with cannot be loaded.
    """
    run, folder = Path(run), Path(folder)
    checkpoint = _checkpoint(RunFolder.open(run), step)
    with storage_errors(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(f"{folder} exists already and is not an empty folder; choose another name.")
    weights, _ = load_checkpoint(checkpoint)
    before: dict[str, torch.Tensor] = {}
    recipe = resolve_recipe(run / "recipe.toml").model_copy(deep=True)
    if policy is None:
        recipe.model.device, recipe.model.gradient_checkpointing = "cpu", False
        if recipe.model.dtype == "auto" and any(tensor.dtype == torch.bfloat16 for tensor in weights.values()):
            recipe.model.dtype = "bfloat16"  # as it was trained, on whatever device
        policy = policy_of(recipe)
    else:  # a model that is given stays as it was
        before = {name: weight.detach().clone() for name, weight in trainable_weights(policy.model).items()}
    restore_weights(policy.model, weights, checkpoint)
    partial = folder.with_name(f".partial-{folder.name}")
    try:
        with storage_errors(folder), tensor_errors():
            shutil.rmtree(partial, ignore_errors=True)
            # What the run played with, whatever else the model was used for since.
            with active_adapters(policy.model, active_in(policy.model, recipe.world.mode)):
                save_policy(policy.model, policy.tokenizer, partial)
            if adapter_names(policy.model):
                save_adapters(policy.model, partial / "adapters")
            flush_tree(partial)
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if before:
            restore_weights(policy.model, before, checkpoint)
    return folder


def _checkpoint(run: RunFolder, step: int | None) -> Path:
    found = checkpoints(run.path / "checkpoints")
    if not found:
        raise CheckpointError(f"{run.path} has no checkpoint yet; let the run get on first.")
    if step is None:
        return standing_checkpoints(run)[-1]
    for checkpoint in found:
        if step_of(checkpoint) == step:
            return checkpoint
    there = ", ".join(str(step_of(checkpoint)) for checkpoint in found)
    raise CheckpointError(f"{run.path} has no checkpoint of step {step}; there are those of {there}.")
