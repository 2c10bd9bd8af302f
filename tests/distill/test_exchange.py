"""The exchange between groups: every rank's share is what it would have cut out of the whole batch itself."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from dinov3_ext import Collectives
from dinov3_train.data.batch import Views, collate
from dinov3_train.distill.exchange import exchanged
from dinov3_train.distill.teacher import Bottlenecks

IMAGES, PATCHES, WIDTH = 8, 6, 3


def whole(local_crops: int):
    """A batch whose every pixel, mask and bottleneck row is a function of its place in it; image 5 has no mask."""
    generator = np.random.default_rng(1)
    masks = generator.random((2, IMAGES, PATCHES)) < 0.4
    masks[:, 5] = False
    views = [
        Views(
            [torch.full((3, 4, 4), 10 * image + crop, dtype=torch.uint8) for crop in range(2)],
            [torch.full((3, 2, 2), 10 * image + crop, dtype=torch.uint8) for crop in range(local_crops)],
            [],
        )
        for image in range(IMAGES)
    ]
    names = [str(image) for image in range(IMAGES)]
    return collate(views, masks, indices=np.arange(100, 100 + IMAGES), names=names, skipped=())


def part(batch, images: slice):
    """Images of a batch, and the bottlenecks a teacher would give: rows that name crop, image and patch."""
    masks = batch.masks[:, images]
    crop, image, patch = masks.nonzero(as_tuple=True)
    ibot = torch.stack([crop, image + images.start, patch], dim=1).float()  # (M, 3)
    grid = torch.cartesian_prod(torch.arange(2), torch.arange(images.start, images.stop)).float()
    dino = torch.cat([grid, torch.zeros(len(grid), 1)], dim=1).unflatten(0, (2, -1))
    cut = replace(
        batch,
        global_crops=batch.global_crops[:, images],
        local_crops=None if batch.local_crops is None else batch.local_crops[:, images],
        masks=masks,
        mask_indices=masks.flatten().nonzero().flatten(),
        mask_weights=(1.0 / masks.sum(-1, keepdim=True).clamp(min=1).float()).expand(masks.shape)[masks],
        indices=batch.indices[images],
    )
    return cut, Bottlenecks(dino=dino, ibot=ibot)


class Threads:
    """Ranks that are threads of this process."""

    def __init__(self, count: int) -> None:
        self.count, self.parts, self.wait = count, [None] * count, threading.Barrier(count, timeout=30)

    def collectives(self, rank: int) -> Collectives:
        def all_gather(tensor: torch.Tensor) -> torch.Tensor:
            self.parts[rank] = tensor
            self.wait.wait()
            assert len({part.shape for part in self.parts}) == 1  # what a real gather demands
            gathered = torch.cat(self.parts)
            self.wait.wait()
            return gathered

        return Collectives(lambda tensor, op: tensor, all_gather, rank, self.count)


@pytest.mark.parametrize("local_crops", [0, 2])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (1, 2, 1), (4, 4)])
def test_a_share_is_a_slice_of_the_whole(sizes, local_crops):
    batch, ranks = whole(local_crops), sum(sizes)
    world, found, failed = Threads(ranks), [None] * ranks, []
    places = [(place, size) for size in sizes for place in range(size)]
    shares = [range(place * IMAGES // size, (place + 1) * IMAGES // size) for place, size in places]

    def rank_of(rank: int) -> None:
        try:
            mine, bottlenecks = part(batch, slice(rank * IMAGES // ranks, (rank + 1) * IMAGES // ranks))
            found[rank] = exchanged(mine, bottlenecks, world.collectives(rank), shares[rank])
        except BaseException as error:
            failed.append(error)
            world.wait.abort()

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for share, (got, bottlenecks) in zip(shares, found):
        wanted, expected = part(batch, slice(share.start, share.stop))
        for name in ("global_crops", "local_crops", "masks", "mask_indices", "mask_weights", "indices"):
            one, other = getattr(got, name), getattr(wanted, name)
            assert one is other is None or torch.equal(one, other), name
        assert torch.equal(bottlenecks.dino, expected.dino)
        assert torch.equal(bottlenecks.ibot, expected.ibot)
