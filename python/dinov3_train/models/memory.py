"""Memory of training, estimated from the sections of a config: what is held through a step, and the largest peak.

Weights, gradients and AdamW's two moments of the student and the EMA teacher's weights are fp32: 20 bytes per parameter
(a Gram teacher 4 more). Activations are what backward reads, per token and block, in numbers of `a` activation bytes
(2 under bf16 autocast) and 4 fp32 bytes:

    none       4 (2 D) + a (D + 3 D + 2 D + D + D + f)   residuals; norm1, qkv, rotated q k, attention, norm2, FFN
    selective  4 D + a (3 D + D + D + f')                the block's input; qkv, attention, proj, first FFN
    full       4 D                                       the block's input

    ConvNeXt   4 (2 C) + a (3 C + 8 C)                   residual, norm; depthwise, norm, product, GELU

f = 2 F for an MLP (before and after GELU), 4 F for SwiGLU; f' = F or 2 F. With checkpointing one block's full
activations are held on top while it is run again. Drop path keeps its share of a. The rest: the weights' copies in the
activation type, the token embeddings, heads and their logits, and the images. Not counted: allocator fragmentation,
CUDA's own context, communication buffers, and workspaces (about 10 % together; leave room).
"""

from __future__ import annotations

from dataclasses import dataclass

from dinov3_train.config import Backbone, ConvNeXtBackbone, Crops, Head, Masking
from dinov3_train.models.flops import (
    CropGroup,
    backbone_parameters,
    head_parameters,
    masked_patches,
    stage_positions,
    tokens_of,
)
from dinov3_train.models.layers import hidden_width

FP32 = 4  # bytes


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one rank: weights (student, its copies in the activation type), teachers, gradients, optimizer moments,
    activations of the backbone, heads (their activations and logits), images."""

    weights: int
    teachers: int
    gradients: int
    optimizer: int
    activations: int
    heads: int
    images: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(vars(self).values())


def training_memory(
    backbone: Backbone | ConvNeXtBackbone,
    heads: tuple[Head, Head],
    crops: Crops,
    *,
    images: int,
    checkpointing: str = "none",
    activation_bytes: int = 2,
    masking: Masking | None = None,
) -> TrainingMemory:
    """The estimate for one rank.

    Args:
        backbone, heads: student and teacher are alike; heads are DINO's and iBOT's.
        crops: global, local and Gram crops.
        images: per rank and micro-batch.
        checkpointing: "none" | "selective" | "full".
        activation_bytes: 2 under bf16 autocast, 4 in fp32.
        masking: how many patches the iBOT head sees; None: the defaults.
    """
    parameters = backbone_parameters(backbone) + sum(head_parameters(backbone.embed_dim, head) for head in heads)
    copies = parameters * activation_bytes if activation_bytes < FP32 else 0  # kept by autocast until the pass ends
    frozen = parameters + (backbone_parameters(backbone) if crops.gram_size is not None else 0)
    wide = (crops.globals * images, crops.global_size, crops.global_size)
    local = (crops.locals * images, crops.local_size, crops.local_size)
    tokens = sum(group[0] * tokens_of(backbone, group)[1] for group in (wide, local))
    masked = masked_patches(masking or Masking(), wide[0], tokens_of(backbone, wide)[0])
    rows = ((wide[0] + local[0], wide[0]), (masked, masked))  # student's and teacher's rows of each head
    gram = (wide[0], crops.gram_size or 0)
    pixels = sum(3 * group[0] * group[1] ** 2 for group in (wide, local, gram))
    return TrainingMemory(
        weights=FP32 * parameters + copies,
        teachers=FP32 * frozen,
        gradients=FP32 * parameters,
        optimizer=2 * FP32 * parameters,
        activations=_convnext_activations(backbone, (wide, local), checkpointing, activation_bytes)
        if isinstance(backbone, ConvNeXtBackbone)
        else backbone_activations(backbone, tokens, checkpointing, activation_bytes),
        heads=sum(_head(backbone, head, *each, activation_bytes) for head, each in zip(heads, rows)),
        images=(FP32 + activation_bytes) * pixels,
    )


def backbone_activations(backbone: Backbone, tokens: int, checkpointing: str, activation_bytes: int) -> int:
    """Bytes backward reads of the blocks and norms for so many packed tokens; see the module's table."""
    if checkpointing not in ("none", "selective", "full"):
        raise ValueError(f"checkpointing: expected one of none, selective, full, got {checkpointing!r}")
    dim, hidden, mlp = backbone.embed_dim, hidden_width(backbone), backbone.ffn == "mlp"
    share = activation_bytes * (1.0 - backbone.drop_path)
    whole = 2 * FP32 * dim + share * (8 * dim + (2 if mlp else 4) * hidden)
    kept = {
        "none": whole,
        "selective": FP32 * dim + share * (5 * dim + (1 if mlp else 2) * hidden),
        "full": float(FP32 * dim),
    }[checkpointing]
    again = 0.0 if checkpointing == "none" else whole
    ends = 3 * FP32 * dim  # token embeddings, the final norm's input and output
    return int(tokens * (backbone.depth * kept + again + ends))


def _convnext_activations(
    backbone: ConvNeXtBackbone, groups: tuple[CropGroup, ...], checkpointing: str, activation_bytes: int
) -> int:
    """Bytes backward reads of a ConvNeXt's blocks; checkpointed it is their input, selectively products too."""
    kept = {
        "none": 2 * FP32 + 11 * activation_bytes,
        "selective": FP32 + 5 * activation_bytes,
        "full": float(FP32),
    }[checkpointing]
    total = 0.0
    for group in groups:
        for depth, positions, dim in zip(backbone.depths, stage_positions(backbone, group), backbone.dims):
            total += group[0] * positions * dim * (depth * kept * (1.0 - backbone.drop_path) + 2 * FP32)
    return int(total)


def _head(backbone: Backbone | ConvNeXtBackbone, head: Head, student: int, teacher: int, activation_bytes: int) -> int:
    """Bytes of a head: student rows with what backward reads, the logits' gradient, and the teacher's logits."""
    mlp = backbone.embed_dim + 2 * (head.layers - 1) * head.hidden + head.bottleneck
    unit = 2 * FP32 * head.bottleneck + activation_bytes * head.bottleneck
    logits = activation_bytes * head.prototypes
    return student * (activation_bytes * mlp + unit + 2 * logits) + teacher * logits
