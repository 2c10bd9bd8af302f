"""gram_loss: against float64, clips, zero rows, autocast, compile."""

import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor

from dinov3_ext import build_info, explain, gram_loss, gram_loss_reference, use

CLIPS = ["none", "both", "teacher"]


def features(apart: float = 0.3, shape: tuple[int, int, int] = (3, 13, 8), seed: int = 0) -> tuple[Tensor, Tensor]:
    """(student, teacher) fp64, `apart` from each other."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(shape, dtype=torch.float64, generator=generator)
    return teacher + apart * torch.randn(shape, dtype=torch.float64, generator=generator), teacher


def loss_and_gradient(function, student: Tensor, teacher: Tensor, clip: str) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    loss = function(student, teacher, clip=clip)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def nested_loops(student: Tensor, teacher: Tensor, clip: str) -> float:
    total, count = 0.0, 0
    for xs, ys in zip(student, teacher):
        for i in range(len(xs)):
            for j in range(len(xs)):
                s = float(xs[i] @ xs[j] / (xs[i].norm() * xs[j].norm()))
                t = float(ys[i] @ ys[j] / (ys[i].norm() * ys[j].norm()))
                s = max(s, 0.0) if clip == "both" else s
                t = max(t, 0.0) if clip != "none" else t
                total, count = total + (s - t) ** 2, count + 1
    return total / count


@pytest.mark.parametrize("clip", CLIPS)
def test_value_is_that_of_nested_loops(clip: str) -> None:
    student, teacher = features()
    for function in (gram_loss, gram_loss_reference):
        expected = nested_loops(student, teacher, clip)
        assert function(student, teacher, clip=clip).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("apart", [0.3, 0.03])
def test_loss_and_gradient_are_as_good_as_plain_torch(clip: str, dtype: torch.dtype, apart: float) -> None:
    student, teacher = (x.to(dtype) for x in features(apart))
    ours = loss_and_gradient(gram_loss, student, teacher, clip)
    plain = loss_and_gradient(gram_loss_reference, student, teacher, clip)
    exact = loss_and_gradient(gram_loss_reference, student.double(), teacher.double(), clip)
    assert ours[0].dtype is torch.float32
    assert ours[1].dtype is dtype
    for what, *three in zip(("loss", "gradient"), ours, plain, exact):
        assert_accurate(*three, what=what)


@pytest.mark.parametrize("clip", CLIPS)
def test_gradcheck(clip: str) -> None:
    student, teacher = features(shape=(2, 5, 4))
    for function in (gram_loss, gram_loss_reference):
        assert torch.autograd.gradcheck(lambda x: function(x, teacher, clip=clip), student.requires_grad_())


def test_zero_rows_and_single_patch() -> None:
    student, teacher = features()
    student[0, 3] = 0
    teacher[1, 2] = 0
    ours, exact = (loss_and_gradient(f, student, teacher, "none") for f in (gram_loss, gram_loss_reference))
    torch.testing.assert_close(ours[0], exact[0])
    keep = torch.ones(3, 13, dtype=torch.bool)
    keep[0, 3] = False  # there the slope of x / max(|x|, 1e-12) is 1e12
    torch.testing.assert_close(ours[1][keep], exact[1][keep])
    torch.testing.assert_close(ours[1][~keep], exact[1][~keep], rtol=1e-9, atol=0)
    assert gram_loss(student[1:, :1], teacher[1:, :1]).item() == pytest.approx(0, abs=1e-15)


def test_gradient_at_exactly_zero_similarity_passes() -> None:
    """In-place `similarity[similarity < 0] = 0` of the DINOv3 paper's code lets it through; max(., 0) may not."""
    student = torch.eye(2, dtype=torch.float64)[None].requires_grad_()
    teacher = torch.ones(1, 2, 2, dtype=torch.float64)
    for function in (gram_loss, gram_loss_reference):
        (clipped,) = torch.autograd.grad(function(student, teacher, clip="both"), student)
        (free,) = torch.autograd.grad(function(student, teacher), student)
        assert torch.equal(clipped, free)
        assert clipped.abs().sum() > 0


def test_float32_features_stay_float32_under_autocast() -> None:
    student, teacher = (x.float() for x in features(0.01))
    plain = loss_and_gradient(gram_loss, student, teacher, "none")
    with torch.autocast("cpu", torch.bfloat16):
        cast = loss_and_gradient(gram_loss, student, teacher, "none")
        reference = gram_loss_reference(student, teacher)
    assert torch.equal(cast[0], plain[0])
    assert torch.equal(cast[1], plain[1])
    torch.testing.assert_close(reference, plain[0], rtol=1e-4, atol=0)  # fp32 sums in another order


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = (x.requires_grad_() for x in features())
    for function in (gram_loss, gram_loss_reference):
        student.grad = teacher.grad = None
        function(student, teacher).backward()
        assert student.grad is not None
        assert teacher.grad is None


def test_opcheck_and_compiled_in_one_graph() -> None:
    student, teacher = features()
    student.requires_grad_()
    torch.library.opcheck(torch.ops.dinov3_ext.gram_loss_composition.default, (student, teacher, "both", True))
    compiled = torch.compile(lambda x: 3 * gram_loss(x, teacher), fullgraph=True)
    (ours,) = torch.autograd.grad(compiled(student), student)
    (eager,) = torch.autograd.grad(3 * gram_loss(student, teacher), student)
    torch.testing.assert_close(ours, eager)


def test_reference_can_be_forced() -> None:
    with use("reference"):
        assert explain("gram_loss").path == "reference"
        assert gram_loss(*features()).item() == gram_loss_reference(*features()).item()


def test_errors_name_the_rule() -> None:
    student, teacher = features()
    for call, message in [
        (lambda: gram_loss(student[0], teacher[0]), r"student must be \(S, N, D\)"),
        (lambda: gram_loss(student, teacher[:, :4]), r"the student's shape \(3, 13, 8\); got \(3, 4, 8\)"),
        (lambda: gram_loss(student, teacher, clip="student"), "clip must be one of none, both, teacher; got 'student'"),
        (lambda: gram_loss(student.long(), teacher), "must be floating point"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_explain_names_the_kernel_and_its_tiles() -> None:
    assert explain("gram_loss", dtype=torch.float64).path == "composition"
    assert explain("gram_loss", device="meta").path == "composition"
    info = build_info()
    if info["cuda"] is None:
        assert explain("gram_loss", device="cuda").path == "composition"
        return
    for dtype, shape, wanted in [
        (torch.float32, (128, 256, 1024), "tiles of 128 x 128, 3 an image"),
        (torch.bfloat16, (16, 2304, 1024), "1 images at a time"),
        (torch.float16, (4, 49, 384), "tiles of 64 x 64, 1 an image"),
    ]:
        path = explain("gram_loss", device="cuda", architecture="sm_90", dtype=dtype, shape=shape)
        assert path.path == "kernel"
        assert wanted in path.reason
        assert ("pairs of fp16 numbers" in path.reason) == (dtype is torch.float32)
