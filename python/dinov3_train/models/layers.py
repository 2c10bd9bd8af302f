"""The modules of a transformer block: attention with masked K bias, LayerScale, both feed-forward kinds, drop path."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_ext.ops.rope_attention import Layout, rope_attention
from dinov3_train.config import Backbone

SWIGLU_ALIGNMENT = {"swiglu": 8, "swiglu64": 64}


@dataclass(frozen=True)
class BlockInputs:
    """What a block needs beside the tokens.

    rope: fp32 (rows, 2, E/4); layout: of the sequences attention runs on.
    attention_tokens, ffn_tokens: int64 (kept tokens,) of the sequences that keep the branch; None: all of them.
    gain: factor of a kept branch, 1 / (1 - drop path rate).
    """

    rope: Tensor
    layout: Layout
    attention_tokens: Tensor | None = None
    ffn_tokens: Tensor | None = None
    gain: float = 1.0


def hidden_width(backbone: Backbone) -> int:
    """Hidden width F of the feed-forward: int(D ratio), and two thirds of that rounded up for the gated kinds."""
    width = int(backbone.embed_dim * backbone.ffn_ratio)
    if backbone.ffn == "mlp":
        return width
    if backbone.ffn not in SWIGLU_ALIGNMENT:
        raise ValueError(f"backbone: ffn expects one of mlp, {', '.join(SWIGLU_ALIGNMENT)}, got {backbone.ffn!r}")
    alignment = SWIGLU_ALIGNMENT[backbone.ffn]
    return -(-(2 * width // 3) // alignment) * alignment


class LayerScale(nn.Module):
    """Gain per channel of a residual branch."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def after(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """gamma * linear(x): x (tokens, F) -> (tokens, D).

        While gradients are taken the gain goes into the weight, which is small beside the tokens: no product over the
        tokens and no branch kept for backward (2 of 24 D numbers per token and block, 5 % of a step on a CPU).
        """
        if not torch.is_grad_enabled():
            return linear(x) * self.gamma
        return F.linear(x, self.gamma[:, None] * linear.weight, self.gamma * linear.bias)


class Qkv(nn.Linear):
    """Linear D -> 3D whose K bias is multiplied by zero.

    Softmax does not see a K bias where nothing is rotated; rotated with the patches' positions it is seen, so masking
    it is part of the model, not a saving.
    """

    def __init__(self, dim: int, bias: bool, mask_k_bias: bool) -> None:
        super().__init__(dim, 3 * dim, bias=bias)
        mask = torch.ones(3 * dim)
        mask[dim : 2 * dim] = 0.0
        self.register_buffer("bias_mask", mask if bias and mask_k_bias else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias if self.bias_mask is None else self.bias * self.bias_mask
        return F.linear(x, self.weight, bias)


class Attention(nn.Module):
    """Self-attention inside each sequence of a packed token list, with rotary positions on patches."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        dim = backbone.embed_dim
        self.heads, self.head_width = backbone.heads, dim // backbone.heads
        self.qkv = Qkv(dim, backbone.qkv_bias, backbone.mask_k_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rope: Tensor, layout: Layout, scale: LayerScale) -> Tensor:
        """x (tokens, D) -> scale * proj(attention), (tokens, D)."""
        qkv = self.qkv(x).view(-1, 3, self.heads, self.head_width)  # (tokens, 3, H, E)
        if len(qkv) == 0:  # every sequence dropped: keep the graph, so that each parameter has a (zero) gradient
            return scale.after(self.proj, qkv[:, 2].flatten(1))
        return scale.after(self.proj, rope_attention(qkv, rope, layout, scale=self.head_width**-0.5).flatten(1))


class Mlp(nn.Module):
    """fc2(gelu(fc1 x)), exact GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, scale: LayerScale) -> Tensor:
        """x (tokens, D) -> scale * fc2, (tokens, D)."""
        return scale.after(self.fc2, F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden)
        self.w2 = nn.Linear(dim, hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, scale: LayerScale) -> Tensor:
        """x (tokens, D) -> scale * w3, (tokens, D)."""
        return scale.after(self.w3, F.silu(self.w1(x)) * self.w2(x))


class Block(nn.Module):
    """x + ls1 attn(norm1 x), then x + ls2 mlp(norm2 x); a branch may run on a share of the sequences only."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        dim, hidden = backbone.embed_dim, hidden_width(backbone)
        self.norm1 = nn.LayerNorm(dim, eps=backbone.norm_eps)
        self.attn = Attention(backbone)
        self.ls1 = LayerScale(dim, backbone.layer_scale)
        self.norm2 = nn.LayerNorm(dim, eps=backbone.norm_eps)
        self.mlp = Mlp(dim, hidden) if backbone.ffn == "mlp" else SwiGLU(dim, hidden)
        self.ls2 = LayerScale(dim, backbone.layer_scale)

    def forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        """x (tokens, D) -> (tokens, D)."""
        kept = _kept(x, inputs.attention_tokens)
        branch = self.attn(self.norm1(kept), inputs.rope, inputs.layout, self.ls1)
        x = _add(x, branch, inputs.attention_tokens, inputs.gain)
        kept = _kept(x, inputs.ffn_tokens)
        return _add(x, self.mlp(self.norm2(kept), self.ls2), inputs.ffn_tokens, inputs.gain)


def _kept(x: Tensor, tokens: Tensor | None) -> Tensor:
    return x if tokens is None else x.index_select(0, tokens)


def _add(x: Tensor, branch: Tensor, tokens: Tensor | None, gain: float) -> Tensor:
    if tokens is None:
        return x + branch
    return x.index_add(0, tokens, branch.to(x.dtype), alpha=gain)  # indices are unique: the order of sums is fixed
