"""The Gram term: nothing to do for equal similarities, blind to rotations, a gradient for the student alone."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_ext import ALONE, Collectives, Potentials
from dinov3_train.losses import GramLoss, Outputs, Targets

EMPTY = torch.zeros(0)
TARGETS = Targets(EMPTY, Potentials(EMPTY, EMPTY), EMPTY, Potentials(EMPTY, EMPTY), 0.07)


def features(seed: int, *, crops: int = 2, images: int = 3, patches: int = 9, width: int = 16) -> Tensor:
    return torch.randn(crops, images, patches, width, generator=torch.Generator().manual_seed(seed))


def value(student: Tensor, teacher: Tensor | None, *, collectives: Collectives = ALONE, **settings) -> Tensor:
    outputs = Outputs(cls=EMPTY, patches=student, dino_logits=EMPTY, ibot_logits=EMPTY)
    targets = replace(TARGETS, gram_patches=teacher)
    (part,) = GramLoss(weight=2.0, **settings)(outputs, targets, None, collectives)
    assert (part.name, part.weight) == ("gram", 2.0)
    return part.value


def plain(student: Tensor, teacher: Tensor, clip: str) -> Tensor:
    """The mean over crops, images and patch pairs, in float64, spelled out."""
    found = []
    for x, y in zip(student.double().flatten(0, 1), teacher.double().flatten(0, 1)):
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        s, t = x @ x.T, y @ y.T
        s = s.clamp(min=0) if clip == "both" else s
        t = t.clamp(min=0) if clip in ("both", "teacher") else t
        found.append((s - t).square().mean())
    return torch.stack(found).mean()


@pytest.mark.parametrize("clip", ["none", "both", "teacher"])
def test_value_and_gradient_are_those_of_the_definition(clip):
    student, teacher = features(0).requires_grad_(), features(1)
    loss = value(student, teacher, clip=clip)
    (gradient,) = torch.autograd.grad(loss, student)
    exact = student.detach().double().requires_grad_()
    reference = plain(exact, teacher, clip)
    (wanted,) = torch.autograd.grad(reference, exact)
    torch.testing.assert_close(loss.double(), reference, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("clip", ["none", "both"])
@pytest.mark.parametrize("level", ["image", "batch"])
def test_identical_features_give_zero_and_no_gradient(clip, level):
    student = features(0).requires_grad_()
    loss = value(student, student.detach().clone(), clip=clip, level=level)
    (gradient,) = torch.autograd.grad(loss, student)
    assert float(loss.detach()) < 1e-12
    assert float(gradient.abs().max()) < 1e-7


def test_rotations_of_either_side_change_nothing():
    student, teacher = features(0), features(1)
    turns = [torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)))[0] for seed in (2, 3)]
    turned = value(student @ turns[0], teacher @ turns[1])
    torch.testing.assert_close(turned, value(student, teacher), rtol=1e-5, atol=0)
    assert float(value(student @ turns[0], student)) < 1e-10


def test_only_the_student_gets_a_gradient():
    student, teacher = features(0).requires_grad_(), features(1).requires_grad_()
    value(student, teacher).backward()
    assert float(student.grad.abs().max()) > 0
    assert teacher.grad is None


@pytest.mark.parametrize("width", [8, 24])
def test_a_teacher_of_another_width(width):
    student, teacher = features(0).requires_grad_(), features(1, width=width)
    loss = value(student, teacher)
    loss.backward()
    torch.testing.assert_close(loss.double(), plain(student.detach(), teacher, "none"), rtol=1e-5, atol=0)
    assert student.grad.shape == student.shape


def test_fewer_teacher_crops_than_global_crops():
    student, teacher = features(0), features(1)
    torch.testing.assert_close(value(student, teacher[:1]), value(student[:1], teacher[:1]))


def test_batch_level_compares_across_images_and_ranks():
    """One matrix of all patches; two ranks that gather have the matrix of one."""
    student, teacher = features(0), features(1)
    whole = value(student, teacher, level="batch")
    rows = [each.transpose(0, 1).flatten(0, 2)[None, None] for each in (student, teacher)]  # (1, 1, B G N, D)
    torch.testing.assert_close(whole, value(*rows), rtol=1e-6, atol=0)
    others = iter((student[:, 1:].transpose(0, 1), teacher[:, 1:].transpose(0, 1)))
    gathering = Collectives(lambda tensor, op: tensor, lambda tensor: torch.cat([tensor, next(others)]))
    first = value(student[:, :1], teacher[:, :1], level="batch", collectives=gathering)
    torch.testing.assert_close(first, whole, rtol=1e-6, atol=0)
    assert not torch.allclose(whole, value(student, teacher))


def test_without_a_gram_teacher_the_term_says_so():
    with pytest.raises(ValueError, match="no Gram teacher"):
        value(features(0), None)
