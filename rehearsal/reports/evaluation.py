"""The figures of an evaluation as tables: for the terminal, and as one HTML page that needs nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from markupsafe import Markup

from rehearsal.errors import RecipeError
from rehearsal.reports.data import moment
from rehearsal.reports.page import page_templates
from rehearsal.reports.plots import Chart, Series, draw
from rehearsal.training.storage import write_atomically
from rehearsal.usage import SANDBOX, is_usage

_HERE = Path(__file__).parent
_LONGEST_TEXT = 2000
_AT = re.compile(r"(pass@|pass\^|majority@|best@)(\d+)")
_TURNS = re.compile(r"success@(\d+)")
_ENDS = ("/low", "/high", "_low", "_high", "/p_value")
_COSTS = {
    "tokens/sampled": "written in an episode",
    "tokens/shown": "shown in an episode",
    "tokens/per_success": "written for each success",
    "feedback/tokens/sampled": "written in an episode with feedback",
    "server_tokens": "written by the server in all",
    "server_retries": "requests that were sent again",
    "feedback/requests": "remarks that were asked of the user",
    "feedback/prompt_tokens": "read by the user's model in all",
    "feedback/completion_tokens": "written by the user's model in all",
    "judge/requests": "answers of the judge in all",
    "judge/cached": "answers of the judge from its cache",
    "judge/prompt_tokens": "read by the judge in all",
    "judge/completion_tokens": "written by the judge in all",
}


@dataclass(frozen=True)
class Part:
    """A table of an evaluation.

    Attributes:
        title: short.
        note: how to read it; "" where that is plain.
        columns: heads, the first of them of names.
        rows: cells, as text.
    """

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def evaluation_parts(figures: Mapping[str, float], rival: str = "") -> list[Part]:
    """The tables of an evaluation; those that have nothing to show are left out.

    Args:
        figures: of :func:`rehearsal.evaluation.run.evaluate_policy` or :func:`rehearsal.evaluation.run.evaluate_mint`.
        rival: name of the policy that was compared with.
    """
    parts = [
        _result(figures), _compared(figures, rival), _turns(figures), _tries(figures), _categories(figures),
        _tools(figures), _costs(figures),
    ]  # fmt: skip
    return [part for part in parts if part.rows]


def write_evaluation_page(path: str | Path, figures: Mapping[str, float], about: Mapping[str, str]) -> Path:
    """Write the tables as one HTML file that asks nobody for anything.

    Args:
        path: of the file.
        figures: as for :func:`evaluation_parts`.
        about: what was evaluated, in words by name, such as ``{"policy": "runs/demo"}``; ``against`` names the rival.

    Raises:
        RecipeError: if there is no folder for it.
    """
    path = check_output(path)
    chart = turns_chart(figures)
    page = page_templates(_LONGEST_TEXT).get_template("evaluation.html.jinja").render(
        about=about, parts=evaluation_parts(figures, about.get("against", "")), chart=chart,
        drawing="" if chart is None else draw(chart, 620, 280),
        style=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        made=moment(datetime.now(UTC).isoformat(timespec="minutes")),
    )  # fmt: skip
    write_atomically(path, page)
    return path


def check_output(path: str | Path) -> Path:
    """The path of a page or of figures, if they can be written there: to be asked before anything is played.

    Raises:
        RecipeError: if there is no folder for it, or it is one.
    """
    path = Path(path)
    if path.is_dir():
        raise RecipeError(f"{path} is a folder; name a file to write to.")
    if not path.resolve().parent.is_dir():
        raise RecipeError(f"There is no folder {path.resolve().parent} to write {path.name} into; make it first.")
    return path


def turns_chart(figures: Mapping[str, float]) -> Chart | None:
    """Success after k turns, without and with feedback; None where there was one number of turns or none."""
    counts = _counts(figures)
    if len(counts) < 2:
        return None
    series: list[Series] = []
    for lead, name in (("", "without feedback"), ("feedback/", "with feedback")):
        keys = [f"{lead}success@{k}" for k in counts]
        if any(key in figures for key in keys):
            low, high = ([figures.get(f"{key}/{end}") for key in keys] for end in ("low", "high"))
            values = [figures.get(key) for key in keys]
            series.append(Series(name, counts, values, low, high, colour=len(series), markers=True))
    return Chart("Success after k turns", "", series, unit="share", whole=True)


def _counts(figures: Mapping[str, float]) -> list[int]:
    return sorted(int(found[1]) for name in figures if (found := _TURNS.fullmatch(name)))


def _result(figures: Mapping[str, float]) -> Part:
    rows = []
    if "success" in figures:
        rows.append(["success", f"{_percent(figures['success'])} {_ends(figures, 'success_')}"])
    for name, value in figures.items():
        elsewhere = name.startswith(("success", "against/", "category/", "tools/", "feedback/")) or name in _COSTS
        elsewhere = elsewhere or is_usage(name)
        if elsewhere or name.endswith(_ENDS) or _AT.fullmatch(name):
            continue
        if name == "slope":
            ends = f"({_points(figures['slope/low'])} to {_points(figures['slope/high'])})"
            rows.append(["slope", f"{_points(value)} points a turn {ends}"])
        elif f"{name}/low" in figures:
            rows.append([name, f"{_percent(value)} {_ends(figures, name + '/')}"])
        else:
            rows.append([name, f"{value:.4g}"])
    return Part("Result", "", ("", ""), rows)


def _compared(figures: Mapping[str, float], rival: str) -> Part:
    rows = []
    if "against/success" in figures:
        found = {name.removeprefix("against/"): value for name, value in figures.items() if name.startswith("against/")}
        rows = [
            [f"success of {rival}", _percent(found["success"])],
            [
                "difference",
                f"{_points(found['difference'])} points ({_points(found['low'])} to {_points(found['high'])}), "
                f"p = {found['p_value']:.2g}; better in {found['better']:.0f} of {found['tasks']:.0f} tasks, worse in "
                f"{found['worse']:.0f}",
            ],
        ]
    return Part("Compared", "", ("", ""), rows)


def _turns(figures: Mapping[str, float]) -> Part:
    helped = any(name.startswith("feedback/success@") for name in figures)
    columns = ["turns", "success", "95%"] + (["with feedback", "95%", "gain", "95%", "p"] if helped else [])
    rows = []
    for k in _counts(figures):
        name = f"success@{k}"
        row = [str(k), _percent(figures[name]), _span(figures, name)]
        if helped:
            row += [_percent(figures[f"feedback/{name}"]), _span(figures, f"feedback/{name}"), *_gain(figures, "", k)]
            row.append(f"{figures[f'feedback/gain@{k}/p_value']:.2g}" if k > 1 else "")
        rows.append(row)
    return Part("Success after k turns", "A task is played anew for each number of turns.", columns, rows)


def _gain(figures: Mapping[str, float], lead: str, k: int) -> list[str]:
    name = f"{lead}feedback/gain@{k}"
    if name not in figures:
        return ["", ""]
    return [_points(figures[name]), f"{_points(figures[name + '/low'])} to {_points(figures[name + '/high'])}"]


def _tries(figures: Mapping[str, float]) -> Part:
    found = [(match[1], int(match[2])) for name in figures if (match := _AT.fullmatch(name))]
    order = list(dict.fromkeys(kind for kind, _ in found))
    rows = [
        [f"{kind}{k}", _percent(figures[f"{kind}{k}"]), _span(figures, f"{kind}{k}")]
        for kind, k in sorted(found, key=lambda one: (order.index(one[0]), one[1]))
    ]
    return Part("Several tries", "Of the samples of each task; intervals over tasks.", ("", "share", "95%"), rows)


def _categories(figures: Mapping[str, float]) -> Part:
    names = [name[len("category/") : -len("/tasks")] for name in figures
             if name.startswith("category/") and name.endswith("/tasks")]  # fmt: skip
    counts = _counts(figures)
    key = f"success@{counts[-1]}" if counts else "success"
    helped = any(f"category/{name}/feedback/{key}" in figures for name in names)
    columns = ["kind", "tasks", "success", "95%"] + (["with feedback", "gain", "95%"] if helped else [])
    rows = []
    for name in names:
        lead = f"category/{name}/"
        row = [name, f"{figures[lead + 'tasks']:.0f}"]
        row += [_percent(figures[lead + key]), _span(figures, lead + key)] if lead + key in figures else ["–", ""]
        if helped:
            row.append(_percent(figures.get(f"{lead}feedback/{key}", float("nan"))))
            row += _gain(figures, lead, counts[-1])
        rows.append(row)
    note = f"With {counts[-1]} turns." if counts else ""
    return Part("By kind of task", note, columns, rows)


def _tools(figures: Mapping[str, float]) -> Part:
    names = [name[len("tools/") : -len("/used")] for name in figures
             if name.startswith("tools/") and name.endswith("/used")]  # fmt: skip
    rows = []
    for name in names:
        own = {key: figures.get(f"tools/{name}/{key}", float("nan"))
               for key in ("calls", "failures", "used", "success_with", "success_without")}  # fmt: skip
        rows.append([name, f"{own['calls']:.2g}", *(_percent(own[key]) for key in list(own)[1:])])
    columns = ("tool", "calls an episode", "of them failed", "used", "success with", "success without")
    return Part("Tools", "Success with and without a tool compares what the agent chose to do.", columns, rows)


def _costs(figures: Mapping[str, float]) -> Part:
    rows = [[told, f"{figures[name]:,.4g}"] for name, told in _COSTS.items() if name in figures]
    rows += [[f"of the {who}, by its prices", f"{figures[f'{name}/money']:,.4g}"] for name, who in
             (("feedback", "user's model"), ("judge", "judge")) if f"{name}/money" in figures]  # fmt: skip
    rows += [[f"calls in the sandbox, {name.removeprefix(SANDBOX)}", f"{calls:,.0f}"]
             for name, calls in figures.items() if name.startswith(SANDBOX)]  # fmt: skip
    rows += [[told, f"{figures[name]:.3g}"] for name, told in (
        ("feedback/remarks", "remarks in an episode"),
        ("feedback/withheld", "remarks withheld since they held the solution, in an episode"),
    ) if name in figures]  # fmt: skip
    return Part("Cost", "", ("", ""), rows)


def _percent(value: float) -> str:
    return "–" if value != value else f"{100 * value:.0f}%"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _ends(figures: Mapping[str, float], lead: str) -> str:
    return f"({_percent(figures[lead + 'low'])} to {_percent(figures[lead + 'high'])})"


def _span(figures: Mapping[str, float], name: str) -> str:
    return (
        f"{_percent(figures[name + '/low'])} to {_percent(figures[name + '/high'])}" if name + "/low" in figures else ""
    )
