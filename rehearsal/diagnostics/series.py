"""Metrics over the steps of a run, as the rules of the verdict read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_STAGE = "curriculum/stage"


class Series:
    """The metrics of a run up to a step.

    A figure that was not measured in a step is NaN there; averages are over what was measured. Everything looks back
    from the last step, so what is said of a step does not change as the run goes on.

    A curriculum in stages plays another environment from one stage to the next, so figures of two stages are not
    compared: whatever is averaged or compared here is of the present stage alone.

    Args:
        rows: one mapping a step with "step" and metrics by name, in order. Values that are not numbers are left out.
    """

    def __init__(self, rows: Sequence[Mapping[str, object]]) -> None:
        self._rows = list(rows)
        self._end = len(self._rows)
        # Of each figure that was asked for: values, with room to grow, and how many of them are filled in.
        self._columns: dict[str, tuple[Floats, int]] = {}
        self._stage = (0, 0)

    def __len__(self) -> int:
        return self._end

    def append(self, row: Mapping[str, object]) -> None:
        """Add a step. Not for what :meth:`until` gave."""
        self._rows.append(row)
        self._end = len(self._rows)

    @property
    def step(self) -> int:
        """Number of the last step; 0 before the first."""
        return int(float(str(self._rows[self._end - 1]["step"]))) if self._end else 0

    @property
    def in_later_stage(self) -> bool:
        """Whether there are earlier steps of another stage, which do not count."""
        return self._stage_begin() > 0

    def until(self, count: int) -> Series:
        """The same run as it stood after ``count`` rows."""
        earlier = Series(())
        earlier._rows, earlier._end, earlier._columns = self._rows, min(count, len(self._rows)), self._columns
        return earlier

    def values(self, name: str) -> Floats:
        """float64 of shape (rows,), NaN where the figure is missing."""
        column, filled = self._columns.get(name, (np.empty(0), 0))
        count = len(self._rows)
        if filled < count:
            if len(column) < count:
                column = np.concatenate([column[:filled], np.full(2 * count - filled, math.nan)])
            for index in range(filled, count):
                value = self._rows[index].get(name)
                if _is_number(value):
                    column[index] = float(value)
            self._columns[name] = (column, count)
        return column[: self._end]

    def measured(self, name: str) -> Floats:
        """The values that there are, oldest first."""
        return self.values(name)[self._rows_of(name)]

    def last(self, name: str) -> float:
        """The value of the last step; NaN if it has none."""
        values = self.values(name)
        return float(values[-1]) if len(values) else math.nan

    def fresh(self, name: str) -> bool:
        """Whether the figure was measured in the last step; of a name with a "*", one of those that it stands for."""
        return bool(self.fresh_like(name)) if "*" in name else not math.isnan(self.last(name))

    def fresh_like(self, pattern: str) -> list[str]:
        """The figures of a form (``a/*b``) that were measured in the last step."""
        return [name for name in self.fresh_names() if fnmatchcase(name, pattern)]

    def where(self, name: str) -> NDArray[np.bool_]:
        """bool of shape (rows,): the steps in which the figure was measured, or one that its "*" stands for."""
        if "*" not in name:
            return ~np.isnan(self.values(name))
        rows = self._rows[: self._end]
        return np.array([any(fnmatchcase(key, name) and _is_number(row[key]) for key in row) for row in rows], bool)

    def fresh_names(self) -> list[str]:
        """The figures that were measured in the last step, in the order in which they were written."""
        # Straight from the row: a column of every figure would have to be made anew in each step of a run.
        return [name for name, value in self._rows[self._end - 1].items() if _is_number(value)] if self._end else []

    def recent(self, name: str, count: int = 5) -> float:
        """Mean of the last ``count`` measured values; NaN if there is none."""
        values = self.measured(name)[-count:]
        return float(values.mean()) if len(values) else math.nan

    def recent_median(self, name: str, count: int = 5) -> float:
        """Median of the last ``count`` measured values, which a single outlier does not move; NaN if there is none."""
        values = self.measured(name)[-count:]
        return float(np.median(values)) if len(values) else math.nan

    def recent_rows(self, name: str, count: int = 5) -> NDArray[np.intp]:
        """Places of the last ``count`` measured values."""
        return self._rows_of(name)[-count:]

    def start(self, name: str, count: int = 3) -> float:
        """Mean of the first ``count`` measured values; NaN before there are as many."""
        values = self.measured(name)
        return float(values[:count].mean()) if len(values) >= count else math.nan

    def best(self, name: str, count: int = 5) -> float:
        """The largest mean of ``count`` measured values in a row; NaN before there are as many."""
        rows = self.best_rows(name, count)
        return float(self.values(name)[rows].mean()) if len(rows) else math.nan

    def best_rows(self, name: str, count: int = 5) -> NDArray[np.intp]:
        """Places of the ``count`` measured values in a row with the largest mean, the earliest where several are
        equal; empty before there are as many."""
        rows = self._rows_of(name)
        if len(rows) < count:
            return rows[:0]
        start = int(_means(self.values(name)[rows], count).argmax())
        return rows[start : start + count]

    def fall(self, name: str, count: int = 5) -> float:
        """How far the recent mean lies below the best one, in standard errors of their difference.

        What a single step scatters by is taken from the differences of neighbouring steps, which a trend hardly
        touches. The best of many means lies above its expectation, so a few standard errors are nothing yet. NaN before
        there are ``count`` steps; where nothing scatters at all, any fall is infinitely many.
        """
        values = self.measured(name)
        if len(values) < count:
            return math.nan
        return _in_errors(self.best(name, count) - self.recent(name, count), values[-4 * count :], 2 / count)

    def fell_at(self, name: str, count: int = 5) -> float:
        """Place of the step in which the mean of ``count`` values last sank below the middle between the best one and
        the recent one; NaN where there is no fall.

        The middle, because all that falls at once passes it at once, however far it falls.
        """
        rows = self._rows_of(name)
        if len(rows) < count:
            return math.nan
        means = _means(self.values(name)[rows], count)
        above = np.flatnonzero(means > (means.max() + means[-1]) / 2)
        return float(rows[above[-1] + count]) if len(above) else math.nan

    def rise(self, name: str, count: int = 10) -> float:
        """How far the recent mean lies above that of the first steps, in standard errors of their difference.

        NaN before there are twice ``count`` steps.
        """
        values = self.measured(name)
        if len(values) < 2 * count:
            return math.nan
        return _in_errors(self.recent(name, count) - self.start(name, count // 2), values, 3 / count)

    def rise_since_best(self, name: str, of: str, count: int = 5) -> float:
        """How far the recent mean of a figure lies above what it was while another was at its best, in standard errors
        of their difference; negative where it lies below. NaN before there are ``count`` values of both."""
        then = self.values(name)[self.best_rows(of, count)]
        then = then[~np.isnan(then)]
        values = self.measured(name)
        if len(values) < count or not len(then):
            return math.nan
        return _in_errors(self.recent(name, count) - float(then.mean()), values[-4 * count :], 2 / count)

    def _rows_of(self, name: str) -> NDArray[np.intp]:
        """Places of the measured values of the present stage."""
        begin = self._stage_begin()
        return begin + np.flatnonzero(~np.isnan(self.values(name)[begin:]))

    def _stage_begin(self) -> int:
        """Place of the first step that was played in the stage in which the last one was; 0 without stages."""
        if self._stage[0] != self._end:
            # A step tells the stage that it leaves behind, which the next one is played in; the first is played in 0.
            stages = self.values(_STAGE)[: max(self._end - 1, 0)]
            known = np.flatnonzero(~np.isnan(stages))
            moved = known[np.diff(stages[known], prepend=0.0) != 0] if len(known) else known
            self._stage = self._end, int(moved[-1]) + 1 if len(moved) else 0
        return self._stage[1]


def _means(values: Floats, count: int) -> Floats:
    """The mean of every ``count`` values in a row."""
    return np.convolve(values, np.ones(count) / count, mode="valid")


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _in_errors(difference: float, values: Floats, share: float) -> float:
    """A difference of means over its standard error: the scatter of single values times the root of ``share``."""
    scatter = math.sqrt(float((np.diff(values) ** 2).mean()) / 2)
    if scatter == 0.0:
        # Means of equal values may differ in their last digit.
        same = abs(difference) <= 1e-9 * float(np.abs(values).max())
        return 0.0 if same else math.copysign(math.inf, difference)
    return difference / (scatter * math.sqrt(share))
