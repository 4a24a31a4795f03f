"""The examples of the documentation's page run, and print what they say they do."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("math_verify")

from rehearsal.rewards.registry import verifiers

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_examples_run_and_print_what_they_say(number: int, tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{BLOCKS[number]}", encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"print\(.*\)  # (.*)$", BLOCKS[number], re.MULTILINE)
    assert said, "every example shows something"
    for line in said:
        assert line in done.stdout.splitlines()


def test_the_page_lists_all_verifiers() -> None:
    table = PAGE.partition("## Verifiers by name")[2].partition("\n\n")[2].partition("\n\n")[0]
    names = re.findall(r"^\| `([\w-]+)`", table, re.MULTILINE)
    assert sorted(names) == verifiers()
