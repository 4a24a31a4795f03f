"""The small base model that ships with the package: made from scripted play, in minutes, by one command.

It is mediocre on purpose. It knows the answer format, sees the state correctly in its thoughts, knows how the worlds
answer, and acts as the mixture of players does from whom it learnt: mostly badly. So there is much to learn from
rewards, and every good action has a probability from which to begin.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rehearsal.agents.players import SkillMix, scripted_episode
from rehearsal.errors import RecipeError
from rehearsal.models.load import quiet_transformers
from rehearsal.training.base_card import model_card
from rehearsal.training.base_config import SCENES, BaseConfig, Scene
from rehearsal.training.base_play import opening_tokens, sampled_play
from rehearsal.training.base_resume import Unfinished
from rehearsal.training.base_training import heldout_losses, new_model, train_base
from rehearsal.training.base_transcripts import (
    Transcript,
    TranscriptSource,
    load_transcripts,
    make_tokenizer,
    save_transcripts,
    stream_transcripts,
)

__all__ = [
    "SCENES",
    "BaseConfig",
    "Scene",
    "SkillMix",
    "Transcript",
    "TranscriptSource",
    "load_transcripts",
    "make_base",
    "make_base_command",
    "sampled_play",
    "save_transcripts",
    "scripted_episode",
]

Evaluation = Callable[[Path], Mapping[str, float]]
"""Plays with the model in a folder and returns rates from 0 to 1, such as ``success_frozenlake``."""


def make_base(
    config: BaseConfig,
    output_dir: str | Path,
    progress: bool = True,
    *,
    evaluate: Evaluation | None = None,
    background: bool = True,
) -> dict[str, float]:
    """Make a base model and write it, with tokenizer and model card, as a Hugging Face folder.

    Everything is fixed by ``config``: two runs on the same machine with the same number of threads write the same
    weights. Now and then the state is kept in ``output_dir/unfinished``: called again with the same configuration, an
    interrupted run goes on from there to the same weights, and the folder is removed at the end. With ``background``
    the episodes are played in a second process, which Python starts by importing the main module anew: a script that
    calls this needs ``if __name__ == "__main__":`` around the call.

    Args:
        config: sizes, players, scenes and training.
        output_dir: made if it does not exist; files of the same names in it are replaced.
        progress: whether to show a progress bar.
        evaluate: plays with the finished model; what it returns goes into the card and the figures. See
            :func:`rehearsal.training.base_play.sampled_play`.
        background: whether episodes are played in a second process.

    Returns:
        Figures by name: ``parameters``, ``vocabulary``, ``tokens``, ``episodes``, ``steps``, ``seconds``,
        ``tokens_per_second``, ``megabytes``, ``opening_tokens`` (system prompt and first observation of FrozenLake),
        ``loss_first`` and ``loss_last`` (training, nats a token), ``heldout_thought``, ``heldout_action``,
        ``heldout_observation`` and ``heldout_opening`` (nats a token, tasks of the validation split), and whatever
        ``evaluate`` returned.

    Raises:
        RecipeError: for an output folder that cannot be used.
        TrainingDiverged: if the loss or a gradient was not finite; nothing is written then.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror or type(error).__name__
        raise RecipeError(f"The base model cannot be written to {folder}: {reason}; name a folder.") from error
    began = time.monotonic()
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn(),
        TimeRemainingColumn(), disable=not progress,
    ) as bar:  # fmt: skip
        first = bar.add_task("tokenizer", total=None, note="")
        tokenizer = make_tokenizer(config)
        model = new_model(config, tokenizer)
        unfinished = Unfinished(folder / "unfinished", config, model)
        state = unfinished.load()
        bar.update(first, total=1, completed=1, note=f"{len(tokenizer)} tokens")
        second = bar.add_task("training", total=config.steps, completed=state.step, note="")

        def on_step(step: int, loss: float, speed: float) -> None:
            bar.update(second, completed=step, note=f"loss {loss:.3f}, {speed:,.0f} tokens/s")

        with closing(stream_transcripts(config, tokenizer, background, state.episodes)) as transcripts:
            figures = train_base(model, config, transcripts, on_step, state, unfinished.save)
    source = TranscriptSource(config, tokenizer, split="validation")
    heldout = list(islice(source.transcripts(), config.heldout_episodes))
    losses = heldout_losses(model, heldout)
    figures |= {f"heldout_{name}": loss for name, loss in losses.items()}
    figures["parameters"] = float(sum(parameter.numel() for parameter in model.parameters()))
    figures["vocabulary"] = float(len(tokenizer))
    figures["opening_tokens"] = float(opening_tokens(tokenizer))
    figures["seconds"] = time.monotonic() - began

    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    figures["megabytes"] = sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 1e6
    if evaluate is not None:
        figures |= evaluate(folder)
    (folder / "MODEL_CARD.md").write_text(model_card(config, figures), encoding="utf-8")
    unfinished.remove()
    return figures


def make_base_command(output_dir: Path, options: Mapping[str, Any]) -> int:
    """What ``rehearsal base`` does: make the model with :func:`make_base`, play with it, and print the figures.

    Args:
        output_dir: folder for the model.
        options: fields of :class:`BaseConfig` by name, and fields of its mix as ``mix.NAME``.

    Returns:
        0, the exit code.

    Raises:
        RecipeError: for an unknown option or a value that cannot be used.
    """
    console = Console()
    config = BaseConfig.from_options(options)
    figures = make_base(config, output_dir, evaluate=sampled_play)
    table = Table("figure", "value", box=None, padding=(0, 2, 0, 0))
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), f"{value:,.0f}" if value.is_integer() else f"{value:.3f}")
    console.print(table)
    console.print(f"The model and its card are in {output_dir}.", soft_wrap=True)
    return 0
