"""assignment_cross_entropy: against float64 and nested loops, blocks, weights, overwriting, compile."""

import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor

from dinov3_ext import (
    Potentials,
    _library,
    assignment,
    assignment_cross_entropy,
    assignment_cross_entropy_reference,
    explain,
    sinkhorn_knopp,
    use,
)
from dinov3_ext.ops import assignment_cross_entropy as module

C, A, B, K = 3, 2, 6, 11
TEMPERATURES = {"student_temperature": 0.1, "teacher_temperature": 0.07}


def problem(dtype: torch.dtype = torch.float64, weighted: bool = False, seed: int = 0) -> tuple:
    """(student, teacher, potentials, weight)."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(C, B, K, dtype=torch.float64, generator=generator).to(dtype)
    teacher = torch.randn(A, B, K, dtype=torch.float64, generator=generator).to(dtype)
    potentials = sinkhorn_knopp(teacher.flatten(0, 1).double(), temperature=0.07)
    if dtype is not torch.float64:
        potentials = Potentials(potentials.rows.float(), potentials.columns.float())
    weight = torch.rand(B, dtype=torch.float64, generator=generator).to(potentials.rows.dtype) if weighted else None
    return student, teacher, potentials, weight


def losses_and_gradient(function, student: Tensor, teacher: Tensor, potentials: Potentials, weight, **options):
    leaf = student.detach().requires_grad_()
    losses = function(leaf * 1, teacher, potentials, weight=weight, **TEMPERATURES, **options)
    cotangent = torch.arange(1.0, 1 + C * A, dtype=losses.dtype).view(C, A)
    return losses.detach(), torch.autograd.grad(losses, leaf, cotangent)[0]


@pytest.mark.parametrize("weighted", [False, True])
def test_value_is_that_of_nested_loops(weighted: bool) -> None:
    student, teacher, potentials, weight = problem(weighted=weighted)
    p = assignment(teacher.flatten(0, 1), potentials, temperature=0.07).view(A, B, K)
    expected = torch.zeros(C, A, dtype=torch.float64)
    for c in range(C):
        for a in range(A):
            for b in range(B):
                log_q = (student[c, b] / 0.1).log_softmax(0)
                expected[c, a] += -(p[a, b] * log_q).sum() * (weight[b] if weighted else 1 / B)
    for function in (assignment_cross_entropy, assignment_cross_entropy_reference):
        losses = function(student, teacher, potentials, weight=weight, **TEMPERATURES)
        torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradcheck(weighted: bool) -> None:
    student, teacher, potentials, weight = problem(weighted=weighted)
    for function in (assignment_cross_entropy, assignment_cross_entropy_reference):
        assert torch.autograd.gradcheck(
            lambda x: function(x, teacher, potentials, weight=weight, **TEMPERATURES), student.requires_grad_()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("at_once", [1 << 24, 2 * (A + C) * K])
def test_losses_and_gradient_are_as_good_as_plain_torch(monkeypatch, dtype, weighted: bool, at_once: int) -> None:
    """The second block size cuts the six rows into three blocks."""
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", {"cpu": at_once})
    student, teacher, potentials, weight = problem(dtype, weighted)
    ours = losses_and_gradient(assignment_cross_entropy, student, teacher, potentials, weight)
    plain = losses_and_gradient(assignment_cross_entropy_reference, student, teacher, potentials, weight)
    exact = losses_and_gradient(
        assignment_cross_entropy_reference,
        student.double(),
        teacher.double(),
        Potentials(potentials.rows.double(), potentials.columns.double()),
        None if weight is None else weight.double(),
    )
    assert ours[0].dtype is torch.float32
    assert ours[1].dtype is dtype
    for what, *three in zip(("losses", "gradient"), ours, plain, exact):
        assert_accurate(*three, what=what)


def test_large_logits_stay_finite() -> None:
    student, teacher, _, _ = problem(torch.float32)
    teacher = teacher * 100
    potentials = sinkhorn_knopp(teacher.flatten(0, 1), temperature=0.07)
    losses, gradient = losses_and_gradient(assignment_cross_entropy, student * 100, teacher, potentials, None)
    assert torch.isfinite(losses).all()
    assert torch.isfinite(gradient).all()


def test_no_rows_is_zero() -> None:
    potentials = Potentials(torch.empty(0), torch.zeros(K))
    for function in (assignment_cross_entropy, assignment_cross_entropy_reference):
        losses = function(torch.empty(1, 0, K), torch.empty(1, 0, K), potentials, **TEMPERATURES)
        assert torch.equal(losses, torch.zeros(1, 1))


def test_overwriting_gives_the_same_gradient_in_the_same_memory() -> None:
    student, teacher, potentials, weight = problem(torch.float32, weighted=True)
    expected = losses_and_gradient(assignment_cross_entropy, student, teacher, potentials, weight)
    leaf = student.clone().requires_grad_()
    logits = leaf.view(C * B, K).add(0).view(C, B, K)
    address, seen = logits.data_ptr(), []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    losses = assignment_cross_entropy(
        logits, teacher, potentials, weight=weight, overwrite_student=True, **TEMPERATURES
    )
    losses.backward(torch.arange(1.0, 1 + C * A).view(C, A))
    assert torch.equal(leaf.grad, expected[1])
    assert seen == [address]


def use_twice(overwrite: bool, logits: Tensor, first: bool, arguments: tuple) -> Tensor:
    """The logits read by another operation that keeps them for its own backward, made before or after the loss."""
    _, teacher, potentials, _ = arguments
    other = logits.square().sum() if first else 0.0
    losses = assignment_cross_entropy(logits, teacher, potentials, overwrite_student=overwrite, **TEMPERATURES)
    return losses.sum() + (other if first else logits.square().sum())


@pytest.mark.parametrize("first", [True, False])
def test_another_reader_of_overwritten_logits_is_an_error_or_right(first: bool) -> None:
    """Autograd runs the later operation's backward first: the other reader is either served or told, never misled."""
    arguments = problem(torch.float32)
    leaf = arguments[0].requires_grad_()
    (expected,) = torch.autograd.grad(use_twice(False, leaf * 1, first, arguments), leaf)
    if first:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            use_twice(True, leaf * 1, first, arguments).backward()
    else:
        (ours,) = torch.autograd.grad(use_twice(True, leaf * 1, first, arguments), leaf)
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_overwriting_is_refused_while_compiling_and_on_a_leaf() -> None:
    arguments = problem(torch.float32)
    student, teacher, potentials, _ = arguments
    with pytest.raises(ValueError, match="got a leaf tensor"):
        assignment_cross_entropy(student.requires_grad_(), teacher, potentials, overwrite_student=True, **TEMPERATURES)

    def loss(x: Tensor) -> Tensor:
        return use_twice(True, x * 1, False, arguments)

    with pytest.raises(Exception, match="overwrite_student must be False under torch.compile"):
        torch.compile(loss, fullgraph=True)(student)


def test_logits_used_twice_compiled() -> None:
    """Without the cache on disk, which tells neither schemas nor fakes of two versions of an op apart."""
    arguments = problem(torch.float32)
    leaf = arguments[0].requires_grad_()
    compiled = torch.compile(lambda x: use_twice(False, x * 1, True, arguments), fullgraph=True)
    with torch.compiler.config.patch(force_disable_caches=True):
        (ours,) = torch.autograd.grad(compiled(leaf), leaf)
    (expected,) = torch.autograd.grad(use_twice(False, leaf * 1, True, arguments), leaf)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)  # fp32 exp of another library


def test_autocast_changes_nothing() -> None:
    arguments = problem(torch.float32, weighted=True)
    plain = losses_and_gradient(assignment_cross_entropy, *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        cast = losses_and_gradient(assignment_cross_entropy, *arguments)
    assert torch.equal(plain[0], cast[0])
    assert torch.equal(plain[1], cast[1])


def test_reference_can_be_forced() -> None:
    student, teacher, potentials, _ = problem()
    with use("reference"):
        assert explain("assignment_cross_entropy").path == "reference"
        forced = assignment_cross_entropy(student, teacher, potentials, **TEMPERATURES)
    assert torch.equal(forced, assignment_cross_entropy_reference(student, teacher, potentials, **TEMPERATURES))


def test_explain_names_blocks_and_ranges() -> None:
    """As the launchers choose them; no GPU is asked."""
    if _library.module is None or _library.build_info()["cuda"] is None:
        pytest.skip("needs a build with nvcc")

    def reason(*shape: int) -> str:
        return explain("assignment_cross_entropy", device="cuda", dtype=torch.bfloat16, shape=shape).reason

    ibot, dino = reason(1, 4915, 65536), reason(10, 64, 65536)
    assert "for A = 1: a block takes 4 images, 1 crops and 1 views" in ibot
    assert "forward 1229 blocks, rows in 1 ranges, backward 1229 blocks, rows in 1;" in ibot
    assert "for A = 2: a block takes 1 images, 4 crops and 2 views" in dino
    assert "forward 1152 blocks, rows in 6 ranges, backward 1024 blocks, rows in 16;" in dino


def test_errors_name_the_rule() -> None:
    student, teacher, potentials, _ = problem()
    arguments = {"student": student, "teacher": teacher, "potentials": potentials, **TEMPERATURES}
    for change, message in [
        ({"student": student[:, :3]}, r"must share B and K; got \(3, 3, 11\) and \(2, 6, 11\)"),
        ({"potentials": Potentials(potentials.rows[1:], potentials.columns)}, r"rows \(A \* B,\) = \(12,\)"),
        ({"weight": torch.ones(5)}, r"weight must be \(B,\) = \(6,\) or None; got \(5,\)"),
        ({"student_temperature": 0.0}, "temperatures must be > 0"),
        ({"student": student.long()}, "must be floating point"),
    ]:
        with pytest.raises(ValueError, match=message):
            assignment_cross_entropy(**{**arguments, **change})
