"""Values and scales as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Unit = Literal["share", "number", "tokens", "seconds"]


def spell(value: float | None, unit: Unit = "number") -> str:
    """A value as people read it: "71%", "4,120", "0.012", "3e-5", "2 h 05 min"."""
    if value is None or not math.isfinite(value):
        return "–"
    if unit == "share":
        percent = 100 * value
        return f"{percent:.0f}%" if abs(percent) >= 10 or percent == round(percent) else f"{percent:.1f}%"
    if unit == "seconds":
        return spell_seconds(value)
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1_000_000:
        return f"{value / 1_000_000:.3g}M"
    if size >= 1_000:
        return f"{value:,.0f}"
    if size >= 0.001:
        text = f"{value:.3g}" if size < 100 else f"{value:.4g}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def spell_seconds(seconds: float) -> str:
    """A duration: "0.8 s", "34 s", "12 min", "2 h 05 min", "3 d 4 h"."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round numbers from ``low`` to ``high``, both ends included where they are round."""
    span = high - low
    raw = span / max(1, count)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    digits = 2 - math.floor(math.log10(step))
    return [round(place * step, digits) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def spell_ticks(marks: Sequence[float], unit: Unit) -> list[str]:
    """Ticks as text with as many decimals as tell them apart, the same for all of them."""
    if unit in ("number", "tokens") and len(marks) > 1:
        step, largest = marks[1] - marks[0], max(abs(mark) for mark in marks)
        if step >= 0.0005 and largest < 1_000:
            decimals = next(count for count in range(6) if abs(step * 10**count - round(step * 10**count)) < 1e-6)
            return [f"{mark:.{decimals}f}" for mark in marks]
    if unit == "share" and len(marks) > 1 and 100 * (marks[1] - marks[0]) < 0.999:
        decimals = min(4, math.ceil(-math.log10(100 * (marks[1] - marks[0])) - 1e-9))
        return [f"{100 * mark:.{decimals}f}%" for mark in marks]
    return [spell(mark, unit) for mark in marks]
