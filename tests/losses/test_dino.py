"""DINO against loops in float64, the weights of its pairs, and the whole of the paper's pretraining loss."""

import pytest
import torch
from loss_oracles import batch_of, dino, gradient, ibot, koleo, masks_of, outputs_of, sinkhorn, targets_of

from dinov3_ext import ALONE, assignment
from dinov3_train.losses import DinoLoss, IbotLoss, KoLeoLoss, Outputs

EMPTY = torch.zeros(0, 3, dtype=torch.float64)


def logits(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Logits as a head gives them: |z| below 1."""
    return (torch.rand(shape, dtype=torch.float64) * 2 - 1).to(dtype).requires_grad_()


def parts_of(student: torch.Tensor, teacher: torch.Tensor, **settings: float) -> dict:
    term = DinoLoss(weight=1.0, student_temperature=0.1, **settings)
    batch = batch_of(masks_of([[0] * teacher.shape[1]] * teacher.shape[0], 4))
    targets = targets_of(teacher.detach(), EMPTY.to(teacher.dtype))
    return {part.name: part for part in term(outputs_of(dino_logits=student), targets, batch, ALONE)}


@pytest.mark.parametrize(
    ("globals_", "locals_", "images", "prototypes"), [(2, 8, 3, 5), (2, 0, 2, 7), (3, 1, 2, 4), (1, 2, 2, 3)]
)
def test_dino_is_the_loop_over_pairs_images_and_prototypes(globals_, locals_, images, prototypes):
    torch.manual_seed(0)
    student, teacher = logits(globals_ + locals_, images, prototypes), logits(globals_, images, prototypes)
    parts = parts_of(student, teacher)
    expected = dict(zip(("dino_global", "dino_local"), dino(student, teacher.detach())))
    expected = {name: value for name, value in expected.items() if value != 0}
    assert parts.keys() == expected.keys()
    for name, value in expected.items():
        # both in fp64, 1e-12 is a thousand roundings
        torch.testing.assert_close(parts[name].value, value, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            gradient(parts[name].value, student), gradient(value, student), rtol=1e-10, atol=1e-12
        )


def test_dino_in_fp32_and_bf16():
    """fp32: sums of 18 x 4 x 64 terms near 4, a few roundings of 6e-8 each, through exp(z / 0.07).
    bf16 logits are exact inputs: everything after them is fp32."""
    torch.manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = logits(10, 4, 64, dtype=dtype), logits(2, 4, 64, dtype=dtype)
        exact = parts_of(student.detach().double().requires_grad_(), teacher.detach().double())
        for name, part in parts_of(student, teacher).items():
            assert part.value.dtype is torch.float32
            torch.testing.assert_close(part.value.double(), exact[name].value, rtol=2e-6, atol=0)


def test_pair_weights():
    """2/18 and 16/18 for two global and eight local crops; `local_weight` leaves the global share as it is."""
    student, teacher = logits(10, 2, 3), logits(2, 2, 3)
    weights = {name: part.weight for name, part in parts_of(student, teacher).items()}
    assert weights == {"dino_global": pytest.approx(2 / 18), "dino_local": pytest.approx(16 / 18)}
    weights = {name: part.weight for name, part in parts_of(student, teacher, local_weight=0.5).items()}
    assert weights == {"dino_global": pytest.approx(2 / 18), "dino_local": pytest.approx(8 / 18)}
    weights = {name: part.weight for name, part in parts_of(logits(6, 2, 3), teacher).items()}
    assert weights == {"dino_global": pytest.approx(2 / 10), "dino_local": pytest.approx(8 / 10)}


def test_a_global_crop_does_not_predict_itself():
    """Crop 0 predicts the targets of crop 1 alone: they give its gradient (softmax - q) / 0.1 / (pairs images)."""
    student, teacher = logits(2, 3, 4), logits(2, 3, 4).detach()
    (found,) = gradient(parts_of(student, teacher)["dino_global"].value, student)
    targets = torch.tensor(sinkhorn(teacher.flatten(0, 1), 0.07), dtype=torch.float64).view(2, 3, 4)
    expected = ((student / 0.1).softmax(-1) - targets.flip(0)) / 0.1 / 6
    torch.testing.assert_close(found, expected.detach(), rtol=1e-9, atol=1e-12)


def test_no_gradient_reaches_the_teacher():
    student, teacher = logits(4, 2, 3), logits(2, 2, 3)
    term = DinoLoss(weight=1.0, student_temperature=0.1)
    targets = targets_of(teacher, EMPTY)
    parts = term(outputs_of(dino_logits=student), targets, batch_of(masks_of([[0, 0]] * 2, 4)), ALONE)
    (found,) = gradient(sum(part.value for part in parts), teacher)
    assert not found.any()


def test_targets_are_the_naive_balanced_assignment():
    """Rows sum to one; after the prototype step each prototype would hold 1/K, so columns are nearly equal."""
    torch.manual_seed(2)
    teacher = logits(2, 3, 5).detach()
    targets = targets_of(teacher, EMPTY)
    found = assignment(teacher.flatten(0, 1), targets.dino_potentials, temperature=0.07)
    torch.testing.assert_close(
        found, torch.tensor(sinkhorn(teacher.flatten(0, 1), 0.07), dtype=torch.float64), rtol=1e-11, atol=0
    )
    torch.testing.assert_close(found.sum(1), torch.ones(6, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("local_weight", [1.0, 0.5])
def test_total_of_pretraining(local_weight):
    """L = 2/18 L_global + 16/18 w L_local + 0.1 sum over crops KoLeo + L_iBOT, and its gradient in every input."""
    torch.manual_seed(3)
    masks = masks_of([[2, 0, 1], [0, 3, 0]], 6)
    student, teacher, masked, masked_teacher = logits(10, 3, 4), logits(2, 3, 4), logits(6, 5), logits(6, 5)
    cls = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    terms = (
        DinoLoss(weight=1.0, student_temperature=0.1, local_weight=local_weight),
        IbotLoss(weight=1.0, student_temperature=0.1),
        KoLeoLoss(weight=0.1),
    )
    outputs = Outputs(cls=cls, patches=cls[:, :, None], dino_logits=student, ibot_logits=masked)
    targets = targets_of(teacher.detach(), masked_teacher.detach())
    parts = [part for term in terms for part in term(outputs, targets, batch_of(masks), ALONE)]
    assert [part.name for part in parts] == ["dino_global", "dino_local", "ibot", "koleo"]
    found = sum(part.weight * part.value for part in parts)
    global_loss, local_loss = dino(student, teacher.detach())
    expected = 2 / 18 * global_loss + 16 / 18 * local_weight * local_loss + 0.1 * koleo(cls, 3)
    expected = expected + ibot(masked, masked_teacher.detach(), masks)
    # fp64; the masks' weights are fp32, and so is 1/3: 3e-8
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    inputs = (student, masked, cls)
    torch.testing.assert_close(gradient(found, *inputs), gradient(expected, *inputs), rtol=1e-6, atol=1e-9)
