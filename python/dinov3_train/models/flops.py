"""Parameters and floating-point operations, counted from the sections of a config: nothing is built or run.

Counted are matrix products, convolution and attention, a multiplication and an addition as two, as
`torch.utils.flop_counter` does. Norms, GELU, softmax and the rest are left out (about 1 % at width 1024).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from dinov3_train.config import Backbone, ConvNeXtBackbone, Crops, Head, Masking
from dinov3_train.models.layers import hidden_width

CropGroup = tuple[int, int, int]  # sequences, image height Y, image width X


def backbone_parameters(backbone: Backbone | ConvNeXtBackbone) -> int:
    """Parameters of the backbone, mask token and (if there is one) local CLS norm included."""
    if isinstance(backbone, ConvNeXtBackbone):
        dims = backbone.dims
        between = sum(2 * dim + 4 * dim * wider + wider for dim, wider in itertools.pairwise(dims))
        return (
            51 * dims[0] + between + sum(n * (8 * d**2 + 58 * d) for n, d in zip(backbone.depths, dims)) + 2 * dims[-1]
        )
    dim, hidden = backbone.embed_dim, hidden_width(backbone)
    embed = 3 * backbone.patch_size**2 * dim + dim + (2 + backbone.registers) * dim
    attention = 4 * dim**2 + dim + (3 * dim if backbone.qkv_bias else 0)
    products = 2 if backbone.ffn == "mlp" else 3
    ffn = products * dim * hidden + (products - 1) * hidden + dim
    norms = (2 if backbone.untie_local_cls_norm else 1) * 2 * dim
    return embed + backbone.depth * (attention + ffn + 6 * dim) + norms


def head_parameters(dim: int, head: Head) -> int:
    """Parameters of a projection head on features of width `dim`."""
    widths = [dim, *[head.hidden] * (head.layers - 1), head.bottleneck]
    return sum((a + 1) * b for a, b in itertools.pairwise(widths)) + head.bottleneck * head.prototypes


def tokens_of(backbone: Backbone | ConvNeXtBackbone, group: CropGroup) -> tuple[int, int]:
    """(patches N, tokens T = 1 + R + N) of one sequence of a crop group."""
    patches = (group[1] // backbone.patch_size) * (group[2] // backbone.patch_size)
    return patches, 1 + (0 if isinstance(backbone, ConvNeXtBackbone) else backbone.registers) + patches


def backbone_flops(
    backbone: Backbone | ConvNeXtBackbone, groups: Sequence[CropGroup], *, backward: bool = False
) -> float:
    """FLOPs of the backbone on crop groups; with backward twice as much again, except for the gradient of the images.

    Per block and sequence: 2 T (4 D^2 + (2 or 3) D F) + 4 T^2 D, times the share kept by drop path in training; of a
    ConvNeXt per block and image: 2 h w (49 C + 8 C^2).
    """
    if isinstance(backbone, ConvNeXtBackbone):
        return sum(_convnext_flops(backbone, group, backward) for group in groups)
    dim, passes = backbone.embed_dim, 3 if backward else 1
    share = 1.0 - backbone.drop_path if backward else 1.0
    weights = 4 * dim**2 + (2 if backbone.ffn == "mlp" else 3) * dim * hidden_width(backbone)
    total = 0.0
    for group in groups:
        patches, tokens = tokens_of(backbone, group)
        embed = 2 * patches * dim * 3 * backbone.patch_size**2
        block = 2 * tokens * weights + 4 * tokens**2 * dim
        total += group[0] * (embed * (2 if backward else 1) + passes * share * backbone.depth * block)
    return total


def stage_positions(backbone: ConvNeXtBackbone, group: CropGroup) -> list[int]:
    """Positions h w of the map of each stage, of one image of a crop group."""
    return [(group[1] // 2 ** (stage + 2)) * (group[2] // 2 ** (stage + 2)) for stage in range(len(backbone.dims))]


def _convnext_flops(backbone: ConvNeXtBackbone, group: CropGroup, backward: bool) -> float:
    passes, share = (3, 1.0 - backbone.drop_path) if backward else (1, 1.0)
    positions, dims = stage_positions(backbone, group), backbone.dims
    total = (2 if backward else 1) * 2.0 * positions[0] * 48 * dims[0]  # the images need no gradient
    total += passes * sum(2 * n * 4 * dim * wider for n, (dim, wider) in zip(positions[1:], itertools.pairwise(dims)))
    blocks = sum(depth * 2 * n * (49 * d + 8 * d**2) for depth, n, d in zip(backbone.depths, positions, dims))
    return group[0] * (total + passes * share * blocks)


def head_flops(dim: int, head: Head, rows: int, *, backward: bool = False) -> float:
    """FLOPs of a projection head on `rows` features, forward, or forward and backward."""
    widths = [dim, *[head.hidden] * (head.layers - 1), head.bottleneck, head.prototypes]
    return (3.0 if backward else 1.0) * 2 * rows * sum(a * b for a, b in itertools.pairwise(widths))


def masked_patches(masking: Masking, crops: int, patches: int) -> int:
    """Masked patches of so many global crops of N patches: int(N r_i) over evenly spaced ratios r_i."""
    masked = int(crops * masking.crop_probability)
    low, step = masking.ratio_min, (masking.ratio_max - masking.ratio_min) / max(masked, 1)
    return sum(int(patches * (low + step * (index + 1))) for index in range(masked))


def training_flops(
    backbone: Backbone | ConvNeXtBackbone, heads: tuple[Head, Head], crops: Crops, masking: Masking, *, images: int
) -> dict[str, float]:
    """FLOPs of one training step over `images` images, activation checkpointing and Gram products not included.

    Args:
        backbone, heads: student and teacher are alike; heads are DINO's and iBOT's.
        crops: global, local and Gram crops; a Gram crop runs through a third, frozen backbone.
        masking: how many patches the iBOT head sees.
        images: of the step.
    Returns:
        FLOPs by part: student, teacher, gram_teacher, heads (student's and teacher's), total.
    """
    wide = (crops.globals * images, crops.global_size, crops.global_size)
    local = (crops.locals * images, crops.local_size, crops.local_size)
    masked = masked_patches(masking, wide[0], tokens_of(backbone, wide)[0])
    dim, (dino, ibot) = backbone.embed_dim, heads
    parts = {
        "student": backbone_flops(backbone, [wide, local], backward=True),
        "teacher": backbone_flops(backbone, [wide]),
        "gram_teacher": 0.0,
        "heads": head_flops(dim, dino, wide[0] + local[0], backward=True) + head_flops(dim, dino, wide[0])
        + head_flops(dim, ibot, masked, backward=True) + head_flops(dim, ibot, masked),
    }  # fmt: skip
    if crops.gram_size is not None:
        parts["gram_teacher"] = backbone_flops(backbone, [(wide[0], crops.gram_size, crops.gram_size)])
    return parts | {"total": sum(parts.values())}
