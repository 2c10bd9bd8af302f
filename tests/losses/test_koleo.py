"""KoLeo against loops in float64: groups, crops, the epsilon, and the gradient through both ends."""

import math

import pytest
import torch
from loss_oracles import batch_of, gradient, koleo, masks_of, outputs_of, targets_of

from dinov3_ext import ALONE
from dinov3_train.losses import KoLeoLoss

EMPTY = torch.zeros(1, 1, 2), torch.zeros(0, 2)


def loss_of(cls: torch.Tensor, group: int | None = None) -> torch.Tensor:
    """cls (G, B, D)."""
    batch = batch_of(masks_of([[0] * cls.shape[1]] * cls.shape[0], 4))
    (part,) = KoLeoLoss(weight=0.1, group=group)(outputs_of(cls=cls), targets_of(*EMPTY), batch, ALONE)
    assert (part.name, part.weight) == ("koleo", 0.1)
    return part.value


@pytest.mark.parametrize(("crops", "images", "group"), [(2, 6, 6), (2, 6, 3), (1, 4, 2), (3, 4, 4)])
def test_koleo_is_the_loop_over_crops_groups_and_images(crops, images, group):
    torch.manual_seed(0)
    cls = torch.randn(crops, images, 5, dtype=torch.float64, requires_grad=True)
    found, expected = loss_of(cls, group), koleo(cls, group)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)  # both fp64
    torch.testing.assert_close(gradient(found, cls), gradient(expected, cls), rtol=1e-10, atol=1e-12)


def test_without_a_group_the_neighbour_is_any_image_of_the_batch():
    cls = torch.randn(2, 6, 5)
    assert torch.equal(loss_of(cls), loss_of(cls, 6))


def test_the_gradient_goes_through_a_point_and_its_neighbour():
    """0 and 1 are each other's neighbours, 2's neighbour is 1: so 1 moves for both, more than 0."""
    angles = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    cls = torch.stack((angles.cos(), angles.sin()), -1)[None].requires_grad_()
    (found,) = gradient(loss_of(cls), cls)
    d01, d12 = 2 * math.sin(0.15), 2 * math.sin(0.35)  # chords; d chord / d angle = cos(half the angle)
    along = (found[0] * torch.stack((-angles.sin(), angles.cos()), -1)).sum(-1)
    pull01, pull12 = math.cos(0.15) / d01, math.cos(0.35) / d12
    # the pair 0-1 counts twice (each is the other's neighbour), 2's term once; mean over three; 1e-7 for the epsilon
    expected = torch.tensor([2 * pull01, -2 * pull01 + pull12, -pull12], dtype=torch.float64) / 3
    torch.testing.assert_close(along, expected, rtol=1e-6, atol=0)


def test_duplicates_stay_finite():
    """||x - x + 1e-8|| = 1e-8 sqrt(D): the loss of a pair of copies, and no NaN in its gradient."""
    cls = torch.ones(1, 2, 4, requires_grad=True)
    loss = loss_of(cls)
    assert loss.item() == pytest.approx(-math.log(1e-8 * math.sqrt(4) + 1e-8), rel=1e-6)
    (found,) = gradient(loss, cls)
    assert found.isfinite().all()


def test_a_zero_feature_stays_finite():
    cls = torch.zeros(1, 2, 4, requires_grad=True)
    assert gradient(loss_of(cls), cls)[0].isfinite().all()


def test_fp32_of_near_duplicates():
    """Neighbours are found in fp64. Distances of 1e-3 come from fp32 unit vectors: 64 roundings near 1e-8 each make
    7e-8, 1e-4 of the distance at most."""
    torch.manual_seed(1)
    cls = torch.randn(1, 1, 64) + 1e-3 * torch.randn(2, 8, 64)
    torch.testing.assert_close(loss_of(cls).double(), koleo(cls.double(), 8), rtol=0, atol=1e-4)


def test_autocast_does_not_touch_it():
    """bf16 similarities would choose other neighbours."""
    torch.manual_seed(2)
    cls = torch.randn(2, 16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss_of(cls)
    assert inside.dtype is torch.float32
    assert torch.equal(inside, loss_of(cls))


@pytest.mark.parametrize(("images", "group"), [(1, None), (4, 1), (4, 3), (2, 4)])
def test_groups_that_cannot_be(images, group):
    with pytest.raises(ValueError, match=r"koleo: .* groups of at least 2 images that divide the batch of \d+, got"):
        loss_of(torch.randn(2, images, 4), group)
