"""The forward pass of a small decoder with as few operations as it takes.

A model of a million parameters spends most of its time between its matrix products: in norms that are written as six
operations, in rotations, in the calls of modules. Here the same sums are done in about a third of the operations, with
gradients written out by hand. It serves models of the Llama shape (Llama, Qwen2, Qwen3) that are narrow, in float32 and
on a processor; every other model runs as its own code says. Whether the two agree is checked for each model when it is
loaded (:func:`rehearsal.models.packed.verify_packing`).

Dimension suffixes: T packed tokens, W width of the model, H query heads, G key/value heads, D width of a head, I width
of the feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rehearsal.models.lora import full_bias, full_weight, is_plain_low_rank

_DECODERS = ("LlamaModel", "Qwen2Model", "Qwen3Model")


class _RMSNorm(torch.autograd.Function):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (Zhang and Sennrich, 2019)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _inverse_rms(x, eps)
        normed = x * scale
        ctx.save_for_backward(normed, weight, scale)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, weight, scale = ctx.saved_tensors
        product = grad * normed
        grad_weight = product.flatten(0, product.ndim - weight.ndim - 1).sum(0)
        along = torch.matmul(product, weight[:, None]) if weight.ndim == 1 else (product * weight).sum(-1, keepdim=True)
        grad_x = torch.mul(grad, weight).addcmul_(normed, along.div_(normed.shape[-1]), value=-1).mul_(scale)
        return grad_x, grad_weight, None


class _PlainRMSNorm(torch.autograd.Function):
    """``x / sqrt(mean(x^2) + eps)``: the weight is part of the matrix behind it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        scale = _inverse_rms(x, eps)
        normed = x * scale
        ctx.save_for_backward(normed, scale)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        normed, scale = ctx.saved_tensors
        along = (grad * normed).sum(-1, keepdim=True).div_(normed.shape[-1])
        return torch.addcmul(grad, normed, along, value=-1).mul_(scale), None


def _plainly_normed(x: Tensor, eps: float) -> Tensor:
    return x * _inverse_rms(x, eps)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(norm.new_full((), eps), norm, norm, value=1.0 / x.shape[-1]).rsqrt_()


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (x * _inverse_rms(x, eps)).mul_(weight)


class _Rotation(torch.autograd.Function):
    """Rotary positions of (T, H, D), with cosines and sines of (T, 1, D) whose two halves are the same."""

    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T1D, sin_T1D)
        return _rotated(x_THD, cos_T1D, sin_T1D)

    @staticmethod
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor, None, None]:
        # The inverse of a rotation is the rotation backwards.
        cos_T1D, sin_T1D = ctx.saved_tensors
        return _rotated(grad_THD, cos_T1D, sin_T1D, -1.0), None, None


def _rotated(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor, sign: float = 1.0) -> Tensor:
    half = x_THD.shape[-1] // 2
    out_THD = x_THD * cos_T1D
    out_THD[..., :half].addcmul_(x_THD[..., half:], sin_T1D[..., :half], value=-sign)
    out_THD[..., half:].addcmul_(x_THD[..., :half], sin_T1D[..., half:], value=sign)
    return out_THD


class _GatedUnit(torch.autograd.Function):
    """``silu(gate) * up`` of (T, 2I), gate first; the middle is computed again for the gradient."""

    @staticmethod
    def forward(ctx: Any, both_T2I: Tensor) -> Tensor:
        ctx.save_for_backward(both_T2I)
        return _gated(both_T2I)

    @staticmethod
    def backward(ctx: Any, grad_TI: Tensor) -> Tensor:
        (both_T2I,) = ctx.saved_tensors
        gate_TI, up_TI = both_T2I.chunk(2, dim=-1)
        out_T2I = torch.empty_like(both_T2I)
        to_gate_TI, to_up_TI = out_T2I.chunk(2, dim=-1)
        torch.mul(grad_TI, F.silu(gate_TI), out=to_up_TI)
        torch.mul(grad_TI, up_TI, out=to_gate_TI)
        torch.ops.aten.silu_backward.grad_input(to_gate_TI, gate_TI, grad_input=to_gate_TI)
        return out_T2I


def _gated(both_T2I: Tensor) -> Tensor:
    gate_TI, up_TI = both_T2I.chunk(2, dim=-1)
    return F.silu(gate_TI).mul_(up_TI)


@dataclass(frozen=True)
class _Layer:
    """The weights of the norms before attention and feed-forward are part of ``qkv`` and ``gate_up``."""

    qkv: Tensor
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    """(H + G, D)"""
    out: Tensor
    gate_up: Tensor
    down: Tensor
    scaling: float
    window: int | None


class FusedDecoder:
    """The decoder of a model, as it is at the moment: weights that belong together are joined.

    Joined weights are part of the graph where gradients are wanted. Without gradients they are copies, so an instance
    serves for as long as the weights stay what they are.

    Args:
        model: a Hugging Face causal LM for which :func:`fits` holds.
    """

    def __init__(self, model: Any) -> None:
        decoder = model.get_decoder()
        attention = decoder.layers[0].self_attn
        self._embedding = decoder.embed_tokens
        self._rotary = decoder.rotary_emb
        self._head_dim = attention.head_dim
        self._heads = attention.q_proj.out_features // self._head_dim
        self._kv_heads = attention.k_proj.out_features // self._head_dim
        self._norm, self._eps = decoder.norm.weight, decoder.norm.variance_epsilon
        self._layers = [self._layer(layer) for layer in decoder.layers]

    def _layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        biases = [full_bias(part) for part in parts]
        qk_norm = None
        if hasattr(attention, "q_norm"):
            queries, keys = attention.q_norm.weight, attention.k_norm.weight
            qk_norm = torch.cat([queries.expand(self._heads, -1), keys.expand(self._kv_heads, -1)])
        return _Layer(
            qkv=torch.cat([full_weight(part) for part in parts]) * layer.input_layernorm.weight,
            qkv_bias=None if biases[0] is None else torch.cat([bias for bias in biases if bias is not None]),
            qk_norm=qk_norm,
            out=full_weight(attention.o_proj).t(),
            gate_up=torch.cat([full_weight(mlp.gate_proj), full_weight(mlp.up_proj)])
            * layer.post_attention_layernorm.weight,
            down=full_weight(mlp.down_proj).t(),
            scaling=float(attention.scaling),
            window=getattr(attention, "sliding_window", None),
        )

    def __call__(
        self, token_ids_T: Tensor, positions_T: Tensor, plan: Any, rows_N: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """Last hidden states of packed tokens, (T, W), or of some of them, (N, W).

        Args:
            token_ids_T: int64.
            positions_T: int64, each token's place in its own sequence.
            plan: an :class:`rehearsal.models.packed.AttentionPlan`.
            rows_N: int64, the tokens whose hidden states are wanted; all if None. What comes after the attention of
                the last layer is computed for these alone.
        """
        H, G, D, eps = self._heads, self._kv_heads, self._head_dim, self._eps
        hidden_TW = F.embedding(token_ids_T, self._embedding.weight, self._embedding.padding_idx)
        cos_1TD, sin_1TD = self._rotary(hidden_TW[None], positions_T[None])
        cos_T1D, sin_T1D = cos_1TD[0, :, None], sin_1TD[0, :, None]
        T = len(token_ids_T)
        # Without gradients the functions themselves are called: a third of a small operation's time is autograd's.
        if torch.is_grad_enabled():
            norm, plain_norm = _RMSNorm.apply, _PlainRMSNorm.apply
            rotate, gated = _Rotation.apply, _GatedUnit.apply
        else:
            norm, plain_norm, rotate, gated = _normed, _plainly_normed, _rotated, _gated
        for index, layer in enumerate(self._layers):
            normed_TW = plain_norm(hidden_TW, eps)
            all_THD = F.linear(normed_TW, layer.qkv, layer.qkv_bias).view(T, H + 2 * G, D)
            # Parts of a split have one gradient in common; slices have one each, as large as the whole.
            qk_THD, value_TGD = all_THD.split((H + G, G), dim=1)
            if layer.qk_norm is not None:
                qk_THD = norm(qk_THD, layer.qk_norm, eps)
            qk_THD = rotate(qk_THD, cos_T1D, sin_T1D)
            query_THD, key_TGD = qk_THD.split((H, G), dim=1)
            mixed_THD = plan.attend(index, query_THD, key_TGD, value_TGD, layer.scaling, layer.window, None)
            if rows_N is not None and index == len(self._layers) - 1:
                hidden_TW, mixed_THD = hidden_TW.index_select(0, rows_N), mixed_THD.index_select(0, rows_N)
            hidden_TW = torch.addmm(hidden_TW, mixed_THD.flatten(1), layer.out)
            normed_TW = plain_norm(hidden_TW, eps)
            hidden_TW = torch.addmm(hidden_TW, gated(F.linear(normed_TW, layer.gate_up)), layer.down)
        return norm(hidden_TW, self._norm, eps)


def fits(model: Any) -> bool:
    """Whether :class:`FusedDecoder` computes what this model computes.

    The look is taken anew each time, because adapters and hooks may come at any moment.
    """
    decoder = model.get_decoder()
    if type(decoder).__name__ not in _DECODERS or torch.is_autocast_enabled("cpu"):
        return False
    if decoder.training and any(getattr(layer, "gradient_checkpointing", False) for layer in decoder.layers):
        return False
    config = decoder.config
    if any(layer.self_attn.attention_dropout for layer in decoder.layers):
        return False
    if getattr(config, "hidden_act", "") != "silu" or getattr(config, "mlp_bias", False):
        return False
    eps = decoder.norm.variance_epsilon
    return all(is_plain(module, eps) for module in _modules(decoder)) and all(
        full_bias(layer.self_attn.o_proj) is None and full_bias(layer.mlp.down_proj) is None for layer in decoder.layers
    )


def _modules(decoder: Any) -> Iterator[nn.Module]:
    yield from (decoder, decoder.embed_tokens, decoder.norm)
    for layer in decoder.layers:
        yield from (layer, layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm)
        yield from layer.self_attn.children()
        yield from layer.mlp.children()


def is_plain(module: Any, eps: float = 0.0) -> bool:
    """No hook, no adapter, no forward of its own, nothing but float32; of a norm also whether its eps is this one."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    if "forward" in module.__dict__:
        return False
    kind = type(module)
    if kind.__name__.endswith("RMSNorm"):
        return module.weight.dtype == torch.float32 and module.variance_epsilon == eps
    if kind in (nn.Linear, nn.Embedding):
        return module.weight.dtype == torch.float32
    # Adapters put classes of their own in the place of these.
    if is_plain_low_rank(module):
        return True
    return kind.__module__.startswith("transformers.")
