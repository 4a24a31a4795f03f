"""What a step tells of the episodes that the policy learned from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rehearsal.algorithms.filters import DropConstant, Extremes
from rehearsal.algorithms.presets import preset
from rehearsal.reports.group_archive import pack_groups, unpack
from rehearsal.training.batch import Batch, by_environment, kept_figures, learned_from
from rehearsal.training.loop import Trainer
from rehearsal.training.recipe import Recipe
from rehearsal.training.run import train
from rehearsal.training.runs import RunFolder
from rehearsal.trajectory import Group, SampleStop, StopReason, Trajectory, Turn, rewards_matrix


def episode(reward: float, *, cut_off: bool = False, failed: bool = False) -> Trajectory:
    stop = SampleStop.LENGTH if cut_off else SampleStop.END
    why = StopReason.ERROR if failed else StopReason.TERMINATED
    return Trajectory("made-up", seed=0, turns=[Turn("o", rewards=[reward], stop=stop)], stop_reason=why)


GROUPS = [
    Group([episode(0.0, cut_off=True), episode(1.0), episode(1.0, cut_off=True), episode(0.5)]),
    Group([episode(0.0, cut_off=True), episode(1.0, cut_off=True)]),
    Group([episode(1.0, cut_off=True), episode(1.0)]),
    Group([episode(0.0), episode(1.0), episode(1.0, failed=True)]),
]
MASKS = preset("grpo", mask_truncated=True)


def test_what_was_cut_off_is_not_learned_from() -> None:
    batch = Batch(GROUPS, DropConstant()(rewards_matrix(GROUPS)))
    learned = learned_from(batch, MASKS)
    assert learned.keep_PG.astype(int).tolist() == [[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    assert learned.reasons == (
        "kept: rewards differ; less 2 of its episodes, cut off", "dropped: all that the filter kept of it was cut off",
        "dropped: all its rewards are equal", "kept: rewards differ",
    )  # fmt: skip
    figures = kept_figures(batch, MASKS)
    assert figures["signal/kept_episodes"] == 4.0
    # The filter's own part: 8 of the 10 episodes with a reward, in 3 groups.
    assert (figures["signal/kept_share"], figures["signal/kept_groups"]) == (0.8, 3.0)
    everything = learned_from(batch, preset("grpo"))
    assert everything.reasons == batch.kept.reasons
    assert np.array_equal(everything.keep_PG, batch.kept.keep_PG)
    assert kept_figures(batch, preset("grpo"))["signal/kept_episodes"] == 8.0


def test_the_share_that_is_kept_of_each_environment() -> None:
    batch = Batch(GROUPS, Extremes(1, 1)(rewards_matrix(GROUPS)))
    figures = by_environment(batch, [0, 1, 1, 0], ["lake", "bandit"])
    assert figures["environment/lake/kept_share"] == pytest.approx(4 / 6)
    assert figures["environment/bandit/kept_share"] == pytest.approx(2 / 4)
    assert by_environment(batch, None, ["lake"]) == {}


def test_the_archive_tells_what_was_learned_from(
    small: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    play = Trainer.play

    def cut(trainer: Trainer) -> Batch:
        batch = play(trainer)
        for number, group in enumerate(batch.groups):
            for sample, trajectory in enumerate(group):
                short = sample < (3 if number == 0 else 1)
                trajectory.stop_reason = StopReason.CONTEXT_LIMIT if short else StopReason.TERMINATED
                trajectory.turns[-1].stop = SampleStop.END
        return batch

    monkeypatch.setattr(Trainer, "play", cut)
    recipe = small(
        algorithm__options__mask_truncated=True, training__steps=2, evaluation__episodes=0, save_trajectories_every=1
    )
    train(recipe, output=tmp_path / "run")
    problems: list[str] = []
    archive = pack_groups(RunFolder.open(tmp_path / "run"), problems)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert not problems
    for row, block in zip(rows, archive.blocks.values(), strict=True):
        first, *others = unpack(block)
        assert [one["kept"] for one in first["episodes"]] == [False, False, False]
        assert first["why"] == "dropped: all that the filter kept of it was cut off"
        for group in others:
            assert [one["kept"] for one in group["episodes"]] == [False, True, True]
            assert group["why"] == "kept: there is no filter; less 1 of its episodes, cut off"
        assert row["signal/kept_episodes"] == 6.0
