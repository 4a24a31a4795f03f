"""What a policy knows of the environments of a recipe; see :mod:`rehearsal.diagnostics.world_model`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rehearsal.diagnostics.world_model import PROBES, Gap, fill_gaps, make_gaps
from rehearsal.errors import RecipeError
from rehearsal.evaluation.run import load_for_evaluation
from rehearsal.evaluation.statistics import wilson_interval
from rehearsal.models.chat import ChatRenderer
from rehearsal.training.playing import episode_limits, make_toolkit
from rehearsal.training.recipe import Recipe
from rehearsal.training.tasks import variants_of


class Prober:
    """Gaps in the environments of a recipe, the same ones each time.

    Args:
        recipe: for the environments and the limits of their episodes.
        renderer: of the model.
        count: episodes of each environment.
        split: of the tasks.
        seed: of tasks and walks.

    Raises:
        RecipeError: if one of the environments has no oracle, or nothing is legal there.
    """

    def __init__(
        self, recipe: Recipe, renderer: ChatRenderer, count: int, split: str = "validation", seed: int = 0
    ) -> None:
        if count < 1:
            raise RecipeError(f"A probe needs at least one episode, not {count}.")
        self._gaps: dict[str, list[Gap]] = {}
        with contextlib.closing(make_toolkit(recipe)) as toolkit:
            for variant, limits in zip(variants_of(recipe), episode_limits(recipe), strict=True):
                with contextlib.closing(variant.make()) as env:
                    found = make_gaps(env, renderer, limits, count, seed=seed, split=split, toolkit=toolkit)
                    self._gaps.setdefault(env.name, []).extend(found)

    def measure(self, model: Any) -> dict[str, float]:
        """The figures of :func:`rehearsal.diagnostics.world_model.fill_gaps` with 95% intervals, ``KIND/low`` and
        ``KIND/high``; behind the name of the environment if there are several."""
        figures: dict[str, float] = {}
        for name, gaps in self._gaps.items():
            own = fill_gaps(model, gaps)
            for kind in PROBES:
                if f"{kind}/count" in own:
                    count = round(own[f"{kind}/count"])
                    hits = round(own[f"{kind}/accuracy"] * count)
                    own[f"{kind}/low"], own[f"{kind}/high"] = wilson_interval(hits, count)
            lead = f"{name}/" if len(self._gaps) > 1 else ""
            figures |= {lead + key: value for key, value in own.items()}
        return figures


def probe_policy(
    policy: str | Path, *, recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (), split: str = "validation", count: int = 200,
) -> dict[str, float]:  # fmt: skip
    """Probe what a policy knows of its world.

    Args:
        policy: a run folder, a Hugging Face folder, a hub name, or "base".
        recipe: where the environment and its limits come from; a run folder brings its own.
        overrides: options by dotted name.
        split: of the tasks.
        count: episodes that gaps are made in.

    Returns:
        the figures of :meth:`Prober.measure`.

    Raises:
        RehearsalError: with one sentence, for whatever the user can mend.
    """
    resolved, loaded = load_for_evaluation(policy, recipe, overrides, "probe")
    return Prober(resolved, loaded.renderer, count, split).measure(loaded.model)
