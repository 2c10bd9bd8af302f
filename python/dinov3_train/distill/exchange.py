"""The exchange between groups of ranks: each rank runs the teacher on its slice, each group trains on the whole batch.

Images and the teacher's bottlenecks are gathered over the world; a rank keeps its group's share of both. So the
teacher runs once per image, whatever the groups, and a student sees the batches it would see alone (spec 5.1).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dinov3_ext import Collectives

from ..data.batch import CropBatch
from .teacher import Bottlenecks


def exchanged(batch: CropBatch, found: Bottlenecks, world: Collectives, share: range) -> tuple[CropBatch, Bottlenecks]:
    """This rank's share of a micro-batch of all ranks.

    Args:
        batch: the rank's slice, B images, on the device; slices follow one another in rank order.
        found: the teacher's word on it.
        world: exchange between all ranks.
        share: positions in the micro-batch of all ranks, W B images, that this rank trains on.

    Names and skipped images stay those of the rank's own slice.
    """
    masks = _gathered(batch.masks.to(torch.uint8), world).bool()  # (G, W B, N)
    wanted = slice(share.start, share.stop)
    mine = masks[:, wanted]
    per_crop = mine.sum(-1, keepdim=True).clamp(min=1)  # (G, B', 1)
    shared = replace(
        batch,
        global_crops=_gathered(batch.global_crops, world)[:, wanted].contiguous(),
        local_crops=None if batch.local_crops is None else _gathered(batch.local_crops, world)[:, wanted].contiguous(),
        gram_crops=None,
        masks=mine,
        mask_indices=mine.flatten().nonzero().flatten(),
        mask_weights=(1.0 / per_crop.float()).expand(mine.shape)[mine],
        indices=world.all_gather(batch.indices.to(batch.masks.device))[wanted].cpu(),
    )
    ibot = _sampled(found.ibot, masks, mine, world, share)
    return shared, Bottlenecks(dino=_gathered(found.dino, world)[:, wanted].contiguous(), ibot=ibot)


def _gathered(crops: Tensor, world: Collectives) -> Tensor:
    """(G, B, ...) of each rank -> (G, W B, ...)."""
    return world.all_gather(crops.transpose(0, 1).contiguous()).transpose(0, 1)


def _sampled(rows: Tensor, masks: Tensor, mine: Tensor, world: Collectives, share: range) -> Tensor:
    """Rows (M', bottleneck) of the sampled patches of `share`, in the order of its own masks.

    rows: (M, bottleneck) of this rank's slice, M differing between ranks; masks: (G, W B, N) of all.
    """
    slices = masks.chunk(world.world_size, dim=1)
    counts = [int(part.sum()) for part in slices]
    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: len(rows)] = rows
    everyone = world.all_gather(padded)  # (W max M, bottleneck)
    places = torch.zeros(masks.shape, dtype=torch.int64, device=masks.device)
    for rank, (part, place) in enumerate(zip(slices, places.chunk(world.world_size, dim=1))):
        place[part] = rank * max(counts) + torch.arange(counts[rank], device=masks.device)
    return everyone[places[:, share.start : share.stop][mine]]
