"""Which weights a step is computed with, as a number."""

from __future__ import annotations

import itertools
from typing import Any

from rehearsal.models.adapters import active_names
from rehearsal.models.lora import rewrites_weights


class WeightWatch:
    """Tells whether the weights of a model are those of an earlier look.

    Changes in place are seen by the versions that PyTorch counts for each parameter, so those that are made behind its
    back (through ``.data``, or to inference tensors) are not.

    Args:
        model: bare or wrapped by PEFT.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._versions: list[tuple[int, int]] = []
        self._numbers: dict[tuple[str, ...], int] = {}
        self._next = itertools.count()
        self.renew()

    def renew(self) -> None:
        """List the parameters anew: some may have been replaced or added."""
        self._parameters = list(self._model.parameters())
        self._rewritten = rewrites_weights(self._model)

    def look(self) -> tuple[int, frozenset[int]]:
        """The number of the present weights, active adapters included, and all numbers that may come back."""
        versions = self._present()
        if versions != self._versions:
            self._versions = versions
            self._numbers.clear()
        names = active_names(self._model)
        if names not in self._numbers:
            self._numbers[names] = next(self._next)
        return self._numbers[names], frozenset(self._numbers.values())

    def passed(self) -> None:
        """Called after a pass: some adapters write into the weights for it and put back what was there, which is no
        change."""
        if self._rewritten:
            self._versions = self._present()

    def _present(self) -> list[tuple[int, int]]:
        return [(id(one), -1 if one.is_inference() else one._version) for one in self._parameters]
