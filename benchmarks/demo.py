"""What a newcomer waits for: ``git clone``, then ``make demo``, in a folder where nothing has been installed.

The committed state of this repository is cloned, so changes that are not committed do not count. Packages come from
wherever pip is set up to find them; what that takes is part of the figure.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.common import parser, report, say  # noqa: E402

_LINE = re.compile(r"success (\d+)% -> (\d+)% on (\d+) held-out \w+ in (?:(\d+)h )?(?:(\d+)m )?(\d+)s, report: (\S+)")


def read_closing_line(text: str) -> dict[str, float]:
    """The figures of the line that a run ends with.

    Raises:
        ValueError: if there is none.
    """
    found = _LINE.search(text)
    if found is None:
        raise ValueError("the demo did not end with its line")
    before, after, tasks, hours, minutes, seconds = (float(part or 0) for part in found.groups()[:6])
    training = hours * 3600 + minutes * 60 + seconds
    return {"before": before / 100, "after": after / 100, "held_out": tasks, "training_seconds": training}


def main() -> int:
    options = parser(__doc__)
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="rehearsal-demo-") as folder:
        clone = Path(folder) / "rehearsal"
        words = ["make", "demo"]
        if given.quick:
            words = ["make", "--dry-run", "demo"]
        began = time.monotonic()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        done = subprocess.run(words, cwd=clone, check=True, capture_output=True, text=True)
        seconds = time.monotonic() - began
        if given.quick:
            say(done.stdout)
            return 0
        figures = read_closing_line(" ".join(done.stdout.split())) | {"all_seconds": seconds}
        figures["report_is_there"] = float((clone / "runs" / "demo" / "report.html").is_file())
    goals = {"all_seconds": "<= 900", "before": "<= 0.30", "after": ">= 0.80", "report_is_there": ">= 1"}
    result = report("demo", figures, goals, [0], given.quick)
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
