"""The page of signal: findings, the plane, and every group with why it was kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rehearsal.cli import main
from rehearsal.errors import CheckpointError
from rehearsal.reports import write_report
from rehearsal.reports.data import gather
from rehearsal.reports.diagnosis import diagnose
from rehearsal.reports.group_archive import pack_groups, unpack
from rehearsal.reports.plane import REGIMES, draw_plane, plane_of
from rehearsal.training.runs import RunFolder
from rehearsal.training.trajectory_store import write_trajectories
from rehearsal.trajectory import Group, StopReason, Trajectory, Turn


def play(reward: float, text: str = "a lake", failed: bool = False) -> Trajectory:
    turn = Turn(text, thought="think <b>", actions=["Left", "Up"], executed=["Left"], rewards=[reward])
    stop = StopReason.ERROR if failed else StopReason.TERMINATED
    return Trajectory("lake", 1, turns=[turn], success=reward > 0, stop_reason=stop, final_observation="end")


def make_run(path: Path, steps: int = 40, text: str = "a lake", **late: float) -> RunFolder:
    """A run whose figures change to ``late`` (two underscores for a slash) half way."""
    with RunFolder.create(path, "", "rehearsal train", device="cpu") as run:
        for step in range(1, steps + 1):
            row = {
                "train/success": 0.5, "train/reward": 0.3 + step / 100, "signal/dead_groups": 0.2,
                "signal/dead_groups_failed": 0.1,
                "signal/dead_groups_solved": 0.1, "signal/reward_std_in_group": 0.4, "behaviour/thought_tokens": 20.0,
                "behaviour/invalid_turns": 0.0, "signal/variance_q10": 0.0, "signal/variance_q25": 0.1,
                "signal/variance_q50": 0.2, "signal/variance_q75": 0.2, "signal/variance_q90": 0.25,
            }  # fmt: skip
            if step % 4 == 0:
                row["information/first/sequence/share"] = 0.9
                row["information/first/sequence/conditional_entropy"] = 3.0
            if step > steps // 2:
                row |= {name.replace("__", "/"): value for name, value in late.items()}
            run.append_metrics(step, row)
            groups = [Group([play(1.0, text), play(0.0, text)]), Group([play(0.0), play(0.0, failed=True)])]
            extra = {"kept": [True, True, False, False], "filter_reason": ["kept: so"] * 2 + ["dropped: <so>"] * 2}
            write_trajectories(run.trajectory_path("train", step), groups, "train", step, extra)
    return run


def test_every_group_is_there_with_why_it_was_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=5)
    problems: list[str] = []
    archive = pack_groups(run, problems)
    assert not problems
    assert archive.complete
    assert list(archive.blocks) == [1, 2, 3, 4, 5]
    alive, dead = unpack(archive.blocks[3])
    assert alive["why"] == "kept: so"
    assert alive["var"] == 0.25
    assert [one["kept"] for one in alive["episodes"]] == [True, True]
    assert [one["reward"] for one in alive["episodes"]] == [1.0, 0.0]
    assert [one["result"] for one in dead["episodes"]] == ["unsolved", "failed"]
    assert dead["why"] == "dropped: <so>"
    assert dead["episodes"][1]["reward"] is None
    turn = alive["episodes"][0]["turns"][0]
    assert (turn["o"], turn["t"], turn["a"], turn["x"]) == ("a lake", "think <b>", ["Left", "Up"], 1)


def test_what_the_reward_of_a_turn_is_made_of(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2)
    told = play(1.0)
    told.turns[0].parts = {"form": 0.5}
    told.turns[0].shaping = {"length": -0.25, "call": 0.0}
    told.turns[0].violations, told.turns[0].obligations = ["<rude>", "late"], ["greeted"]
    write_trajectories(run.trajectory_path("train", 1), [Group([told, play(0.0)])], "train", 1)
    write_trajectories(run.trajectory_path("eval", 2), [Group([told])], "eval", 2)
    (group,) = unpack(pack_groups(run, []).blocks[1])
    words = "form +0.5, length −0.25; broke <rude>, late; did greeted"
    assert [one["turns"][0].get("m") for one in group["episodes"]] == [words, None]
    page = write_report(run.path).read_text(encoding="utf-8")
    assert "form +0.5, length −0.25; broke &lt;rude&gt;, late; did greeted" in page


def test_a_small_budget_leaves_steps_out_evenly(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=33)
    whole = pack_groups(run, [])
    each = max(map(len, whole.blocks.values()))
    some = pack_groups(run, [], budget=5 * each)
    assert list(some.blocks) == [1, 9, 17, 25, 33]
    assert not some.complete
    assert some.recorded == 33
    assert list(pack_groups(run, [], budget=0).blocks) == [33], "one is always shown"


def test_files_of_earlier_versions_and_damaged_ones(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3)
    write_trajectories(run.trajectory_path("train", 1), [Group([play(1.0)])], "train", 1)
    run.trajectory_path("train", 2).write_bytes(b"PAR1 nothing")
    problems: list[str] = []
    archive = pack_groups(run, problems)
    assert list(archive.blocks) == [1, 3]
    assert len(problems) == 1
    (group,) = unpack(archive.blocks[1])
    assert group["why"] == ""
    assert group["episodes"][0]["kept"]


def test_text_that_no_encoding_holds_and_long_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2, text="half \udc80 a pair" + "x" * 10_000)
    (alive, _) = unpack(pack_groups(run, []).blocks[1])
    text = alive["episodes"][0]["turns"][0]["o"]
    assert "\\udc80" in text
    assert text.endswith("…")
    assert len(text) < 5_000
    write_report(run.path)


def test_the_page_tells_what_was_found(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", behaviour__invalid_turns=0.6)
    html = write_report(run.path).read_text()
    assert "Format lost" in html
    assert "since step" in html
    assert "Raise agent.format_penalty" in html
    assert 'class="span"' in html, "it is marked on the curves"
    assert html.count("<template data-step=") == 40
    assert "&lt;so&gt;" not in html, "texts of episodes lie in blocks, not in the page"


def test_the_page_of_a_healthy_run(tmp_path: Path) -> None:
    html = write_report(make_run(tmp_path / "run").path).read_text()
    assert "Nothing was found wrong in 40 steps." in html
    assert (
        "Not judged, because their figures were not measured: entropy collapse, entropy runs away, steps too large, "
        "success does not pay, noise outweighs signal" in html
    )


def test_the_plane(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    plane = plane_of(gather(run.path))
    assert plane is not None
    assert plane.steps == list(range(4, 41, 4))
    assert plane.varied_limit == 1.5
    assert plane.regime(0) == REGIMES[True, True]
    with (run.path / "metrics.jsonl").open("a") as file:
        for step, (share, varied) in enumerate([(0.1, 3.0), (0.1, 0.5), (0.9, 0.5)], start=41):
            row = {"information/first/sequence/share": share, "information/first/sequence/conditional_entropy": varied}
            file.write(json.dumps({"step": step, **row}) + "\n")
    plane = plane_of(gather(run.path))
    assert plane is not None
    assert [plane.regime(place) for place in (-3, -2, -1)] == [
        REGIMES[False, True], REGIMES[False, False], REGIMES[True, False],
    ]  # fmt: skip
    drawing = str(draw_plane(plane))
    assert drawing.startswith("<svg")
    assert drawing.count("<circle") == 13
    assert "nan" not in drawing
    assert "start" in drawing


def test_the_ceiling_is_no_good_mark(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", information__first__sequence__saturated=1.0, information__first__prompts=12.0)
    plane = plane_of(gather(run.path))
    assert plane is not None
    assert plane.saturated == 20
    assert "with 12 prompts it says that thoughts tell them apart" in write_report(run.path).read_text()
    below = plane_of(gather(make_run(tmp_path / "below").path))
    assert below is not None
    assert below.warning == ""


@pytest.mark.parametrize("values", [[(0.0, 0.0)], [(1.0, 5.0)], [(-0.2, 0.0), (0.1, 0.1)]])
def test_planes_at_the_edge(values: list[tuple[float, float]], tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", "", "x", device="cpu") as run:
        for step, (share, varied) in enumerate(values, start=1):
            row = {"information/first/sequence/share": share, "information/first/sequence/conditional_entropy": varied}
            run.append_metrics(step, row)
    plane = plane_of(gather(run.path))
    assert plane is not None
    assert "nan" not in str(draw_plane(plane))
    write_report(run.path)


def test_diagnosis_of_a_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", behaviour__thought_tokens=50.0)
    found = diagnose(run.path)
    assert [one.rule.name for one in found.verdicts] == ["length_drift"]
    assert found.steps == 40
    assert found.figures["behaviour/thought_tokens"] == (20.0, 50.0)
    assert "noise" in found.unjudged
    few = make_run(tmp_path / "few", steps=6)
    early = diagnose(few.path)
    assert "no_progress" in early.too_early
    assert "no_progress" not in found.too_early
    assert "Too early to judge" in write_report(few.path).read_text()
    told: dict[str, Any] = json.loads(json.dumps(found.as_json()))
    assert told["verdicts"][0]["name"] == "length_drift"
    assert math.isfinite(told["figures"]["train/success"]["end"])


@pytest.mark.parametrize(("saturated", "warned"), [(1.0, True), (0.0, False)])
def test_diagnosis_warns_of_the_ceiling_too(
    saturated: float, warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    look = {"share": 0.99, "conditional_entropy": 3.0, "saturated": saturated}
    with RunFolder.create(tmp_path / "run", "", "rehearsal train", device="cpu") as run:
        for step in range(1, 13):
            row = {f"information/first/sequence/{name}": value for name, value in look.items()}
            run.append_metrics(step, row | {"information/first/prompts": 12.0} if step % 4 == 1 else {})
    plane = plane_of(gather(run.path))
    assert plane is not None
    found = diagnose(run.path)
    assert found.ceiling == found.as_json()["ceiling"] == plane.warning
    assert main(["diagnose", str(run.path)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    words = "note What thoughts say of their prompt: In 3 of 3 measurements the estimate is at its ceiling: with 12"
    assert (words in told) == warned
    assert ("ceiling" in told) == warned


def test_metrics_that_were_cut_short(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", behaviour__thought_tokens=50.0)
    file = run.path / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:-1], lines[-1][:30]]))
    found = diagnose(run.path)
    assert found.steps == 39
    assert found.damaged == 1
    assert [one.rule.name for one in found.verdicts] == ["length_drift"]
    file.write_text("")
    with pytest.raises(CheckpointError, match="tells of no step, so there is nothing to judge"):
        diagnose(run.path)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"holds no metrics\.jsonl"):
        diagnose(run.path)
