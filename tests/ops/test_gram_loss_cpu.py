"""gram_loss's CPU kernel: every instruction set, block edges, strips, strides, zero rows, threads, memory."""

from collections.abc import Iterator

import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor

from dinov3_ext import _library, gram_loss, gram_loss_reference

VARIANTS = _library.module.cpu_variants() if _library.module is not None else []
pytestmark = pytest.mark.skipif(_library.module is None, reason=f"needs the native library: {_library.problem}")


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _library.module.cpu_variant()
    _library.module.set_cpu_variant(request.param)
    yield request.param
    _library.module.set_cpu_variant(before)


def features(shape: tuple[int, int, int], apart: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(student, teacher) fp64, with a common direction as real features have: similarities of both signs, most > 0."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(shape, dtype=torch.float64, generator=generator)
    teacher = teacher + 0.3 * torch.randn(shape[2], dtype=torch.float64, generator=generator)
    return teacher + apart * torch.randn(shape, dtype=torch.float64, generator=generator), teacher


def loss_and_gradient(function, student: Tensor, teacher: Tensor, clip: str) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    loss = function(student, teacher, clip=clip)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def assert_as_good_as_torch(student: Tensor, teacher: Tensor, clip: str) -> None:
    ours = loss_and_gradient(gram_loss, student, teacher, clip)
    plain = loss_and_gradient(gram_loss_reference, student, teacher, clip)
    exact = loss_and_gradient(gram_loss_reference, student.double(), teacher.double(), clip)
    assert ours[1].dtype is student.dtype
    for what, *three in zip(("loss", "gradient"), ours, plain, exact):
        assert_accurate(*three, what=what)


# Around the register tiles (6, 12 rows; 8, 16, 32 columns), blocks of 96 patches, 128 and 64 columns of the width; with
# widths of whole steps of 32, where bf16 features are read as they lie, last blocks of 1, 16 and 32 patches.
SHAPES = [(2, 2, 3), (3, 95, 33), (1, 97, 64), (2, 193, 129), (1, 260, 200), (1, 112, 288), (3, 128, 96)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_block_edges(variant: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    student, teacher = (x.to(dtype) for x in features(shape))
    assert_as_good_as_torch(student, teacher, "none")


@pytest.mark.parametrize("clip", ["none", "both", "teacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("apart", [1.0, 0.05])
def test_clips_and_closeness(variant: str, clip: str, dtype: torch.dtype, apart: float) -> None:
    student, teacher = (x.to(dtype) for x in features((4, 196, 384), apart))
    assert_as_good_as_torch(student, teacher, clip)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_several_strips(variant: str, dtype: torch.dtype) -> None:
    """One image of many patches: the gradient is collected from strips, bf16 with its low halves beside it."""
    student, teacher = (x.to(dtype) for x in features((1, 700, 72)))
    assert_as_good_as_torch(student, teacher, "both")


def test_types_may_differ(variant: str) -> None:
    student, teacher = features((2, 50, 70))
    assert_as_good_as_torch(student.float(), teacher.bfloat16(), "none")
    assert_as_good_as_torch(student.bfloat16(), teacher.half(), "none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides(variant: str, dtype: torch.dtype) -> None:
    student, teacher = (x.to(dtype) for x in features((3, 40, 136)))
    expected = loss_and_gradient(gram_loss, student, teacher, "none")
    views = {
        "width first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "every other": lambda x: torch.stack([x, -x], -1).flatten(2)[..., ::2],
        "rows of a wider tensor": lambda x: torch.cat([x, x], -1)[..., : x.shape[2]],
        "images last": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    }
    for name, view in views.items():
        ours = loss_and_gradient(gram_loss, view(student), view(teacher), "none")
        assert torch.equal(ours[0], expected[0]), name
        assert torch.equal(ours[1], expected[1]), name
    student, teacher = (x.to(dtype) for x in features((3, 40, 128)))  # bf16: read as they lie or, strided, packed
    for name, view in views.items():
        assert_as_good_as_torch(view(student), view(teacher), "none")
        loss, gradient = loss_and_gradient(gram_loss, student, view(student), "none")
        assert loss.item() == gradient.abs().max().item() == 0, name
    one = teacher[:, :1].expand(-1, 40, -1)  # stride 0: all of the teacher's similarities are one
    ours, exact = gram_loss(student, one), gram_loss_reference(student.double(), one.double())
    assert ours.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_tiny_and_huge_rows(variant: str, dtype: torch.dtype) -> None:
    student, teacher = (x.to(dtype) for x in features((1, 100, 96)))
    student[0, 3], teacher[0, 5] = 0, 0
    student[0, 7] *= 1e-8
    student[0, 8] *= 1e15
    teacher[0, 9] *= 1e-15
    ours = loss_and_gradient(gram_loss, student, teacher, "none")
    exact = loss_and_gradient(gram_loss_reference, student.double(), teacher.double(), "none")
    assert torch.isfinite(ours[1]).all()
    assert ours[0].item() == pytest.approx(exact[0].item(), rel=1e-5)
    spacing = 1e-5 if dtype is torch.float32 else 1e-2
    for row in (0, 3, 7, 8):  # of sizes 1, 1e12, 1e8 and 1e-15
        scale = exact[1][0, row].abs().max()
        assert (ours[1][0, row].double() - exact[1][0, row]).abs().max() < spacing * scale, row


@pytest.mark.parametrize("size", [1e-8, 1e8])
def test_short_and_long_rows_as_they_lie(variant: str, size: float) -> None:
    """bf16 rows of moderate lengths are multiplied unscaled."""
    student, teacher = features((2, 70, 96))
    student[0, 7] *= size
    student[1] *= size
    teacher[:, 9] *= size
    student, teacher = student.bfloat16(), teacher.bfloat16()
    ours = loss_and_gradient(gram_loss, student, teacher, "none")
    exact = loss_and_gradient(gram_loss_reference, student.double(), teacher.double(), "none")
    assert ours[0].item() == pytest.approx(exact[0].item(), rel=1e-5)
    error, largest = (ours[1].double() - exact[1]).abs().amax(dim=2), exact[1].abs().amax(dim=2)  # (2, 70)
    assert (error < 1e-2 * largest).all()


@pytest.mark.parametrize("shape", [(3, 100, 70), (1, 500, 96)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(variant: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    student, teacher = (x.to(dtype) for x in features(shape))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(loss_and_gradient(gram_loss, student, teacher, "both"))
    finally:
        torch.set_num_threads(before)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_loss_alone_is_the_same(variant: str) -> None:
    student, teacher = (x.float() for x in features((2, 150, 64)))
    with torch.no_grad():
        alone = gram_loss(student, teacher, clip="teacher")
    assert torch.equal(alone, loss_and_gradient(gram_loss, student, teacher, "teacher")[0])


def test_identical_features_give_zero(variant: str) -> None:
    student, _ = features((1, 130, 64))
    loss, gradient = loss_and_gradient(gram_loss, student.float(), student.float(), "none")
    assert loss.item() == 0
    assert gradient.abs().max().item() == 0
