"""The report is one whole file that needs nothing, trusts no text, and tells what is missing."""

import base64
import hashlib
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup

from rehearsal.errors import CheckpointError
from rehearsal.reports import SECTIONS, section, write_report
from rehearsal.training.runs import RunFolder
from rehearsal.training.trajectory_store import write_trajectories
from rehearsal.trajectory import Group, SampleStop, StopReason, Trajectory, Turn

RECIPE = '# all options\n[model]\npath = "tiny/model"\n\n[environment]\nname = "lake"\nnote = "a # b"  # why\n'
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&</pre>"
VOID = {"meta", "link", "img", "br", "input", "use", "line", "path", "rect", "circle", "hr"}


class Page(HTMLParser):
    """All tags with their attributes, all text; fails on tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))

    def having(self, attribute: str) -> Iterator[str]:
        return (values[attribute] or "" for _, values in self.tags if attribute in values)


def play(seed: int, solved: bool | None, split: str = "test", **changes: Any) -> Trajectory:
    turns = [
        Turn("P _\n_ G", "", "<think>hm</think>Up", "hm", ["Up"], ["Up"], [0.0]),
        Turn("P _\n_ G", "last turn", "Left", "", ["Left", "Up"], ["Left"], [1.0 if solved else 0.0], -0.1, False,
             SampleStop.LENGTH),
    ]  # fmt: skip
    values: dict[str, Any] = {"turns": turns, "success": solved, "final_observation": "_ _\n_ P", "task": f"t{seed}"}
    return Trajectory("lake", seed, split, **{**values, **changes})


def evaluation(successes: float, episodes: int = 100) -> dict[str, float]:
    return {
        "episodes": episodes,
        "success": successes,
        "success_low": max(0.0, successes - 0.08),
        "success_high": min(1.0, successes + 0.08),
        "reward": successes - 0.1,
    }


def make_run(path: Path, steps: int = 30, **metrics: float) -> RunFolder:
    with RunFolder.create(path, RECIPE, "rehearsal train lake.toml", device="cpu") as run:
        for step in range(steps + 1):
            if step % 10 == 0:
                run.append_evaluation(step, "test", evaluation(0.2 + 0.02 * step))
                solved = [seed * 4 < step for seed in range(12)]
                groups = [Group([play(seed, won)]) for seed, won in enumerate(solved)]
                write_trajectories(run.trajectory_path("eval", step), groups, "eval", step)
            if step:
                parts = {"time/generation": 2.0, "time/learning": 1.0, "time/other": 0.1, "time/step": 3.1}
                row = {"train/success": step / 40, "train/stop/turn_limit": 0.5, "policy/entropy": math.nan, **parts}
                run.append_metrics(step, {**row, **metrics})
        tries = [play(7, sample == 1, "train", sample=sample) for sample in range(4)]
        extra = {"advantage": [-0.25, 0.75, -0.25, math.nan]}
        write_trajectories(run.trajectory_path("train", steps), [Group(tries)], "train", steps, extra)
    return run


def page_of(path: Path) -> Page:
    return Page(write_report(path).read_text(encoding="utf-8"))


def test_a_whole_run_has_all_parts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "lake-1", **{"policy/loss/policy": 0.1, "policy/loss/world_model": 2.0, "mine/own": 4.0})
    page = page_of(run.path)
    assert write_report(run.path) == run.path / "report.html"
    for words in (
        "tiny/model on lake",
        "20% 95%: 12% to 28% step 0",
        "80% 95%: 72% to 88% step 30",
        "The gain of 60 points (95% interval 49 to 71) is more than noise.",
        "Learning curves",
        "Loss: world model",
        "Other metrics (1)",
        "Where the time goes",
        "8 newly solved",
        "4 solved neither time",
        "of 12 tasks",
        "not taken",
        "cut off: out of tokens",
        "penalty −0.1",
        "Advantage+0.75",
        "At the end",
        "the agent used all its turns",
        "Started with rehearsal train lake.toml",
        "# all options",
    ):
        assert words in page.text, words
    assert "What you should know about this run" not in page.text
    assert "policy/entropy" not in page.text  # it never had a value
    ids = list(page.having("id"))
    assert len(ids) == len(set(ids))
    links = [link.removeprefix("#") for tag, values in page.tags if tag == "a" and (link := values["href"] or "")]
    assert set(links) <= set(ids)


def test_the_file_asks_nobody_for_anything(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run").path)
    assert not list(page.having("src"))
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "embed", "base", "img")]
    assert all(link.startswith("#") for link in page.having("href"))
    html = (tmp_path / "run" / "report.html").read_text()
    assert "url(" not in html
    assert "@import" not in html
    policy = next(values["content"] or "" for tag, values in page.tags if values.get("http-equiv"))
    assert "default-src 'none'" in policy
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert not [name for _, values in page.tags for name in values if name.startswith("on")]


def test_text_of_environments_models_and_users_stays_text(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", f"a = '''{EVIL}'''", EVIL, device=EVIL) as run:
        run.append_metrics(1, {f"mine/{EVIL}": 1.0, f"policy/loss/{EVIL}": 1.0, f"train/stop/{EVIL}": 1.0})
        for step in (0, 5):
            run.append_evaluation(step, EVIL, evaluation(0.5))
            turn = Turn(EVIL, EVIL, EVIL, EVIL, [EVIL], [EVIL], [1.0])
            one = play(1, step > 0, task=EVIL, turns=[turn], final_observation=EVIL, error=EVIL)
            one.environment = EVIL
            other = play(2, False, error=EVIL, stop_reason=StopReason.ERROR)
            write_trajectories(run.trajectory_path("eval", step), [Group([one]), Group([other])], "eval", step)
        run.write_summary({EVIL: EVIL, "model": EVIL, "environment": EVIL})
        run.add_warning(EVIL)
        run.set_status("failed", EVIL)
    page = page_of(run.path)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not list(page.having("onerror"))
    assert page.text.count("<script>alert(1)</script>") >= 20


@pytest.mark.parametrize("steps", [0, 1, 2, 25, 900])
def test_runs_of_any_length_have_a_report(tmp_path: Path, steps: int) -> None:
    with RunFolder.create(tmp_path / "run", RECIPE, "x") as run:
        for step in range(1, steps + 1):
            run.append_metrics(step, {"train/success": 0.5, "time/generation": 0.0, "policy/kl_sampling": 0.0})
    page = page_of(run.path)
    assert "No held-out evaluation was recorded" in page.text
    assert "No episodes were recorded" in page.text
    assert ("No training step was recorded" in page.text) == (steps == 0)
    assert ("In training, success went from 50% to 50%" in page.text) == (steps > 0)
    assert (run.path / "report.html").stat().st_size < 400_000


def test_a_run_that_was_cut_short_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=10)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        with (run.path / name).open("a") as out:
            out.write('{"step": 11, "train/succ')
    with (run.path / "metrics.jsonl").open("a") as out:
        out.write('\n[1]\n{"no": "step"}\n')
    (run.path / "trajectories" / "eval_000010.parquet").write_bytes(b"PAR1 torn")
    (run.path / "recipe.toml").write_text("a = ")
    info = (run.path / "run.json").read_text()
    (run.path / "run.json").write_text(info.replace('"finished"', '"running"', 1))
    page = page_of(run.path)
    for words in (
        "3 lines of metrics.jsonl could not be read",
        "1 line of evaluations.jsonl could not be read",
        "eval_000010.parquet is damaged",
        "The recipe is no valid TOML",
        "it was probably killed",
    ):
        assert words in page.text, words
    assert "Learning curves" in page.text
    assert "Before and after" not in page.text


def test_a_run_whose_own_words_are_lost_still_has_a_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=10)
    (run.path / "run.json").write_text("{")
    assert "What the run says about itself is lost" in page_of(run.path).text
    (run.path / "run.json").unlink()
    assert "Learning curves" in page_of(run.path).text


def test_a_report_can_be_made_while_the_run_works(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", RECIPE, "x") as run:
        run.append_metrics(1, {"train/success": 0.5})
        page = page_of(run.path)
    assert "running" in page.text
    assert "killed" not in page.text


def test_what_is_no_run_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_environments_that_know_no_success_are_judged_by_reward(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", RECIPE, "x") as run:
        for step, reward in ((0, 0.0), (5, 1.0)):
            run.append_evaluation(step, "test", {"episodes": 3, "success": None, "reward": reward})
            groups = [Group([play(seed, None, turns=[Turn("o", rewards=[reward])])]) for seed in range(3)]
            write_trajectories(run.trajectory_path("eval", step), groups, "eval", step)
    page = page_of(run.path)
    assert "Held-out reward" in page.text
    assert "3 higher reward" in page.text
    assert "cannot be told apart from noise" in page.text
    assert "No success was recorded" in page.text


def test_long_texts_are_cut_and_say_so(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", RECIPE, "x") as run:
        turns = [Turn("o" * 60_000, thought="t" * 60_000) for _ in range(10)]
        for step in (0, 5):
            groups = [Group([play(seed, True, turns=turns)]) for seed in range(30)]
            write_trajectories(run.trajectory_path("eval", step), groups, "eval", step)
    page = page_of(run.path)
    assert "more characters in the trajectory file" in page.text
    assert (run.path / "report.html").stat().st_size < 8_000_000


def test_other_parts_can_be_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, part in SECTIONS.items():  # whatever is registered below is forgotten afterwards
        monkeypatch.setitem(SECTIONS, key, part)
    monkeypatch.setitem(SECTIONS, "signal", None)

    @section("signal", "Signal", order=30)
    def signal(data: Any, templates: Any) -> Markup:
        return Markup("<p>{} steps seen</p>").format(len(data.steps))

    page = page_of(make_run(tmp_path / "run", steps=10).path)
    assert "10 steps seen" in page.text
    titles = [values["id"] for tag, values in page.tags if tag == "section"]
    assert titles.index("learning") < titles.index("signal") < titles.index("before-after")
