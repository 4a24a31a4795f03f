"""Checkpoints: written whole or not at all, and enough to go on exactly where a run stopped.

A checkpoint is a folder ``step_000020`` with three files:

- ``weights.safetensors``: the tensors that are trained, by name, which may be adapters alone. It is no Hugging Face
  folder; :func:`rehearsal.training.export.export_policy` makes one of it.
- ``state.pt``: the number of steps; the optimisers' moments and, for weights of lower precision, their float32 masters;
  the critic and its optimiser, if there is one; what diagnostics, the choice of tasks and the memory of past situations
  have learnt so far; the seconds so far.
- ``manifest.json``: the step again, and checksums of both.

It is written under another name, flushed to disk and renamed, and renamed again before it is deleted, so a folder with
the right name is complete. Which tasks a step draws, sampling noise and schedules are functions of (seed, step) and of
that state, so there is nothing else to keep.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rehearsal.errors import CheckpointError
from rehearsal.training.runs import RunFolder
from rehearsal.training.storage import flush, flush_tree, storage_errors

_NAME = re.compile(r"step_(\d+)")
_MANIFEST = "manifest.json"


def _checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


@contextlib.contextmanager
def tensor_errors() -> Iterator[None]:
    """Turn what safetensors and PyTorch raise when a file cannot be written into the :class:`OSError` behind it."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number)) from error
    except RuntimeError as error:
        # torch.save stumbles over its own unfinished file and leaves the reason behind in the context.
        reason: BaseException | None = error
        while reason is not None and not isinstance(reason, OSError):
            reason = reason.__context__
        if reason is None:
            raise
        raise reason from None


def save_checkpoint(
    folder: Path, step: int, weights: dict[str, torch.Tensor], state: dict[str, Any], keep: int,
    spare: Path | None = None,
) -> Path:  # fmt: skip
    """Write a checkpoint and remove all but the newest ``keep``.

    Args:
        folder: the run's checkpoint folder.
        step: steps done.
        weights: the trained tensors by name.
        state: everything else; must be loadable by ``torch.load(weights_only=True)``.
        keep: checkpoints that stay, this one included.
        spare: one that stays beside them.

    Raises:
        CheckpointError: if it cannot be written; earlier checkpoints are untouched.
    """
    target = folder / f"step_{step:06d}"
    partial = folder / f".partial-{step:06d}"
    with storage_errors(target), tensor_errors():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            save_file({name: tensor.detach().contiguous().cpu() for name, tensor in weights.items()},
                      partial / "weights.safetensors")  # fmt: skip
            with (partial / "state.pt").open("wb") as out:
                torch.save({**state, "step": step}, out)
            files = {file.name: _checksum(file) for file in sorted(partial.iterdir())}
            (partial / _MANIFEST).write_text(json.dumps({"step": step, "crc32": files}))
            flush_tree(partial)
            earlier = _set_aside(target)
            partial.rename(target)
            flush(folder)
            shutil.rmtree(earlier, ignore_errors=True)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    for old in checkpoints(folder)[:-keep]:
        if old != spare:
            _remove(old)
    return target


def _remove(checkpoint: Path) -> None:
    shutil.rmtree(_set_aside(checkpoint), ignore_errors=True)


def _set_aside(checkpoint: Path) -> Path:
    """Give a checkpoint that is to be deleted another name: what is half deleted must not look like one."""
    going = checkpoint.with_name(f".partial-{checkpoint.name}")
    shutil.rmtree(going, ignore_errors=True)
    with contextlib.suppress(OSError):  # it is not there, or it stays, whole
        checkpoint.rename(going)
    return going


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. What a crash left half-written is not among them."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def standing_checkpoints(run: RunFolder) -> list[Path]:
    """The checkpoints of a run up to where it stands, oldest first: of one that went back on a verdict not those that
    it went back from.

    Raises:
        CheckpointError: if the one that it went back to is gone.
    """
    found, back = checkpoints(run.path / "checkpoints"), run.info.went_back_to
    if back is None:
        return found
    if back not in map(step_of, found):
        raise CheckpointError(
            f"{run.path} went back to its step {back}, whose checkpoint is not there any more; put it back, or begin "
            "a new run."
        )
    return [path for path in found if step_of(path) <= back]


def step_of(checkpoint: Path) -> int:
    """How many steps had been done when a checkpoint was written."""
    match = _NAME.fullmatch(checkpoint.name)
    if match is None:
        raise CheckpointError(f"{checkpoint} is not the folder of a checkpoint.")
    return int(match[1])


def remove_partial(folder: Path) -> None:
    """Delete what a crash left half written or half deleted."""
    if folder.is_dir():
        for path in folder.glob(".partial-*"):
            shutil.rmtree(path, ignore_errors=True)


def remove_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps: a run that goes on from an earlier one makes them anew."""
    for path in checkpoints(folder):
        if step_of(path) > step:
            _remove(path)


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and state of a checkpoint, verified against its checksums.

    Raises:
        CheckpointError: if a file is missing or damaged.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        for name, expected in manifest["crc32"].items():
            if _checksum(path / name) != expected:
                raise CheckpointError(f"{path / name} is damaged (its checksum does not match).")
        weights = load_file(path / "weights.safetensors")
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except CheckpointError as error:
        raise CheckpointError(f"{error} {_advice(path)}") from error
    except Exception as error:  # a damaged file may raise anything
        raise CheckpointError(
            f"The checkpoint {path} cannot be read ({type(error).__name__}). {_advice(path)}"
        ) from error
    return weights, state


@contextlib.contextmanager
def state_errors(path: Path) -> Iterator[None]:
    """Turn what is raised where the state of a whole checkpoint does not fit into a :class:`CheckpointError`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"The checkpoint {path} was written by another version of this package or by a run of another kind "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}). {_advice(path)}"
        ) from error


def _advice(path: Path) -> str:
    others = [other.name for other in checkpoints(path.parent) if other != path]
    if others:
        return f"Delete that folder to go on from {others[-1]}."
    return "Delete that folder and start the run anew with --overwrite."


def trainable_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that training changes, by name; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def restore_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], where: Path) -> None:
    """Copy saved weights into a model in place.

    Raises:
        CheckpointError: if they belong to a model of another shape.
    """
    current = trainable_weights(model)
    missing = sorted(set(current) ^ set(weights))
    wrong = [name for name in current if name in weights and current[name].shape != weights[name].shape]
    if missing or wrong:
        raise CheckpointError(
            f"The checkpoint {where} belongs to another model: {(missing or wrong)[0]} does not fit. Resume with the "
            "model that the run began with."
        )
    with torch.no_grad():
        for name, parameter in current.items():
            parameter.copy_(weights[name])
