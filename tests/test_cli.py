"""The command line: exit code 2 and one sentence for whatever the user can mend, and files for what went well."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rehearsal.training.checkpoint as checkpoint_module
from rehearsal import __version__
from rehearsal.cli import main
from rehearsal.display import duration, percent
from rehearsal.environments.base import TextEnv
from rehearsal.environments.registry import register
from rehearsal.training.recipe import option_names, resolve_recipe
from rehearsal.training.runs import RunFolder

RECIPE = """
name = "small"
[environment]
name = "frozenlake"
[agent]
thinking = false
max_turns = 2
max_tokens_per_turn = 12
max_context = 260
[training]
steps = 2
groups = 2
group_size = 2
learning_rate = 1e-3
[evaluation]
episodes = 3
every = 1
validation_episodes = 2
[engine]
max_sessions = 8
memory_gib = 0.05
"""


class Temper(TextEnv):
    """Breaks in the way that its argument names."""

    name = "temper"
    instructions = "Walk.\nActions: Left, Right, Up, Down."
    never = threading.Event()

    def __init__(self, how: str = "") -> None:
        self.how = how
        self.fast = how != "hang"

    def legal_actions(self) -> list[str]:
        return ["Left", "Right", "Up", "Down"]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        if self.how == "raise":
            raise ConnectionError("the simulator is gone")
        if self.how == "hang":
            self.never.wait(30)
        if self.how == "type":
            return 7, {}
        return "Start.", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "Done.", math.nan if self.how == "no-number" else 1.0, True, False, {}


register("test-temper", Temper)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], taught_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Runs a command in an empty folder with small.toml in it; returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "small.toml").write_text(
        RECIPE + f'[model]\npath = {json.dumps(str(taught_folder))}\ndevice = "cpu"\n', encoding="utf-8"
    )

    def call(*words: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


def mistake(outcome: tuple[int, str, str]) -> str:
    """The sentence of a command that failed as it should."""
    code, _, said = outcome
    assert code == 2
    lines = said.strip().splitlines()
    assert len(lines) == 1, said
    assert lines[0].startswith("error ")
    assert lines[0].endswith((".", "?")), lines[0]
    return lines[0].removeprefix("error ")


# What goes well


def test_a_run_from_beginning_to_end(run: Run, tmp_path: Path) -> None:
    code, out, said = run("train", "small.toml", "--training.steps", "3")
    assert code == 0, said
    folder = tmp_path / "runs" / "small"
    assert "1/3" in out
    assert "3/3" in out
    assert "on 3 tasks" in out
    assert out.strip().splitlines()[-1].endswith("report: runs/small/report.html")
    assert (folder / "report.html").stat().st_size > 1000
    info = RunFolder.open(folder).info
    assert info.status == "finished"
    assert info.command == "rehearsal train small.toml --training.steps 3"
    assert resolve_recipe(folder / "recipe.toml").training.steps == 3

    figures = tmp_path / "figures.json"
    code, out, said = run("eval", folder, "--episodes", "4", "--json", figures, "--split", "validation")
    assert code == 0, said
    told = json.loads(figures.read_text())
    assert told["episodes"] == 4
    assert {"success", "success_low", "success_high"} <= told.keys()
    assert "success" in out

    (folder / "report.html").unlink()
    code, out, _ = run("report", folder)
    assert code == 0
    assert out.strip() == str(folder / "report.html")
    assert (folder / "report.html").exists()

    code, out, _ = run("diagnose", folder)
    assert code == 0
    assert "success in training" in out
    code, out, _ = run("diagnose", folder, "--json")
    assert code == 0
    assert json.loads(out)["steps"] == 3

    # The next run of that name has a folder of its own.
    assert run("train", "small.toml", "--training.steps=1", "--evaluation.episodes=0")[0] == 0
    assert (tmp_path / "runs" / "small-2").is_dir()


def test_evaluation_of_a_policy_gives_the_same_twice(run: Run, taught_folder: Path, tmp_path: Path) -> None:
    told = []
    for number in range(2):
        file = tmp_path / f"{number}.json"
        code, _, said = run("eval", taught_folder, "--recipe", "small.toml", "--episodes", "5", "--json", file)
        assert code == 0, said
        told.append(json.loads(file.read_text()))
    assert told[0] == told[1]
    greedy = run("eval", taught_folder, "--recipe", "small.toml", "--episodes", "5", "--temperature", "0")
    assert greedy[0] == 0


def test_resuming_takes_the_stored_recipe(run: Run, tmp_path: Path) -> None:
    assert run("train", "small.toml", "--output", "one")[0] == 0
    code, out, said = run("train", "--resume", "one", "--training.steps", "4")
    assert code == 0, said
    assert "4/4" in out
    info = RunFolder.open(tmp_path / "one").info
    assert info.summary["steps"] == 4
    assert info.command == "rehearsal train --resume one --training.steps 4"
    assert resolve_recipe(tmp_path / "one" / "recipe.toml").training.steps == 4


@pytest.mark.parametrize(
    "words",
    [
        ("small.toml", "--training.steps", "1", "--name", "x"),
        ("--training.steps", "1", "--name", "x", "small.toml"),
        ("--name=x", "--training.steps=1", "small.toml"),
        ("--seed", "7", "small.toml", "--name", "x", "--training.steps", "1"),
    ],
)
def test_options_may_stand_anywhere(words: tuple[str, ...], run: Run) -> None:
    code, out, said = run("train", *words, "--dry-run")
    assert code == 0, said
    assert 'name = "x"' in out
    assert "steps = 1\n" in out
    assert "1 steps of 2 x 2 episodes" in out


def test_options_without_a_recipe(run: Run, taught_folder: Path) -> None:
    code, out, said = run(
        "train", "--seed", "5", "--model.path", taught_folder, "--agent.max_context", "300", "--dry-run"
    )
    assert code == 0, said
    assert "seed = 5" in out


def test_a_dry_run_shows_recipe_and_memory_and_leaves_nothing(run: Run, tmp_path: Path) -> None:
    code, out, said = run("train", "small.toml", "--algorithm.name", "ppo", "--dry-run")
    assert code == 0, said
    for word in ("[training]", "weights", "optimiser", "keys and values", "critic", "together", "algorithm: ppo"):
        assert word in out
    assert not (tmp_path / "runs").exists()


def test_overwriting(run: Run, tmp_path: Path) -> None:
    words = ("train", "small.toml", "--output", "one", "--training.steps", "1", "--evaluation.episodes", "0")
    assert run(*words)[0] == 0
    assert "already holds a finished run" in mistake(run(*words))
    assert run(*words, "--overwrite")[0] == 0
    # What is wrong with the new run costs the old one nothing.
    assert "typo" in mistake(run(*words, "--overwrite", "--model.path", "./typo"))
    assert "no environment" in mistake(run(*words, "--overwrite", "--environment.name", "frozenpond"))
    assert (tmp_path / "one" / "metrics.jsonl").is_file()
    assert "name its folder" in mistake(run("train", "small.toml", "--overwrite"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_bytes(b"x")
    assert "is not a run folder" in mistake(run("train", "small.toml", "--output", "photos", "--overwrite"))
    assert (tmp_path / "photos" / "me.jpg").exists()


def test_help_of_every_command(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    overview = capsys.readouterr().out
    for command in ("train", "eval", "play", "report", "diagnose", "envs", "recipes", "check", "base"):
        assert command in overview
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        assert f"rehearsal {command}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--version"])
    assert __version__ in capsys.readouterr().out


def test_all_options_are_listed(run: Run) -> None:
    code, out, _ = run("train", "--options")
    assert code == 0
    for name in option_names():
        assert f"--{name} " in out
    assert "constant|linear|cosine" in out


def test_lists(run: Run) -> None:
    code, out, _ = run("envs")
    assert code == 0
    for name in ("frozenlake", "sokoban", "bandit", "countdown", "helpdesk", "calculate", "lookup", "repair"):
        assert name in out
    code, out, _ = run("recipes")
    assert code == 0
    assert "frozenlake" in out


def test_checking_environments(run: Run) -> None:
    assert run("check", "bandit")[0] == 0
    assert run("check", "--size", "3", "frozenlake")[0] == 0
    code, out, said = run("check", "test-temper", "--how", "no-number")
    assert code == 2
    assert said == ""
    assert "nan" in out


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "no-such.toml"), "There is no recipe no-such.toml"),
        (("train", "frozenlak"), "Did you mean frozenlake?"),
        (
            ("train", "small.toml", "--training.step", "3"),
            "There is no option training.step. Did you mean training.steps?",
        ),
        (("train", "small.toml", "--training.steps", "0"), "Option training.steps cannot be 0"),
        (("train", "small.toml", "--algorithm.name", "grop"), "grop"),
        (("train", "small.toml", "--algorithm.options.clip", "1"), "has no option 'clip'"),
        (("train", "small.toml", "--environment.name", "frozenlak"), "did you mean frozenlake?"),
        (("train", "small.toml", "--environment.name", "no_such_module:Env"), "no_such_module"),
        (("train", "small.toml", "--environment.params.sise", "3"), "did you mean size"),
        (("train", "small.toml", "--agent.max_context", "20"), "raise it to"),
        (("train", "small.toml", "--agent.max_context", "9999"), "positions; lower it"),
        (("train", "small.toml", "--engine.memory_gib", "0.000001"), "raise the memory budget"),
        (("train", "small.toml", "--model.path", "./nowhere"), "is not a Hugging Face model folder"),
        (("train", "small.toml", "--model.device", "abacus"), 'There is no device "abacus"'),
        (("train", "small.toml", "extra"), "extra is out of place"),
        (("train", "small.toml", "--sampling.top_p", "0.9"), "set training.old_logprobs to recompute"),
        (("train", "small.toml", "--resume", "x", "--output", "y"), "leave --output out"),
        (("train", "--resume", "nowhere"), "nowhere holds no run"),
        (("train", "small.toml", "--resume", "x"), "recipe that is stored in x; leave small.toml out"),
        (("train", "[/bold]"), "There is no recipe [/bold]"),
        (
            ("train", "small.toml", "--name", "[red]", "--model.path", "./[red]"),
            "[red] is not a Hugging Face model folder",
        ),
        (("report", "nowhere"), "nowhere holds no run"),
        (("report", "nowhere", "--training.steps", "3"), "--training.steps is not an option of `rehearsal report`"),
        (("diagnose", "nowhere"), "nowhere holds no metrics.jsonl"),
        (("train", "small.toml", "--filter.name", "best"), "There is no filter 'best'"),
        (("train", "small.toml", "--filter.options.q", "1"), "has no option 'q'"),
        (("train", "small.toml", "--diagnostics.stop_on", '["sadness"]'), "There is no verdict 'sadness'"),
        (("envs", "--all"), "--all is not an option of `rehearsal envs`"),
        (("eval", "./nowhere", "--recipe", "small.toml"), "is not a Hugging Face model folder"),
        (("eval", "base", "--recipe", "small.toml", "--episodes", "0"), "episodes must be 1 or more"),
        (("check", "no-such-thing"), "There is no environment 'no-such-thing'"),
        (("play", "frozenlake", "--sise", "3"), "did you mean size"),
        (("base", "--tokns", "3"), "tokns"),
    ],
)
def test_one_sentence_for_each_mistake(words: tuple[str, ...], message: str, run: Run, tmp_path: Path) -> None:
    assert message in mistake(run(*words))
    assert not (tmp_path / "runs").exists(), "nothing is made before everything is known to fit"


def test_files_that_are_not_toml(run: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("[training\n")
    assert "broken.toml is not valid TOML" in mistake(run("train", "broken.toml"))


def test_models_that_cannot_be_used(run: Run, taught_folder: Path, tmp_path: Path) -> None:
    def copied(name: str) -> Path:
        shutil.copytree(taught_folder, tmp_path / name)
        return tmp_path / name

    mute = copied("mute")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (mute / file).unlink()
    assert "has no tokenizer; save it there" in mistake(run("train", "small.toml", "--model.path", mute))

    untaught = copied("untaught")
    (untaught / "chat_template.jinja").unlink()
    assert "no chat template" in mistake(run("train", "small.toml", "--model.path", untaught))

    torn = copied("torn")
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"The model {torn} cannot be loaded" in mistake(run("train", "small.toml", "--model.path", torn))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "Temper.reset raised ConnectionError: the simulator is gone."),
        ("hang", "Temper.reset took longer than 0.2 s."),
        ("type", "Temper.reset must return a string as observation, not 7 of type int."),
        ("no-number", "Temper.step must return a finite number as reward, not nan of type float."),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_an_environment_that_is_broken(command: str, how: str, message: str, run: Run, taught_folder: Path) -> None:
    options = (
        "--environment.name",
        "test-temper",
        "--environment.params.how",
        how,
        "--environment.step_timeout",
        "0.2",
        "--evaluation.episodes",
        "0",
    )
    if command == "train":
        said = mistake(run("train", "small.toml", "--output", "one", *options))
        assert "of 4 episodes failed" in said
        assert "TrainingDiverged" not in said
        assert message in said
        assert RunFolder.open("one").info.status == "failed"
        assert RunFolder.open("one").info.error
    else:
        said = mistake(run("eval", taught_folder, "--recipe", "small.toml", "--episodes", "4", *options))
        assert message in said


def test_a_damaged_checkpoint(run: Run, tmp_path: Path) -> None:
    assert run("train", "small.toml", "--output", "one", "--checkpoint.every", "1")[0] == 0
    newest = tmp_path / "one" / "checkpoints" / "step_000002" / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    said = mistake(run("train", "--resume", "one"))
    assert "Delete that folder to go on from step_000001" in said
    shutil.rmtree(newest.parent)
    assert run("train", "--resume", "one")[0] == 0


def test_a_run_is_not_resumed_as_another_one(run: Run, tmp_path: Path) -> None:
    assert run("train", "small.toml", "--output", "one")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file()}
    said = mistake(run("train", "frozenlake", "--resume", "one", "--training.steps", "3"))
    assert "leave frozenlake out" in said
    said = mistake(run("train", "--resume", "one", "--training.steps", "3", "--environment.name", "bandit"))
    assert "one cannot be resumed with another environment.name (bandit instead of frozenlake)" in said
    for option, value in (("environment.params.size", "5"), ("seed", "1"), ("agent.thinking", "true")):
        said = mistake(run("train", "--resume", "one", f"--{option}", value))
        assert f"another {option.removesuffix('.size')} (" in said
    assert {path: path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file()} == before


def test_export(run: Run, tmp_path: Path) -> None:
    assert run("train", "small.toml", "--output", "one", "--checkpoint.every", "1")[0] == 0
    code, out, said = run("export", "one", "policy", "--step", "1")
    assert (code, out.strip()) == (0, "policy"), said
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "policy").iterdir()}
    assert "policy exists already" in mistake(run("export", "one", "policy"))
    assert "no checkpoint of step 9; there are those of 1, 2" in mistake(run("export", "one", "other", "--step", "9"))
    assert "nowhere holds no run" in mistake(run("export", "nowhere", "other"))


def test_a_full_disk(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "save_file", full)
        said = mistake(run("train", "small.toml", "--output", "one"))
    assert "because the disk is full; make room, then go on with --resume" in said
    assert run("train", "--resume", "one")[0] == 0


def test_a_folder_in_use(run: Run, tmp_path: Path) -> None:
    assert run("train", "small.toml", "--output", "one")[0] == 0
    with RunFolder.resume(tmp_path / "one", "somebody else") as other:
        for words in (("train", "small.toml", "--output", "one"), ("train", "--resume", "one")):
            assert "in use by another run" in mistake(run(*words))
        said = mistake(run("train", "small.toml", "--output", "one", "--overwrite"))
        assert "Another process writes to one; stop it first" in said
        other.set_status("stopped")
    assert (tmp_path / "one" / "checkpoints").is_dir()


def test_a_run_that_has_nothing_to_evaluate_yet(run: Run, tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "young", "", "x"):
        pass
    assert "has neither a policy nor a checkpoint yet" in mistake(run("eval", tmp_path / "young"))


def test_figures_that_cannot_be_written_are_told_of_first(run: Run, taught_folder: Path, tmp_path: Path) -> None:
    for command in ("eval", "probe"):
        words = (command, taught_folder, "--recipe", "small.toml", "--json")
        assert "There is no folder" in mistake(run(*words, tmp_path / "missing" / "x.json"))
        assert "is a folder" in mistake(run(*words, tmp_path))


def test_a_probe_of_an_environment_where_any_text_is_an_action(run: Run, taught_folder: Path, tmp_path: Path) -> None:
    words = ("probe", "--recipe", "small.toml", "--environment.name", "countdown", "--agent.max_turns", "1")
    code, out, said = run(*words[:1], taught_folder, *words[1:], "--episodes", "12", "--json", "figures.json")
    assert code == 0, said
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    for kind in ("action", "forward", "inverse", "by_forward", "reward", "budget"):
        assert figures[f"{kind}/count"] == 12
        assert figures[f"{kind}/low"] <= figures[f"{kind}/accuracy"] <= figures[f"{kind}/high"]
    for label in ("the best action", "the action between, in words", "the same, by what comes next"):
        (line,) = [line for line in out.splitlines() if line.startswith(label)]
        assert " to " in line and line.rstrip().endswith("12")
    assert "temper cannot be probed: its oracle() is None" in mistake(
        run(*words[:1], taught_folder, *words[1:4], "test-temper")
    )


def test_playing_what_raises(run: Run) -> None:
    assert "seed is a whole number" in mistake(run("play", "frozenlake", "--seed", "-1"))
    said = mistake(run("play", "test-temper", "--how", "raise"))
    assert "Temper.reset raised ConnectionError: the simulator is gone" in said


def test_ctrl_c(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rehearsal.training.loop.Trainer.play", interrupted)
    code, _, said = run("train", "small.toml", "--output", "one", "--evaluation.episodes", "0")
    assert code == 130
    assert said.strip() == "Stopped."
    assert RunFolder.open("one").info.status == "stopped"


# Words


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (552, "9m 12s"),
        (3599.9, "1h 00m"),
        (3900, "1h 05m"),
        (90000, "25h 00m"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_percents() -> None:
    assert [percent(value) for value in (0.0, 0.236, 1.0, None, math.nan)] == ["0%", "24%", "100%", "–", "–"]
