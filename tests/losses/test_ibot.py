"""iBOT against loops in float64, and its divisor."""

import pytest
import torch
from loss_oracles import batch_of, gradient, ibot, masks_of, outputs_of, targets_of

from dinov3_ext import ALONE
from dinov3_train.losses import IbotLoss


def loss_of(student: torch.Tensor, teacher: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Student and teacher (M, K), masks (G, B, N)."""
    targets = targets_of(torch.zeros(1, 1, student.shape[1], dtype=student.dtype), teacher.detach())
    (part,) = IbotLoss(weight=1.0, student_temperature=0.1)(
        outputs_of(ibot_logits=student), targets, batch_of(masks), ALONE
    )
    assert (part.name, part.weight) == ("ibot", 1.0)
    return part.value


@pytest.mark.parametrize("counts", [[[3, 0, 2], [0, 4, 0]], [[1], [8]], [[8, 8, 8], [8, 8, 8]], [[0, 1]]])
def test_ibot_is_the_loop_over_crops_and_their_masked_patches(counts):
    """1 / (masked patches of the crop), summed, divided by all crops, masked or not."""
    torch.manual_seed(0)
    masks = masks_of(counts, 8)
    student, teacher = (torch.rand(int(masks.sum()), 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    found, expected = loss_of(student, teacher, masks), ibot(student, teacher.detach(), masks)
    # fp64 but for the fp32 weights 1 / masked: half a spacing of fp32 each
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(gradient(found, student), gradient(expected, student), rtol=1e-7, atol=1e-9)


def test_unmasked_crops_count_in_the_divisor():
    """Equal cross-entropy c in every patch: half of the crops masked gives c / 2."""
    student = torch.zeros(5, 4, dtype=torch.float64)  # a uniform prediction: c = log 4 whatever the target
    masks = masks_of([[2, 0], [0, 3]], 8)
    assert loss_of(student, torch.rand(5, 4, dtype=torch.float64), masks).item() == pytest.approx(
        torch.tensor(4.0).log().item() / 2, rel=1e-6
    )


def test_nothing_masked_is_zero_with_a_gradient():
    """A rank whose slice of the batch holds no masked crop still takes part in the gradient exchange."""
    student = torch.zeros(0, 4, requires_grad=True)
    loss = loss_of(student, torch.zeros(0, 4), masks_of([[0, 0], [0, 0]], 8))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad.shape == (0, 4)


def test_fp32():
    """Sums of 300 terms near 3 in fp32: 2e-6."""
    torch.manual_seed(1)
    masks = masks_of([[60, 0, 90], [0, 150, 0]], 196)
    student, teacher = torch.rand(300, 32), torch.rand(300, 32)
    exact = loss_of(student.double(), teacher.double(), masks)
    torch.testing.assert_close(loss_of(student, teacher, masks).double(), exact, rtol=2e-6, atol=0)
