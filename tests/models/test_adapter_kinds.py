"""Adapters of layers that are not plain linear ones, and folders that hold more than adapters can say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rehearsal.errors import ModelError
from rehearsal.models.adapters import (
    MERGED,
    POLICY,
    WORLD,
    AdapterSettings,
    active_adapters,
    adapter_names,
    adapter_parameters,
    add_adapters,
    base_digest,
    load_adapter,
    save_adapters,
)
from rehearsal.models.load import load_policy, save_policy

IDS = torch.arange(1, 13)


def stir(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in adapter_names(model):
            for parameter in adapter_parameters(model, name).values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS[None], use_cache=False).logits[0]


@pytest.fixture(params=["tiny_gpt2", "tiny_experts"])
def bare(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return request.getfixturevalue(request.param)


# Saving


@pytest.mark.parametrize("names", [(POLICY, WORLD), (POLICY,), ()])
def test_a_policy_of_any_kind_is_saved_with_its_adapters(
    names: tuple[str, ...], bare: Callable[..., Any], base_tokenizer: Any, tmp_path: Path
) -> None:
    model = stir(add_adapters(bare(len(base_tokenizer)), AdapterSettings(3, 5)))
    with active_adapters(model, names):
        save_policy(model, base_tokenizer, tmp_path)
        wanted = logits(model)
    found = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(logits(found), wanted, atol=1e-5)
    # And it can be trained on: nothing in it is made up.
    assert torch.allclose(logits(load_policy(tmp_path, device="cpu").model), wanted, atol=1e-5)
    assert torch.allclose(wanted, logits(bare(len(base_tokenizer))), atol=1e-3) == (not names)


def test_a_square_transposed_weight_is_not_taken_for_one_that_is_not(
    tiny_gpt2: Callable[..., Any], base_tokenizer: Any, tmp_path: Path
) -> None:
    model = stir(add_adapters(tiny_gpt2(len(base_tokenizer)), AdapterSettings(3, 0, targets=("attn.c_proj",))))
    save_policy(model, base_tokenizer, tmp_path)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(model), atol=1e-5)


def test_a_base_in_bfloat16_is_saved_with_adapters_in_float32(
    tiny_qwen3: Callable[..., Any], base_tokenizer: Any, tmp_path: Path
) -> None:
    model = stir(add_adapters(tiny_qwen3(len(base_tokenizer)).to(torch.bfloat16), AdapterSettings(3, 5)))
    exact = stir(add_adapters(tiny_qwen3(len(base_tokenizer)).to(torch.bfloat16).float(), AdapterSettings(3, 5)))
    assert {p.dtype for p in adapter_parameters(model, POLICY).values()} == {torch.float32}
    save_policy(model, base_tokenizer, tmp_path / "model")
    save_policy(exact, base_tokenizer, tmp_path / "exact")
    told, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "exact"))
    # Added up in the precision of the adapters, and rounded once.
    assert all(torch.equal(told[key], tensor.to(torch.bfloat16)) for key, tensor in wanted.items())


@pytest.mark.parametrize("ranks", [(3, 5), (4, 4)])
def test_adapters_of_any_kind_come_back_apart_and_as_one(
    ranks: tuple[int, int], bare: Callable[..., Any], tmp_path: Path
) -> None:
    model = stir(add_adapters(bare(), AdapterSettings(*ranks, alpha=7)))
    save_adapters(model, tmp_path)
    assert torch.allclose(logits(PeftModel.from_pretrained(bare(), tmp_path / MERGED)), logits(model), atol=1e-5)
    again = load_adapter(load_adapter(bare(), tmp_path / POLICY, POLICY), tmp_path / WORLD, WORLD)
    assert torch.equal(logits(again), logits(model))
    one = load_adapter(bare(), tmp_path / MERGED, POLICY)
    assert torch.allclose(logits(one), logits(model), atol=1e-5)


def test_ranks_that_differ_by_layer_are_merged(tiny_qwen3: Callable[..., Any], tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.1.*down_proj": 16}, task_type="CAUSAL_LM",
    )  # fmt: skip
    stir(get_peft_model(tiny_qwen3(), config, adapter_name=POLICY)).save_pretrained(tmp_path / "theirs")
    model = load_adapter(tiny_qwen3(), tmp_path / "theirs" / POLICY, POLICY)
    model.add_adapter(WORLD, LoraConfig(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter([POLICY, WORLD])
    stir(model)
    save_adapters(model, tmp_path)
    assert torch.allclose(logits(PeftModel.from_pretrained(tiny_qwen3(), tmp_path / MERGED)), logits(model), atol=1e-5)
    again = load_adapter(load_adapter(tiny_qwen3(), tmp_path / POLICY, POLICY), tmp_path / WORLD, WORLD)
    assert torch.equal(logits(again), logits(model))


# What is refused


@pytest.mark.parametrize(
    ("targets", "tied", "told"),
    [
        (("q_proj", "embed_tokens"), False, r"an adapter of model.embed_tokens \(Embedding\) cannot"),
        (("q_proj", "lm_head"), True, "lm_head shares its weight with another layer"),
    ],
)
def test_layers_that_could_not_be_multiplied_out_are_refused_at_once(
    targets: tuple[str, ...], tied: bool, told: str, tiny_qwen3: Callable[..., Any]
) -> None:
    model = tiny_qwen3(tie_word_embeddings=tied)
    wanted = logits(model)
    with pytest.raises(ModelError, match=rf"No adapter can be put into this model: {told}.*adapters.targets"):
        add_adapters(model, AdapterSettings(3, 5, targets=targets))
    # The model is as it was.
    assert not adapter_names(model) and all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model), wanted)
    assert adapter_names(add_adapters(model, AdapterSettings(3, 5))) == [POLICY, WORLD]


def test_a_head_of_its_own_may_have_one(tiny_qwen3: Callable[..., Any], base_tokenizer: Any, tmp_path: Path) -> None:
    base = tiny_qwen3(len(base_tokenizer), tie_word_embeddings=False)
    model = stir(add_adapters(base, AdapterSettings(3, 5, targets=("lm_head", "q_proj"))))
    save_policy(model, base_tokenizer, tmp_path)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(model), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, r"lora_bias"),
        ({"bias": "lora_only"}, "bias = lora_only"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
)
def test_adapters_that_are_more_than_factors_are_refused_for_what_they_are(
    settings: dict[str, Any], told: str, tiny_qwen3: Callable[..., Any], tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    theirs = get_peft_model(tiny_qwen3(tie_word_embeddings=False), config)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=told) as caught:
        load_adapter(tiny_qwen3(tie_word_embeddings=False), tmp_path, POLICY)
    assert "another base" not in str(caught.value)


def test_adapters_of_other_methods_and_of_embeddings_are_refused(
    tiny_qwen3: Callable[..., Any], tmp_path: Path
) -> None:
    from peft import IA3Config

    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(tiny_qwen3(), config).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="of the kind IA3"):
        load_adapter(tiny_qwen3(), tmp_path / "other", POLICY)
    both = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    get_peft_model(tiny_qwen3(), both).save_pretrained(tmp_path / "embeddings")
    model = tiny_qwen3()
    with pytest.raises(ModelError, match=r"cannot be used: .*embed_tokens"):
        load_adapter(model, tmp_path / "embeddings", POLICY)
    assert not adapter_names(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_a_folder_without_all_weights_is_refused(
    tiny_qwen3: Callable[..., Any], base_tokenizer: Any, tmp_path: Path
) -> None:
    save_policy(tiny_qwen3(len(base_tokenizer)), base_tokenizer, tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    state["model.layers.0.mlp.base_layer.weight"] = state.pop("model.layers.0.mlp.down_proj.weight")
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"incomplete: it lacks model.layers.0.mlp.down_proj.weight, which"):
        load_policy(tmp_path, device="cpu")
    del state["model.layers.0.mlp.up_proj.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"down_proj.weight and 1 more, which"):
        load_policy(tmp_path, device="cpu")


# Which base


def test_a_base_is_the_same_in_either_precision(tiny_qwen3: Callable[..., Any], tmp_path: Path) -> None:
    model = stir(add_adapters(tiny_qwen3(), AdapterSettings(3, 5)))
    save_adapters(model, tmp_path)
    assert base_digest(tiny_qwen3()) == base_digest(tiny_qwen3().to(torch.bfloat16)) != base_digest(tiny_qwen3(seed=1))
    for base in (tiny_qwen3(), tiny_qwen3().to(torch.bfloat16)):
        assert adapter_names(load_adapter(base, tmp_path / POLICY, POLICY)) == [POLICY]


def test_a_folder_that_tells_its_base_exactly_is_still_known(tiny_qwen3: Callable[..., Any], tmp_path: Path) -> None:
    import hashlib

    save_adapters(stir(add_adapters(tiny_qwen3(), AdapterSettings(3, 5))), tmp_path)
    # As folders were written before: the numbers as they are.
    digest = hashlib.blake2b(digest_size=12)
    for name, parameter in tiny_qwen3().named_parameters():
        some = parameter.detach().flatten()[:256].float().numpy()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + some.tobytes())
    (tmp_path / POLICY / "rehearsal_base.json").write_text(json.dumps({"base": digest.hexdigest()}))
    assert adapter_names(load_adapter(tiny_qwen3(), tmp_path / POLICY, POLICY)) == [POLICY]
    with pytest.raises(ModelError, match="another base"):
        load_adapter(tiny_qwen3(seed=1), tmp_path / POLICY, POLICY)
