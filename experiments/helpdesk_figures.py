"""What the cells of the help desk experiment come to: which companies count, and calls until one is served."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.helpdesk_companies import CHANGED, SERVED, TESTED, guessable, person
from experiments.intervals import told

SHARES = (
    "lead_in", "ceiling", "before", "new_at_the_end", "ceiling_at_the_end",
    "remembered", "last_lot", "changed_before", "changed_at_the_end",
)  # fmt: skip
"""Shares of matters settled that a cell tells, see :mod:`experiments.helpdesk`."""
COMPARED = ("placebo", "rehearse_only", "dual", "policy_only", "no_replay")
"""Arms that ``dual_rehearse`` is compared with, seed by seed."""


def counted(
    companies: Sequence[int], runs: Sequence[Mapping[str, Any]], guessed: set[int], person_took: Sequence[int]
) -> list[int]:
    """Places of the companies that count: nobody serves them by a guess, and neither an arm nor the person before the
    first call."""
    return [
        place
        for place, company in enumerate(companies)
        if company not in guessed and person_took[place] and all(run["start"][place] < SERVED for run in runs)
    ]


def _at_least(run: Mapping[str, Any], place: int, most: int) -> float:
    """The fewest calls that a company can have taken: one more than at the last test that it failed."""
    if run["calls"][place] is None:
        return most
    failed = run["failed"][place]
    return 0 if failed is None else failed + 1


def _mean(values: Iterable[float]) -> float:
    each = [float(value) for value in values]
    return statistics.mean(each) if each else math.nan


def figures_of(
    played: Mapping[str, Mapping[str, Any]], arms: Mapping[str, int], companies: Sequence[int], steps: Mapping[str, int]
) -> dict[str, float]:
    """All figures.

    Args:
        played: what :func:`play` found, by ``arm-seed``.
        arms: seeds of each arm.
        companies: of phases 2 and 4.
        steps: of each phase.
    """
    seeds = max(arms.values())
    people = [person(companies, seed) for seed in range(seeds)]
    figures: dict[str, float] = {}
    for number, (phase, params) in enumerate((("new", {}), ("changed", CHANGED))):
        guessed = guessable(companies, params)
        runs = {
            (arm, seed): run[phase]
            for arm, count in arms.items()
            for seed in range(count)
            if phase in (run := played[f"{arm}-{seed}"])
        }
        places = []
        for seed in range(seeds):
            # The arms that have a run of every seed, so that the companies do not depend on who was played once.
            compared = [run for (arm, own), run in runs.items() if own == seed and arms[arm] == seeds]
            places.append(counted(companies, compared, guessed, people[seed][number]))
        figures[f"{phase}_guess_served"] = len(guessed) / len(companies)
        figures[f"{phase}_companies_counted"] = _mean(len(own) for own in places)
        figures[f"{phase}_companies_counted_fewest"] = min(len(own) for own in places)
        own = [[people[seed][number][place] for place in places[seed]] for seed in range(seeds)]
        figures[f"person_{phase}_calls"] = _mean(_median(each) for each in own)
        figures[f"person_{phase}_mean_calls"] = _mean(_mean(each) for each in own)
        # Those that were not served in time count with the most that was tried: a bound from below.
        most = steps[phase]
        means: dict[str, list[float]] = {}
        for arm, count in arms.items():
            if (arm, 0) not in runs:
                continue
            each = [[runs[arm, seed]["calls"][place] for place in places[seed]] for seed in range(count)]
            means[arm] = [_mean(most if took is None else took for took in of_seed) for of_seed in each]
            medians = [_median([most if took is None else took for took in of_seed]) for of_seed in each]
            figures |= told(f"{arm}_{phase}_calls", medians) | told(f"{arm}_{phase}_mean_calls", means[arm])
            least = [
                _median([_at_least(runs[arm, seed], place, most) for place in places[seed]]) for seed in range(count)
            ]
            figures[f"{arm}_{phase}_calls_at_least"] = _mean(least)
            figures[f"{arm}_{phase}_served"] = _mean(_mean(took is not None for took in of_seed) for of_seed in each)
            for calls in TESTED:
                shares = [runs[arm, seed]["foretold"][calls] for seed in range(count)] if calls < most else [None]
                if None not in shares:
                    figures[f"{arm}_{phase}_foretold_after_{calls}"] = _mean(shares)
        for arm in COMPARED:
            if arm in means and "dual_rehearse" in means:
                pairs = zip(means[arm], means["dual_rehearse"], strict=True)
                figures |= told(f"{arm}_minus_dual_rehearse_{phase}_mean_calls", [a - b for a, b in pairs])
    kept: dict[str, list[float]] = {}
    for arm, count in arms.items():
        own_runs = [played[f"{arm}-{seed}"] for seed in range(count)]
        for name in SHARES:
            if all(run.get(name) is not None for run in own_runs):
                figures |= told(f"{arm}_{name}", [run[name] for run in own_runs])
        if all(run.get("remembered") is not None for run in own_runs):
            kept[arm] = [run["remembered"] - run["new_at_the_end"] for run in own_runs]
            figures |= told(f"{arm}_remembered_minus_new_at_the_end", kept[arm])
    if "dual_rehearse" in kept and len(kept.get("no_replay", ())) == len(kept["dual_rehearse"]):
        pairs = zip(kept["dual_rehearse"], kept["no_replay"], strict=True)
        figures |= told("replay_keeps", [a - b for a, b in pairs])
    return figures


def _median(values: Sequence[float]) -> float:
    return float(statistics.median(values)) if values else math.nan
