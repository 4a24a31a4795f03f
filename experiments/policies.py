"""What cells of several experiments have in common: training runs from the base that ships."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from importlib import resources
from typing import Any

from experiments.cells import digest


def base_fingerprint() -> str:
    """Digest of the shipped base's weights."""
    weights = resources.files("rehearsal") / "models" / "base" / "model.safetensors"
    return hashlib.blake2b(weights.read_bytes(), digest_size=6).hexdigest()


def origin(recipe: str) -> dict[str, str]:
    """What a cell is made from, for its settings: digests of the shipped base and of a built-in recipe's file."""
    text = (resources.files("rehearsal") / "recipes" / f"{recipe}.toml").read_bytes()
    return {"base": base_fingerprint(), "recipe_file": hashlib.blake2b(text, digest_size=6).hexdigest()}


def resolved(recipe: str | None, overrides: Mapping[str, Any]) -> str:
    """Digest of a recipe with all of its options, so that a cell is not taken for one with another default.

    Options that cells without them could not have had are left out where they do nothing.
    """
    from rehearsal.training.recipe import resolve_recipe

    found = resolve_recipe(recipe, overrides).model_dump(mode="json")
    if found["world"]["updates"] == 1:
        del found["world"]["hold"]
    return digest(found)


def train_cell(settings: Mapping[str, Any], kind: Any = None, policy: Any = None) -> tuple[Any, dict[str, Any]]:
    """One training run.

    Args:
        settings: ``recipe``, ``seed``, ``threads`` and ``overrides``.
        kind: of trainer, if not the usual one.
        policy: that it goes on with, if not the recipe's own.

    Returns:
        the trainer, and figures: held-out success before and after with its interval, seconds, updates, episodes played
        and those that the policy learned from. ``seconds`` go by the clock, ``cpu_seconds`` by what the processor has
        spent in this process, whatever else it had to do.
    """
    import torch

    from rehearsal.training.loop import Trainer
    from rehearsal.training.recipe import resolve_recipe

    torch.set_num_threads(int(settings["threads"]))
    recipe = resolve_recipe(settings["recipe"], {"seed": settings["seed"], **settings["overrides"]})
    trainer = (kind or Trainer)(recipe, policy=policy)
    began, worked = time.monotonic(), time.process_time()
    trainer.run()
    held_out = [figures for _, split, figures in trainer.evaluations if split == "test"]
    figures: dict[str, Any] = {
        "seconds": time.monotonic() - began,
        "cpu_seconds": time.process_time() - worked,
        "learning_seconds": sum(row.get("time/learning", 0.0) for row in trainer.history),
        "updates": sum(row["policy/updates"] for row in trainer.history),
        "episodes": sum(row["train/episodes"] for row in trainer.history),
        "kept_episodes": sum(row["signal/kept_episodes"] for row in trainer.history),
        "kept_share": sum(row["signal/kept_share"] for row in trainer.history) / len(trainer.history),
        "train_success": [round(row["train/success"], 4) for row in trainer.history],
    }
    if held_out:
        figures |= {
            "before": held_out[0]["success"], "after": held_out[-1]["success"],
            "after_low": held_out[-1]["success_low"], "after_high": held_out[-1]["success_high"],
        }  # fmt: skip
    return trainer, figures
