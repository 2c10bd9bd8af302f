"""The Gram teacher: what it sees, what it gives, how it is refreshed, and what a training step does with it."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_training import PATCH, STILL, VALUES, batch, gradients, settings, state

from dinov3_train.data.batch import normalize
from dinov3_train.losses import GramLoss
from dinov3_train.train.gram import GramTeacher, resized
from dinov3_train.train.step import train_step

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def with_gram_crops(record, side: int = 24):
    crops = F.interpolate(record.global_crops.flatten(0, 1).float(), size=(side, side), mode="nearest").to(torch.uint8)
    return replace(record, gram_crops=crops.unflatten(0, record.global_crops.shape[:2]))


def teacher_of_its_own(found, **settings) -> GramTeacher:
    backbone = copy.deepcopy(found.teacher.backbone)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return GramTeacher(backbone, MEAN, STD, **settings)


def gram_state(backbone=STILL):
    found = state(backbone)
    found.gram_teacher = teacher_of_its_own(found)
    return found


GRAM = (GramLoss(weight=2.0),)


def test_gram_crops_are_seen_at_their_own_side_and_resized():
    found, record = gram_state(), with_gram_crops(batch(range(2), batch_size=2))
    patches = found.gram_teacher.patches(record, PATCH)
    assert patches.shape == (2, 2, 16, 32)
    images = normalize(record.gram_crops.flatten(0, 1), MEAN, STD)
    features = found.gram_teacher.backbone.features(images)
    assert features.grid == (6, 6)
    maps = features.patches.mT.unflatten(2, (6, 6))
    wanted = F.interpolate(maps, size=(4, 4), mode="bicubic", align_corners=False, antialias=False)
    torch.testing.assert_close(patches, wanted.flatten(2).mT.unflatten(0, (2, 2)))


def test_without_gram_crops_it_sees_the_global_crops():
    found, record = gram_state(), batch(range(2), batch_size=2)
    wanted = found.gram_teacher.backbone.features(normalize(record.global_crops.flatten(0, 1), MEAN, STD)).patches
    torch.testing.assert_close(found.gram_teacher.patches(record, PATCH), wanted.unflatten(0, (2, 2)))


def test_fewer_crops_and_another_normalisation():
    found, record = gram_state(), batch(range(2), batch_size=2)
    whole = found.gram_teacher.patches(record, PATCH)
    found.gram_teacher.crops = 1
    torch.testing.assert_close(found.gram_teacher.patches(record, PATCH), whole[:1])
    found.gram_teacher.mean = (0.0, 0.0, 0.0)
    assert not torch.allclose(found.gram_teacher.patches(record, PATCH), whole[:1])


def test_resizing_keeps_a_constant_map_and_a_same_grid():
    features = torch.randn(2, 12, 5)
    assert torch.equal(resized(features, (3, 4), (3, 4)), features)
    constant = torch.ones(2, 36, 5) * torch.randn(2, 1, 5)
    torch.testing.assert_close(resized(constant, (6, 6), (4, 4)), constant[:, :16])


def test_refresh_copies_the_weights_once():
    found = gram_state()
    found.gram_teacher.refresh(found.teacher.backbone)
    theirs, mine = found.teacher.backbone.state_dict(), found.gram_teacher.backbone.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    with torch.no_grad():
        next(found.teacher.backbone.parameters()).add_(1.0)
    assert not torch.equal(*(next(each.backbone.parameters()) for each in (found.teacher, found.gram_teacher)))


def test_a_step_moves_the_student_towards_it_and_leaves_it_alone():
    """Gram alone: its loss falls, the teacher's weights keep their bits and have no gradient."""
    found, record = gram_state(), with_gram_crops(batch(range(4), batch_size=4))
    before = copy.deepcopy(found.gram_teacher.backbone.state_dict())
    weights = dict.fromkeys(("dino_global", "dino_local", "ibot", "koleo"), 0.0)
    values = replace(VALUES, learning_rate=3e-3, weight_decay=0.0, weights=weights)
    losses = [float(train_step(found, [record], values, settings(terms=GRAM)).losses["gram"]) for _ in range(25)]
    assert losses[-1] < 0.7 * losses[0]
    after = found.gram_teacher.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in found.gram_teacher.backbone.parameters())


def test_a_scheduled_weight_scales_loss_and_gradient():
    record, found = with_gram_crops(batch(range(4), batch_size=4)), {}
    for factor in (0.0, 0.5, 1.0):
        made = gram_state()
        report = train_step(made, [record], replace(VALUES, weights={"gram": factor}), settings(terms=GRAM))
        found[factor] = float(report.losses["loss"]), gradients(made)["backbone.blocks.0.attn.proj.weight"]
    total = found[1.0][0] - found[0.0][0]
    assert found[0.5][0] - found[0.0][0] == pytest.approx(total / 2, rel=1e-3)
    half = (found[0.0][1] + found[1.0][1]) / 2
    torch.testing.assert_close(found[0.5][1], half, rtol=0, atol=1e-5 * float(half.abs().max()))


def test_the_ema_is_copied_after_the_step_that_says_so():
    found, record = gram_state(), with_gram_crops(batch(range(4), batch_size=4))
    name = "blocks.0.attn.proj.weight"
    first = found.gram_teacher.backbone.state_dict()[name].clone()
    train_step(found, [record], VALUES, settings(terms=GRAM))
    assert torch.equal(found.gram_teacher.backbone.state_dict()[name], first)
    train_step(found, [record], replace(VALUES, refresh_gram=True), settings(terms=GRAM))
    assert torch.equal(found.gram_teacher.backbone.state_dict()[name], found.teacher.backbone.state_dict()[name])


def test_the_live_ema_as_gram_teacher():
    """At rate 0 the student is the EMA, still and unmasked: loss 0."""
    found, record = state(STILL), batch(range(4), batch_size=4, masked=range(0))
    found.teacher.backbone.load_state_dict(found.student.backbone.state_dict())
    found.gram_teacher = GramTeacher(found.teacher.backbone, MEAN, STD)
    report = train_step(found, [record], VALUES, settings(terms=GRAM))
    assert float(report.losses["gram"]) < 1e-9
