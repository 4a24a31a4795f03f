"""An experiment is a grid of cells (arm, seed). Each is stored as it finishes, so an interrupted grid goes on where it
stopped, on any machine; a cell's file says which recipe made it, and one made by another recipe is not taken for it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def device() -> str:
    """The processor or GPU and the number of cores."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores"
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{model}, {os.cpu_count()} cores"


def commit() -> str:
    """The commit that the code is at, with "+" if files differ from it."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, cwd=HERE
        )
    except OSError:
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


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
    """
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
                "fingerprint": _fingerprint(cells[name]), "settings": dict(cells[name]), "commit": commit(),
                "device": device(), "figures": figures,
            }  # fmt: skip
            file.with_suffix(".partial").write_text(json.dumps(content, indent=1) + "\n")
            file.with_suffix(".partial").rename(file)

    if workers == 1:
        for name in missing:
            store(name, play(cells[name]))
    else:
        with ProcessPoolExecutor(workers) as pool:
            futures = {name: pool.submit(play, cells[name]) for name in missing}
            for name, future in futures.items():
                store(name, future.result())
    return {name: done[name] for name in cells}


def _fingerprint(settings: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8).hexdigest()


def report(
    name: str, figures: Mapping[str, Any], goals: Mapping[str, Any], seeds: Sequence[int], quick: bool,
) -> int:  # fmt: skip
    """Print the result as the last line, and store it unless ``quick``.

    Args:
        goals: by figure, ``[">=", bound]`` or ``["<=", bound]``.

    Returns:
        0 if every goal holds, else 1.
    """
    held = {
        figure: figures[figure] >= bound if sign == ">=" else figures[figure] <= bound
        for figure, (sign, bound) in goals.items()
        if figures.get(figure) is not None
    }
    result = {
        "name": name, "command": "python " + " ".join([f"experiments/{name}.py", *sys.argv[1:]]), "commit": commit(),
        "device": device(), "seeds": list(seeds), "figures": dict(figures), "goals": {k: list(v) for k, v in goals.items()},
        "holds": {**held, **{figure: None for figure in goals if figure not in held}},
    }  # fmt: skip
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0 if all(held.values()) else 1
