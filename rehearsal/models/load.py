"""Loading and saving a policy: an ordinary Hugging Face folder, with its tokenizer and chat template."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rehearsal.errors import ModelError
from rehearsal.models.adapters import adapter_names
from rehearsal.models.chat import ChatRenderer
from rehearsal.models.lora import plain_buffers, plain_state
from rehearsal.models.packed import causal_lm, verify_packing

_HUB_SECONDS = 10.0


@dataclass
class Policy:
    """A model with all that is needed to talk to it.

    Attributes:
        model: a Hugging Face causal LM.
        tokenizer: its tokenizer, with a chat template.
        renderer: the chat format, token-exact.
        source: where it came from, for people.
    """

    model: Any
    tokenizer: Any
    renderer: ChatRenderer
    source: str

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in causal_lm(self.model).parameters())

    @property
    def device(self) -> torch.device:
        return next(causal_lm(self.model).parameters()).device


def base_folder() -> Path:
    """The folder of the base model that ships with the package."""
    return Path(str(resources.files("rehearsal") / "models" / "base"))


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" takes a GPU where there is one.

    Raises:
        ModelError: if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f'There is no device "{name}"; use "auto", "cpu" or "cuda".') from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError('This machine has no CUDA device that PyTorch can use; set model.device to "cpu".')
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError('This machine has no MPS device; set model.device to "cpu".')
    return device


def load_policy(
    path: str | Path = "base", *, device: str = "auto", dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    history: Literal["preserve", "refuse"] = "preserve", template_options: dict[str, Any] | None = None,
    gradient_checkpointing: bool = False,
) -> Policy:  # fmt: skip
    """Load a policy and check that it can be trained token-exactly.

    Args:
        path: "base" for the model that ships, a Hugging Face folder, or a hub name.
        device: see :func:`pick_device`.
        dtype: of the weights; "auto" is float32 on a processor and bfloat16 on a GPU.
        history: what to do with a chat template that rewrites earlier answers, see ``ChatRenderer``.
        template_options: variables for the chat template.
        gradient_checkpointing: compute activations twice to keep fewer of them.

    Raises:
        ModelError: with one sentence, if something is missing or does not fit.
    """
    folder = base_folder() if str(path) == "base" else Path(path)
    local = folder.exists() or str(path).startswith((".", "/", "~")) or str(path) == "base"
    if local and not (folder / "config.json").is_file():
        hint = f" Make it with `rehearsal base --output {folder}`." if str(path) == "base" else ""
        raise ModelError(f"{folder} is not a Hugging Face model folder: it has no config.json.{hint}")
    source = str(folder) if local else str(path)
    if not local:
        _look_for(source)
    where = pick_device(device)
    weights = {"auto": torch.float32 if where.type == "cpu" else torch.bfloat16}.get(dtype) or getattr(torch, dtype)
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(source)
            found: Any = AutoModelForCausalLM.from_pretrained(source, dtype=weights, output_loading_info=True)
            model, loaded = found
    except Exception as error:  # whatever a third-party loader raises is about this folder
        told = " ".join(str(error).split())[:300]
        if local and not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            raise ModelError(
                f"{folder} has no tokenizer; save it there with tokenizer.save_pretrained({str(folder)!r})."
            ) from error
        raise ModelError(f"The model {source} cannot be loaded: {told}") from error
    if local and not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ModelError(f"{folder} has no tokenizer; save it there with tokenizer.save_pretrained({str(folder)!r}).")
    if missing := sorted(loaded["missing_keys"]):
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"The model {source} is incomplete: it lacks {missing[0]}{others}, which would be made up at random; save "
            "it again, or load the model that it was made of."
        )
    text_config = model.config.get_text_config()
    if len(tokenizer) > text_config.vocab_size:
        raise ModelError(
            f"The tokenizer of {source} has {len(tokenizer)} tokens and the model only {text_config.vocab_size}; they "
            "do not belong together, or the model's embeddings were not resized."
        )
    _switch_dropout_off(model)
    torch.nn.Module.to(model, where)
    model.eval()
    if gradient_checkpointing:
        _compute_activations_again(model)
    stops = model.generation_config.eos_token_id if model.generation_config is not None else None
    stop_ids = [stops] if isinstance(stops, int) else list(stops or [])
    renderer = ChatRenderer(
        tokenizer, history=history, template_kwargs=template_options,
        extra_stop_ids=[i for i in stop_ids if 0 <= i < len(tokenizer)],
    )  # fmt: skip
    verify_packing(model)
    return Policy(model, tokenizer, renderer, "base" if str(path) == "base" else source)


def _look_for(name: str) -> None:
    """Ask once whether a hub has a model of this name. Where nobody answers the loaders ask again for a minute or more,
    and a name that is no model is more often a slip than a hub that comes back.

    Raises:
        ModelError: if there is none, or nobody answers.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_HUB_SECONDS)
    except GatedRepoError:
        return  # there is one, and the loader says how to be let in
    except (RepositoryNotFoundError, EntryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f'There is no model "{name}": it is no folder here, and the hub has none of that name; use "base", a '
            "folder that holds a model, or a hub name such as Qwen/Qwen3-0.6B."
        ) from error
    except HfHubHTTPError:
        return  # a server that is busy or wants a token: the loader knows what to do about it
    except Exception as error:  # whatever a third-party client raises where nobody answers
        raise ModelError(
            f'There is no folder "{name}" here, and the hub, where it could be a name, does not answer '
            f"({type(error).__name__}); use a folder that holds a model, or try again with a connection."
        ) from error


def _switch_dropout_off(model: Any) -> None:
    """Dropout would make the learner's probabilities differ from those that were sampled from."""
    names = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")
    # Attention keeps a copy of its own of what the configuration said when the model was made.
    for place in (model.config.get_text_config(), *model.modules()):
        for name in names:
            if isinstance(getattr(place, name, None), int | float):
                setattr(place, name, 0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def _compute_activations_again(model: Any) -> None:
    how = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.20 or so on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


def save_policy(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Write a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load.

    Of a model with adapters, the active ones are multiplied into its weights in the folder; the model stays as it is.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        if adapter_names(model):
            causal_lm(model).save_pretrained(folder, state_dict={**plain_state(model), **plain_buffers(model)})
        else:
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence progress bars and advice of the library inside the block; warnings of ours go another way."""
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled() if hasattr(hf_logging, "is_progress_bar_enabled") else True
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
