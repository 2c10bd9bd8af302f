"""The frozen teacher: run once for all students, the word of an EMA teacher on the same crops, other grids resized."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dinov3_ext import ALONE
from dinov3_train.config import Backbone, ConvNeXtBackbone, Head
from dinov3_train.data.batch import CropBatch, normalize, resized
from dinov3_train.distill.teacher import FrozenTeacher, resized_patches
from dinov3_train.losses import DinoLoss, IbotLoss
from dinov3_train.models.architectures import backbone_of
from dinov3_train.models.heads import ProjectionHead
from dinov3_train.train.networks import Networks, teacher_of
from dinov3_train.train.optimizer import adamw
from dinov3_train.train.step import StepSettings, StepValues, TrainState, train_step

VIT = Backbone(name="test", embed_dim=32, depth=2, heads=2, patch_size=8, layer_scale=0.5)
CONVNEXT = ConvNeXtBackbone(name="test", depths=(1, 1), dims=(8, 16), patch_size=8, layer_scale=0.5)
HEAD = Head(hidden=16, bottleneck=8, prototypes=12)
ASKED = {"temperature": 0.07, "iterations": 3, "collectives": ALONE}


def networks(described, seed=0) -> Networks:
    torch.manual_seed(seed)
    width = described.embed_dim
    parts = backbone_of(described), ProjectionHead(width, HEAD), ProjectionHead(width, HEAD)
    built = Networks(*parts, checkpointing="none", hide_masked=False)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def batch(side: int = 32, patches: int = 16) -> CropBatch:
    generator = np.random.default_rng(0)
    masks = torch.zeros(2, 4, patches, dtype=torch.bool)
    masks[0, ::2, :5], masks[1, 1, 3:9] = True, True
    weights = 1.0 / masks.sum(-1, keepdim=True).clamp(min=1)
    return CropBatch(
        global_crops=torch.from_numpy(generator.integers(0, 256, (2, 4, 3, side, side), dtype=np.uint8)),
        local_crops=torch.from_numpy(generator.integers(0, 256, (2, 4, 3, 16, 16), dtype=np.uint8)),
        gram_crops=None,
        masks=masks,
        mask_indices=masks.flatten().nonzero().flatten(),
        mask_weights=weights.expand(masks.shape)[masks],
        indices=torch.arange(4),
        names=("a", "b", "c", "d"),
        skipped=(),
    )


def pixels(record: CropBatch) -> torch.Tensor:
    return normalize(record.global_crops, (0.5,) * 3, (0.25,) * 3)


def test_the_word_of_an_ema_teacher_on_the_same_crops():
    record, built = batch(), networks(VIT)
    wanted = teacher_of(built).targets(record, pixels(record), **ASKED)
    found = FrozenTeacher(built).targets(record, pixels(record), **ASKED)
    for name in ("dino_logits", "ibot_logits"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))
    assert torch.equal(found.ibot_potentials.columns, wanted.ibot_potentials.columns)


def test_many_students_one_pass_each_batch():
    record, built = batch(), networks(VIT)
    teacher, calls = FrozenTeacher(built), []
    built.backbone.register_forward_hook(lambda *_: calls.append(1))
    run = built.backbone.forward_packed
    built.backbone.forward_packed = lambda *a, **k: calls.append(1) or run(*a, **k)
    first = teacher.targets(record, pixels(record), **ASKED)
    assert teacher.targets(record.to("cpu"), pixels(record), **ASKED) is first  # another copy of the same batch
    other = teacher.targets(record, pixels(record), **(ASKED | {"temperature": 0.04}))
    assert other.temperature == 0.04
    assert len(calls) == 1
    teacher.targets(replace(record, indices=record.indices + 4), pixels(record), **ASKED)
    assert len(calls) == 2
    teacher.forget()
    teacher.targets(record, pixels(record), **ASKED)
    assert len(calls) == 3


def test_larger_crops_are_brought_to_the_grid_of_the_masks():
    record, built = batch(side=64), networks(VIT)
    crops = pixels(record)  # 8 x 8 patches, masks on 4 x 4
    found = FrozenTeacher(built).bottlenecks(record, crops)
    features = built.backbone.features(crops.flatten(0, 1)).patches.transpose(1, 2).unflatten(2, (8, 8))
    small = F.interpolate(features, size=(4, 4), mode="bicubic", antialias=False).flatten(2).transpose(1, 2)
    expected = built.ibot_head.bottleneck(small.flatten(0, 1)[record.mask_indices])
    # the same operations on the same numbers; one rounding of a unit vector's entry may differ
    torch.testing.assert_close(found.ibot, expected, rtol=0, atol=2.0**-22)
    constant = torch.ones(1, 64, 3)
    torch.testing.assert_close(resized_patches(constant, (8, 8), (4, 4)), torch.ones(1, 16, 3), rtol=0, atol=1e-6)


def step_of(described, teacher, record, *, size=None):
    """One `train_step` of a student of `described`; gives (state, report)."""
    student = networks(described, seed=1).train()
    optimizer = adamw(student, betas=(0.9, 0.99), layer_decay=1.0, patch_embed_multiplier=1.0)
    state = TrainState(student, teacher_of(student), optimizer, student)
    settings = StepSettings(
        terms=(DinoLoss(weight=1.0, student_temperature=0.1), IbotLoss(weight=1.0, student_temperature=0.1)),
        seed=0,
        batch_size=4,
        sinkhorn_iterations=3,
        clip=None,
        autocast=None,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        collectives=ALONE,
        max_skipped=1,
        teacher=teacher,
        student_size=size,
    )
    values = StepValues(
        learning_rate=1e-3,
        prototype_rate=1e-3,
        backbone_rate=1e-3,
        weight_decay=0.0,
        momentum=0.9,
        teacher_temperature=0.07,
    )
    return state, train_step(state, [record], values, settings)


@pytest.mark.parametrize("described", [VIT, CONVNEXT], ids=["vit", "convnext"])
def test_a_step_moves_the_student_towards_the_teacher_and_leaves_the_teacher(described):
    record, built = batch(), networks(VIT)
    before = {name: value.clone() for name, value in built.state_dict().items()}
    state, report = step_of(described, FrozenTeacher(built), record)
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())
    assert report.finite
    gradients = {name: p.grad for name, p in state.student.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    assert float(gradients["ibot_head.prototypes.weight"].abs().max()) > 0
    ema, student, start = state.teacher, state.student, networks(described, seed=1)
    name = "backbone.norm.weight"
    expected = 0.9 * start.state_dict()[name] + 0.1 * student.state_dict()[name]
    torch.testing.assert_close(ema.state_dict()[name], expected)


def test_a_student_of_the_teachers_own_weights_has_least_loss():
    """The loss is a cross-entropy against the teacher's assignments: its own weights beat other weights."""
    record, built = batch(), networks(VIT)
    own, other = networks(VIT), networks(VIT, seed=5)
    losses = []
    for student in (own, other):
        outputs = student.train()(record, pixels(record), None, None)
        targets = FrozenTeacher(built).targets(record, pixels(record), **ASKED)
        part = IbotLoss(weight=1.0, student_temperature=0.1)(outputs, targets, record, ALONE)[0]
        losses.append(float(part.value.detach()))
    assert losses[0] < losses[1]


def test_the_student_sees_its_crops_smaller_and_the_teacher_as_they_are():
    record = batch(side=64)
    seen = {}
    teacher = FrozenTeacher(networks(VIT))
    run = teacher.bottlenecks
    teacher.bottlenecks = lambda b, crops: seen.update(teacher=crops.shape[-1]) or run(b, crops)
    state, report = step_of(VIT, teacher, record, size=32)
    assert report.finite
    assert seen == {"teacher": 64}
    small = resized(pixels(record), 32)
    assert small.shape == (2, 4, 3, 32, 32)
    # a mean over 2 x 2 pixels of noise: antialiasing keeps the average and shrinks the spread
    assert float(small.std()) < 0.75 * float(pixels(record).std())
    assert state.step == 1
