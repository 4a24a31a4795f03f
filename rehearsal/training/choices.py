"""The algorithm and the filter that a recipe asks for, checked against each other before anything runs."""

from __future__ import annotations

import math

from rehearsal.algorithms.filters import DropConstant, Filter, KeepAll, make_filter, most_groups
from rehearsal.algorithms.presets import Algorithm, preset
from rehearsal.diagnostics import RULE_NAMES
from rehearsal.errors import RecipeError
from rehearsal.training.options import DiagnosticsOptions
from rehearsal.training.recipe import Recipe


def chosen(recipe: Recipe) -> tuple[Algorithm, Filter]:
    """The algorithm of a recipe and its filter.

    Raises:
        RecipeError: for a name, an option or a value that does not exist, groups of one episode where episodes of a
            group are compared, a filter that never lets a step be filled, or a scaling where nothing is filtered.
    """
    algorithm = preset(recipe.algorithm.name, **recipe.algorithm.options)
    choose = make_filter(recipe.filter.name, **recipe.filter.options)
    if recipe.training.group_size == 1:
        if not algorithm.advantage.is_sequential:
            raise RecipeError(
                f"{algorithm.name} compares the episodes of a group, so training.group_size must be 2 or more; ppo and "
                "reinforce_pp can do with 1."
            )
        if algorithm.dynamic_sampling or not isinstance(choose, KeepAll):
            raise RecipeError(
                "Filters go by how the rewards of a group differ, so training.group_size must be 2 or more; with 1 set "
                "filter.name to none and leave dynamic sampling out."
            )
    if algorithm.dynamic_sampling and isinstance(choose, KeepAll):
        choose = DropConstant()
    if isinstance(choose, KeepAll) and recipe.filter.loss_scaling != "none":
        raise RecipeError(
            "filter.loss_scaling scales by what a filter keeps, and there is none: set filter.name, or leave it out."
        )
    most, needed = most_groups(choose), _groups_of_one_environment(recipe)
    if algorithm.dynamic_sampling and most is not None and most < needed:
        where = " of one environment" if recipe.mixture else ""
        raise RecipeError(
            f"With filter.options.k at {most} dynamic sampling never fills a step of {needed} groups{where}: set "
            f"filter.options.k to {needed} or to a share such as 0.5, or algorithm.options.dynamic_sampling to false."
        )
    return algorithm, choose


def _groups_of_one_environment(recipe: Recipe) -> int:
    """The most groups of a step that belong to one environment: filters look at each by itself."""
    weights = [part.weight for part in recipe.mixture] or [1.0]
    return math.ceil(recipe.training.groups * max(weights) / sum(weights) - 1e-9)  # thirds of 30 are 10


def check_verdicts(options: DiagnosticsOptions) -> None:
    """Refuse verdicts that do not exist.

    Raises:
        RecipeError: naming those that do.
    """
    for name in (*options.stop_on, *options.go_back_on):
        if name not in RULE_NAMES:
            raise RecipeError(f"There is no verdict {name!r}; there are {', '.join(RULE_NAMES)}.")
