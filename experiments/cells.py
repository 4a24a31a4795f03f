"""An experiment is a grid of cells (arm, seed). Each is stored as it finishes, so an interrupted grid goes on where it
stopped, on any machine; a cell's file says which settings made it, and one made by others is not taken for it. So
whatever decides what a cell finds belongs into its settings: digests of the base and the recipe, constants of the
script, the words of an environment."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import commit, describe_device

RESULTS = Path(__file__).resolve().parent / "results"


def run_cells(
    experiment: str, cells: Mapping[str, Mapping[str, Any]], play: Callable[[Mapping[str, Any]], dict[str, Any]],
    folder: Path | None, workers: int = 1,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Run the cells that are not stored yet.

    Args:
        experiment: names the folder of the stored cells.
        cells: settings by name; JSON values only.
        play: runs one cell from its settings; a function of a module, so that other processes can call it.
        folder: where cells are stored; None stores nothing.
        workers: processes at the same time.

    Returns:
        what ``play`` returned, by name.

    Raises:
        RuntimeError: if a cell failed; all others are played and stored first.
    """
    made_by = commit()
    done: dict[str, dict[str, Any]] = {}
    missing: list[str] = []
    for name, settings in cells.items():
        file = folder / experiment / f"{name}.json" if folder else None
        stored = json.loads(file.read_text()) if file and file.is_file() else None
        if stored and stored["fingerprint"] == _fingerprint(settings):
            done[name] = stored["figures"]
        else:
            missing.append(name)

    def store(name: str, figures: dict[str, Any]) -> None:
        done[name] = figures
        print(name, json.dumps({k: v for k, v in figures.items() if not isinstance(v, list)}), flush=True)
        if folder:
            file = folder / experiment / f"{name}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            content = {
                "fingerprint": _fingerprint(cells[name]), "settings": dict(cells[name]), "commit": made_by,
                "device": describe_device(torch.device("cpu")), "figures": figures,
            }  # fmt: skip
            file.with_suffix(".partial").write_text(json.dumps(content, indent=1) + "\n")
            file.with_suffix(".partial").rename(file)

    failed: dict[str, Exception] = {}

    def end(name: str, result: Callable[[], dict[str, Any]]) -> None:
        try:
            store(name, result())
        except Exception as problem:
            failed[name] = problem
            print(name, "failed:", repr(problem), flush=True)

    if workers == 1:
        for name in missing:
            end(name, partial(play, cells[name]))
    else:
        with ProcessPoolExecutor(workers) as pool:
            names = {pool.submit(play, cells[name]): name for name in missing}
            # As they finish, not in order: a slow cell must not keep the others from being stored.
            for future in as_completed(names):
                end(names[future], future.result)
    if failed:
        raise RuntimeError(f"these cells failed: {', '.join(failed)}") from next(iter(failed.values()))
    return {name: done[name] for name in cells}


def digest(content: Any) -> str:
    """Digest of JSON values, for the settings of cells that depend on more than their settings say: the constants of a
    script, the words of an environment."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()


def _fingerprint(settings: Mapping[str, Any]) -> str:
    return digest(settings)
