"""Files of one JSON object a line: values made fit for them, and reading that survives torn lines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rehearsal.training.storage import storage_errors


@dataclass(frozen=True)
class JsonLines:
    """What a ``.jsonl`` file holds.

    Attributes:
        rows: the objects of all readable lines, in order.
        damaged: how many lines could not be read (a torn last line counts).
    """

    rows: list[dict[str, Any]]
    damaged: int


def read_json_lines(path: Path) -> JsonLines:
    """Read a ``.jsonl`` file; lines that are not a JSON object are left out and counted. A missing file is empty.

    Raises:
        CheckpointError: if the file is there and cannot be read.
    """
    with storage_errors(path, writing=False):
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows, damaged = [], 0
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            damaged += 1
    return JsonLines(rows, damaged)


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: numbers that are not finite become None, NumPy and torch scalars numbers."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # a NumPy or torch scalar or array
        return plain(value.tolist())
    return str(value)


def as_line(row: Mapping[str, Any]) -> str:
    """The row as one line of valid JSON, line break included; see :func:`plain`."""
    return json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n"
