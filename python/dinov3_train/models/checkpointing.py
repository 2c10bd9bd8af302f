"""Activation checkpointing of blocks: keep nothing, or keep what is dear to recompute."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

MODES = ("none", "selective", "full")

# matrix products and attention; everything else of a block (norms, GELU) is cheap to run twice
_KEPT = (
    "aten::mm",
    "aten::addmm",
    "aten::linear",
    "aten::bmm",
    "aten::_scaled_dot_product_",
    "dinov3_ext::rope_attention",
)


def checkpointed(block: nn.Module, x: Tensor, inputs: object, *, mode: str) -> Tensor:
    """block(x, inputs), keeping of its activations all ("none"), matrix products and attention, or the input only."""
    if mode not in MODES:
        raise ValueError(f"checkpointing: expected one of {', '.join(MODES)}, got {mode!r}")
    if mode == "none" or not torch.is_grad_enabled():
        return block(x, inputs)
    contexts = {"context_fn": functools.partial(create_selective_checkpoint_contexts, _policy)}
    # blocks draw nothing at random, so no generator state needs to be kept
    return checkpoint(
        block, x, inputs, use_reentrant=False, preserve_rng_state=False, **(contexts if mode == "selective" else {})
    )


def _policy(context: object, operator: object, *arguments: object, **options: object) -> CheckpointPolicy:
    keep = operator.name().startswith(_KEPT)
    if keep and operator.name() == "aten::addmm":  # bias, input, weight (fan in, fan out)
        keep = arguments[2].shape[0] <= arguments[2].shape[1]  # backward does not read the block's last product, F -> D
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
