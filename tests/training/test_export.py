"""The policy of any checkpoint as a folder that transformers loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rehearsal.errors import CheckpointError, RecipeError
from rehearsal.models.adapters import POLICY, WORLD, activate, active_names
from rehearsal.training.export import export_policy
from rehearsal.training.loop import Trainer
from rehearsal.training.observer import SilentObserver
from rehearsal.training.playing import policy_of
from rehearsal.training.recipe import Recipe
from rehearsal.training.run import train

IDS = torch.arange(1, 20)[None]


class Killed(SilentObserver):
    """Ends a run without its leave, as kill -9 does: no policy folder is written."""

    def step(self, step: int, metrics: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small: Callable[..., Recipe]) -> Path:
    run = tmp_path_factory.mktemp("export") / "run"
    train(small(training__steps=2, evaluation__episodes=0, evaluation__every=0), output=run)
    return run


def test_the_newest_checkpoint_of_a_finished_run_is_its_policy(whole: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    folder = export_policy(whole, tmp_path / "policy")
    assert folder == tmp_path / "policy"
    mine, theirs = weights(folder), weights(whole / "policy")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert {path.name for path in folder.iterdir()} == {path.name for path in (whole / "policy").iterdir()}
    AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(whole / "policy").chat_template
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["policy"], "nothing is left beside it"


def test_an_earlier_step_is_another_policy(whole: Path, tmp_path: Path) -> None:
    earlier = weights(export_policy(whole, tmp_path / "one", step=1))
    newest = weights(export_policy(whole, tmp_path / "two", step=2))
    assert any(not torch.equal(earlier[name], newest[name]) for name in newest)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7; there are those of 1, 2\."):
        export_policy(whole, tmp_path / "seven", step=7)
    assert not (tmp_path / "seven").exists()


def test_a_run_that_was_killed_has_a_policy_too(small: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = small(evaluation__episodes=0, evaluation__every=0)
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(recipe, output=run, observer=Killed())
    assert not (run / "policy").exists()
    export_policy(run, tmp_path / "policy")
    short = recipe.model_copy(deep=True)
    reference = train(short, output=tmp_path / "two", observer=StopAfter(2)).path / "policy"
    assert all(torch.equal(tensor, weights(reference)[name]) for name, tensor in weights(tmp_path / "policy").items())


class StopAfter(SilentObserver):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def started(self, trainer: Any) -> None:
        self.trainer = trainer

    def step(self, step: int, metrics: Any) -> None:
        self.trainer.stop_requested = step >= self.steps


def test_adapters_are_multiplied_in_and_stand_beside(
    small: Callable[..., Recipe], taught_folder: Path, tmp_path: Path
) -> None:
    recipe = small(world__mode="dual", training__steps=1, evaluation__episodes=0, evaluation__every=0)
    run = train(recipe, output=tmp_path / "run").path
    folder = export_policy(run, tmp_path / "policy")
    assert {path.name for path in (folder / "adapters").iterdir()} == {"policy", "world", "merged"}
    mine, theirs = weights(folder), weights(run / "policy")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    adapted = policy_of(small(adapters__policy_folder=str(folder / "adapters" / "merged")))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
        assert torch.allclose(adapted.model(IDS).logits, expected, atol=1e-4)
        plain = AutoModelForCausalLM.from_pretrained(taught_folder)(IDS).logits
        assert not torch.allclose(plain, expected, atol=1e-4)


def test_a_model_that_was_given_stays_as_it_was(whole: Path, small: Callable[..., Recipe], tmp_path: Path) -> None:
    policy = policy_of(small())
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    export_policy(whole, tmp_path / "policy", policy=policy)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.model.state_dict().items())
    assert all(
        torch.equal(tensor, weights(whole / "policy")[name]) for name, tensor in weights(tmp_path / "policy").items()
    )


def test_a_model_that_was_given_is_written_as_its_run_played(
    small: Callable[..., Recipe], taught_folder: Path, tmp_path: Path
) -> None:
    recipe = small(world__mode="inactive", training__steps=1, evaluation__episodes=0, evaluation__every=0)
    run = train(recipe, output=tmp_path / "run").path
    policy = policy_of(recipe)
    activate(policy.model, (POLICY, WORLD))
    folder = export_policy(run, tmp_path / "policy", policy=policy)
    mine, theirs = weights(folder), weights(run / "policy")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert active_names(policy.model) == (POLICY, WORLD)


def test_what_is_there_is_not_written_over(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("Dear reader")
    with pytest.raises(CheckpointError, match="full exists already and is not an empty folder"):
        export_policy(whole, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    assert export_policy(whole, tmp_path / "empty").is_dir()
    with pytest.raises(CheckpointError, match="nowhere holds no run"):
        export_policy(tmp_path / "nowhere", tmp_path / "policy")


def test_another_run_goes_on_from_a_checkpoint(whole: Path, small: Callable[..., Recipe], tmp_path: Path) -> None:
    """As verdicts suggest: the algorithm and the filter may change, which resuming refuses."""
    changes = {"algorithm.options.clip_high": 0.3, "filter.name": "top_p"}
    with pytest.raises(RecipeError, match="cannot be resumed with another"):
        train(output=whole, resume=True, overrides=changes)
    folder = export_policy(whole, tmp_path / "before", step=1)
    overrides = {name.replace(".", "__"): value for name, value in changes.items()}
    trainer = Trainer(small(model__path=str(folder), training__steps=1, evaluation__episodes=0, **overrides))
    assert trainer.policy is not None
    begun = {name: weight.detach().clone() for name, weight in trainer.policy.model.state_dict().items()}
    for name, tensor in weights(folder).items():
        assert torch.equal(begun[name], tensor), name
    summary = trainer.run()
    assert summary["steps"] == 1
