"""Metrics over the steps of a run, as the rules of the verdict read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Series:
    """The metrics of a run up to a step.

    A figure that was not measured in a step is NaN there; averages are over what was measured. Everything looks back
    from the last step, so what is said of a step does not change as the run goes on.

    Args:
        rows: one mapping a step with "step" and metrics by name, in order. Values that are not numbers are left out.
    """

    def __init__(self, rows: Sequence[Mapping[str, object]]) -> None:
        self._rows = list(rows)
        self._end = len(self._rows)
        self._columns: dict[str, Floats] = {}

    def __len__(self) -> int:
        return self._end

    @property
    def step(self) -> int:
        """Number of the last step; 0 before the first."""
        return int(float(str(self._rows[self._end - 1]["step"]))) if self._end else 0

    def until(self, count: int) -> Series:
        """The same run as it stood after ``count`` rows."""
        earlier = Series(())
        earlier._rows, earlier._end, earlier._columns = self._rows, min(count, len(self._rows)), self._columns
        return earlier

    def values(self, name: str) -> Floats:
        """float64 of shape (rows,), NaN where the figure is missing."""
        if name not in self._columns:
            column = np.full(len(self._rows), math.nan)
            for index, row in enumerate(self._rows):
                value = row.get(name)
                if isinstance(value, int | float) and not isinstance(value, bool):
                    column[index] = float(value)
            self._columns[name] = column
        return self._columns[name][: self._end]

    def measured(self, name: str) -> Floats:
        """The values that there are, oldest first."""
        values = self.values(name)
        return values[~np.isnan(values)]

    def last(self, name: str) -> float:
        """The value of the last step; NaN if it has none."""
        values = self.values(name)
        return float(values[-1]) if len(values) else math.nan

    def fresh(self, name: str) -> bool:
        """Whether the figure was measured in the last step."""
        return not math.isnan(self.last(name))

    def recent(self, name: str, count: int = 5) -> float:
        """Mean of the last ``count`` measured values; NaN if there is none."""
        values = self.measured(name)[-count:]
        return float(values.mean()) if len(values) else math.nan

    def start(self, name: str, count: int = 3) -> float:
        """Mean of the first ``count`` measured values; NaN before there are as many."""
        values = self.measured(name)
        return float(values[:count].mean()) if len(values) >= count else math.nan

    def best(self, name: str, count: int = 5) -> float:
        """The largest mean of ``count`` measured values in a row; NaN before there are as many."""
        values = self.measured(name)
        if len(values) < count:
            return math.nan
        return float(np.convolve(values, np.ones(count) / count, mode="valid").max())
