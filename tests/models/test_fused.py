"""The fused decoder: the same numbers and gradients as the model's own code, and only where it may be used."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rehearsal.models.fused import FusedDecoder, _GatedUnit, _RMSNorm, _Rotation, fits
from rehearsal.models.packed import PackedPlan, Span, fused_decoder, packed_attention, packed_hidden


def _qwen2(**settings: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(2)
    config = Qwen2Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, **settings,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


@pytest.fixture(params=["qwen3", "llama", "qwen2", "qwen2_window"])
def model(request: pytest.FixtureRequest, build_family: Callable[[str], Any]) -> Any:
    if request.param == "qwen2":
        return _qwen2()
    if request.param == "qwen2_window":
        return _qwen2(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    return build_family(request.param)


def _run(forward: Callable[..., Any], model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    plan = PackedPlan([Span(0, 9), Span(9, 13), Span(13, 20, ((0, 5),))], 20)
    ids = torch.randint(0, 97, (20,), generator=torch.Generator().manual_seed(0))
    weights = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    model.zero_grad(set_to_none=True)
    with packed_attention(model):
        hidden = forward(ids, torch.from_numpy(plan.positions_T), plan)
        (hidden * weights).sum().backward()
    return hidden.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_hidden_states_and_gradients_are_the_models_own(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "norm" in name:
            # All ones would hide a norm's weight in the wrong place.
            nn.init.uniform_(parameter, 0.5, 1.5)
    assert fits(model)
    fused, fused_gradients = _run(FusedDecoder(model), model)
    decoder = model.get_decoder()

    def own(ids: Any, positions: Any, plan: Any) -> Any:
        return decoder(input_ids=ids[None], position_ids=positions[None], use_cache=False, packing=plan)[0][0]

    plain, plain_gradients = _run(own, model)
    assert torch.allclose(fused, plain, atol=1e-5, rtol=1e-5)
    assert set(fused_gradients) == set(plain_gradients)
    for name, gradient in plain_gradients.items():
        assert torch.allclose(fused_gradients[name], gradient, atol=1e-5 * float(gradient.abs().max()) + 1e-7), name


def test_some_rows_are_those_of_all_with_their_gradients(model: Any) -> None:
    rows = torch.tensor([19, 3, 3, 0, 7])
    plan = PackedPlan([Span(0, 12), Span(12, 20)], 20)
    ids = torch.randint(0, 97, (20,), generator=torch.Generator().manual_seed(0))
    positions = torch.from_numpy(plan.positions_T)
    weights = torch.randn(len(rows), 32, generator=torch.Generator().manual_seed(1))
    found = []
    for wanted in (None, rows):
        model.zero_grad(set_to_none=True)
        with packed_attention(model):
            hidden = packed_hidden(model, ids, positions, plan, wanted)
            chosen = hidden[rows] if wanted is None else hidden
            (chosen * weights).sum().backward()
        found.append([chosen.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    for all_rows, some_rows in zip(*found, strict=True):
        assert torch.allclose(some_rows, all_rows, atol=1e-5 * float(all_rows.abs().max()) + 1e-7)


def test_without_gradients_the_numbers_are_the_same(model: Any) -> None:
    plan = PackedPlan([Span(0, 6)], 6)
    ids, positions = torch.arange(6), torch.from_numpy(plan.positions_T)
    with packed_attention(model):
        wanted = packed_hidden(model, ids, positions, plan)
        with torch.inference_mode():
            assert torch.allclose(packed_hidden(model, ids, positions, plan), wanted, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 6), (5, 3, 6)])
def test_gradient_of_the_norm(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[1:], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: _RMSNorm.apply(a, b, 1e-3), (x, weight))


def test_gradient_of_the_rotation_and_of_the_gated_unit() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(4, 1, 3, dtype=torch.float64).repeat(1, 1, 2)
    assert torch.autograd.gradcheck(lambda a: _Rotation.apply(a, angles.cos(), angles.sin()), (x,))
    both = torch.randn(4, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_GatedUnit.apply, (both,))


def test_it_steps_aside_for_whatever_it_does_not_compute(build_family: Callable[[str], Any]) -> None:
    for family in ("gemma3", "olmo2", "qwen3_moe", "granite"):
        assert fused_decoder(build_family(family)) is None
    assert fused_decoder(build_family("qwen3").to(torch.bfloat16)) is None
    hooked = build_family("qwen3")
    handle = hooked.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert fused_decoder(hooked) is None
    handle.remove()
    assert fused_decoder(hooked) is not None
    hooked.model.layers[0].mlp.up_proj.forward = hooked.model.layers[0].mlp.up_proj.forward
    assert fused_decoder(hooked) is None
    dropping = build_family("llama")
    dropping.model.layers[1].self_attn.attention_dropout = 0.1
    assert fused_decoder(dropping) is None
    plain = build_family("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused_decoder(plain) is None
    plain.model.layers[0].gradient_checkpointing = True
    assert fused_decoder(plain) is not None
    assert fused_decoder(plain.train()) is None


def test_an_adapter_counts(build_family: Callable[[str], Any]) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build_family("qwen3"), LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    assert fused_decoder(model) is not None
    assert fused_decoder(model.merge_and_unload()) is not None
    other = get_peft_model(build_family("qwen3"), LoraConfig(target_modules=["v_proj"], use_dora=True))
    assert fused_decoder(other) is None


def test_it_is_what_the_shipped_model_runs_on() -> None:
    from rehearsal.models.load import base_folder, load_policy

    policy = load_policy(base_folder(), device="cpu")
    assert isinstance(fused_decoder(policy.model), FusedDecoder)
