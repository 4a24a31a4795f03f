"""The algorithm and the filter that a recipe asks for, checked against each other before anything runs."""

from __future__ import annotations

from rehearsal.algorithms.filters import DropConstant, Filter, KeepAll, make_filter
from rehearsal.algorithms.presets import Algorithm, preset
from rehearsal.diagnostics import RULE_NAMES
from rehearsal.errors import RecipeError
from rehearsal.training.options import DiagnosticsOptions
from rehearsal.training.recipe import Recipe


def chosen(recipe: Recipe) -> tuple[Algorithm, Filter]:
    """The algorithm of a recipe and its filter.

    Raises:
        RecipeError: for a name, an option or a value that does not exist, or groups of one episode where episodes of a
            group are compared.
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
    return algorithm, choose


def check_verdicts(options: DiagnosticsOptions) -> None:
    """Refuse verdicts that do not exist.

    Raises:
        RecipeError: naming those that do.
    """
    for name in (*options.stop_on, *options.go_back_on):
        if name not in RULE_NAMES:
            raise RecipeError(f"There is no verdict {name!r}; there are {', '.join(RULE_NAMES)}.")
