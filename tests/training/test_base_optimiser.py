"""The optimiser of the base: who is moved by what."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rehearsal.training.base_optimiser import BaseOptimiser


def a_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.embed = nn.Embedding(6, 4)
    model.wide, model.norm = nn.Linear(4, 8, bias=False), nn.LayerNorm(4)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def test_a_matrix_moves_at_the_same_pace_in_all_directions() -> None:
    """The root mean square of its first step is 0.2 of the rate, as that of AdamW about is, whatever the gradient."""
    model = a_model()
    model.wide.weight.grad[:, 0] *= 0.1
    before = model.wide.weight.detach().clone()
    BaseOptimiser(model, 0.0).step(0.01)
    moved = (model.wide.weight.detach() - before).double()
    values = torch.linalg.svdvals(moved)
    assert values.min() > 0.5 * values.max(), "orthogonal, as far as five iterations make it"
    assert float(moved.square().mean().sqrt()) == pytest.approx(0.2 * 0.01, rel=0.3)


def test_embeddings_and_vectors_move_as_adamw_moves_them() -> None:
    model, plain = a_model(), a_model()
    BaseOptimiser(model, 0.1).step(0.01)
    torch.optim.AdamW(plain.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0).step()
    for name in ("embed.weight", "norm.weight", "norm.bias"):
        torch.testing.assert_close(model.get_parameter(name), plain.get_parameter(name))
    assert not torch.allclose(model.wide.weight, plain.wide.weight)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_state_goes_on_where_it_was() -> None:
    def steps(interrupted: bool) -> dict[str, torch.Tensor]:
        model = a_model()
        optimiser = BaseOptimiser(model, 0.1)
        for number in range(4):
            torch.manual_seed(number)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimiser.step(0.01)
            if interrupted and number == 1:
                kept = optimiser.state_dict()
                optimiser = BaseOptimiser(model, 0.1)
                optimiser.load_state_dict(kept)
        return model.state_dict()

    whole, resumed = steps(False), steps(True)
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())
