"""assignment_cross_entropy's CPU kernel: every instruction set, row ends, crops and views, extreme logits, threads."""

from collections.abc import Iterator

import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor

from dinov3_ext import (
    Potentials,
    _library,
    assignment_cross_entropy,
    assignment_cross_entropy_reference,
    sinkhorn_knopp_reference,
)

VARIANTS = _library.module.cpu_variants() if _library.module is not None else []
TEMPERATURES = {"student_temperature": 0.1, "teacher_temperature": 0.07}
pytestmark = pytest.mark.skipif(_library.module is None, reason=f"needs the native library: {_library.problem}")


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _library.module.cpu_variant()
    _library.module.set_cpu_variant(request.param)
    yield request.param
    _library.module.set_cpu_variant(before)


def problem(
    crops: int, views: int, images: int, prototypes: int, dtype: torch.dtype, spread: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor, Potentials]:
    generator = torch.Generator().manual_seed(seed)
    student = spread * torch.randn(crops, images, prototypes, dtype=torch.float64, generator=generator)
    teacher = (spread * torch.randn(views, images, prototypes, dtype=torch.float64, generator=generator)).to(dtype)
    exact = sinkhorn_knopp_reference(teacher.flatten(0, 1).double(), temperature=0.07)
    return student.to(dtype), teacher, Potentials(exact.rows.float(), exact.columns.float())


def losses_and_gradient(function, student: Tensor, teacher: Tensor, potentials: Potentials, weight=None, **options):
    leaf = student.detach().requires_grad_()
    losses = function(leaf * 1, teacher, potentials, weight=weight, **TEMPERATURES, **options)
    cotangent = torch.linspace(1, 2, losses.numel(), dtype=losses.dtype).view_as(losses)
    return losses.detach(), torch.autograd.grad(losses, leaf, cotangent)[0]


def assert_as_good_as_torch(student: Tensor, teacher: Tensor, potentials: Potentials, weight=None) -> None:
    ours = losses_and_gradient(assignment_cross_entropy, student, teacher, potentials, weight)
    plain = losses_and_gradient(assignment_cross_entropy_reference, student, teacher, potentials, weight)
    wide = Potentials(potentials.rows.double(), potentials.columns.double())
    exact = losses_and_gradient(
        assignment_cross_entropy_reference,
        student.double(),
        teacher.double(),
        wide,
        None if weight is None else weight.double(),
    )
    assert ours[1].dtype is student.dtype
    for what, *three in zip(("losses", "gradient"), ours, plain, exact):
        assert_accurate(*three, what=what)


# Ends of rows around vectors of 4, 8, 16 and pairs of them, and around blocks of 1024.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prototypes", [7, 8, 31, 33, 1000, 1024, 1025, 2100])
def test_row_ends(variant: str, prototypes: int, dtype: torch.dtype) -> None:
    assert_as_good_as_torch(*problem(1, 1, 20, prototypes, dtype))


@pytest.mark.parametrize(("crops", "views"), [(1, 2), (10, 2), (3, 1), (2, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_crops_and_views(variant: str, crops: int, views: int, dtype: torch.dtype, weighted: bool) -> None:
    weight = torch.rand(9, generator=torch.Generator().manual_seed(1)) if weighted else None
    assert_as_good_as_torch(*problem(crops, views, 9, 1500, dtype), weight)


@pytest.mark.parametrize("images", [1, 3, 70])
def test_rows_are_cut_where_images_are_few(variant: str, images: int) -> None:
    assert_as_good_as_torch(*problem(2, 2, images, 5000, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_larger_logits_behind_the_first_block(variant: str, dtype: torch.dtype) -> None:
    """The shift guessed from a row's first columns is far off: the sum overflows and is taken again."""
    student, teacher, potentials = problem(2, 1, 6, 3000, dtype)
    student[..., 2500:] += 40
    assert_as_good_as_torch(student, teacher, potentials)
    student[..., 2500:] += 1000
    losses, gradient = losses_and_gradient(assignment_cross_entropy, student, teacher, potentials)
    exact = losses_and_gradient(assignment_cross_entropy_reference, student.double(), teacher.double(), potentials)
    torch.testing.assert_close(losses.double(), exact[0], rtol=1e-5, atol=0)
    assert torch.isfinite(gradient).all()


def test_spread_logits(variant: str) -> None:
    student, teacher, potentials = problem(2, 2, 40, 700, torch.bfloat16, spread=10.0)
    assert_as_good_as_torch(student, teacher, potentials)


def test_minus_infinity_of_the_teacher_is_probability_zero(variant: str) -> None:
    student, teacher, _ = problem(1, 1, 12, 300, torch.float32)
    teacher[..., ::3] = -torch.inf
    exact = sinkhorn_knopp_reference(teacher.flatten(0, 1).double(), temperature=0.07)
    potentials = Potentials(exact.rows.float(), exact.columns.float())
    assert_as_good_as_torch(student, teacher, potentials)


def test_one_prototype_has_no_loss(variant: str) -> None:
    losses, gradient = losses_and_gradient(assignment_cross_entropy, *problem(2, 1, 5, 1, torch.float32))
    assert losses.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-5


def test_no_images(variant: str) -> None:
    potentials = Potentials(torch.empty(0), torch.zeros(40))
    student = torch.empty(2, 0, 40, requires_grad=True)
    losses = assignment_cross_entropy(student, torch.empty(3, 0, 40), potentials, **TEMPERATURES)
    assert torch.equal(losses, torch.zeros(2, 3))
    losses.sum().backward()
    assert student.grad.shape == (2, 0, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(variant: str, dtype: torch.dtype) -> None:
    """Crops and images in the other order, rows of a wider tensor: the same bits."""
    student, teacher, potentials = problem(3, 2, 5, 130, dtype)
    expected = losses_and_gradient(assignment_cross_entropy, student, teacher, potentials)
    views = {
        "images first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "wider rows": lambda x: torch.cat([x, x], 2)[..., :130],
        "prototypes first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }
    for name, view in views.items():
        leaf = view(student).detach().requires_grad_()
        losses = assignment_cross_entropy(leaf, view(teacher), potentials, **TEMPERATURES)
        cotangent = torch.linspace(1, 2, losses.numel()).view_as(losses)
        assert torch.equal(losses.detach(), expected[0]), name
        assert torch.equal(torch.autograd.grad(losses, leaf, cotangent)[0], expected[1]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_overwriting_gives_the_same_bits(variant: str, dtype: torch.dtype) -> None:
    arguments = problem(3, 2, 5, 1100, dtype)
    expected = losses_and_gradient(assignment_cross_entropy, *arguments)
    ours = losses_and_gradient(assignment_cross_entropy, *arguments, overwrite_student=True)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])


def test_threads_do_not_change_a_bit(variant: str) -> None:
    arguments = problem(2, 2, 5, 9000, torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(losses_and_gradient(assignment_cross_entropy, *arguments))
    finally:
        torch.set_num_threads(before)
    for losses, gradient in results[1:]:
        assert torch.equal(losses, results[0][0])
        assert torch.equal(gradient, results[0][1])
