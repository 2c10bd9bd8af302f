"""What every block needs in one step, prepared once on the host and moved to the device once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dinov3_train.config import Backbone
from dinov3_train.models.draws import TrainingDraws
from dinov3_train.models.layers import BlockInputs
from dinov3_train.models.rope import CropGroup, coordinate_rows, packed_layout, plain_table, table


def block_inputs(
    backbone: Backbone, groups: tuple[CropGroup, ...], draws: TrainingDraws | None, device: torch.device
) -> list[BlockInputs]:
    """Rotary table, layout and kept tokens of each block.

    Args:
        backbone: depth, registers, embed_dim, heads and rope are read.
        groups: crop groups in packed order.
        draws: of the step, or None for no augmentation and no drop path.
        device: where the tokens lie.

    Errors: ValueError when the draws were made for other crop groups.
    """
    ropes = _tables(backbone, groups, draws, device)
    prefix, own_rows = 1 + backbone.registers, draws is not None and draws.rope is not None and not draws.per_block
    if draws is None or draws.kept is None:
        layout = packed_layout(groups, prefix, own_rows, device)
        return [BlockInputs(rope=rope, layout=layout) for rope in ropes]
    sequences = sum(group.count for group in groups)
    if draws.kept.shape != (backbone.depth, 2, sequences):
        raise ValueError(
            f"draws: kept expects (depth, 2, sequences) = {(backbone.depth, 2, sequences)}, got {draws.kept.shape}"
        )
    full = packed_layout(groups, prefix, own_rows, torch.device("cpu"))
    attention = [full.select(np.flatnonzero(kept[0])) for kept in draws.kept]
    ffn = [full.select(np.flatnonzero(kept[1])) for kept in draws.kept]
    tokens = _moved([index for _, index in attention + ffn], device)
    gain = 1.0 / draws.keep_share
    return [
        BlockInputs(rope=rope, layout=layout.to(device), attention_tokens=kept, ffn_tokens=kept_ffn, gain=gain)
        for rope, (layout, _), kept, kept_ffn in zip(
            ropes, attention, tokens[: backbone.depth], tokens[backbone.depth :]
        )
    ]


def _tables(
    backbone: Backbone, groups: tuple[CropGroup, ...], draws: TrainingDraws | None, device: torch.device
) -> list[Tensor]:
    """One rotary table (rows, 2, E/4) per block; the same tensor for all blocks unless drawn per block."""
    head_width, base, depth = backbone.embed_dim // backbone.heads, backbone.rope.base, backbone.depth
    if draws is None or draws.rope is None:
        return [plain_table(tuple(group.grid for group in groups), head_width, base, device)] * depth
    for group, draw in zip(groups, draws.rope):
        expected = depth if draws.per_block else group.count
        if len(draw.scale) != expected:
            raise ValueError(f"draws: rope expects {expected} rows for a crop group, got {len(draw.scale)}")
    rows = [coordinate_rows(group.grid, draw, device) for group, draw in zip(groups, draws.rope)]  # (n, h + w) each
    if draws.per_block:
        return list(table(torch.cat(rows, dim=1), head_width, base))
    return [table(torch.cat([row.flatten() for row in rows]), head_width, base)] * depth


def _moved(parts: list[Tensor], device: torch.device) -> list[Tensor]:
    """Host tensors on the device, in one transfer."""
    if device.type == "cpu":
        return parts
    return list(torch.cat(parts).to(device, non_blocking=True).split([len(part) for part in parts]))
