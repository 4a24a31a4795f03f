"""What the last line of a run says."""

from __future__ import annotations

from typing import Any

import pytest

from rehearsal.display import closing_line

DONE: dict[str, Any] = {
    "steps": 12, "environment": "frozenlake", "episodes": 256.0, "seconds": 552.0, "success_before": 0.24,
    "success_after": 0.86,
}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, "success 24% -> 86% on 256 held-out maps in 9m 12s, report: r.html"),
        (
            {"ended_by": "format_lost"},
            "success 24% -> 86% on 256 held-out maps in 9m 12s, ended after step 12 by the verdict format_lost, "
            "report: r.html",
        ),
        (
            {"ended_by": "echo_trap", "went_back_to": 10},
            "success 24% -> 86% on 256 held-out maps in 9m 12s, ended after step 12 by the verdict echo_trap with the "
            "policy of step 10, report: r.html",
        ),
    ],
)
def test_the_closing_line_says_what_ended_the_run(more: dict[str, Any], expected: str) -> None:
    assert closing_line({**DONE, **more}, "r.html") == expected
