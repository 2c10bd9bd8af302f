"""Collating, moving and normalising a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from dinov3_train.data.batch import Views, collate, normalize, patch_grid

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def crops(count: int, side: int, seed: int) -> list[torch.Tensor]:
    return list(
        torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    )


def batch(*, local: int = 3, gram: int = 0):
    views = [Views(crops(2, 16, 10 + b), crops(local, 8, 20 + b), crops(gram, 24, 30 + b)) for b in range(2)]
    masks = np.zeros((2, 2, 4), dtype=bool)
    masks[0, 1, :3], masks[1, 0, 2] = True, True
    indices = np.array([6, 7])
    return views, collate(views, masks, indices=indices, names=["a", "b"], skipped=["c: broken"])


def test_collate_is_crop_major():
    views, made = batch(gram=2)
    assert made.global_crops.shape == (2, 2, 3, 16, 16)
    assert made.local_crops.shape == (3, 2, 3, 8, 8)
    assert made.gram_crops.shape == (2, 2, 3, 24, 24)
    assert made.global_crops.is_contiguous()
    for image in range(2):
        for crop in range(2):
            assert torch.equal(made.global_crops[crop, image], views[image].global_crops[crop])
        assert torch.equal(made.local_crops[2, image], views[image].local_crops[2])
    assert made.mask_indices.tolist() == [4, 5, 6, 10]
    assert made.mask_indices.dtype == torch.int64
    assert torch.allclose(made.mask_weights, torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0]))
    assert made.mask_weights.dtype == torch.float32
    assert torch.equal(made.masks.flatten().nonzero().flatten(), made.mask_indices)
    assert made.indices.tolist() == [6, 7]
    assert made.names == ("a", "b")
    assert made.skipped == ("c: broken",)


def test_absent_crops_stay_absent_and_indices_stay_on_the_host():
    _, made = batch(local=0)
    moved = made.to("meta")
    assert made.local_crops is None
    assert made.gram_crops is None
    assert moved.local_crops is None
    assert moved.masks.device.type == "meta"
    assert moved.indices.device.type == "cpu"


def test_normalize_equals_torchvision():
    pixels = torch.stack(crops(4, 8, 0)).reshape(2, 2, 3, 8, 8)
    expected = functional.normalize(functional.to_dtype(pixels, torch.float32, scale=True), list(MEAN), list(STD))
    torch.testing.assert_close(normalize(pixels, MEAN, STD), expected, rtol=0, atol=1e-6)  # 2.6 at fp32: 4 spacings
    exact = (pixels.double() / 255 - torch.tensor(MEAN).double()[:, None, None]) / torch.tensor(STD).double()[
        :, None, None
    ]
    assert (normalize(pixels, MEAN, STD) - exact).abs().max() < 1e-6
    with pytest.raises(ValueError, match="must be uint8"):
        normalize(pixels.float(), MEAN, STD)


def test_sides_that_do_not_divide_name_the_nearest():
    assert patch_grid(224, 16, "crops.global_size") == 14
    with pytest.raises(ValueError, match=r"crops.global_size: .* patch size 16 \(nearest: 208 or 224\), got 220"):
        patch_grid(220, 16, "crops.global_size")
    with pytest.raises(ValueError, match=r"\(nearest: 16\), got 9"):
        patch_grid(9, 16, "crops.local_size")
