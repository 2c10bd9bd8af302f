"""Where CLS and registers look: the attention of a block, computed again from its queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinov3_ext.ops.rope_attention import rope_rotate


@torch.no_grad()
def prefix_attention(backbone: nn.Module, images: Tensor, *, block: int = -1) -> Tensor:
    """Attention of CLS and registers to every patch.

    a_hp,j = softmax over all tokens j of q_hp . k_hj / sqrt(E), keys of patches turned by their position; patches only

    Args:
        backbone: a vision transformer; on any device; its train or eval mode is as before afterwards.
        images: (S, 3, Y, X), normalised.
        block: number of the block, from 0, or from the end if negative.
    Returns:
        (S, 1 + R, H, h, w), fp32, CPU: shares that with those of the prefix tokens sum to 1.
    Errors: ValueError for a backbone without attention, or a block outside the depth.
    """
    blocks = getattr(backbone, "blocks", None)
    if blocks is None or not all(hasattr(entry, "attn") for entry in blocks):
        raise ValueError(f"prefix_attention: backbone expects attention blocks, got {type(backbone).__name__}")
    if not -len(blocks) <= block < len(blocks):
        raise ValueError(f"prefix_attention: block expects a number in [-{len(blocks)}, {len(blocks)}), got {block}")
    caught: list[Tensor] = []

    def catch(attention: nn.Module, inputs: tuple) -> None:
        tokens, rope, layout = inputs[:3]
        qkv = attention.qkv(tokens).view(-1, 3, attention.heads, attention.head_width).float()  # (tokens, 3, H, E)
        caught.append(rope_rotate(qkv, rope, layout))  # (tokens, 2, H, E)

    was_training = backbone.training
    backbone.eval()
    handle = blocks[block].attn.register_forward_pre_hook(catch)
    try:
        height, width = backbone.features(images).grid
    finally:
        handle.remove()
        backbone.train(was_training)
    prefix = 1 + backbone.registers
    query, key = caught[0].unflatten(0, (len(images), -1)).transpose(1, 3).unbind(2)  # (S, H, T, E) each
    logits = query[:, :, :prefix] @ key.mT * query.shape[-1] ** -0.5  # (S, H, 1 + R, T)
    shares = logits.softmax(dim=-1)[..., prefix:].transpose(1, 2)  # (S, 1 + R, H, N)
    return shares.unflatten(-1, (height, width)).cpu()
