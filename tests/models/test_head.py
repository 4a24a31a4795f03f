"""Log-probs and entropies from hidden states, against the softmax of the model's own logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rehearsal.models.head as head
from rehearsal.models.head import token_logprobs

FAMILIES = ["qwen3", "llama", "gemma3", "olmo2", "qwen3_moe", "gemma2", "granite", "cohere"]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, build_family: Callable[[str], Any]) -> Any:
    return build_family(request.param)


def inputs(n: int = 13) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 97, (n,), generator=generator), torch.randint(0, 97, (n,), generator=generator)


def expected(model: Any, ids: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logprobs = (model(input_ids=ids[None], use_cache=False).logits[0].float() / temperature).log_softmax(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def hidden_of(model: Any, ids: Tensor) -> Tensor:
    return model.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_log_probs_and_entropies_are_those_of_the_model(family: Any, temperature: float) -> None:
    ids, targets = inputs()
    with torch.no_grad():
        wanted, wanted_entropy = expected(family, ids, targets, temperature)
        logprobs, entropy = token_logprobs(
            family, hidden_of(family, ids), targets, temperature=temperature, entropy=True
        )
    assert logprobs.dtype == torch.float32
    assert entropy is not None
    torch.testing.assert_close(logprobs, wanted, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, wanted_entropy, atol=2e-5, rtol=1e-5)


def test_the_families_differ_in_what_they_do_to_logits(build_family: Callable[[str], Any]) -> None:
    """A control: the head alone, without caps and scales, would be wrong for three of the families."""
    ids, targets = inputs()
    for name, plain in [("llama", True), ("gemma2", False), ("granite", False), ("cohere", False)]:
        model = build_family(name)
        with torch.no_grad():
            raw = model.get_output_embeddings()(hidden_of(model, ids)).log_softmax(-1).gather(1, targets[:, None])[:, 0]
            wanted = expected(model, ids, targets, 1.0)[0]
        assert torch.allclose(raw, wanted, atol=1e-3) == plain, name


def test_gradients_are_those_of_the_model(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "_CHUNK_ENTRIES", 1)
    ids, targets = inputs(100)  # two chunks of at most 64
    weights = torch.randn(2, 100, generator=torch.Generator().manual_seed(1))

    def loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
        return (weights[0] * logprobs).sum() + (weights[1] * entropy).sum()

    loss(*expected(family, ids, targets, 0.8)).backward()
    wanted = {name: p.grad.clone() for name, p in family.named_parameters() if p.grad is not None}
    family.zero_grad(set_to_none=True)
    logprobs, entropy = token_logprobs(family, hidden_of(family, ids), targets, temperature=0.8, entropy=True)
    assert entropy is not None
    loss(logprobs, entropy).backward()
    for name, parameter in family.named_parameters():
        if parameter.grad is not None:
            scale = float(wanted[name].abs().max()) + 1e-6
            assert float((parameter.grad - wanted[name]).abs().max()) < 5e-5 * scale, name


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 200])
def test_chunks_change_nothing(n: int, build_family: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_family("qwen3")
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(n, 32, generator=generator, requires_grad=True)
    targets = torch.randint(0, 97, (n,), generator=generator)
    results = []
    for entries in (1 << 20, 1):
        monkeypatch.setattr(head, "_CHUNK_ENTRIES", entries)
        logprobs, entropy = token_logprobs(model, hidden, targets, entropy=True)
        assert entropy is not None
        assert logprobs.shape == entropy.shape == (n,)
        if n:
            (logprobs.sum() - 0.3 * entropy.sum()).backward()
            results.append((logprobs.detach(), entropy.detach(), hidden.grad.clone()))
            hidden.grad = None
    for first, second in zip(*results, strict=True) if n else ():
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wanted", ["both", "log-probs", "entropies"])
@pytest.mark.parametrize("warmth", ["one", "0.7", "each its own"])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_plain_head_is_what_autograd_makes_of_it(
    wanted: str, warmth: str, frozen: bool, build_family: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_CHUNK_ENTRIES", 1)
    model = build_family("llama")
    weight = model.get_output_embeddings().weight.requires_grad_(not frozen)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(100, 32, generator=generator, requires_grad=True)
    targets = torch.randint(0, 97, (100,), generator=generator)
    by_value, by_entropy = torch.randn(2, 100, generator=generator)
    temperature = {"one": 1.0, "0.7": 0.7, "each its own": 0.5 + torch.rand(100, generator=generator)}[warmth]
    leaves = [hidden] if frozen else [hidden, weight]
    found = []
    for plain in (True, False):
        if plain:
            assert head._plain_head(model, hidden) is weight
        else:
            monkeypatch.setattr(head, "_plain_head", lambda *_: None)
        logprobs, entropies = token_logprobs(
            model, hidden, targets, temperature=temperature, entropy=wanted != "log-probs"
        )
        terms = [] if wanted == "entropies" else [(by_value * logprobs).sum()]
        if wanted != "log-probs":
            assert entropies is not None
            terms.append((by_entropy * entropies).sum())
        found.append((logprobs.detach(), *torch.autograd.grad(torch.stack(terms).sum(), leaves)))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["granite", "cohere", "gemma2"])
def test_heads_that_do_more_are_left_to_autograd(name: str, build_family: Callable[[str], Any]) -> None:
    assert head._plain_head(build_family(name), torch.randn(3, 32)) is None


def test_a_head_with_a_hook_or_in_half_precision_is_left_to_autograd(build_family: Callable[[str], Any]) -> None:
    model, hidden = build_family("llama"), torch.randn(3, 32)
    assert head._plain_head(model, hidden) is not None
    with torch.autocast("cpu"):
        assert head._plain_head(model, hidden) is None
    assert head._plain_head(model, hidden.bfloat16()) is None
    model.get_output_embeddings().register_forward_hook(lambda *_: None)
    assert head._plain_head(model, hidden) is None


def test_the_backward_pass_keeps_no_logits(build_family: Callable[[str], Any]) -> None:
    """What stays for the backward pass is one hidden state a token, not a row of logits."""
    model = build_family("llama")
    hidden = torch.randn(256, 32, requires_grad=True)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_logprobs(model, hidden, torch.zeros(256, dtype=torch.long))
    assert sum(kept) < 256 * 97


def test_no_entropy_unless_asked_for(build_family: Callable[[str], Any]) -> None:
    model = build_family("llama")
    assert token_logprobs(model, torch.randn(3, 32), torch.tensor([1, 2, 3]))[1] is None


def test_extreme_logits_stay_finite(build_family: Callable[[str], Any]) -> None:
    model = build_family("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e4)
    hidden = torch.randn(4, 32, requires_grad=True)
    logprobs, entropy = token_logprobs(model, hidden, torch.tensor([1, 2, 3, 4]), entropy=True)
    assert entropy is not None
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.isfinite().all()
    assert entropy.isfinite().all()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
