"""Checkpoints: whole or not there, and every damage told."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rehearsal.training.checkpoint as checkpoint_module
from rehearsal.errors import CheckpointError
from rehearsal.training.checkpoint import (
    checkpoints,
    load_checkpoint,
    remove_after,
    remove_partial,
    restore_weights,
    save_checkpoint,
    trainable_weights,
)

STATE: dict[str, Any] = {
    "learner": {"updates": 3, "optimiser": {"state": {0: {"exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 0.1}]}},
    "seconds": 1.5,
}


def weights(fill: float = 0.0, n: int = 3) -> dict[str, Tensor]:
    return {"a.weight": torch.arange(6.0).view(2, 3).t() + fill, "b": torch.full((n,), fill)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    path = save_checkpoint(folder, 20, weights(1.0), STATE, keep=2)
    assert path.name == "step_000020"
    loaded, state = load_checkpoint(path)
    assert loaded.keys() == weights().keys()
    for name, tensor in weights(1.0).items():
        assert torch.equal(loaded[name], tensor)
    assert state["step"] == 20
    assert state["learner"]["updates"] == 3
    assert torch.equal(state["learner"]["optimiser"]["state"][0]["exp_avg"], torch.ones(4))


def test_the_newest_stay(tmp_path: Path) -> None:
    for step in (2, 4, 10, 100, 1_000_000):
        save_checkpoint(tmp_path, step, weights(), STATE, keep=3)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000010", "step_000100", "step_1000000"]


def test_what_is_no_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for name in ("step_", "step_x", ".partial-000003", "other"):
        (tmp_path / name).mkdir()
    assert checkpoints(tmp_path) == []
    assert checkpoints(tmp_path / "missing") == []
    remove_partial(tmp_path)
    assert names(tmp_path) == ["other", "step_", "step_x"]
    remove_partial(tmp_path / "missing")


def test_a_step_can_be_written_again(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 5, weights(1.0), STATE, keep=2)
    path = save_checkpoint(tmp_path, 5, weights(2.0), STATE, keep=2)
    assert float(load_checkpoint(path)[0]["b"][0]) == 2.0


def test_what_a_crash_left_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / ".partial-000005").mkdir(parents=True)
    (tmp_path / ".partial-000005" / "weights.safetensors").write_bytes(b"half")
    save_checkpoint(tmp_path, 5, weights(1.0), STATE, keep=2)
    assert names(tmp_path) == ["step_000005"]


class PowerCut(BaseException):
    """Nothing that runs on catches it."""


@pytest.mark.parametrize("how", ["pruned", "written again", "dropped on resuming"])
def test_a_checkpoint_that_is_half_deleted_has_not_the_name_of_one(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, weights(float(step)), STATE, keep=2)
    original = shutil.rmtree

    def killed(path: Path, **options: Any) -> None:
        if path.is_dir():
            (path / "weights.safetensors").unlink()
            raise PowerCut
        original(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module.shutil, "rmtree", killed)
        with pytest.raises(PowerCut):
            if how == "pruned":
                save_checkpoint(tmp_path, 3, weights(3.0), STATE, keep=2)
            elif how == "written again":
                save_checkpoint(tmp_path, 2, weights(2.5), STATE, keep=2)
            else:
                remove_after(tmp_path, 1)
    left = {"pruned": [2.0, 3.0], "written again": [1.0, 2.5], "dropped on resuming": [1.0]}[how]
    assert [float(load_checkpoint(path)[0]["b"][0]) for path in checkpoints(tmp_path)] == left
    assert len(names(tmp_path)) == len(left) + 1
    remove_partial(tmp_path)
    assert len(names(tmp_path)) == len(left)


def test_a_second_half_deleted_checkpoint_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / ".partial-step_000001").mkdir()
    (tmp_path / ".partial-step_000001" / "state.pt").write_bytes(b"half")
    for step in (1, 2):
        save_checkpoint(tmp_path, step, weights(), STATE, keep=1)
    assert names(tmp_path) == ["step_000002"]


# A disk that refuses


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Lets the system refuse to write beyond a number of bytes into any file, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("large", ["weights", "state"])
def test_a_file_that_the_system_does_not_take(large: str, tmp_path: Path, small_files: Callable[[int], None]) -> None:
    """The libraries raise errors of their own then, which are no OSError."""
    save_checkpoint(tmp_path, 1, weights(1.0), STATE, keep=2)
    state = {**STATE, "moments": torch.zeros(100_000 if large == "state" else 1)}
    small_files(50_000)
    with pytest.raises(CheckpointError, match=r"step_000002 could not be written: File too large\.$"):
        save_checkpoint(tmp_path, 2, weights(2.0, 100_000 if large == "weights" else 3), state, keep=2)
    assert names(tmp_path) == ["step_000001"]
    assert float(load_checkpoint(tmp_path / "step_000001")[0]["b"][0]) == 1.0


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["save_file", "flush_tree", "_checksum"])
def test_a_full_disk_leaves_earlier_checkpoints_alone(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, weights(1.0), STATE, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, where, full)
        with pytest.raises(CheckpointError, match=r"because the disk is full; make room, then go on with --resume\.$"):
            save_checkpoint(tmp_path, 2, weights(2.0), STATE, keep=1)
    assert names(tmp_path) == ["step_000001"]
    load_checkpoint(tmp_path / "step_000001")
    save_checkpoint(tmp_path, 2, weights(2.0), STATE, keep=1)
    assert names(tmp_path) == ["step_000002"]


def test_a_bug_is_not_taken_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("not about files")

    monkeypatch.setattr(checkpoint_module, "save_file", broken)
    with pytest.raises(RuntimeError, match="not about files"):
        save_checkpoint(tmp_path, 1, weights(), STATE, keep=1)
    assert names(tmp_path) == []


def test_ctrl_c_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module, "flush_tree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 1, weights(), STATE, keep=1)
    assert names(tmp_path) == []


# Damage


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt"])
@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "empty"])
def test_damaged_files_are_told(name: str, damage: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, weights(), STATE, keep=3)
    path = save_checkpoint(tmp_path, 2, weights(), STATE, keep=3)
    file = path / name
    if damage == "bit":
        flip(file, file.stat().st_size // 2)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match=r"Delete that folder to go on from step_000001\.$") as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    load_checkpoint(tmp_path / "step_000001")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 1}', '{"crc32": {"weights.safetensors": "x"}}'])
def test_a_damaged_manifest_is_told(text: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, weights(), STATE, keep=3)
    (path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"Delete that folder and start the run anew with --overwrite\.$"):
        load_checkpoint(path)


def test_a_state_that_runs_code_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, weights(), STATE, keep=3)
    touched = tmp_path / "touched"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (touched,))

    torch.save({"step": 1, "evil": Evil()}, path / "state.pt")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["crc32"]["state.pt"] = checkpoint_module._checksum(path / "state.pt")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert not touched.exists()


# Into the model


def test_weights_go_back_into_the_model(tiny_qwen3: Callable[..., Any], tmp_path: Path) -> None:
    model, other = tiny_qwen3(seed=0), tiny_qwen3(seed=1)
    path = save_checkpoint(tmp_path, 1, trainable_weights(model), STATE, keep=1)
    before = {name: parameter.data_ptr() for name, parameter in other.named_parameters()}
    restore_weights(other, load_checkpoint(path)[0], path)
    for (name, parameter), wanted in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, wanted)
        assert parameter.data_ptr() == before[name], "in place, so that engine and optimiser see it"
    ids = torch.arange(6)[None]
    assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)


def test_tied_weights_are_kept_once(tiny_qwen3: Callable[..., Any]) -> None:
    assert "lm_head.weight" not in trainable_weights(tiny_qwen3())
    assert "lm_head.weight" in trainable_weights(tiny_qwen3(tie_word_embeddings=False))


@pytest.mark.parametrize("changes", [{"hidden_size": 48}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}])
def test_weights_of_another_model_are_refused(
    changes: dict[str, int], tiny_qwen3: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_qwen3()
    with pytest.raises(CheckpointError, match=r"belongs to another model: .* does not fit"):
        restore_weights(model, trainable_weights(tiny_qwen3(**changes)), tmp_path / "step_000001")
