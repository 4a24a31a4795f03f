"""The loop: a run that was stopped, killed or out of disk space goes on as if nothing had happened."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import rehearsal.training.checkpoint as checkpoint_module
import rehearsal.training.learner as learner_module
import rehearsal.training.loop as loop_module
import rehearsal.training.playing as playing_module
from rehearsal.agents.rehearse import Hindsight
from rehearsal.environments.base import TextEnv
from rehearsal.environments.registry import register
from rehearsal.errors import CheckpointError, EnvironmentFault, RecipeError, TrainingDiverged
from rehearsal.rollout import tasks_of_step
from rehearsal.training.checkpoint import load_checkpoint
from rehearsal.training.loop import Trainer
from rehearsal.training.observer import SilentObserver
from rehearsal.training.optimiser import clipped_updates
from rehearsal.training.recipe import Recipe, resolve_recipe
from rehearsal.training.replay import Memory
from rehearsal.training.run import free_folder, train
from rehearsal.training.runs import RunFolder
from rehearsal.training.trajectory_store import read_trajectories
from rehearsal.trajectory import Trajectory, all_trajectories


class StopAfter(SilentObserver):
    """Asks for a stop while a step goes on, as Ctrl-C does."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def started(self, trainer: Trainer) -> None:
        self.trainer = trainer
        if self.steps == 0:
            trainer.stop_requested = True

    def learning(self) -> None:
        if self.trainer.steps_done + 1 == self.steps:
            self.trainer.stop_requested = True


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "policy" / "model.safetensors")


def rows_of(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Lines without what depends on the clock."""
    rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if not key.startswith(("time", "speed/"))} for row in rows
    ]  # fmt: skip


def assert_same_run(run: Path, reference: Path) -> None:
    """Weights to the last bit, and everything that was written down."""
    expected = weights_of(reference)
    actual = weights_of(run)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
    assert [row["step"] for row in rows_of(run)] == [row["step"] for row in rows_of(reference)]
    assert rows_of(run) == rows_of(reference)
    assert rows_of(run, "evaluations.jsonl") == rows_of(reference, "evaluations.jsonl")
    files = sorted(path.name for path in (reference / "trajectories").iterdir())
    assert sorted(path.name for path in (run / "trajectories").iterdir()) == files
    for name in files:
        assert token_ids(run / "trajectories" / name) == token_ids(reference / "trajectories" / name)


def token_ids(file: Path) -> list[list[int]]:
    return [t.segments[0].token_ids.tolist() for t in episodes_of(file)]


def episodes_of(file: Path) -> list[Trajectory]:
    return all_trajectories(read_trajectories(file))


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, small: Callable[..., Recipe]
) -> Callable[[str], tuple[Path, Recipe]]:
    """The run that nobody stopped, for an algorithm; played once."""
    runs: dict[str, tuple[Path, Recipe]] = {}

    def reference(algorithm: str) -> tuple[Path, Recipe]:
        if algorithm not in runs:
            recipe = small(algorithm__name=algorithm, algorithm__options__kl_coefficient=0.01)
            path = tmp_path_factory.mktemp("reference") / algorithm
            train(recipe, output=path)
            runs[algorithm] = (path, recipe)
        return runs[algorithm]

    return reference


# Stopped and resumed


@pytest.mark.parametrize(("algorithm", "steps"), [("grpo", 0), ("grpo", 1), ("grpo", 3), ("dapo", 2), ("ppo", 2)])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    algorithm: str, steps: int, uninterrupted: Callable[[str], tuple[Path, Recipe]], tmp_path: Path
) -> None:
    reference, recipe = uninterrupted(algorithm)
    run = tmp_path / "run"
    first = train(recipe, output=run, observer=StopAfter(steps))
    assert first.summary["steps"] == steps
    assert "success_after" not in first.summary
    assert RunFolder.open(run).info.status == "stopped"
    second = train(output=run, resume=True)
    assert RunFolder.open(run).info.status == "finished"
    assert second.summary.keys() >= {"success_before", "success_after"}
    assert len(RunFolder.open(run).info.resumed) == 1
    assert_same_run(run, reference)


def test_two_runs_of_one_recipe_are_the_same(
    uninterrupted: Callable[[str], tuple[Path, Recipe]], tmp_path: Path
) -> None:
    reference, recipe = uninterrupted("grpo")
    train(recipe, output=tmp_path / "again")
    assert_same_run(tmp_path / "again", reference)
    train(recipe.model_copy(update={"seed": 1}), output=tmp_path / "other")
    other = weights_of(tmp_path / "other")
    assert any(not torch.equal(tensor, other[name]) for name, tensor in weights_of(reference).items())


def test_steps_after_the_last_checkpoint_are_played_again(
    uninterrupted: Callable[[str], tuple[Path, Recipe]], tmp_path: Path
) -> None:
    """A run that breaks off between checkpoints has lines and files of steps that the checkpoint knows nothing of."""
    reference, recipe = uninterrupted("grpo")
    recipe = recipe.model_copy(deep=True)
    recipe.checkpoint.every = 2
    run = tmp_path / "run"

    class PowerCut(SilentObserver):
        def step(self, step: int, metrics: Mapping[str, float]) -> None:
            if step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, output=run, observer=PowerCut())
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3]
    train(output=run, resume=True)
    assert_same_run(run, reference)


def test_a_finished_run_can_be_taken_further(
    uninterrupted: Callable[[str], tuple[Path, Recipe]], tmp_path: Path
) -> None:
    reference, recipe = uninterrupted("grpo")
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    longer = recipe.model_copy(deep=True)
    longer.training.steps = 5
    longer.training.schedule = "constant"
    assert train(longer, output=run, resume=True).summary["steps"] == 5
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3, 4, 5]
    # Resumed without anything left to do, it is finished at once and unchanged.
    before = weights_of(run)
    train(output=run, resume=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(run).items())
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3, 4, 5]


_SCRIPT = """
    import sys
    import torch
    from pathlib import Path
    from rehearsal.training.run import train
    torch.set_num_threads(1)
    run = Path(sys.argv[1])
    if (run / "run.json").exists():
        train(output=run, resume=True)
    else:
        train(sys.argv[2], output=run)
"""


def start(run: Path, recipe: Recipe, tmp_path: Path) -> subprocess.Popen[str]:
    """Train in a process of its own, or resume if there is a run."""
    file = tmp_path / "recipe.toml"
    file.write_text(recipe.to_toml())
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(_SCRIPT))
    return subprocess.Popen(
        [sys.executable, str(script), str(run), str(file)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 500.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def n_steps(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_was_killed_ends_as_one_that_was_not(
    seed: int, uninterrupted: Callable[[str], tuple[Path, Recipe]], tmp_path: Path
) -> None:
    """SIGKILL at a random moment, more than once: between steps, in a step, or while something is written."""
    reference, recipe = uninterrupted("grpo")
    run = tmp_path / "run"
    rng = random.Random(seed)
    for stop_at in (1, 2, 3):
        process = start(run, recipe, tmp_path)
        wait_until(lambda: n_steps(run) >= stop_at, process)  # noqa: B023
        time.sleep(rng.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if process.returncode == 0:
            break  # it was faster
        assert process.returncode == -signal.SIGKILL
        # Killed after its last line, while Python shut down, it is rightly finished.
        status = RunFolder.open(run).info.status
        assert status == "running" or (status == "finished" and n_steps(run) == recipe.training.steps)
        assert not RunFolder.open(run).in_use
    process = start(run, recipe, tmp_path)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    assert_same_run(run, reference)
    assert not [*run.rglob(".*.tmp"), *run.rglob(".partial-*")]


@pytest.mark.slow
def test_sigterm_ends_a_run_in_order(uninterrupted: Callable[[str], tuple[Path, Recipe]], tmp_path: Path) -> None:
    reference, recipe = uninterrupted("grpo")
    run = tmp_path / "run"
    process = start(run, recipe, tmp_path)
    wait_until(lambda: n_steps(run) >= 1, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    assert "Stopping after this step" in output
    info = RunFolder.open(run).info
    assert info.status == "stopped"
    assert 1 <= info.summary["steps"] < 4
    assert (run / "checkpoints" / f"step_{info.summary['steps']:06d}").is_dir()
    train(output=run, resume=True)
    assert_same_run(run, reference)


def test_signals_stop_after_the_step_and_at_once_the_second_time(small: Callable[..., Recipe], tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    class Terminated(SilentObserver):
        def learning(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    result = train(small(), output=tmp_path / "one", observer=Terminated())
    assert result.summary["steps"] == 1
    assert signal.getsignal(signal.SIGTERM) is before

    class Impatient(SilentObserver):
        def learning(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(small(), output=tmp_path / "two", observer=Impatient())
    assert RunFolder.open(tmp_path / "two").info.status == "stopped"
    assert n_steps(tmp_path / "two") == 0
    assert train(output=tmp_path / "two", resume=True).summary["steps"] == 4


# Folders


def test_two_processes_do_not_share_a_folder(small: Callable[..., Recipe], tmp_path: Path) -> None:
    run = tmp_path / "run"

    class Second(SilentObserver):
        def learning(self) -> None:
            for resume in (False, True):
                with pytest.raises(CheckpointError, match=r"in use by another run"):
                    train(small(), output=run, resume=resume)

    train(small(training__steps=1), output=run, observer=Second())
    with pytest.raises(CheckpointError, match="already holds a finished run"):
        train(small(), output=run)


def test_what_is_wrong_with_the_recipe_leaves_no_folder(small: Callable[..., Recipe], tmp_path: Path) -> None:
    for changes, error in (
        ({"algorithm__name": "grop"}, RecipeError),
        ({"environment__name": "frozenlak"}, RecipeError),
        ({"environment__params__sise": 3}, RecipeError),
        ({"agent__max_context": 20}, RecipeError),
    ):
        with pytest.raises(error):
            train(small(**changes), output=tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_resuming_needs_a_run(tmp_path: Path, small: Callable[..., Recipe]) -> None:
    with pytest.raises(CheckpointError, match="output must name its folder"):
        train(resume=True)
    for recipe in (None, small()):
        with pytest.raises(CheckpointError, match=r"nowhere holds no run: .*check the name"):
            train(recipe, output=tmp_path / "nowhere", resume=True)


def test_folders_are_numbered(tmp_path: Path) -> None:
    assert free_folder(tmp_path, "run") == tmp_path / "run"
    (tmp_path / "run").mkdir()
    (tmp_path / "run-2").mkdir()
    assert free_folder(tmp_path, "run") == tmp_path / "run-3"


# Disk full and damage


@pytest.mark.parametrize("when", ["checkpoint", "policy"])
def test_a_full_disk_leaves_a_run_that_can_go_on(
    when: str, uninterrupted: Callable[[str], tuple[Path, Recipe]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, recipe = uninterrupted("grpo")
    run = tmp_path / "run"
    calls = []

    def full(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if when == "policy" or len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    module, name = (checkpoint_module, "save_file") if when == "checkpoint" else (loop_module, "save_policy")
    original = getattr(module, name)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, full)
        with pytest.raises(CheckpointError, match="because the disk is full; make room, then go on with --resume"):
            train(recipe, output=run)
    info = RunFolder.open(run).info
    assert info.status == "failed"
    assert "disk is full" in info.error
    newest = "step_000002" if when == "checkpoint" else "step_000004"
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-1] == newest
    train(output=run, resume=True)
    assert_same_run(run, reference)


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_serves(
    uninterrupted: Callable[[str], tuple[Path, Recipe]], tmp_path: Path
) -> None:
    reference, recipe = uninterrupted("grpo")
    run = tmp_path / "run"
    train(recipe, output=run, observer=StopAfter(3))
    newest = run / "checkpoints" / "step_000003"
    data = bytearray((newest / "weights.safetensors").read_bytes())
    data[-5] ^= 255
    (newest / "weights.safetensors").write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"checksum does not match.*Delete that folder to go on from step_000002"):
        train(output=run, resume=True)
    shutil.rmtree(newest)
    train(output=run, resume=True)
    assert_same_run(run, reference)


def test_a_checkpoint_of_another_model_is_refused(
    small: Callable[..., Recipe], tiny_qwen3: Callable[..., Any], base_tokenizer: Any, taught_folder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    from rehearsal.models.load import save_policy

    run, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(taught_folder, model)
    train(small(model__path=str(model)), output=run, observer=StopAfter(1))
    # Under the same name there is another model now.
    shutil.rmtree(model)
    save_policy(tiny_qwen3(len(base_tokenizer), num_hidden_layers=1), base_tokenizer, model)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        train(output=run, resume=True)


# What a run leaves


def test_the_trained_policy_is_an_ordinary_folder(
    small: Callable[..., Recipe], taught_folder: Path, tmp_path: Path
) -> None:
    result = train(small(training__steps=2), output=tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(result.path / "policy").eval()
    tokenizer = AutoTokenizer.from_pretrained(result.path / "policy")
    ids = torch.tensor([tokenizer.encode("Walk over the frozen lake.<answer>Left</answer>")])
    with torch.no_grad():
        expected = result.policy.model.eval()(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, expected)
        first = AutoModelForCausalLM.from_pretrained(taught_folder).eval()
        assert not torch.allclose(first(input_ids=ids).logits, expected, atol=1e-3)
    assert tokenizer.chat_template == result.policy.tokenizer.chat_template
    messages = [{"role": "user", "content": "Hello."}]
    assert tokenizer.apply_chat_template(messages) == result.policy.tokenizer.apply_chat_template(messages)


def test_everything_is_written_down(uninterrupted: Callable[[str], tuple[Path, Recipe]]) -> None:
    run, recipe = uninterrupted("grpo")
    assert resolve_recipe(run / "recipe.toml") == recipe
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    for row in rows:
        assert row["train/episodes"] == 12
        assert row["policy/updates"] == 1
        assert row["policy/kl_sampling"] < 1e-6
        assert math.isfinite(row["policy/loss/policy"])
        parts = row["time/generation"] + row["time/learning"] + row["time/diagnostics"] + row["time/other"]
        assert parts == pytest.approx(row["time/step"], rel=1e-3)
        assert row["time/other"] >= 0
    assert [row["policy/learning_rate"] for row in rows] == pytest.approx([3e-3 * (1 - i / 4) for i in range(4)])
    evaluations = rows_of(run, "evaluations.jsonl")
    assert [(row["step"], row["split"], row["episodes"]) for row in evaluations] == [
        (0, "test", 4), (2, "validation", 3), (4, "test", 4),
    ]  # fmt: skip
    files = sorted(path.name for path in (run / "trajectories").iterdir())
    assert files == [
        "eval_000000.parquet", "eval_000002.parquet", "eval_000004.parquet", "train_000002.parquet",
        "train_000004.parquet",
    ]  # fmt: skip
    summary = RunFolder.open(run).info.summary
    assert summary["steps"] == 4
    assert summary["algorithm"] == "grpo"
    assert summary["success_before"] == evaluations[0]["success"]
    assert summary["success_after"] == evaluations[2]["success"]


def test_held_out_tasks_are_the_same_before_and_after(uninterrupted: Callable[[str], tuple[Path, Recipe]]) -> None:
    run, _ = uninterrupted("grpo")
    before, after = (episodes_of(run / "trajectories" / f"eval_{step:06d}.parquet") for step in (0, 4))
    assert [t.seed for t in before] == [t.seed for t in after]
    assert {t.split for t in (*before, *after)} == {"test"}
    assert {t.policy_step for t in before} == {0}
    assert {t.policy_step for t in after} == {4}
    trained = episodes_of(run / "trajectories" / "train_000002.parquet")
    assert {t.task for t in trained}.isdisjoint({t.task for t in before})


def test_an_observer_sees_all_of_it(small: Callable[..., Recipe]) -> None:
    told: list[Any] = []

    class Witness:
        def started(self, trainer: Trainer) -> None:
            told.append("started")

        def playing(self, what: str, total: int) -> None:
            told.append((what, total))

        def episode(self, trajectory: Trajectory) -> None:
            told.append("episode")

        def learning(self) -> None:
            told.append("learning")

        def step(self, step: int, metrics: Mapping[str, float]) -> None:
            told.append(("step", step))

        def evaluation(self, step: int, split: str, figures: Mapping[str, float]) -> None:
            told.append((split, step))

        def finished(self, summary: Mapping[str, Any]) -> None:
            told.append("finished")

    Trainer(small(training__steps=2, evaluation__every=1), observer=Witness()).run()
    assert [entry for entry in told if entry != "episode"] == [
        "started", ("evaluation after 0 steps", 4), ("test", 0),
        ("step 1", 12), "learning", ("step", 1), ("evaluation after 1 steps", 3), ("validation", 1),
        ("step 2", 12), "learning", ("step", 2), ("evaluation after 2 steps", 4), ("test", 2), "finished",
    ]  # fmt: skip
    assert told.count("episode") == 4 + 12 + 3 + 12 + 4


def test_without_a_folder_nothing_is_written(small: Callable[..., Recipe], tmp_path: Path) -> None:
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        summary = Trainer(small(training__steps=1)).run()
    finally:
        os.chdir(before)
    assert summary["steps"] == 1
    assert list(tmp_path.iterdir()) == []


def test_a_divergence_ends_the_run_and_keeps_the_last_good_state(
    small: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    original = loop_module.Learner.step

    def poisoned(self: Any, groups: Any, step: int, *rest: Any) -> dict[str, float]:
        if step == 2:
            groups[0].trajectories[0].turns[0].rewards = [1.0]  # something to learn, so something to compute
            with torch.no_grad():
                self.model.model.norm.weight[0] = math.inf
        return original(self, groups, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module.Learner, "step", poisoned)
        with pytest.raises(TrainingDiverged, match="step 3"):
            train(small(), output=run)
    info = RunFolder.open(run).info
    assert info.status == "failed"
    assert "TrainingDiverged" in info.error
    assert train(output=run, resume=True).summary["steps"] == 4


def diverges_once(at: int) -> Callable[..., Any]:
    """Stands for the update of a step: the one of that number, counted from 1, has gradients that are not finite."""
    numbers = itertools.count(1)

    def update(updates: Any, *rest: Any) -> Any:
        if next(numbers) == at:
            updates[0].optimiser.param_groups[0]["params"][0].grad.fill_(math.inf)
        return clipped_updates(updates, *rest)

    return update


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training__minibatches": 2, "algorithm__name": "ppo"},
        {"curriculum__name": "difficulty", "curriculum__tasks": 8},
    ],
    ids=["plain", "minibatches", "curriculum"],
)
def test_steps_before_a_divergence_are_kept(
    changes: dict[str, Any], small: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without waiting for the next checkpoint, and so that the run goes on from there as if nothing had happened."""
    recipe = small(**changes, checkpoint__every=0)
    train(recipe, output=tmp_path / "reference")
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(learner_module, "clipped_updates", diverges_once(2 * recipe.training.minibatches + 1))
        with pytest.raises(TrainingDiverged, match="gradient of the policy at step 3 is not finite"):
            train(recipe, output=run)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000002"]
    train(output=run, resume=True)
    assert_same_run(run, tmp_path / "reference")


def test_what_a_diverging_step_brought_into_memory_is_not_kept(
    small: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It will be brought there again."""

    def situations(self: Memory, groups: Any, step: int) -> dict[str, Any]:
        self.replay.add([Hindsight(np.array([step, 1], dtype=np.int32), 1, "", "frozenlake", False)])
        return {}

    monkeypatch.setattr(Memory, "situations", situations)
    monkeypatch.setattr(learner_module, "clipped_updates", diverges_once(3))
    with pytest.raises(TrainingDiverged):
        train(small(checkpoint__every=0), output=tmp_path / "run")
    _, state = load_checkpoint(tmp_path / "run" / "checkpoints" / "step_000002")
    assert [one["token_ids"] for one in state["memory"]["situations"]] == [[0, 1], [1, 1]]


def test_a_step_that_was_learnt_in_part_is_not_kept(
    small: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(training__minibatches=2, checkpoint__every=0)
    monkeypatch.setattr(learner_module, "clipped_updates", diverges_once(2 * 2 + 2))
    with pytest.raises(TrainingDiverged, match="step 3"):
        train(recipe, output=tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_divergence_costs_no_earlier_checkpoint_and_keeps_nothing_unsound(
    small: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def left_by(run: Path) -> list[str]:
        with pytest.raises(TrainingDiverged, match="step 4"):
            train(small(checkpoint__every=2, checkpoint__keep=1), output=run)
        return sorted(path.name for path in (run / "checkpoints").iterdir())

    with monkeypatch.context() as patch:
        patch.setattr(learner_module, "clipped_updates", diverges_once(4))
        assert left_by(tmp_path / "sound") == ["step_000002", "step_000003"]
    original = loop_module.Learner.step

    def poisoned(self: Any, groups: Any, step: int, *rest: Any) -> dict[str, float]:
        if step == 3:
            groups[0].trajectories[0].turns[0].rewards = [1.0]  # something to learn, so something to compute
            with torch.no_grad():
                self.model.model.norm.weight[0] = math.inf
        return original(self, groups, step, *rest)

    monkeypatch.setattr(loop_module.Learner, "step", poisoned)
    assert left_by(tmp_path / "unsound") == ["step_000002"]


# Failures of the environment


class Unreliable(TextEnv):
    """One action; a share of its resets fails."""

    name = "unreliable"
    fast = True
    instructions = "Walk.\nActions: Left, Right, Up, Down."
    failing = 0.0

    def legal_actions(self) -> list[str]:
        return ["Left", "Right", "Up", "Down"]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        chance = (options or {}).get("chance", 0)
        if np.random.default_rng([seed or 0, chance]).random() < type(self).failing:
            raise ConnectionError("the simulator is gone")
        return "Start.", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "Done.", float(action == "Left"), True, False, {"success": action == "Left"}


register("test-unreliable", Unreliable)


@pytest.mark.parametrize(("failing", "ends"), [(0.3, False), (0.9, True), (1.0, True)])
def test_too_many_failed_episodes_end_the_run(
    failing: float, ends: bool, small: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Unreliable, "failing", failing)
    recipe = small(environment__name="test-unreliable", evaluation__episodes=0, training__groups=8).model_copy(
        deep=True
    )
    recipe.environment.params = {}
    if not ends:
        summary = train(recipe, output=tmp_path / "run").summary
        assert summary["steps"] == 4
        assert sum(row["train/failed_episodes"] for row in rows_of(tmp_path / "run")) > 10
        return
    with pytest.raises(EnvironmentFault) as caught:
        train(recipe, output=tmp_path / "run")
    message = str(caught.value)
    assert "of 24 episodes failed, more than training.abort_failed_share allows" in message
    assert message.endswith("Unreliable.reset raised ConnectionError: the simulator is gone.")
    assert RunFolder.open(tmp_path / "run").info.status == "failed"


class HardToMake(Unreliable):
    """A share of its constructors fails, or the first one hangs."""

    name = "hard-to-make"
    fast = False
    made = 0
    easy = 0
    hangs = False

    def __init__(self) -> None:
        kind = type(self)
        kind.made += 1
        if kind.hangs:
            threading.Event().wait(60)
        if kind.made > kind.easy and kind.made % 4 == 0:
            raise ConnectionError("the simulator is full")


register("test-hard-to-make", HardToMake)


def hard_to_make(small: Callable[..., Recipe]) -> Recipe:
    recipe = small(environment__name="test-hard-to-make", evaluation__episodes=0, training__groups=8).model_copy(
        deep=True
    )
    recipe.environment.params = {}
    return recipe


def test_constructors_that_fail_on_the_way_cost_their_episodes(
    small: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HardToMake, "made", 0)
    monkeypatch.setattr(HardToMake, "easy", 5)
    assert train(hard_to_make(small), output=tmp_path / "run").summary["steps"] == 4
    episodes = [t for file in sorted((tmp_path / "run" / "trajectories").iterdir()) for t in episodes_of(file)]
    told = {trajectory.error for trajectory in episodes if trajectory.failed}
    assert sum(row["train/failed_episodes"] for row in rows_of(tmp_path / "run")) > 0
    assert told == {"The environment test-hard-to-make could not be made: ConnectionError: the simulator is full"}


def test_an_environment_that_cannot_be_made_at_all_is_told_before_a_run_begins(
    small: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HardToMake, "made", 3)
    with pytest.raises(EnvironmentFault, match="test-hard-to-make could not be made: ConnectionError"):
        train(hard_to_make(small), output=tmp_path / "run")
    monkeypatch.setattr(HardToMake, "hangs", True)
    monkeypatch.setattr(playing_module, "_SECONDS_TO_BEGIN", 0.1)
    recipe = hard_to_make(small)
    recipe.environment.step_timeout = 0.1
    with pytest.raises(EnvironmentFault, match=r"test-hard-to-make was not made within 0\.1 s; .*step_timeout\.$"):
        train(recipe, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Replacing groups that can teach nothing


def refill_trainer(small: Callable[..., Recipe], alive: Callable[[int], bool], tries: int = 5) -> Trainer:
    """A trainer whose groups have rewards that differ only where ``alive`` says so of the number of the group."""
    recipe = small(
        algorithm__name="dapo", algorithm__options__max_refill_tries=tries, evaluation__episodes=0, training__groups=4
    )
    trainer = Trainer(recipe)
    numbers = iter(range(10_000))
    original = trainer.rollout.play

    def play(tasks: Any, size: int, **kwargs: Any) -> Any:
        groups = original(tasks, size, **kwargs)
        for group in groups:
            living = alive(next(numbers))
            for trajectory in group:
                for turn in trajectory.turns:
                    turn.rewards, turn.penalty = [0.0], 0.0
                trajectory.turns[0].rewards = [float(trajectory.sample == 0) if living else 0.0]
        return groups

    trainer.rollout.play = play  # type: ignore[method-assign]
    return trainer


def test_dead_groups_are_replaced_by_fresh_tasks(small: Callable[..., Recipe]) -> None:
    trainer = refill_trainer(small, lambda number: number % 2 == 1)
    batch = trainer.play()
    # 4 groups with 2 alive, 2 more with 1, 1 more with none (number 6), 1 more alive.
    assert batch.kept.keep_P.tolist() == [False, True, False, True, False, True, False, True]
    assert batch.rounds == 4
    seeds = [group.trajectories[0].seed for group in batch.groups]
    assert len(set(seeds)) == 8
    assert seeds[:4] == [task.seed for task in tasks_of_step(0, 0, 4)]


def test_refills_are_bounded(small: Callable[..., Recipe]) -> None:
    trainer = refill_trainer(small, lambda number: number == 2, tries=3)
    batch = trainer.play()
    assert batch.rounds == 1 + 3
    assert len(batch.groups) == 4 + 3 * 3
    assert int(batch.kept.keep_P.sum()) == 1
    # The policy learns from what is there; nothing is duplicated to fill the step.
    figures = trainer.learner.step(batch.groups, 0, batch.kept.keep_PG)
    assert figures["policy/grad_norm"] > 0


@pytest.mark.parametrize("first_dead", [0, 3, 4])
def test_exactly_as_many_groups_as_asked_for_are_kept(first_dead: int, small: Callable[..., Recipe]) -> None:
    trainer = refill_trainer(small, lambda number: number >= first_dead)
    batch = trainer.play()
    assert int(batch.kept.keep_P.sum()) == 4
    assert len(batch.groups) == 4 + first_dead
    assert batch.rounds == (1 if first_dead == 0 else 2)


def test_without_dynamic_sampling_every_group_is_kept(small: Callable[..., Recipe]) -> None:
    trainer = Trainer(small(evaluation__episodes=0))
    batch = trainer.play()
    assert batch.kept.keep_P.tolist() == [True] * 4
    assert batch.rounds == 1


def test_refills_are_in_the_metrics(small: Callable[..., Recipe]) -> None:
    trainer = refill_trainer(small, lambda number: number % 2 == 1)
    trainer.recipe.training.steps = 1
    trainer.run()
    (figures,) = trainer.history
    assert figures["signal/kept_groups"] == 4
    assert figures["signal/played_groups"] == 8
    assert figures["signal/rounds"] == 4
    assert figures["signal/dead_groups"] == 0.5


# Rewards of training


def test_what_is_added_to_rewards_is_seen_by_all_but_the_evaluation(
    small: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = small(rewards__length="cosine", rewards__length_tokens=200, training__steps=1, save_trajectories_every=1)
    train(recipe, output=tmp_path / "run")
    (row,) = rows_of(tmp_path / "run")
    assert row["train/reward/length"] < 0
    played = episodes_of(tmp_path / "run" / "trajectories" / "train_000001.parquet")
    for episode in played:
        assert episode.reward == pytest.approx(episode.parts["reward"] + episode.parts["length"])
    assert row["train/reward"] == pytest.approx(np.mean([episode.reward for episode in played]))
    judged = episodes_of(tmp_path / "run" / "trajectories" / "eval_000001.parquet")
    assert judged and not any(turn.shaping for episode in judged for turn in episode.turns)


def test_parts_of_the_reward_are_learnt_from_apart(small: Callable[..., Recipe]) -> None:
    """With all the weight on one part, the others make no difference."""

    def after(**options: Any) -> dict[str, torch.Tensor]:
        recipe = small(training__steps=2, evaluation__episodes=0, **options)
        trainer = Trainer(recipe)
        trainer.run()
        assert trainer.policy is not None
        return {name: tensor.clone() for name, tensor in trainer.policy.model.state_dict().items()}

    parts, length = "algorithm__options__parts", {"rewards__length": "cosine", "rewards__length_tokens": 200}
    plain = after()
    alone = after(**length, **{parts: {"reward": 1.0}})
    both = after(**length, **{parts: {"reward": 1.0, "length": 0.5}})
    assert all(torch.equal(alone[name], tensor) for name, tensor in plain.items())
    assert not all(torch.equal(both[name], tensor) for name, tensor in plain.items())


def test_a_part_that_the_environment_does_not_tell_ends_the_run(small: Callable[..., Recipe]) -> None:
    with pytest.raises(EnvironmentFault, match="names manners"):
        Trainer(small(algorithm__options__parts={"manners": 1.0}, evaluation__episodes=0)).run()
