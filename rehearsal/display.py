"""What a person sees in the terminal while a run goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from rehearsal.diagnostics import Verdict
from rehearsal.training.observer import Observer, Watched
from rehearsal.training.recipe import Recipe
from rehearsal.trajectory import Trajectory
from rehearsal.usage import usage_words


def percent(value: float | None) -> str:
    return "–" if value is None or value != value else f"{100 * value:.0f}%"


def duration(seconds: float) -> str:
    """Seconds as "9m 12s" or "1h 05m"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def _named(name: str, values: Mapping[str, Any]) -> str:
    """A name with its parameters: "frozenlake (size=4)"."""
    told = ", ".join(f"{key}={value}" for key, value in values.items())
    return f"{name} ({told})" if told else name


def _environments(recipe: Recipe) -> str:
    if not recipe.mixture:
        return _named(recipe.environment.name, recipe.environment.params)
    total = sum(part.weight for part in recipe.mixture)
    return "; ".join(f"{percent(part.weight / total)} {_named(part.name, part.params)}" for part in recipe.mixture)


class TerminalObserver(Observer):
    """One line a step, a bar for the episodes at play, and the held-out figures as they come."""

    _HEADER_EVERY = 20
    _COLUMNS = (
        ("step", 8), ("success", 8), ("reward", 8), ("dead groups", 12), ("entropy", 8), ("tok/turn", 9),
        ("tok/s", 8), ("episodes/s", 11), ("left", 7),
    )  # fmt: skip

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._lines = 0
        self._trainer: Watched | None = None
        self._first: tuple[int, float] | None = None

    def started(self, trainer: Watched) -> None:
        self._trainer = trainer
        assert trainer.policy is not None
        recipe = trainer.recipe
        limits = trainer.rollout.limits
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        table.add_row("agent", f"{escape(trainer.policy.source)}, {trainer.policy.n_parameters / 1e6:.2f}M parameters")
        table.add_row("environment", escape(_environments(recipe)))
        if recipe.curriculum.name != "fresh":
            stages = f", {len(recipe.curriculum.stages)} stages" if recipe.curriculum.stages else ""
            table.add_row("curriculum", escape(recipe.curriculum.name + stages))
        if recipe.filter.name != "none":
            table.add_row("filter", escape(_named(recipe.filter.name, recipe.filter.options)))
        table.add_row(
            "episode",
            f"at most {limits.max_turns} turns of {limits.max_actions_per_turn} actions, {limits.max_context} tokens",
        )
        table.add_row(
            "step",
            f"{recipe.training.groups} tasks x {recipe.training.group_size} episodes, {trainer.algorithm.name}, "
            f"learning rate {recipe.training.learning_rate:g}",
        )
        engine = trainer.rollout.engine
        cache = getattr(engine, "cache_bytes", 0) / 2**20
        split = f" in {trainer.processes} processes" if trainer.processes > 1 else ""
        table.add_row("engine", f"{engine.capacity} episodes at once{split}, at most {cache:.0f} MiB of cache")
        for name, told in trainer.facts.items():
            table.add_row(escape(name), escape(told))
        if trainer.folder is not None:
            table.add_row("run", escape(str(trainer.folder.path)))
        self.console.print(table)
        for note in trainer.policy.renderer.notes:
            self.console.print(f"[yellow]note[/] {escape(note)}", highlight=False)

    def playing(self, what: str, total: int) -> None:
        self._stop()
        if not self.console.is_terminal:
            return
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=30),
            TextColumn("{task.completed}/{task.total} episodes"), TimeElapsedColumn(), console=self.console,
            transient=True, refresh_per_second=8,
        )  # fmt: skip
        self._progress.start()
        self._task = self._progress.add_task(f"playing: {what}", total=total)

    def episode(self, trajectory: Trajectory) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task)

    def learning(self) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description="learning")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._stop()
        assert self._trainer is not None
        if self._lines % self._HEADER_EVERY == 0:
            self._line([name for name, _ in self._COLUMNS], "bold")
        self._lines += 1
        now = time.monotonic()
        if self._first is None:
            # The first step of a session has nothing before it to be timed by; it times itself.
            self._first = (step - 1, now - metrics.get("time/step", 0.0))
        steps = self._trainer.recipe.training.steps
        left = (now - self._first[1]) / max(1, step - self._first[0]) * (steps - step)
        self._line(
            [
                f"{step}/{steps}",
                percent(metrics.get("train/success")),
                f"{metrics.get('train/reward', float('nan')):.3f}",
                percent(metrics.get("signal/dead_groups")),
                f"{metrics.get('behaviour/entropy', float('nan')):.3f}",
                f"{metrics.get('train/response_tokens', float('nan')):.1f}",
                f"{metrics.get('speed/tokens_per_second', float('nan')):,.0f}",
                f"{metrics.get('speed/episodes_per_second', float('nan')):.1f}",
                duration(left),
            ]
        )

    def verdict(self, step: int, verdict: Verdict) -> None:
        self._stop()
        since = "" if verdict.began == step else f" (since step {verdict.began})"
        self.console.print(
            f"[bold yellow]{escape(verdict.rule.title)}[/]{since}: {escape(verdict.evidence)} "
            f"{escape(verdict.rule.sentence)} [dim]{escape(verdict.rule.suggestion)}[/]",
            highlight=False,
        )

    def warning(self, sentence: str) -> None:
        self._stop()
        self.console.print(f"[bold yellow]warning[/] {escape(sentence)}", highlight=False)

    def evaluation(self, step: int, split: str, figures: Mapping[str, float]) -> None:
        self._stop()
        name = "held-out" if split == "test" else split
        if "success" in figures:
            text = (
                f"success [bold]{percent(figures['success'])}[/] "
                f"({percent(figures['success_low'])} to {percent(figures['success_high'])})"
            )
        else:
            text = f"reward [bold]{figures.get('reward', float('nan')):.3f}[/]"
        self.console.print(
            f"[cyan]{name}[/] after {step} steps: {text} on {figures['episodes']:.0f} tasks", highlight=False
        )

    def finished(self, summary: Mapping[str, Any]) -> None:
        self._stop()
        if self._trainer is not None and self._trainer.usage:
            for name, told in usage_words(self._trainer.usage, self._trainer.facts).items():
                self.console.print(f"[dim]{name.lower()}[/] {escape(told)}", highlight=False)

    def close(self) -> None:
        """Leave the terminal in order, whatever happened."""
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._task = None

    def _line(self, cells: list[str], style: str = "") -> None:
        text = "".join(cell.rjust(width) for cell, (_, width) in zip(cells, self._COLUMNS, strict=True))
        self.console.print(text, style=style, highlight=False)


def closing_line(summary: Mapping[str, Any], report: Any) -> str:
    """The last line of a run: "success 24% -> 86% on 256 held-out maps in 9m 12s, report: PATH", with the verdict that
    ended it if one did."""
    things = {"frozenlake": "maps", "sokoban": "levels"}.get(str(summary.get("environment")), "tasks")
    n = f"{summary.get('episodes', 0):.0f} held-out {things}"
    took = f" in {duration(summary['seconds'])}" if "seconds" in summary else ""
    if "success_before" in summary and "success_after" in summary:
        what = f"success {percent(summary['success_before'])} -> {percent(summary['success_after'])} on {n}"
    elif "reward_before" in summary and "reward_after" in summary:
        what = f"reward {summary['reward_before']:.3f} -> {summary['reward_after']:.3f} on {n}"
    else:
        what = f"stopped after {summary.get('steps', 0)} steps"
    ended = ""
    if "ended_by" in summary:
        ended = f", ended after step {summary.get('steps', 0)} by the verdict {summary['ended_by']}"
        if "went_back_to" in summary:
            ended += f" with the policy of step {summary['went_back_to']}"
    return f"{what}{took}{ended}, report: {report}"


_GAPS = {
    "action": "the best action",
    "forward": "what comes of an action",
    "inverse": "the action between, in words",
    "by_forward": "the same, by what comes next",
    "reward": "the reward, asked in words",
    "budget": "enough turns? asked in words",
}


def probe_tables(figures: Mapping[str, float]) -> list[RenderableType]:
    """What a probe found, as a table and a sentence for each environment."""
    leads = {name.removesuffix("perplexity") for name in figures if name.endswith("perplexity")}
    leads |= {name.removesuffix("action/accuracy") for name in figures if name.endswith("action/accuracy")}
    shown: list[RenderableType] = []
    for lead in sorted(leads):
        table = Table("the gap", "right", "95%", "chance", "word for word", "gaps", box=None, padding=(0, 2, 0, 0))
        for kind, words in _GAPS.items():
            own = {key: figures.get(f"{lead}{kind}/{key}") for key in ("accuracy", "low", "high", "chance", "exact")}
            if own["accuracy"] is not None:
                low, high = percent(own["low"] or 0.0), percent(own["high"] or 0.0)
                table.add_row(
                    words, percent(own["accuracy"]), f"{low} to {high}", percent(own["chance"] or 0.0),
                    percent(own["exact"] or 0.0), f"{figures[f'{lead}{kind}/count']:.0f}",
                )  # fmt: skip
        if lead:
            shown.append(lead.rstrip("/"))
        shown.append(table)
        if f"{lead}perplexity" in figures:
            perplexity, symbols = figures[f"{lead}perplexity"], figures[f"{lead}symbols"]
            verdict = "the world is foreign to it" if perplexity > symbols else "it knows how the world speaks"
            shown.append(f"Perplexity of answers {perplexity:.3g}, of {symbols:.0f} symbols: {verdict}.")
    return shown
