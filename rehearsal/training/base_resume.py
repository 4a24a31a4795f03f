"""An interrupted training of a base goes on where it was kept last, to the weights that it would have had."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from rehearsal.errors import CheckpointError
from rehearsal.training.base_config import BaseConfig
from rehearsal.training.base_training import BaseState
from rehearsal.training.checkpoint import (
    checkpoints,
    load_checkpoint,
    remove_partial,
    restore_weights,
    save_checkpoint,
    trainable_weights,
)


class Unfinished:
    """Keeps the state of a base in the making.

    Args:
        folder: for it.
        config: what is made. What another configuration left behind is not taken up.
        model: whose weights are kept and restored.
    """

    def __init__(self, folder: Path, config: BaseConfig, model: torch.nn.Module) -> None:
        self.folder = folder
        self._digest = hashlib.blake2b(repr(config).encode(), digest_size=8).hexdigest()
        self._model = model

    def load(self) -> BaseState:
        """The state that was kept last, with its weights in the model; a new one if there is none.

        Raises:
            CheckpointError: if it is damaged.
        """
        remove_partial(self.folder)
        kept = checkpoints(self.folder)
        if not kept:
            return BaseState()
        try:
            weights, stored = load_checkpoint(kept[-1])
        except CheckpointError as error:
            raise CheckpointError(
                f"The base model in the making cannot be taken up from {kept[-1]}, which is damaged; delete "
                f"{self.folder} to begin anew."
            ) from error
        if stored["config"] != self._digest:
            self.remove()
            return BaseState()
        restore_weights(self._model, weights, kept[-1])
        return BaseState(**{field.name: stored[field.name] for field in fields(BaseState)})

    def save(self, state: BaseState) -> None:
        """Keep a state and the model's weights.

        Raises:
            CheckpointError: if they cannot be written; what was kept before is untouched.
        """
        stored: dict[str, Any] = {field.name: getattr(state, field.name) for field in fields(BaseState)}
        save_checkpoint(
            self.folder, state.step, trainable_weights(self._model), {**stored, "config": self._digest}, keep=1
        )

    def remove(self) -> None:
        """Delete all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)
