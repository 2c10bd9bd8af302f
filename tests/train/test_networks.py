"""The student's and the teacher's pass, the EMA."""

from dataclasses import replace

import pytest
import torch
from tiny_training import BACKBONE, PATCHES, STILL, batch, networks

from dinov3_ext import ALONE, assignment
from dinov3_train.data.batch import normalize
from dinov3_train.models.draws import training_draws
from dinov3_train.train.networks import teacher_of, update_teacher

SCALE = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def crops_of(record):
    local = None if record.local_crops is None else normalize(record.local_crops, *SCALE)
    return normalize(record.global_crops, *SCALE), local


def student_pass(student, record):
    global_crops, local_crops = crops_of(record)
    counts = (2, 0 if local_crops is None else len(local_crops))
    draws = training_draws(
        student.backbone.backbone,
        seed=0,
        step=0,
        indices=record.indices.numpy(),
        first=0,
        crops_per_image=counts,
        batch_size=len(record.indices),
    )
    return student(record, global_crops, local_crops, draws)


@pytest.mark.parametrize("local_crops", [3, 0])
def test_outputs_belong_to_their_crop_and_image(local_crops):
    """Each crop run alone gives the features and logits at its place: global crops first, crop-major."""
    student, record = networks(STILL), batch(range(4), batch_size=4, local_crops=local_crops)
    outputs = student_pass(student, record)
    assert outputs.dino_logits.shape == (2 + local_crops, 4, 24)
    global_crops, local_crops_ = crops_of(record)
    for crop in range(2 + local_crops):
        for image in range(4):
            is_local = crop >= 2
            pixels = local_crops_[crop - 2, image] if is_local else global_crops[crop, image]
            mask = None if is_local else record.masks[crop, image][None]
            alone = student.backbone.forward_packed([pixels[None]], masks=[mask], local=[is_local])[0]
            # one sequence against all packed: other matrix shapes, other summation order, values near 1
            close = {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(outputs.dino_logits[crop, image], student.dino_head(alone.cls)[0], **close)
            if not is_local:
                torch.testing.assert_close(outputs.cls[crop, image], alone.cls[0], **close)
                torch.testing.assert_close(outputs.patches[crop, image], alone.patches[0], **close)


def test_ibot_logits_are_those_of_the_masked_patches_in_their_order():
    student, record = networks(STILL), batch(range(4), batch_size=4)
    outputs = student_pass(student, record)
    assert len(outputs.ibot_logits) == record.masks.sum() == 16
    row = 0
    for crop in range(2):
        for image in range(4):
            for patch in range(PATCHES):
                if record.masks[crop, image, patch]:
                    alone = student.ibot_head(outputs.patches[crop, image, patch][None])[0]
                    torch.testing.assert_close(outputs.ibot_logits[row], alone, rtol=1e-4, atol=1e-5)
                    row += 1


def test_the_teacher_sees_whole_crops_and_its_targets_are_balanced():
    student, record = networks(), batch(range(4), batch_size=4)
    teacher = teacher_of(student)
    global_crops, _ = crops_of(record)
    settings = {"temperature": 0.07, "iterations": 3, "collectives": ALONE}
    targets = teacher.targets(record, global_crops, **settings)
    unmasked = teacher.targets(replace(record, masks=torch.zeros_like(record.masks)), global_crops, **settings)
    assert torch.equal(targets.dino_logits, unmasked.dino_logits)
    assert torch.equal(targets.ibot_logits, unmasked.ibot_logits)
    for logits, potentials in (
        (targets.dino_logits.flatten(0, 1), targets.dino_potentials),
        (targets.ibot_logits, targets.ibot_potentials),
    ):
        assert not logits.requires_grad
        rows = assignment(logits, potentials, temperature=0.07).sum(1)
        torch.testing.assert_close(rows, torch.ones_like(rows))  # each row of 24 sums to one in fp32


def test_the_teacher_is_a_frozen_copy_without_draws():
    student, record = networks(), batch(range(4), batch_size=4)
    teacher = teacher_of(student)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert {p.data_ptr() for p in teacher.parameters()}.isdisjoint(p.data_ptr() for p in student.parameters())
    global_crops, _ = crops_of(record)
    targets = [
        teacher.targets(record, global_crops, temperature=0.07, iterations=3, collectives=ALONE).dino_logits
        for _ in range(2)
    ]
    assert torch.equal(*targets)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.994, 1.0])
def test_ema(momentum):
    student = networks()
    teacher = teacher_of(student)
    for parameter in student.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    before = [parameter.clone() for parameter in teacher.parameters()]
    buffers = [buffer.clone() for buffer in teacher.buffers()]
    update_teacher(teacher, student, momentum=momentum)
    for new, old, source in zip(teacher.parameters(), before, student.parameters()):
        expected = momentum * old.double() + (1 - momentum) * source.double()
        torch.testing.assert_close(new.double(), expected, rtol=3e-7, atol=3e-7)  # two roundings of fp32 near 1
        if momentum in (0.0, 1.0):
            assert torch.equal(new, source if momentum == 0.0 else old)
    assert all(torch.equal(a, b) for a, b in zip(teacher.buffers(), buffers))


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_activation_checkpointing_changes_no_gradient(checkpointing):
    record, found = batch(range(4), batch_size=4), []
    for mode in ("none", checkpointing):
        student = networks(BACKBONE, checkpointing=mode)
        outputs = student_pass(student, record)
        (outputs.dino_logits.square().mean() + outputs.ibot_logits.square().mean() + outputs.cls.sum()).backward()
        found.append([parameter.grad for parameter in student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_every_parameter_gets_a_gradient_when_nothing_is_masked():
    """Ranks exchange every gradient: none may be missing on a rank whose images carry no mask."""
    student, record = networks(), batch(range(4), batch_size=4, masked=range(0))
    outputs = student_pass(student, record)
    (outputs.dino_logits.square().mean() + outputs.ibot_logits.sum()).backward()
    assert [name for name, parameter in student.named_parameters() if parameter.grad is None] == []
