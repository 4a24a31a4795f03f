"""The episodes of a report are few, spread evenly, and show every kind of change."""

from collections import Counter
from pathlib import Path

from rehearsal.reports.episodes import PAIRS, choose_episodes
from rehearsal.reports.recipe import highlighted
from rehearsal.training.runs import RunFolder
from rehearsal.training.trajectory_store import write_trajectories
from rehearsal.trajectory import Group, StopReason, Trajectory, Turn


def played(seed: int, solved: bool | None, reward: float = 0.0, sample: int = 0, split: str = "test") -> Trajectory:
    turns = [Turn("o", rewards=[reward])]
    return Trajectory("lake", seed, split, f"t{seed}", sample, turns=turns, success=solved)


def run_with(path: Path, evaluations: dict[int, list[Trajectory]], train: dict[int, list[Group]]) -> RunFolder:
    with RunFolder.create(path, "a = 1", "x") as run:
        for step, episodes in evaluations.items():
            write_trajectories(run.trajectory_path("eval", step), [Group([one]) for one in episodes], "eval", step)
        for step, groups in train.items():
            write_trajectories(run.trajectory_path("train", step), groups, "train", step)
    return run


def test_pairs_show_every_kind_of_change_and_the_counts_are_of_all(tmp_path: Path) -> None:
    before = [played(seed, seed < 20) for seed in range(100)]
    after = [played(seed, 1 <= seed < 90) for seed in reversed(range(100))]
    middle = [played(seed, False) for seed in range(100)]
    run = run_with(tmp_path / "run", {0: before, 5: middle, 9: after}, {})
    choice = choose_episodes(run, [])
    assert choice.changes == {"gained": 70, "lost": 1, "never": 10, "kept": 19}
    assert len(choice.pairs) == PAIRS
    assert Counter(pair.change for pair in choice.pairs) == {"gained": 3, "lost": 1, "never": 3, "kept": 3}
    for pair in choice.pairs:
        assert (pair.before.step, pair.after.step) == (0, 9)
        assert pair.before.trajectory.seed == pair.after.trajectory.seed
    assert {one.step for one in choice.episodes} == {0, 9}
    assert choice.seen == 200
    assert len({one.key for one in choice.episodes}) == len(choice.episodes) <= 60


def test_a_damaged_last_evaluation_is_replaced_by_its_neighbour(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", {step: [played(1, step > 3)] for step in (0, 5, 9)}, {})
    run.trajectory_path("eval", 9).write_bytes(b"torn")
    problems: list[str] = []
    choice = choose_episodes(run, problems)
    assert [(pair.before.step, pair.after.step, pair.change) for pair in choice.pairs] == [(0, 5, "gained")]
    assert len(problems) == 1
    assert "eval_000009.parquet" in problems[0]


def test_one_evaluation_gives_episodes_and_no_pairs(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", {3: [played(seed, True) for seed in range(40)]}, {})
    choice = choose_episodes(run, [])
    assert choice.pairs == []
    assert list(choice.stops) == [3]
    assert choice.stops[3] == {"terminated": 40}
    assert [one.place for one in sorted(choice.episodes, key=lambda one: one.place)][:: len(choice.episodes) - 1] == [
        0,
        39,
    ]


def test_a_training_group_that_taught_something_is_preferred(tmp_path: Path) -> None:
    dead = Group([played(1, False, 0.0, sample, "train") for sample in range(4)])
    telling = Group([played(2, sample == 3, float(sample == 3), sample, "train") for sample in range(8)])
    run = run_with(tmp_path / "run", {}, {step: [dead, telling] for step in range(1, 30)})
    choice = choose_episodes(run, [])
    assert {one.trajectory.seed for one in choice.episodes} == {2}
    assert len({one.step for one in choice.episodes}) == 5
    assert {1, 29} <= {one.step for one in choice.episodes}
    assert sum(one.result == "solved" for one in choice.episodes) == 5
    assert len(choice.episodes) == 25


def test_failed_episodes_are_told_apart(tmp_path: Path) -> None:
    broken = played(1, None)
    broken.stop_reason = StopReason.TIMEOUT
    run = run_with(tmp_path / "run", {0: [broken], 9: [played(1, None, 1.0)]}, {})
    choice = choose_episodes(run, [])
    assert [one.result for one in choice.episodes] == ["open", "failed"]
    assert choice.changes == {"same": 1}


def test_the_recipe_keeps_every_character() -> None:
    text = 'a = "x # y" # why <b>\n[t.u]\n"q r" = 1\nlist = [\n  "#", 2,\n]\n\nbroken \'# quote'
    html = highlighted(text)
    assert html.striptags() == " ".join(text.split())
    assert '<span class="r"># why &lt;b&gt;</span>' in html
    assert '<b class="t">[t.u]</b>' in html
    assert html.count('class="r"') == 1
