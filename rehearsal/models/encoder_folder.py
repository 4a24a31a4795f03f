"""What a folder of sentence-transformers says of how its encoder is to be used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from rehearsal.errors import ModelError

_FLAGS = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}
_NAMES = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_QUERY = ("query",)
_DOCUMENT = ("document", "passage", "corpus")


@dataclass(frozen=True)
class Declared:
    """Attributes:
    pooling: "mean", "cls" or "last".
    max_tokens: of a text; None if nothing is said.
    prefixes: what goes before a "query" and a "document".
    """

    pooling: str = "mean"
    max_tokens: int | None = None
    prefixes: Mapping[str, str] = field(default_factory=lambda: {"query": "", "document": ""})


def declared_by(place: str, local: bool, pooling: str | None = None) -> Declared:
    """What ``modules.json`` and the files that it names say; mean pooling without prefixes where there are none.

    An encoder of which a part is left out still gives numbers, so what we do not compute is refused.

    Args:
        place: a folder or a hub name.
        local: whether it is a folder.
        pooling: what the user asked for, which goes before what the folder says.

    Raises:
        ModelError: if the folder says something that we do not do, such as a layer behind the pooling.
    """
    modules = _read(place, "modules.json", local)
    if not isinstance(modules, list):
        return Declared()
    said = pooling or "mean"
    for module in modules:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind == "Pooling":
            said = pooling or _pooling_of(place, _read(place, f"{module.get('path')}/config.json", local))
        elif kind not in ("Transformer", "Normalize"):
            raise ModelError(f"The encoder {place} has a part {kind} of sentence-transformers, which is not supported; "
                             "give an encoder of Transformer, Pooling and Normalize alone.")  # fmt: skip
    lengths = _read(place, "sentence_bert_config.json", local)
    longest = lengths.get("max_seq_length") if isinstance(lengths, Mapping) else None
    settings = _read(place, "config_sentence_transformers.json", local)
    prompts = settings.get("prompts") if isinstance(settings, Mapping) else None
    prompts = prompts if isinstance(prompts, Mapping) else {}
    prefixes = {
        use: next((str(prompts[name]) for name in names if prompts.get(name)), "")
        for use, names in (("query", _QUERY), ("document", _DOCUMENT))
    }
    return Declared(said, longest if isinstance(longest, int) and longest > 0 else None, prefixes)


def _pooling_of(place: str, config: Any) -> str:
    config = config if isinstance(config, Mapping) else {}
    named = config.get("pooling_mode")
    if named is None:
        on = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
        found = [_FLAGS.get(name) for name in on]
    else:
        found = [_NAMES.get(name) for name in ([named] if isinstance(named, str) else named)]
    if len(found) != 1 or found[0] is None or config.get("include_prompt") is False:
        raise ModelError(
            f'The encoder {place} pools in a way that is not supported; set pooling to "mean", "cls" or "last" to use '
            "it all the same."
        )
    return found[0]


def _read(place: str, name: str, local: bool) -> Any:
    """The content of a JSON file of a model; None if it has none."""
    try:
        if local:
            found: Path | str | None = Path(place) / name
        else:
            found = cached_file(place, name, _raise_exceptions_for_missing_entries=False)
        return json.loads(Path(found).read_text(encoding="utf-8")) if found and Path(found).is_file() else None
    except (OSError, ValueError) as error:
        told = " ".join(str(error).split())[:200]
        raise ModelError(f"{name} of the encoder {place} cannot be read: {told}") from error
