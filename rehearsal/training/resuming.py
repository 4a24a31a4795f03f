"""What a run may be resumed with: more of the same, and nothing that would make another run of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rehearsal.errors import RecipeError
from rehearsal.training.recipe import Recipe, option_names, resolve_recipe
from rehearsal.training.runs import RunFolder

_FREE = (
    "name",
    "model.device",
    "model.gradient_checkpointing",
    "environment.workers",
    "environment.step_timeout",
    "training.",
    "evaluation.every",
    "diagnostics.",
    "engine.",
    "checkpoint.",
    "trackers",
    "save_trajectories_every",
)
"""Options, and tables of them (with a dot at the end), that may differ when a run is taken up again: how long and how
fast it goes on, where, and who watches. Everything else says what is learnt, by whom, and what it is measured on; with
that changed, figures from before and after would not be of one run."""


def resumed_recipe(
    run: str | Path, recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
) -> Recipe:  # fmt: skip
    """The recipe that a run goes on with.

    Args:
        run: its folder.
        recipe: the stored one if None; another must be that of the same run.
        overrides: options by dotted name.

    Raises:
        CheckpointError: if the folder holds no run.
        RecipeError: if an option differs that would make another run of it.
    """
    RunFolder.open(run)  # before anything else: a wrong folder is the likeliest mistake
    stored = resolve_recipe(Path(run) / "recipe.toml")
    wanted = resolve_recipe(Path(run) / "recipe.toml" if recipe is None else recipe, overrides)
    for name in changed_options(stored, wanted):
        if not any(name == free or (free.endswith(".") and name.startswith(free)) for free in _FREE):
            raise RecipeError(
                f"{run} cannot be resumed with another {name} ({_shown(wanted, name)} instead of "
                f"{_shown(stored, name)}): that would be another run; leave the option out, or begin a new run, with "
                f"--model.path {Path(run) / 'policy'} if it is to start from what this one has learnt."
            )
    if wanted.engine.memory_gib is None:
        # The number of places bears on rounding: it stays what it was.
        wanted = wanted.model_copy(update={"engine": wanted.engine.model_copy(
            update={"memory_gib": stored.engine.memory_gib}
        )})  # fmt: skip
    return wanted


def changed_options(one: Recipe, other: Recipe) -> list[str]:
    """Dotted names of the options that differ between two recipes, in the order of the recipe."""
    return [name for name in option_names() if _value(one, name) != _value(other, name)]


def _value(recipe: Recipe, name: str) -> Any:
    value: Any = recipe
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _shown(recipe: Recipe, name: str) -> str:
    value = _value(recipe, name)
    if isinstance(value, list):
        value = [entry.model_dump() if hasattr(entry, "model_dump") else entry for entry in value]
    text = "nothing" if value is None else str(value) or '""'
    return text if len(text) <= 60 else text[:57] + "..."
