"""Commands that measure a model: ``eval`` and ``probe``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rehearsal.errors import RecipeError
from rehearsal.training.storage import storage_errors


def eval_command(options: argparse.Namespace) -> int:
    from rehearsal.reports.evaluation import check_output, evaluation_parts, write_evaluation_page

    for output in filter(None, (options.page, options.json)):
        check_output(output)
    figures = _mint(options) if options.protocol == "mint" else _plain_evaluation(options)
    console = Console()
    for part in evaluation_parts(figures, options.against or ""):
        headless = not any(part.columns)
        table = Table(
            *part.columns, box=None, show_header=not headless, padding=(0, 2, 0, 0),
            title=None if part.title == "Result" else part.title, title_justify="left", title_style="bold",
        )  # fmt: skip
        for row in part.rows:
            table.add_row(*(escape(cell) for cell in row))
        console.print(table)
    tasks = round(figures.get("tasks", options.episodes))
    if tasks < options.episodes:
        console.print(
            f"The {options.split} split has {tasks:,} tasks; each was played, instead of {options.episodes:,}."
        )
    _write_json(options.json, figures)
    if options.page is not None:
        about = {"policy": options.policy, "recipe": options.recipe, "split": options.split, "against": options.against,
                 "command": options.command_line}  # fmt: skip
        write_evaluation_page(options.page, figures, {name: str(value) for name, value in about.items() if value})
    return 0


def _write_json(file: Path | None, figures: Mapping[str, float]) -> None:
    if file is not None:
        with storage_errors(file):
            file.write_text(json.dumps(figures, indent=2) + "\n")


def _plain_evaluation(options: argparse.Namespace) -> dict[str, float]:
    from rehearsal.evaluation.run import evaluate_policy

    for name in ("turns", "proposals", "feedback", "feedback_model", "feedback_key_env"):
        if getattr(options, name) is not None:
            raise RecipeError(f"--{name.replace('_', '-')} goes with --protocol mint.")
    if options.verifier_options is not None and options.verifier is None:
        raise RecipeError("--verifier-options needs a --verifier.")
    if options.verifier is not None and options.samples < 2:
        raise RecipeError("A --verifier picks among several samples of a task: add --samples 4.")
    return evaluate_policy(
        options.policy, recipe=options.recipe, overrides=options.dotted, split=options.split, episodes=options.episodes,
        temperature=1.0 if options.temperature is None else options.temperature, samples=options.samples,
        against=options.against, url=options.url, api_key_env=options.api_key_env, verifier=options.verifier,
        verifier_options=_object("--verifier-options", options.verifier_options),
    )  # fmt: skip


def _mint(options: argparse.Namespace) -> dict[str, float]:
    from rehearsal.evaluation.run import evaluate_mint

    for name in ("against", "verifier", "verifier_options"):
        if getattr(options, name) is not None:
            raise RecipeError(f"--{name.replace('_', '-')} does not go with --protocol mint.")
    given = {name: getattr(options, name) for name in ("turns", "proposals", "feedback", "temperature")}
    return evaluate_mint(
        options.policy, recipe=options.recipe, overrides=options.dotted, split=options.split, episodes=options.episodes,
        feedback_model=options.feedback_model, feedback_key_env=options.feedback_key_env, samples=options.samples,
        url=options.url, api_key_env=options.api_key_env,
        **{name: value for name, value in given.items() if value is not None},
    )  # fmt: skip


def _object(flag: str, text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError as problem:
        raise RecipeError(f"{flag} is not JSON: {problem}.") from problem
    if not isinstance(value, dict):
        raise RecipeError(f'{flag} must be an object, such as \'{{"pattern": "[0-9]+"}}\'.')
    return value


def probe_command(options: argparse.Namespace) -> int:
    from rehearsal.display import probe_tables
    from rehearsal.evaluation.probe import probe_policy
    from rehearsal.reports.evaluation import check_output

    if options.json is not None:
        check_output(options.json)
    figures = probe_policy(
        options.policy, recipe=options.recipe, overrides=options.dotted, split=options.split, count=options.episodes
    )
    console = Console()
    for table in probe_tables(figures):
        console.print(table, highlight=False)
    _write_json(options.json, figures)
    return 0
