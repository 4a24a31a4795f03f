"""Sequences into packs: nothing lost, nothing twice, and the same log-probs however they are packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rehearsal.models.head import token_logprobs
from rehearsal.models.packed import packed_attention, packed_hidden
from rehearsal.models.packing import Pack, PackItem, common_prefix, make_packs


@st.composite
def item_lists(draw: st.DrawFn) -> list[PackItem]:
    """Groups with prompts of 0 to 40 tokens and members that continue them; some members are the prompt alone."""
    items: list[PackItem] = []
    for group in range(draw(st.integers(0, 4))):
        rng = np.random.default_rng(draw(st.integers(0, 3)))
        prompt = rng.integers(0, 97, draw(st.sampled_from([0, 1, 15, 16, 17, 40])))
        for _ in range(draw(st.integers(1, 4))):
            tail = rng.integers(0, 97, draw(st.integers(0 if len(prompt) else 1, 30)))
            ids = np.concatenate([prompt, tail]).astype(np.int32)
            wanted = [i for i in range(1, len(ids)) if draw(st.integers(0, 3)) == 0] if len(ids) < 30 else []
            if len(ids) >= 30:
                wanted = sorted({int(i) for i in rng.integers(1, len(ids), 6)})
            items.append(PackItem(ids, np.array(wanted, dtype=np.int64), group))
    return items


def read_back(pack: Pack, items: list[PackItem]) -> list[tuple[int, list[int], int]]:
    """For each target of a pack: its item, the tokens that its source attends to, and the target's id."""
    owners = [number for number in pack.items for _ in items[number].targets]
    assert len(owners) == len(pack.targets_N) == len(pack.sources_N)
    seen = attended(pack)
    ids = pack.token_ids_T.tolist()
    return [
        (owner, [ids[i] for i in seen[source]], target)
        for owner, source, target in zip(owners, pack.sources_N.tolist(), pack.targets_N.tolist(), strict=True)
    ]


def attended(pack: Pack) -> list[list[int]]:
    """For each packed token, which tokens its plan lets it see, found out by asking attention itself."""
    n = pack.n_tokens
    identity = torch.eye(n)[:, None]
    flat = torch.zeros(n, 1, n)
    out_TT = pack.plan.attend(0, flat, flat, identity, 1.0, None, None)[:, 0]
    return [torch.nonzero(row > 0)[:, 0].tolist() for row in out_TT]


@settings(deadline=None, max_examples=80)
@given(items=item_lists(), budget=st.sampled_from([16, 40, 100, 4096]), share=st.booleans())
def test_every_target_once_with_its_whole_context(items: list[PackItem], budget: int, share: bool) -> None:
    packs = make_packs(items, budget, share_prefixes=share)
    # Every item once and in order, the ones without targets too.
    assert [number for pack in packs for number in pack.items] == list(range(len(items)))
    found = [entry for pack in packs for entry in read_back(pack, items)]
    expected = [
        (number, sorted(item.token_ids[:target].tolist()), int(item.token_ids[target]))
        for number, item in enumerate(items)
        for target in item.targets
    ]
    assert [(number, sorted(context), target) for number, context, target in found] == expected


@settings(deadline=None, max_examples=80)
@given(items=item_lists(), budget=st.sampled_from([16, 40, 100]), share=st.booleans())
def test_the_budget_is_kept(items: list[PackItem], budget: int, share: bool) -> None:
    for pack in make_packs(items, budget, share_prefixes=share):
        longest = max(len(items[number].token_ids) for number in pack.items)
        if len(pack.items) == 1:
            assert pack.n_tokens == longest
        else:
            assert pack.n_tokens <= budget
        whole = sum(len(items[number].token_ids) for number in pack.items)
        assert pack.n_tokens + pack.saved_tokens == whole
        if not share:
            assert pack.saved_tokens == 0


def test_packs_are_made_smaller_to_keep_all_workers_at_work() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(100, 400, size=90)
    items = [PackItem(rng.integers(0, 500, n).astype(np.int32), np.array([n - 1]), i) for i, n in enumerate(lengths)]
    for workers in (1, 2, 3, 4, 8):
        packs = make_packs(items, 4096, workers=workers)
        assert [number for pack in packs for number in pack.items] == list(range(len(items)))
        assert max(pack.n_tokens for pack in packs) <= 4096
        assert len(packs) % workers == 0
        # In rounds of as many as there are workers; each takes as long as its largest.
        slowest = sum(max(pack.n_tokens for pack in packs[i : i + workers]) for i in range(0, len(packs), workers))
        assert slowest <= 1.15 * sum(lengths) / workers
    # Too little to be worth a second worker.
    assert len(make_packs(items[:3], 4096, workers=8)) == 1


@settings(deadline=None, max_examples=80)
@given(items=item_lists(), share=st.booleans())
def test_positions_are_those_of_the_sequence(items: list[PackItem], share: bool) -> None:
    for pack in make_packs(items, 100, share_prefixes=share):
        wanted = [int(target) - 1 for number in pack.items for target in items[number].targets]
        assert pack.positions_T[pack.sources_N].tolist() == wanted


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("budget", [64, 4096])
def test_sharing_and_cutting_leave_log_probs_alone(
    family: str, budget: int, build_family: Callable[[str], Any]
) -> None:
    model = build_family(family)
    rng = np.random.default_rng(0)
    items = []
    for group, (n_prompt, members) in enumerate([(30, 4), (16, 3), (5, 2), (40, 1)]):
        prompt = rng.integers(0, 97, n_prompt)
        for member in range(members):
            ids = np.concatenate([prompt, rng.integers(0, 97, 3 + 7 * member)]).astype(np.int32)
            # Targets inside the shared part, at its border, and behind it.
            targets = sorted({1, n_prompt - 1, n_prompt, n_prompt + 1, len(ids) - 1})
            items.append(PackItem(ids, np.array(targets), group))

    def logprobs(packs: list[Pack]) -> torch.Tensor:
        parts = []
        with torch.no_grad(), packed_attention(model):
            for pack in packs:
                hidden = packed_hidden(model, pack.token_ids_T, pack.positions_T, pack.plan)
                parts.append(token_logprobs(model, hidden[pack.sources_N], pack.targets_N)[0])
        return torch.cat(parts)

    alone = []
    with torch.no_grad():
        for item in items:
            ids = torch.from_numpy(item.token_ids.astype(np.int64))
            log = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
            alone.append(log[item.targets - 1, ids[item.targets]])
    shared = make_packs(items, budget)
    assert sum(pack.saved_tokens for pack in shared) >= 30
    for packs in (shared, make_packs(items, budget, share_prefixes=False)):
        torch.testing.assert_close(logprobs(packs), torch.cat(alone), atol=2e-5, rtol=1e-5)


def test_the_budget_counts_what_is_really_shared() -> None:
    """Neighbours have more in common than the group, or less than is worth sharing."""
    stem, other = np.arange(40), np.arange(40) + 50
    ids = [np.append(stem, 1), np.append(stem, 2), np.append(other, 3), np.append(other, 4)]
    packs = make_packs([PackItem(row.astype(np.int32), np.array([40]), 0) for row in ids], 90)
    assert [pack.items for pack in packs] == [[0, 1], [2, 3]]
    short = [np.append(stem[:15], [60 + i] * 10).astype(np.int32) for i in range(2)]
    assert [pack.n_tokens for pack in make_packs([PackItem(row, np.array([20]), 0) for row in short], 40)] == [25, 25]


def test_what_a_group_shares_is_packed_once() -> None:
    prompt = np.arange(50)
    items = [PackItem(np.append(prompt, [60 + i, 70]).astype(np.int32), np.array([51]), 0) for i in range(4)]
    (pack,) = make_packs(items, 4096)
    assert pack.n_tokens == 50 + 4 * 2
    assert pack.saved_tokens == 3 * 50
    # As many fit into a pack as their own tokens allow, not as their whole lengths would.
    assert [pack.items for pack in make_packs(items, 58)] == [[0, 1, 2, 3]]
    assert [pack.items for pack in make_packs(items, 58, share_prefixes=False)] == [[0], [1], [2], [3]]


def test_groups_do_not_share_with_each_other() -> None:
    ids = np.arange(40, dtype=np.int32)
    items = [PackItem(ids, np.array([39]), group) for group in (0, 1)]
    (pack,) = make_packs(items, 4096)
    assert pack.n_tokens == 80


def test_identical_sequences_keep_a_token_of_their_own() -> None:
    ids = np.arange(40, dtype=np.int32)
    (pack,) = make_packs([PackItem(ids, np.array([39]), 0)] * 3, 4096)
    assert pack.n_tokens == 39 + 3
    assert pack.targets_N.tolist() == [39, 39, 39]


def test_a_sequence_longer_than_the_budget_has_a_pack_of_its_own() -> None:
    items = [PackItem(np.arange(n, dtype=np.int32), np.array([n - 1]), i) for i, n in enumerate((5, 100, 5, 5))]
    assert [pack.items for pack in make_packs(items, 16)] == [[0], [1], [2, 3]]


@given(sequences=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=4))
def test_the_common_prefix_is_the_longest(sequences: list[list[int]]) -> None:
    n = common_prefix([np.array(sequence) for sequence in sequences])
    assert len({tuple(sequence[:n]) for sequence in sequences}) == 1
    longer = {tuple(sequence[: n + 1]) for sequence in sequences}
    assert len(longer) > 1 or min(len(sequence) for sequence in sequences) == n
