"""Cross-entropy of student logits against Sinkhorn-Knopp assignments that are never stored."""

import torch
from torch import Tensor

from dinov3_ext import _library
from dinov3_ext._paths import (
    Path,
    Question,
    emulator_forced,
    explains,
    for_each_library,
    native_ops,
    reference_forced,
)
from dinov3_ext.ops.sinkhorn_knopp import Potentials

# Logits widened to fp32 at a time. On a CPU 4 MB, which the cache keeps: blocks of 64 MB take a fifth longer (48
# against 40 ms forward and backward of 64 x 65536 bf16, one core). Elsewhere large, for few launches.
LOGITS_AT_ONCE = {"cpu": 1 << 20}
LOGITS_AT_ONCE_ELSEWHERE = 1 << 26

KERNEL_DEVICES = ("cpu", "cuda")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assignment_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    potentials: Potentials,
    *,
    student_temperature: float,
    teacher_temperature: float,
    weight: Tensor | None = None,
    overwrite_student: bool = False,
) -> Tensor:
    """Cross-entropy of every student crop against every teacher crop of the same images.

    p[a, b, k] = exp(teacher[a, b, k] / teacher_temperature + rows[a B + b] + columns[k])
    losses[c, a] = sum_b weight[b] (logsumexp_k(s[c, b, :]) - sum_k p[a, b, k] s[c, b, k])
    with s = student / student_temperature.

    Saved for backward: the logits, the potentials and one number per student row. No gradient to the teacher.

    Args:
        student: (C, B, K) logits, fp32, bf16, fp16 or fp64.
        teacher: (A, B, K) logits.
        potentials: of the teacher's logits, rows in the order (A, B); rows (A * B,), columns (K,).
        student_temperature: > 0.
        teacher_temperature: > 0, the temperature the potentials were made with.
        weight: (B,) of each image or patch, or None for the mean: 1 / B. No gradient.
        overwrite_student: backward writes the gradient over the student logits instead of into new memory. The logits
            must then be the result of an operation and have no other reader: one that needs them in its own backward
            gets autograd's error about a tensor modified in place. Refused while compiling, where such a write would be
            silently wrong.
    Returns:
        (C, A) losses, fp32 (fp64 for fp64 logits).
    Raises:
        ValueError: wrong shape, type, device or temperature; overwrite_student on a leaf or while compiling.
        ImportError: the native library is not built (logits of one 16-bit type or fp32 on a CPU or CUDA device
            need it).
    """
    _check_inputs(student, teacher, potentials, student_temperature, teacher_temperature, weight)
    if overwrite_student and torch.compiler.is_compiling():
        raise ValueError("assignment_cross_entropy: overwrite_student must be False under torch.compile; got True")
    if overwrite_student and student.requires_grad and student.is_leaf:
        raise ValueError(
            "assignment_cross_entropy: overwrite_student needs student logits made by an operation; got a leaf tensor"
        )
    if reference_forced():
        return assignment_cross_entropy_reference(
            student,
            teacher,
            potentials,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            weight=weight,
        )
    temperatures = (student_temperature, teacher_temperature)
    if _has_kernel(student.device, student.dtype) and teacher.dtype is student.dtype:
        _library.require("assignment_cross_entropy")
        return _kernel(student, teacher, potentials, temperatures, weight, overwrite_student)
    return _AssignmentCrossEntropy.apply(
        student, teacher, potentials.rows, potentials.columns, weight, temperatures, overwrite_student
    )


def _kernel(
    student: Tensor,
    teacher: Tensor,
    potentials: Potentials,
    temperatures: tuple[float, float],
    weight: Tensor | None,
    overwrite_student: bool,
) -> Tensor:
    student, teacher = (x if x.shape[2] == 1 or x.stride(2) == 1 else x.contiguous() for x in (student, teacher))
    rows, columns = (x.detach().float().contiguous() for x in (potentials.rows, potentials.columns))
    weight = None if weight is None else weight.detach().float().contiguous()
    arguments = (teacher.detach(), rows, columns, *temperatures, weight)
    if overwrite_student:
        return _OverwritingKernel.apply(student, *arguments)
    return native_ops().assignment_cross_entropy(student, *arguments)[0]


def assignment_cross_entropy_reference(
    student: Tensor,
    teacher: Tensor,
    potentials: Potentials,
    *,
    student_temperature: float,
    teacher_temperature: float,
    weight: Tensor | None = None,
) -> Tensor:
    """The plain twin of `assignment_cross_entropy`: all written out, autograd's own backward."""
    _check_inputs(student, teacher, potentials, student_temperature, teacher_temperature, weight)
    wide = torch.float64 if student.dtype is torch.float64 else torch.float32
    views, rows = teacher.shape[:2]
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        scores = teacher.to(wide) / teacher_temperature
        p = (scores + potentials.rows.view(views, rows, 1) + potentials.columns).exp()  # (A, B, K)
    with torch.autocast(student.device.type, enabled=False):
        log_q = (student.to(wide) / student_temperature).log_softmax(-1)  # (C, B, K)
        each = -torch.einsum("abk,cbk->cab", p, log_q)  # (C, A, B)
        return each.sum(-1) / max(rows, 1) if weight is None else (each * weight.to(wide)).sum(-1)


class _AssignmentCrossEntropy(torch.autograd.Function):
    """Block after block of rows, so that nothing of the size of the logits is made but the gradient."""

    @staticmethod
    def forward(ctx, student, teacher, rows, columns, weight, temperatures, overwrite_student):
        wide = torch.float64 if student.dtype is torch.float64 else torch.float32
        factor = _factor(weight, student, wide)  # (B,)
        log_sums, losses = [], student.new_zeros(student.shape[0], teacher.shape[0], dtype=wide)
        with torch.autocast(student.device.type, enabled=False):
            for part in _blocks(student, teacher):
                s = student[:, part].to(wide, copy=True).div_(temperatures[0])  # (C, b, K)
                p = _probabilities(teacher, rows, columns, part, temperatures[1])  # (A, b, K)
                dots = torch.stack([(s * one).sum(-1) for one in p], 1)  # (C, A, b)
                log_sums.append(torch.logsumexp(s, -1))  # (C, b)
                losses = losses + ((log_sums[-1][:, None] - dots) * factor[part]).sum(-1)
        log_sum = torch.cat(log_sums, 1) if log_sums else losses.new_zeros(student.shape[0], 0)
        ctx.save_for_backward(student, teacher, rows, columns, factor, log_sum)
        ctx.temperatures, ctx.overwrite_student = temperatures, overwrite_student
        return losses

    @staticmethod
    def backward(ctx, losses_grad):  # (C, A)
        student, teacher, rows, columns, factor, log_sum = ctx.saved_tensors
        wide = log_sum.dtype
        grad = student if ctx.overwrite_student else torch.empty_like(student)
        total = losses_grad.sum(1)[:, None, None]  # (C, 1, 1)
        with torch.autocast(student.device.type, enabled=False):
            for part in _blocks(student, teacher):
                q = student[:, part].to(wide, copy=True).div_(ctx.temperatures[0])  # (C, b, K)
                q.sub_(log_sum[:, part, None]).exp_().mul_(total)
                p = _probabilities(teacher, rows, columns, part, ctx.temperatures[1])  # (A, b, K)
                for one, share in zip(p, losses_grad.T):  # A is 1 or 2: a matrix product took 4 times as long
                    q.addcmul_(one, share[:, None, None], value=-1)
                grad[:, part] = q.mul_(factor[part, None] / ctx.temperatures[0])
        return (grad.detach() if ctx.overwrite_student else grad), None, None, None, None, None, None


class _OverwritingKernel(torch.autograd.Function):
    """The kernels, the gradient written over the student's logits."""

    @staticmethod
    def forward(ctx, student, *arguments):
        ctx.ops = native_ops()  # backward may run outside the `with use(...)` of the forward
        losses, log_sums = ctx.ops.assignment_cross_entropy(student, *arguments)
        _save(ctx, student, arguments, log_sums)
        return losses

    @staticmethod
    def backward(ctx, grad):
        student, *rest = ctx.saved_tensors
        arguments = _arguments(ctx, *rest)
        ctx.ops.assignment_cross_entropy_backward_(grad.contiguous(), student, *arguments)
        torch.autograd.graph.increment_version(student)  # ops of the stable ABI leave it to the caller
        return (student.detach(), *(None for _ in range(6)))


def _save(ctx, student: Tensor, arguments: tuple, log_sums: Tensor) -> None:
    teacher, rows, columns, *ctx.temperatures, weight = arguments
    ctx.save_for_backward(student, teacher, rows, columns, log_sums, weight)


def _arguments(ctx, teacher, rows, columns, log_sums, weight) -> tuple:
    """What the backward ops take behind the gradient and the student."""
    return (teacher, rows, columns, log_sums, *ctx.temperatures, weight)


def _factor(weight: Tensor | None, student: Tensor, wide: torch.dtype) -> Tensor:
    """(B,) what each row's cross-entropy is multiplied with."""
    rows = student.shape[1]
    return student.new_full((rows,), 1 / max(rows, 1), dtype=wide) if weight is None else weight.detach().to(wide)


def _blocks(student: Tensor, teacher: Tensor) -> list[slice]:
    """Slices of the B rows."""
    crops, rows, prototypes = student.shape
    if torch.compiler.is_compiling():  # one loop nest after fusion: nothing wide is stored
        return [slice(0, rows)]
    at_once = LOGITS_AT_ONCE.get(student.device.type, LOGITS_AT_ONCE_ELSEWHERE)
    step = max(1, at_once // ((crops + teacher.shape[0]) * prototypes))
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def _probabilities(teacher: Tensor, rows: Tensor, columns: Tensor, part: slice, temperature: float) -> Tensor:
    """Assignments of some rows: (A, b, K) in the type of the potentials."""
    scores = teacher[:, part].to(columns.dtype, copy=True).div_(temperature)
    return scores.add_(rows.view(teacher.shape[:2])[:, part, None]).add_(columns).exp_()


def _check_inputs(
    student: Tensor,
    teacher: Tensor,
    potentials: Potentials,
    student_temperature: float,
    teacher_temperature: float,
    weight: Tensor | None,
) -> None:
    op = "assignment_cross_entropy"
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[1:] != teacher.shape[1:]:
        raise ValueError(
            f"{op}: student (C, B, K) and teacher (A, B, K) must share B and K; "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if not student.is_floating_point() or not teacher.is_floating_point():
        raise ValueError(f"{op}: student and teacher must be floating point; got {student.dtype}, {teacher.dtype}")
    views, rows, prototypes = teacher.shape
    if potentials.rows.shape != (views * rows,) or potentials.columns.shape != (prototypes,):
        raise ValueError(
            f"{op}: potentials must be rows (A * B,) = ({views * rows},) and columns (K,) = ({prototypes},); "
            f"got {tuple(potentials.rows.shape)} and {tuple(potentials.columns.shape)}"
        )
    if weight is not None and weight.shape != (rows,):
        raise ValueError(f"{op}: weight must be (B,) = ({rows},) or None; got {tuple(weight.shape)}")
    if not student_temperature > 0 or not teacher_temperature > 0:
        raise ValueError(f"{op}: temperatures must be > 0; got {student_temperature} and {teacher_temperature}")


def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    return (device.type in KERNEL_DEVICES or emulator_forced()) and dtype in KERNEL_DTYPES


@explains("assignment_cross_entropy", "C", "B", "K")
def _explain(question: Question) -> Path:
    op, device, dtype = "assignment_cross_entropy", question.device, question.dtype
    if not _has_kernel(device, dtype):
        reason = "PyTorch operations over blocks of rows, assignments recomputed in backward"
        return Path(op, "composition", f"no kernel for {dtype} on {device.type}: {reason}")
    if emulator_forced():
        return Path(op, "kernel", "own CUDA kernel in the emulator")
    if _library.module is None:
        return Path(op, "missing", _library.problem)
    info = _library.build_info()
    if device.type == "cpu":
        return Path(op, "kernel", f"own CPU kernel, {info['cpu_variant']}")
    if info["cuda"] is None:
        return Path(op, "missing", "the library was built without nvcc: no CUDA kernels")
    reason = f"own CUDA kernels, built for {info['cuda_architectures']}"
    if question.shape is None or 0 in question.shape:
        return Path(op, "kernel", reason)
    crops, images, prototypes = question.shape
    views = 1 if crops == 1 else 2  # iBOT, DINO
    plan = _library.module.assignment_cross_entropy_plan(crops, views, images, prototypes)
    return Path(
        op,
        "kernel",
        f"{reason}; for A = {views}: a block takes {plan['images']} images, {plan['crops']} crops and {plan['views']} "
        f"views; forward {plan['forward_blocks']} blocks, rows in {plan['forward_ranges']} ranges, backward "
        f"{plan['backward_blocks']} blocks, rows in {plan['backward_ranges']}; on every architecture",
    )


@for_each_library
def _register(namespace: str) -> None:
    op = f"{namespace}::assignment_cross_entropy"

    @torch.library.register_fake(op)
    def _(student, teacher, rows, columns, student_temperature, teacher_temperature, weight):
        crops, images = student.shape[:2]
        return (
            student.new_empty((crops, teacher.shape[0]), dtype=torch.float32),
            student.new_empty((crops, images), dtype=torch.float64),
        )

    @torch.library.register_fake(f"{op}_backward")
    def _(grad, student, teacher, rows, columns, log_sums, student_temperature, teacher_temperature, weight):
        return student.new_empty(student.shape)

    @torch.library.register_fake(f"{op}_backward_")
    def _(grad, student, teacher, rows, columns, log_sums, student_temperature, teacher_temperature, weight):
        return None

    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        student, *arguments = inputs
        _save(ctx, student, arguments, output[1])

    def backward(ctx, grad: Tensor, _log_sums_grad: Tensor) -> tuple:
        student, *rest = ctx.saved_tensors
        ops = getattr(torch.ops, namespace)
        gradient = ops.assignment_cross_entropy_backward(grad.contiguous(), student, *_arguments(ctx, *rest))
        return (gradient, *(None for _ in range(6)))

    torch.library.register_autograd(op, backward, setup_context=setup_context)
