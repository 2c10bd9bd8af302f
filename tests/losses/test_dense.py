"""The other dense regularisers: against loops and closed forms, with gradients to the student only."""

import math
from dataclasses import replace

import pytest
import torch
from loss_oracles import batch_of, cross_entropy, gradient, koleo, masks_of, outputs_of, sinkhorn, targets_of

from dinov3_ext import ALONE, sinkhorn_knopp
from dinov3_train.losses import DenseHeadLoss, FeatureDistillationLoss, PatchKoLeoLoss

EMPTY = torch.zeros(1, 1, 2), torch.zeros(0, 2)


def outputs(patches: torch.Tensor, **more):
    """patches (G, B, N, D)."""
    return replace(outputs_of(cls=patches[:, :, 0]), patches=patches, **more)


def batch(crops: int, images: int, patches: int):
    return batch_of(masks_of([[0] * images] * crops, patches))


def test_koleo_of_patches_is_koleo_inside_each_crop():
    torch.manual_seed(0)
    patches = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    (part,) = PatchKoLeoLoss(weight=0.3)(outputs(patches), targets_of(*EMPTY), batch(2, 3, 4), ALONE)
    assert (part.name, part.weight) == ("koleo_patches", 0.3)
    # one crop's patches as the images of a batch: (1, N, D) each; mean over images, summed over crops
    expected = sum(koleo(patches[g, b][None], 4) for g in range(2) for b in range(3)) / 3
    torch.testing.assert_close(part.value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(part.value, patches), gradient(expected, patches), rtol=1e-9, atol=1e-12)


def test_feature_distillation_is_one_minus_the_mean_cosine():
    torch.manual_seed(1)
    patches, teacher = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(1, 3, 4, 5)
    targets = replace(targets_of(*EMPTY), gram_patches=teacher)
    (part,) = FeatureDistillationLoss(weight=2.0)(outputs(patches), targets, batch(2, 3, 4), ALONE)
    cosines = [
        float(patches[0, b, n] @ teacher[0, b, n] / (patches[0, b, n].norm() * teacher[0, b, n].norm()))
        for b in range(3)
        for n in range(4)
    ]
    assert part.value.item() == pytest.approx(1 - sum(cosines) / 12, abs=1e-6)
    assert (gradient(part.value, patches)[0][1] == 0).all()  # the teacher saw the first crop only
    same = replace(targets_of(*EMPTY), gram_patches=3 * patches.detach())
    (part,) = FeatureDistillationLoss(weight=2.0)(outputs(patches), same, batch(2, 3, 4), ALONE)
    assert part.value.item() == pytest.approx(0.0, abs=1e-6)


def test_dense_head_is_the_cross_entropy_of_every_patch():
    torch.manual_seed(2)
    student, teacher = torch.randn(12, 7, requires_grad=True), torch.randn(12, 7)
    targets = targets_of(*EMPTY)
    potentials = sinkhorn_knopp(teacher, temperature=targets.temperature, iterations=3, collectives=ALONE)
    targets = replace(targets, dense_logits=teacher, dense_potentials=potentials)
    term = DenseHeadLoss(weight=0.5, student_temperature=0.1)
    (part,) = term(outputs(torch.randn(1, 3, 4, 5), dense_logits=student), targets, batch(1, 3, 4), ALONE)
    assignment = sinkhorn(teacher, targets.temperature)
    expected = sum(cross_entropy(row, target) for row, target in zip(student, assignment)) / 12
    assert part.name == "dense"
    torch.testing.assert_close(part.value, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient(part.value, student), gradient(expected, student), rtol=1e-3, atol=1e-5)
    assert math.isfinite(part.value.item())


def test_what_is_missing_is_named():
    patches = torch.randn(1, 2, 4, 5)
    with pytest.raises(ValueError, match="Gram teacher's patches of width 5, got none"):
        FeatureDistillationLoss(weight=1.0)(outputs(patches), targets_of(*EMPTY), batch(1, 2, 4), ALONE)
    wide = replace(targets_of(*EMPTY), gram_patches=torch.randn(1, 2, 4, 6))
    with pytest.raises(ValueError, match="width 5, got width 6"):
        FeatureDistillationLoss(weight=1.0)(outputs(patches), wide, batch(1, 2, 4), ALONE)
    with pytest.raises(ValueError, match="networks with a dense head, got none"):
        DenseHeadLoss(weight=1.0, student_temperature=0.1)(outputs(patches), targets_of(*EMPTY), batch(1, 2, 4), ALONE)
