"""Whether an agent has given up a tool: it calls it hardly ever any more, and does no better for it.

An agent whose first calls fail, or cost more than they bring, learns in a few steps not to call; from then on it never
finds out what the tool would have been good for. Its other figures may look healthy all the while.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from rehearsal.diagnostics.series import Series

TOOL_FIGURES = "train/tools/"
"""What the figures of tools begin with: ``train/tools/NAME/used``."""
_USED = "/used"


@dataclass(frozen=True)
class AbandonedTool:
    """A tool that is hardly called any more.

    Attributes:
        name: of the tool.
        most: share of the episodes that called it when most did.
        now: the same in the last steps.
        failures: share of its calls that failed when most episodes called it; NaN where that is not known.
        scale: "success" or "reward", whichever the environment tells; "" if neither is known.
        before: mean of it when most episodes called the tool; NaN if it is not known.
        after: the same in the last steps.
    """

    name: str
    most: float
    now: float
    failures: float
    scale: str
    before: float
    after: float


def tool_names(metrics: Iterable[str]) -> list[str]:
    """The tools that these metrics tell the use of, in order."""
    return [
        name.removeprefix(TOOL_FIGURES).removesuffix(_USED)
        for name in metrics
        if name.startswith(TOOL_FIGURES) and name.endswith(_USED)
    ]


def abandoned_tools(series: Series, *, share: float, certain: float, done: float) -> list[AbandonedTool]:
    """The tools that a run, as it stands after its last step, has given up.

    Of those that the last step had: the share of the episodes that call it has fallen, by more than chance, below a
    share of its highest mean over five steps, and success has not risen by more than chance since then. An agent that
    learned to do without a tool is left alone by the second condition, and one that has reached its goal by ``done``.

    Chance is judged twice: by what single steps scatter, and by how few episodes a share may stand for. Steps in which
    nobody calls do not scatter at all, so that one stray call before them would otherwise look like a habit.

    Args:
        series: the run.
        share: of the best, below which a tool counts as given up.
        certain: standard errors beyond which a change is more than chance.
        done: success from which on a run may do as it likes.
    """
    scale = next((name for name in ("success", "reward") if series.fresh(f"train/{name}")), "")
    if scale == "success" and series.recent("train/success") >= done:
        return []
    found = []
    for name in tool_names(series.fresh_names()):
        used = f"{TOOL_FIGURES}{name}{_USED}"
        now, most = series.recent(used), series.best(used)
        if not now < share * most or not series.fall(used) > certain:
            continue
        then = series.best_rows(used)
        if (
            not _errors_between(most, now, _episodes(series, then), _episodes(series, series.recent_rows(used)))
            > certain
        ):
            continue
        if scale and series.rise_since_best(f"train/{scale}", used) > certain:
            continue
        failures = _mean_at(series, f"{TOOL_FIGURES}{name}/failures", then)
        before = _mean_at(series, f"train/{scale}", then)
        found.append(AbandonedTool(name, most, now, failures, scale, before, series.recent(f"train/{scale}")))
    return found


def _episodes(series: Series, rows: np.ndarray) -> float:
    """Episodes of these steps; without limit where they were not counted."""
    counts = series.values("train/episodes")[rows]
    return math.inf if np.isnan(counts).any() else float(counts.sum())


def _errors_between(first: float, second: float, n_first: float, n_second: float) -> float:
    """The difference of two shares of so many episodes, in standard errors of what they would be if they were equal."""
    if math.isinf(n_first) or math.isinf(n_second):
        return math.inf
    both = (first * n_first + second * n_second) / (n_first + n_second)
    error = math.sqrt(both * (1 - both) * (1 / n_first + 1 / n_second))
    return (first - second) / error if error > 0 else 0.0


def _mean_at(series: Series, name: str, rows: np.ndarray) -> float:
    values = series.values(name)[rows]
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan
