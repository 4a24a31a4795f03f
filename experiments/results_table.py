"""Write docs/results.md from the stored results of benchmarks and experiments, never by hand.

python experiments/results_table.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import met  # noqa: E402


def shown(value: Any) -> str:
    """A figure as it stands in a table."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, list):
        return ", ".join(shown(entry) for entry in value)
    return str(value)


def section(file: Path) -> list[str]:
    """The lines of one result."""
    result = json.loads(file.read_text())
    lines = [
        f"## {result['name']}",
        "",
        f"`{result['command']}` at {result['commit']} on {result['device']['name']}, {result['device']['cores']} cores"
        + (f", seeds {shown(result['seeds'])}" if result.get("seeds") else ""),
        "",
        "| figure | value | goal | holds |",
        "|---|---|---|---|",
    ]
    for name, value in result["figures"].items():
        goal = result["goals"].get(name)
        holds = "" if goal is None else shown(value is not None and met(value, goal))
        lines.append(f"| {name} | {shown(value)} | {goal or ''} | {holds} |")
    return [*lines, ""]


def main() -> None:
    lines = [
        "# Results",
        "",
        "Made from the files under `benchmarks/results/` and `experiments/results/` by "
        "`python experiments/results_table.py`. Times are those of one machine on one day; ratios were taken within "
        "one run.",
        "",
    ]
    for folder in ("experiments", "benchmarks"):
        for file in sorted((ROOT / folder / "results").glob("*.json")):
            lines += section(file)
    (ROOT / "docs" / "results.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
