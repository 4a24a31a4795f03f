"""Loading a policy: an ordinary folder, and one sentence for whatever is wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rehearsal.errors import ModelError
from rehearsal.models import load
from rehearsal.models.load import base_folder, load_policy, pick_device, save_policy


def change(folder: Path, file: str, **values: Any) -> None:
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | values))


@pytest.fixture
def folder(taught_folder: Path, tmp_path: Path) -> Path:
    """A copy of a good model folder, to be broken."""
    shutil.copytree(taught_folder, tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_is_loaded_as_it_is(taught_folder: Path) -> None:
    policy = load_policy(taught_folder, device="cpu")
    other = AutoModelForCausalLM.from_pretrained(taught_folder).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(policy.model(input_ids=ids).logits, other(input_ids=ids).logits)
    assert not policy.model.training
    assert policy.source == str(taught_folder)
    assert policy.n_parameters == sum(p.numel() for p in other.parameters())
    assert policy.device == torch.device("cpu")
    assert next(policy.model.parameters()).dtype == torch.float32
    assert policy.renderer.notes == []


def test_what_is_saved_can_be_loaded_by_anybody(taught_policy: Any, tmp_path: Path) -> None:
    save_policy(taught_policy.model, taught_policy.tokenizer, tmp_path / "new" / "folder")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "folder")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new" / "folder")
    for name, parameter in taught_policy.model.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    assert tokenizer.get_vocab() == taught_policy.tokenizer.get_vocab()
    assert tokenizer.chat_template == taught_policy.tokenizer.chat_template


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_type_of_the_weights(dtype: str, taught_folder: Path) -> None:
    policy = load_policy(taught_folder, device="cpu", dtype=dtype)  # type: ignore[arg-type]
    assert {parameter.dtype for parameter in policy.model.parameters()} == {getattr(torch, dtype)}


def test_dropout_is_switched_off(folder: Path) -> None:
    """Otherwise the learner's probabilities would not be those that were sampled from."""
    change(folder, "config.json", attention_dropout=0.3)
    policy = load_policy(folder, device="cpu")
    policy.model.train()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(policy.model(input_ids=ids).logits, policy.model(input_ids=ids).logits)
    assert {layer.self_attn.attention_dropout for layer in policy.model.model.layers} == {0.0}


def test_activations_can_be_computed_again(taught_folder: Path) -> None:
    policy = load_policy(taught_folder, device="cpu", gradient_checkpointing=True)
    assert policy.model.is_gradient_checkpointing
    assert not load_policy(taught_folder, device="cpu").model.is_gradient_checkpointing


def test_every_end_of_the_generation_config_ends_an_answer(folder: Path, base_tokenizer: Any) -> None:
    extra = base_tokenizer.convert_tokens_to_ids("<|endoftext|>")
    change(folder, "generation_config.json", eos_token_id=[base_tokenizer.eos_token_id, extra, 10**9])
    assert load_policy(folder, device="cpu").renderer.stop_token_ids == tuple(
        sorted({base_tokenizer.eos_token_id, extra})
    )


# What is wrong with a folder


def complaint(path: Path | str, **settings: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load_policy(path, **{"device": "cpu", **settings})
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    assert complaint(tmp_path / "nothing").endswith("is not a Hugging Face model folder: it has no config.json.")
    assert "no config.json" in complaint(tmp_path)
    assert "no config.json" in complaint("./no/such/folder")
    (tmp_path / "file").write_text("x")
    assert "no config.json" in complaint(tmp_path / "file")


def test_a_missing_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rehearsal.models.load.base_folder", lambda: tmp_path)
    assert "`rehearsal base" in complaint("base")
    assert base_folder() != tmp_path


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    assert complaint(folder) == f"{folder} has no tokenizer; save it there with tokenizer.save_pretrained('{folder}')."


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_damaged_files(file: str, folder: Path) -> None:
    (folder / file).write_bytes((folder / file).read_bytes()[:200])
    assert str(folder) in complaint(folder)


def test_missing_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert complaint(folder).startswith(f"The model {folder} cannot be loaded: ")


def test_a_tokenizer_that_is_too_large(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"extra{i}" for i in range(50)])
    tokenizer.save_pretrained(folder)
    assert "they do not belong together, or the model's embeddings were not resized" in complaint(folder)


def test_a_tokenizer_without_a_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    assert "has no chat template" in complaint(folder)


def test_a_model_that_cannot_be_packed(build_family: Callable[[str], Any], base_tokenizer: Any, tmp_path: Path) -> None:
    import transformers as hf

    config = hf.GPT2Config(
        vocab_size=len(base_tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64, resid_pdrop=0.1
    )
    save_policy(hf.GPT2LMHeadModel(config), base_tokenizer, tmp_path / "gpt2")
    # GPT-2 learns positions by heart and goes through the attention interface: it can be packed.
    assert load_policy(tmp_path / "gpt2", device="cpu").model.config.n_embd == 32
    state_space = hf.MambaConfig(vocab_size=len(base_tokenizer), hidden_size=32, num_hidden_layers=1, state_size=4)
    save_policy(hf.MambaForCausalLM(state_space), base_tokenizer, tmp_path / "mamba")
    assert "MambaForCausalLM" in complaint(tmp_path / "mamba")


# Devices


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ModelError, match='There is no device "abacus"'):
        pick_device("abacus")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(ModelError, match=r'no CUDA device that PyTorch can use; set model\.device to "cpu"'):
        pick_device("cuda")


# Names that are not folders


class Hub:
    """Stands for the hub: answers once, and counts how often it is asked."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.asked: list[str] = []

    def __call__(self, url: str, **_: Any) -> None:
        self.asked.append(url)
        if self.error is not None:
            raise self.error


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Exception | None], Hub]:
    import huggingface_hub

    def make(error: Exception | None) -> Hub:
        stand_in = Hub(error)
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", stand_in)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
        # Nothing behind the question may be reached in a test.
        monkeypatch.setattr(load.AutoTokenizer, "from_pretrained", lambda name: pytest.fail(f"{name} was asked for"))
        return stand_in

    return make


def answer(status: int) -> Any:
    import huggingface_hub.errors as errors

    kind = errors.RepositoryNotFoundError if status == 404 else errors.HfHubHTTPError
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConnectionError("no route"), "the hub, where it could be a name, does not answer (ConnectionError)"),
        (TimeoutError(), "the hub, where it could be a name, does not answer (TimeoutError)"),
        (answer(404), "the hub has none of that name"),
    ],
)
def test_a_name_that_nobody_knows_is_asked_for_once(
    error: Exception, told: str, hub: Callable[[Exception | None], Hub]
) -> None:
    asked = hub(error)
    with pytest.raises(ModelError) as raised:
        load_policy("no-such-model")
    assert told in str(raised.value)
    assert str(raised.value).count(". ") == 0
    assert len(asked.asked) == 1


@pytest.mark.parametrize("error", [None, answer(500)])
def test_where_there_may_be_one_the_loader_is_asked(
    error: Exception | None, hub: Callable[[Exception | None], Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(error)

    def loader(name: str) -> None:
        raise OSError(f"{name}: the loader was asked")

    monkeypatch.setattr(load.AutoTokenizer, "from_pretrained", loader)
    with pytest.raises(ModelError, match="the loader was asked"):
        load_policy("somebody/some-model")


def test_what_is_in_the_cache_needs_no_hub(
    hub: Callable[[Exception | None], Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = hub(ConnectionError())

    def loader(name: str) -> None:
        raise OSError("the loader was asked")

    monkeypatch.setattr(load.AutoTokenizer, "from_pretrained", loader)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    with pytest.raises(ModelError, match="the loader was asked"):
        load_policy("somebody/some-model")
    assert asked.asked == []
