"""Packed forward passes against one forward pass for each sequence, in values and in gradients."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rehearsal.errors import ModelError
from rehearsal.models import packed, packed_kernel
from rehearsal.models.packed import (
    IMPLEMENTATION,
    PackedPlan,
    Span,
    additive_mask,
    attention,
    causal_lm,
    logits_of,
    packed_attention,
    packed_hidden,
    verify_packing,
)

FAMILIES = ["qwen3", "llama", "gemma3", "olmo2", "qwen3_moe", "gemma2", "granite", "cohere"]
LENGTHS = (7, 1, 12, 12, 3)
"""Longer and shorter than the sliding window of 5, two alike, and one of a single token."""


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, build_family: Callable[[str], Any]) -> Any:
    return build_family(request.param)


@pytest.fixture(params=[192, 4], ids=["whole", "pieces"])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many queries go to the kernel at a time."""
    monkeypatch.setattr(packed, "_PIECE", request.param)
    return int(request.param)


def random_ids(n: int, seed: int) -> Tensor:
    return torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(seed))


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((actual - expected).abs().max() <= tolerance * (expected.abs().max() + 1e-6))


def packed_logits(model: Any, ids_T: Tensor, plan: PackedPlan) -> Tensor:
    with packed_attention(model):
        return logits_of(model, packed_hidden(model, ids_T, torch.from_numpy(plan.positions_T), plan))


def weighted(logits_TV: Tensor, seed: int) -> Tensor:
    """A number that depends on every logit in its own way, so no wrong gradient can hide in a sum."""
    weights = torch.randn(logits_TV.shape, generator=torch.Generator().manual_seed(seed))
    return (logits_TV.log_softmax(-1) * weights).sum()


def single_pass(model: Any, sequences: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    logits = [model(input_ids=ids[None], use_cache=False).logits[0] for ids in sequences]
    torch.stack([weighted(part, i) for i, part in enumerate(logits)]).sum().backward()
    return [part.detach() for part in logits], gradients(model)


@pytest.mark.usefixtures("piece")
def test_a_pack_equals_its_sequences(family: Any) -> None:
    sequences = [random_ids(n, i) for i, n in enumerate(LENGTHS)]
    expected, expected_gradients = single_pass(family, sequences)
    ends = np.cumsum(LENGTHS)
    plan = PackedPlan([Span(int(end - n), int(end)) for n, end in zip(LENGTHS, ends, strict=True)], int(ends[-1]))
    logits = packed_logits(family, torch.cat(sequences), plan).split(list(LENGTHS))
    for i, (actual, wanted) in enumerate(zip(logits, expected, strict=True)):
        assert close(actual.detach(), wanted), i
    torch.stack([weighted(part, i) for i, part in enumerate(logits)]).sum().backward()
    actual_gradients = gradients(family)
    assert set(actual_gradients) == set(expected_gradients)
    for name, wanted in expected_gradients.items():
        assert close(actual_gradients[name], wanted, 3e-5), name


@pytest.mark.usefixtures("piece")
def test_a_shared_prefix_equals_sequences_that_repeat_it(family: Any) -> None:
    """Two groups with a prompt each, one of them longer than the window, beside a sequence that shares nothing."""
    prompts, tails = [random_ids(9, 10), random_ids(3, 11)], [(4, 1, 6), (2, 8)]
    sequences, spans, parts, position = [], [], [], 0
    for g, (prompt, lengths) in enumerate(zip(prompts, tails, strict=True)):
        start = position
        spans.append(Span(start, start + len(prompt)))
        parts.append(prompt)
        position += len(prompt)
        for i, n in enumerate(lengths):
            tail = random_ids(n, 20 + 5 * g + i)
            sequences.append(torch.cat([prompt, tail]))
            spans.append(Span(position, position + n, ((start, start + len(prompt)),)))
            parts.append(tail)
            position += n
    alone = random_ids(6, 40)
    sequences.append(alone)
    spans.append(Span(position, position + len(alone)))
    parts.append(alone)
    plan = PackedPlan(spans, position + len(alone))

    def tails_of(logits: Sequence[Tensor]) -> list[Tensor]:
        return [logits[0][9:], logits[1][9:], logits[2][9:], logits[3][3:], logits[4][3:], logits[5]]

    expected = [family(input_ids=ids[None], use_cache=False).logits[0] for ids in sequences]
    torch.stack([weighted(part, i) for i, part in enumerate(tails_of(expected))]).sum().backward()
    expected_gradients = gradients(family)

    logits = packed_logits(family, torch.cat(parts), plan).split([len(part) for part in parts])
    owned = [logits[i] for i in (1, 2, 3, 5, 6, 7)]
    for i, (actual, wanted) in enumerate(zip(owned, tails_of(expected), strict=True)):
        assert close(actual.detach(), wanted.detach()), i
    # The prompt itself says the same as in any of its sequences.
    assert close(logits[0].detach(), expected[0][:9].detach())
    assert close(logits[4].detach(), expected[3][:3].detach())
    torch.stack([weighted(part, i) for i, part in enumerate(owned)]).sum().backward()
    for name, actual in gradients(family).items():
        assert close(actual, expected_gradients[name], 3e-5), name


def test_the_window_is_seen_by_the_packed_pass(build_family: Callable[[str], Any]) -> None:
    """A control for the tests above: without its windows a Gemma gives other logits on the same sequences."""
    model = build_family("gemma3")
    ids = random_ids(12, 3)
    plan = PackedPlan([Span(0, 12)], 12)
    with_windows = packed_logits(model, ids, plan).detach()
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    without = packed_logits(model, ids, plan).detach()
    assert close(with_windows[:5], without[:5])
    assert not close(with_windows[5:], without[5:], 1e-3)


def test_a_prefix_of_several_ranges(build_family: Callable[[str], Any]) -> None:
    """A tree: a prompt, a turn that two continue, and their ends."""
    model = build_family("qwen3")
    prompt, turn, ends = random_ids(5, 0), random_ids(4, 1), (random_ids(3, 2), random_ids(6, 3))
    spans = [Span(0, 5), Span(5, 9, ((0, 5),)), Span(9, 12, ((0, 5), (5, 9))), Span(12, 18, ((0, 5), (5, 9)))]
    logits = packed_logits(model, torch.cat([prompt, turn, *ends]), PackedPlan(spans, 18)).detach()
    for end, where in zip(ends, (slice(9, 12), slice(12, 18)), strict=True):
        whole = model(input_ids=torch.cat([prompt, turn, end])[None], use_cache=False).logits[0, 9:].detach()
        assert close(logits[where], whole)


@st.composite
def span_lists(draw: st.DrawFn) -> tuple[list[Span], int]:
    spans: list[Span] = []
    position = 0
    for _ in range(draw(st.integers(1, 6))):
        own = draw(st.integers(1, 9))
        earlier = draw(st.sampled_from([None, *spans]))
        prefix = () if earlier is None else (*earlier.prefix, (earlier.start, earlier.stop))
        spans.append(Span(position, position + own, prefix))
        position += own
    return draw(st.permutations(spans)), position


@settings(deadline=None, max_examples=60)
@given(
    case=span_lists(), window=st.sampled_from([None, 1, 4]), piece=st.sampled_from([192, 2]), seed=st.integers(0, 100)
)
def test_any_plan_attends_as_written_down(
    case: tuple[list[Span], int], window: int | None, piece: int, seed: int
) -> None:
    spans, n = case
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(n, heads, 4, generator=generator) for heads in (4, 2, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "_PIECE", piece)
        out = PackedPlan(spans, n).attend(0, query, key, value, 0.5, window, None)
    for span in spans:
        rows = [*(i for start, stop in span.prefix for i in range(start, stop)), *range(span.start, span.stop)]
        offset = len(rows) - (span.stop - span.start)
        for own, row in enumerate(range(span.start, span.stop)):
            here = offset + own
            seen = rows[max(0, here - window + 1) if window else 0 : here + 1]
            for head in range(4):
                weights = (key[seen, head // 2] @ query[row, head] * 0.5).softmax(-1)
                assert torch.allclose(out[row, head], weights @ value[seen, head // 2], atol=1e-5)


def heads_of(layout: str, n: int, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves, and queries, keys and values of 4 and 2 heads made of them: alone, or parts of one tensor."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    if layout == "joined":
        both = drawn(n, 8, 4)
        return [both], list(both.split((4, 2, 2), dim=1))
    if layout == "heads first":
        leaves = [drawn(heads, n, 4) for heads in (4, 2, 2)]
        return leaves, [leaf.transpose(0, 1) for leaf in leaves]
    leaves = [drawn(n, heads, 4) for heads in (4, 2, 2)]
    return leaves, leaves


@settings(deadline=None, max_examples=60)
@given(
    case=span_lists(), window=st.sampled_from([None, 1, 4]), piece=st.sampled_from([192, 2]), seed=st.integers(0, 100),
    layout=st.sampled_from(["apart", "joined", "heads first"]),
)  # fmt: skip
def test_the_kernel_has_the_gradient_of_the_plain_way(
    case: tuple[list[Span], int], window: int | None, piece: int, seed: int, layout: str
) -> None:
    """Without it autograd follows each gathering, each piece and each change of layout."""
    spans, n = case
    generator = torch.Generator().manual_seed(seed)
    leaves, heads = heads_of(layout, n, generator)
    weights = torch.randn(n, 4, 4, generator=generator, dtype=torch.float64)
    found = []
    for kernel in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packed, "_PIECE", piece)
            if kernel:
                assert packed.serves(*heads)
            else:
                patch.setattr(packed, "serves", lambda *_: False)
            out = PackedPlan(spans, n).attend(0, *heads, 0.5, window, None)
            with torch.no_grad():
                assert torch.allclose(PackedPlan(spans, n).attend(0, *heads, 0.5, window, None), out)
        found.append((out.detach(), *torch.autograd.grad((out * weights).sum(), leaves, retain_graph=True)))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


def test_one_token_alone_and_values_without_a_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 4, generator=generator) for heads in (4, 2, 2))
    query.requires_grad_()
    out = PackedPlan([Span(0, 1)], 1).attend(0, query, key, value, 0.5, None, None)
    torch.testing.assert_close(out, value.repeat_interleave(2, dim=1))
    (gradient,) = torch.autograd.grad(out.sum(), [query])
    assert torch.allclose(gradient, torch.zeros(()), atol=1e-6)


def test_an_old_pytorch_goes_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (torch.randn(5, heads, 4) for heads in (4, 2, 2))
    plan = PackedPlan([Span(0, 2), Span(2, 5)], 5)
    expected = plan.attend(0, query, key, value, 0.5, None, None)
    monkeypatch.setattr(packed_kernel, "_BACKWARD", None)
    assert not packed.serves(query, key, value)
    torch.testing.assert_close(plan.attend(0, query, key, value, 0.5, None, None), expected)


@settings(deadline=None, max_examples=60)
@given(case=span_lists())
def test_positions_count_from_the_first_token_of_the_prefix(case: tuple[list[Span], int]) -> None:
    spans, n = case
    positions = PackedPlan(spans, n).positions_T
    for span in spans:
        before = sum(stop - start for start, stop in span.prefix)
        assert positions[span.start : span.stop].tolist() == list(range(before, before + span.stop - span.start))


@pytest.mark.parametrize("spans", [[Span(0, 4)], [Span(0, 3), Span(2, 6), Span(6, 8)]], ids=["hole", "overlap"])
def test_spans_must_cover_every_token_once(spans: list[Span]) -> None:
    with pytest.raises(ValueError, match="each must be covered once"):
        PackedPlan(spans, 8)


def test_capped_scores(build_family: Callable[[str], Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 6, 2, 4, generator=generator) for _ in range(3))
    mask = torch.ones(1, 6, 6, dtype=torch.bool).tril()
    out = attention(query, key, value, additive_mask(mask, 1, torch.float32), 1.0, 2.0)
    scores = torch.einsum("nqhd,nkhd->nhqk", query, key)
    weights = (2.0 * torch.tanh(scores / 2.0)).masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    assert torch.allclose(out, torch.einsum("nhqk,nkhd->nqhd", weights, value), atol=1e-6)


# What cannot be packed


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_verified(name: str, build_family: Callable[[str], Any]) -> None:
    model = build_family(name).train()
    verify_packing(model)
    assert model.training


class _Mixed(nn.Module):
    """Adds the token before to each token, as a short convolution would, and then does what it wraps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden + 0.5 * torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1))


def test_a_model_that_mixes_tokens_outside_attention_is_refused(build_family: Callable[[str], Any]) -> None:
    model = build_family("llama")
    model.model.layers[0].mlp = _Mixed(model.model.layers[0].mlp)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM gives other logits on packed sequences .* use a decoder"):
        verify_packing(model)


def test_attention_sinks_are_refused(build_family: Callable[[str], Any]) -> None:
    with pytest.raises(ModelError, match=r"attention sinks are not supported yet; use another model"):
        verify_packing(build_family("gpt_oss"))


def test_dropout_in_attention_is_refused(build_family: Callable[[str], Any]) -> None:
    model = build_family("llama").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    plan = PackedPlan([Span(0, 4)], 4)
    with pytest.raises(ModelError, match="Attention dropout would make sampled and trained probabilities differ"):
        packed_logits(model, random_ids(4, 0), plan)


def test_a_model_with_attention_of_its_own_is_refused(build_family: Callable[[str], Any]) -> None:
    """Attention that never asks the library's interface sees the pack as one long text."""
    model = build_family("llama")

    def own(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return hidden_states.cumsum(dim=1), None

    for layer in model.model.layers:
        layer.self_attn.forward = own.__get__(layer.self_attn)
    with pytest.raises(ModelError, match="mixes tokens outside of attention"):
        verify_packing(model)


def test_arguments_that_get_lost_are_told(build_family: Callable[[str], Any]) -> None:
    model = build_family("llama")
    with packed_attention(model), pytest.raises(ModelError, match="drops the arguments that packed sequences need"):
        model(input_ids=random_ids(4, 0)[None])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, asyncio.CancelledError])
def test_the_attention_is_put_back_whatever_happens(
    error: type[BaseException], build_family: Callable[[str], Any]
) -> None:
    model = build_family("llama")
    before = model.config._attn_implementation
    assert before != IMPLEMENTATION
    with pytest.raises(error), packed_attention(model):
        assert model.config._attn_implementation == IMPLEMENTATION
        raise error
    assert model.config._attn_implementation == before
    ids = random_ids(5, 0)
    assert model(input_ids=ids[None]).logits.isfinite().all()


def test_blocks_may_be_nested_and_entered_by_several_threads(build_family: Callable[[str], Any]) -> None:
    model = build_family("llama")
    before = model.config._attn_implementation
    inside, leave = threading.Barrier(3), threading.Event()

    def enter() -> None:
        with packed_attention(model):
            inside.wait(20)
            leave.wait(20)

    threads = [threading.Thread(target=enter) for _ in range(2)]
    for thread in threads:
        thread.start()
    with packed_attention(model):
        inside.wait(20)
        with packed_attention(model):
            pass
        assert model.config._attn_implementation == IMPLEMENTATION
    # The threads are still in their blocks.
    assert model.config._attn_implementation == IMPLEMENTATION
    leave.set()
    for thread in threads:
        thread.join(20)
    assert model.config._attn_implementation == before


def test_adapters_are_part_of_a_packed_pass(build_family: Callable[[str], Any]) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build_family("qwen3"), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    sequences = [random_ids(6, 0), random_ids(4, 1)]
    with torch.no_grad():
        expected = torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in sequences])
        with model.disable_adapter():
            bare = torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids in sequences])
        actual = packed_logits(model, torch.cat(sequences), PackedPlan([Span(0, 6), Span(6, 10)], 10))
    assert close(actual, expected)
    assert not close(actual, bare, 1e-2)
    assert causal_lm(model).config.model_type == "qwen3"
