"""Puts the parts of a report together into one HTML file that needs nothing else, not even a network."""

from __future__ import annotations

import base64
import hashlib
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import jinja2
from markupsafe import Markup

from rehearsal.reports.calls import UNREAD, broken_call, call_counts, call_views, told_above, use_of
from rehearsal.reports.data import ReportData, gather, moment
from rehearsal.reports.plots import draw
from rehearsal.reports.scales import spell
from rehearsal.reports.sections import SECTIONS
from rehearsal.reports.tables import STOP_WORDS
from rehearsal.reports.turn_rewards import made_of
from rehearsal.training.storage import write_atomically

_HERE = Path(__file__).parent


def write_report(run_path: str | Path) -> Path:
    """Write ``report.html`` into a run folder, in whatever state the run is.

    The file holds everything that it shows and asks nobody for anything: it can be opened offline and sent by mail.
    Its content security policy lets no script run but its own, so what an environment or a model wrote stays text.

    Returns:
        The path of the report.

    Raises:
        CheckpointError: if ``run_path`` is no run folder, or the report cannot be written.
    """
    data = gather(run_path)
    path = Path(run_path) / "report.html"
    write_atomically(path, render(data))
    return path


def render(data: ReportData) -> str:
    """The whole page as HTML."""
    templates = page_templates(data.episodes.text_limit)
    parts = []
    for section in sorted(SECTIONS.values(), key=lambda section: section.order):
        html = section.render(data, templates)
        if html is not None:
            parts.append((section, html))
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    return templates.get_template("report.html.jinja").render(
        data=data,
        parts=parts,
        style=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        # The policy names the script by its hash, so a script that slipped in through a text would not run.
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        made=moment(datetime.now(UTC).isoformat(timespec="minutes")),
    )


def page_templates(text_limit: int) -> jinja2.Environment:
    """The templates of this folder; texts of others that they show are cut after so many characters."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["spell"] = spell
    templates.filters["clip"] = partial(_clip, limit=text_limit)
    templates.filters.update(calls=call_views, broken_call=broken_call, use=use_of, call_counts=call_counts)
    templates.filters["made_of"] = made_of
    templates.globals.update(draw=draw, stop_words=STOP_WORDS, told_above=told_above, unread=UNREAD)
    return templates


def _clip(text: str, limit: int) -> str:
    """The text, or its beginning and the number of characters that are left out."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]}\n… {len(text) - limit:,} more characters in the trajectory file"
