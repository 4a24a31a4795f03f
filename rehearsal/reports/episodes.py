"""Which episodes a report shows whole: the same held-out tasks before and after, and a few from training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from rehearsal.errors import CheckpointError
from rehearsal.reports.calls import Use, call_views, told_above, use_of
from rehearsal.training.runs import RunFolder
from rehearsal.training.trajectory_store import read_table, read_trajectories
from rehearsal.trajectory import Group, Trajectory, all_trajectories

PAIRS = 10
"""Tasks shown side by side."""
EXTRA_EVALUATION = 6
"""More episodes of the first and of the last evaluation, beside those of the pairs."""
TRAIN_STEPS = 5
"""Training steps of which episodes are shown."""
TRAIN_EPISODES = 5
"""Episodes of one group of such a step."""
TEXT_BUDGET = 3_000_000
"""Characters of episode text in a report; texts are cut shorter until they fit."""
_TEXT_LIMITS = (20_000, 8_000, 4_000, 2_000, 1_000, 400)

T = TypeVar("T")

Change = Literal["gained", "lost", "never", "kept", "higher", "lower", "same"]

CHANGES: Mapping[Change, str] = {
    "gained": "newly solved",
    "lost": "no longer solved",
    "never": "solved neither time",
    "kept": "solved both times",
    "higher": "higher reward",
    "lower": "lower reward",
    "same": "same reward",
}
"""How an episode compares with the one of the same task at the first evaluation, in words; the order in which pairs
are picked. The last three are for environments that know no success."""


@dataclass(frozen=True)
class Episode:
    """One episode of the report.

    Attributes:
        phase: "train" or "eval".
        step: the training step.
        group: index of its group in the file.
        place: index of the episode in the file.
        trajectory: what happened.
        advantage: of the episode, where it was recorded.
    """

    phase: Literal["train", "eval"]
    step: int
    group: int
    place: int
    trajectory: Trajectory
    advantage: float | None

    @property
    def key(self) -> str:
        """Unique in the report, usable as an HTML id."""
        return f"{self.phase}-{self.step}-{self.place}"

    @property
    def result(self) -> str:
        """One of "solved", "unsolved", "failed" (no reward: something other than the agent broke) and "open" (the
        environment knows no success)."""
        if self.trajectory.failed:
            return "failed"
        return {True: "solved", False: "unsolved", None: "open"}[self.trajectory.success]

    @property
    def use(self) -> Use:
        """How it used its tools, see :func:`rehearsal.reports.calls.use_of`."""
        return use_of(self.trajectory)

    @property
    def same_task(self) -> tuple[Any, ...]:
        """What two episodes of one task share."""
        one = self.trajectory
        return one.environment, one.split, one.task, one.seed, one.sample


@dataclass(frozen=True)
class Pair:
    """The same held-out task at the first and at the last evaluation."""

    before: Episode
    after: Episode
    change: Change


@dataclass(frozen=True)
class EpisodeChoice:
    """What was picked, and what it was picked from.

    Attributes:
        episodes: those to show whole, training and evaluation, the latest step first.
        pairs: those of them to show side by side.
        changes: over all tasks of both evaluations, not only the shown ones.
        stops: for the first and the last evaluation (one entry if they are the same), its step and how many episodes
            ended for each reason.
        seen: how many episodes the files that were opened hold.
        text_limit: characters of one text that fit into the report.
    """

    episodes: Sequence[Episode]
    pairs: Sequence[Pair]
    changes: Mapping[Change, int]
    stops: Mapping[int, Mapping[str, int]]
    seen: int
    text_limit: int

    @property
    def played(self) -> list[tuple[str, int]]:
        """Phase and step of the shown episodes, each once, the latest first."""
        return list(dict.fromkeys((one.phase, one.step) for one in self.episodes))

    @property
    def environments(self) -> list[str]:
        """Ids of the environments of the shown episodes."""
        return sorted({one.trajectory.environment for one in self.episodes})


def choose_episodes(run: RunFolder, problems: list[str]) -> EpisodeChoice:
    """Pick the episodes of a report. Files that cannot be read are left out, with a sentence in ``problems``.

    The choice is spread evenly over what there is and looks at outcomes only to show every kind of change; it never
    looks for good ones.
    """
    seen = 0
    evaluations: dict[int, list[Episode]] = {}
    files = run.trajectory_files("eval")
    # From both ends towards the middle: where the first or last file is damaged, its neighbour stands in.
    for steps in (sorted(files), sorted(files, reverse=True)):
        for step in steps:
            if step in evaluations:
                break
            groups = _read("eval", step, files.pop(step), problems) if step in files else None
            if groups is not None:
                evaluations[step] = groups
                seen += len(groups)
                break
    pairs, changes = _pairs(evaluations)
    chosen = {one.key: one for pair in pairs for one in (pair.before, pair.after)}
    for episodes in evaluations.values():
        rest = [one for one in episodes if one.key not in chosen]
        extra = EXTRA_EVALUATION if pairs else PAIRS + EXTRA_EVALUATION
        chosen |= {one.key: one for one in _spread(rest, extra)}
    train_files = run.trajectory_files("train")
    for step in _spread(list(train_files), TRAIN_STEPS):
        episodes = _read("train", step, train_files[step], problems) or []
        seen += len(episodes)
        chosen |= {one.key: one for one in _telling_group(episodes)[:TRAIN_EPISODES]}
    shown = sorted(chosen.values(), key=lambda one: (-one.step, one.phase, one.place))
    if not shown:
        problems.append("No episodes were recorded, so none can be shown.")
    stops = {
        step: Counter(one.trajectory.stop_reason.value for one in evaluations[step]) for step in sorted(evaluations)
    }
    return EpisodeChoice(shown, pairs, changes, stops, seen, _text_limit(shown))


def _read(phase: Literal["train", "eval"], step: int, file: Path, problems: list[str]) -> list[Episode] | None:
    try:
        groups: list[Group] = read_trajectories(file)
        advantages = read_table(file, ["advantage"]).column("advantage").to_pylist()
    except CheckpointError as error:
        problems.append(str(error))
        return None
    of_group = [index for index, group in enumerate(groups) for _ in group]
    return [
        Episode(phase, step, of_group[place], place, trajectory, advantages[place])
        for place, trajectory in enumerate(all_trajectories(groups))
    ]


def _pairs(evaluations: Mapping[int, Sequence[Episode]]) -> tuple[list[Pair], Counter[Change]]:
    if len(evaluations) < 2:
        return [], Counter()
    first, last = min(evaluations), max(evaluations)
    before = {one.same_task: one for one in evaluations[first]}
    by_change: dict[Change, list[Pair]] = {change: [] for change in CHANGES}
    for after in evaluations[last]:
        if after.same_task in before:
            pair = Pair(before[after.same_task], after, _change(before[after.same_task], after))
            by_change[pair.change].append(pair)
    counts: Counter[Change] = Counter({change: len(pairs) for change, pairs in by_change.items() if pairs})
    # One of each kind in turn, so that a run with many gains still shows what it lost.
    queues = [_spread(pairs, PAIRS) for pairs in by_change.values()]
    picked: list[Pair] = []
    while len(picked) < PAIRS and any(queues):
        picked.extend(queue.pop(0) for queue in queues if queue)
    order = list(CHANGES)
    return sorted(picked[:PAIRS], key=lambda pair: order.index(pair.change)), counts


def _change(before: Episode, after: Episode) -> Change:
    if before.trajectory.success is not None or after.trajectory.success is not None:
        was, is_now = before.trajectory.success is True, after.trajectory.success is True
        return "kept" if was and is_now else "gained" if is_now else "lost" if was else "never"
    # A failed episode has no reward (NaN) and compares as the same.
    change = after.trajectory.reward - before.trajectory.reward
    return "higher" if change > 0 else "lower" if change < 0 else "same"


def _telling_group(episodes: Sequence[Episode]) -> list[Episode]:
    """The first group whose rewards differ (which is what the policy learns from), or the first one."""
    groups: dict[int, list[Episode]] = {}
    for one in episodes:
        groups.setdefault(one.group, []).append(one)
    for group in groups.values():
        rewards = {one.trajectory.reward for one in group if not one.trajectory.failed}
        if len(rewards) > 1:
            # Best, worst, and what lies between, spread evenly, in the order they were played.
            ranked = sorted(group, key=lambda one: -np.nan_to_num(one.trajectory.reward, nan=-np.inf))
            return sorted(_spread(ranked, TRAIN_EPISODES), key=lambda one: one.place)
    return next(iter(groups.values()), [])


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of the items, evenly spaced, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(place)] for place in np.linspace(0, len(items) - 1, count)]


def _text_limit(episodes: Sequence[Episode]) -> int:
    sizes = np.array([len(text) for one in episodes for text in _texts(one.trajectory)], dtype=np.int64)
    fitting = (limit for limit in _TEXT_LIMITS if np.minimum(sizes, limit).sum() <= TEXT_BUDGET)
    return next(fitting, _TEXT_LIMITS[-1])


def _texts(trajectory: Trajectory) -> Iterator[str]:
    """The texts of an episode that are shown."""
    for place, turn in enumerate(trajectory.turns):
        yield "" if told_above(trajectory.turns, place) else turn.observation
        yield from (turn.notice, turn.thought, turn.response)
        for call in call_views(turn):
            yield call.result
            yield from (argument.text for argument in call.arguments)
