"""Write docs/results.md from the stored results of benchmarks and experiments, never by hand.

python experiments/results_table.py
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import met  # noqa: E402

ENDS = ("_low", "_high")
"""What is put behind a figure's name for the ends of its interval."""


def shown(value: Any) -> str:
    """A figure as it stands in a table."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, list):
        return ", ".join(shown(entry) for entry in value)
    return str(value)


def with_interval(name: str, figures: Mapping[str, Any]) -> str:
    """A figure, with its interval where there is one."""
    ends = [figures.get(name + end) for end in ENDS]
    value = shown(figures[name])
    return value if None in ends else f"{value} ({shown(ends[0])} to {shown(ends[1])})"


def rows(figures: Mapping[str, Any]) -> dict[str, str]:
    """What stands in the table: figures with their intervals, and figures that differ in a last number in one row."""
    names = [
        name for name in figures if not any(name.endswith(end) and name.removesuffix(end) in figures for end in ENDS)
    ]
    series: dict[str, list[str]] = {}
    for name in names:
        numbered = re.fullmatch(r"(.+_)\d+", name)
        series.setdefault(numbered[1] if numbered else name, []).append(name)
    found: dict[str, str] = {}
    for stem, members in series.items():
        if len(members) > 2:
            numbers = [name.removeprefix(stem) for name in members]
            found[f"{stem}{numbers[0]}, {numbers[1]} … {numbers[-1]}"] = ", ".join(shown(figures[m]) for m in members)
        else:
            found |= {name: with_interval(name, figures) for name in members}
    return found


def section(file: Path) -> list[str]:
    """The lines of one result."""
    result = json.loads(file.read_text())
    figures, goals = result["figures"], result["goals"]
    lines = [
        f"## {result['name']}",
        "",
        f"`{result['command']}` at {result['commit']} on {result['device']['name']}, {result['device']['cores']} cores"
        + (f", seeds {shown(result['seeds'])}" if result.get("seeds") else ""),
        "",
    ]
    if goals:
        lines += ["| figure | goal | found | holds |", "|---|---|---|---|"]
        for name, goal in goals.items():
            value = figures.get(name)
            found = "–" if value is None else with_interval(name, figures)
            lines.append(f"| {name} | {goal} | {found} | {shown(value is not None and met(value, goal))} |")
        lines.append("")
    lines += ["| figure | found |", "|---|---|"]
    lines += [f"| {name} | {found} |" for name, found in rows(figures).items() if name not in goals]
    return [*lines, ""]


def main() -> None:
    lines = [
        "# Results",
        "",
        "Made from the files under `benchmarks/results/` and `experiments/results/` by "
        "`python experiments/results_table.py`. In brackets stand, in experiments, intervals of 95% and, in "
        "benchmarks, the lowest and the highest round. Times are those of one machine on one day; ratios were taken "
        "within one run.",
        "",
    ]
    for folder in ("experiments", "benchmarks"):
        for file in sorted((ROOT / folder / "results").glob("*.json")):
            lines += section(file)
    (ROOT / "docs" / "results.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
