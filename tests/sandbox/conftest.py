"""Pools of interpreters at every level of isolation that this system offers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rehearsal.sandbox import InterpreterPool, Isolation

sys.path.insert(0, str(Path(__file__).parent))

from pools import SMALL, below, eventually, is_zombie, python_for

_LEVELS = [pytest.param(level, marks=[] if level >= Isolation.NAMESPACES else pytest.mark.slow) for level in Isolation]


@pytest.fixture(scope="package", params=_LEVELS, ids=lambda level: level.value)
def pool(request: pytest.FixtureRequest) -> Iterator[InterpreterPool]:
    """A pool with small limits. At the end nothing of it is left."""
    level = request.param
    python = python_for(level)
    with InterpreterPool(40, limits=SMALL, isolation=level, python=python, spare=0) as made:
        yield made
        left = below(made) | {made._zygote._process.pid}
        scratch = made._zygote._scratch
    assert eventually(lambda: all(is_zombie(pid) for pid in left)), "processes outlived their pool"
    assert not scratch or not os.path.exists(scratch)
