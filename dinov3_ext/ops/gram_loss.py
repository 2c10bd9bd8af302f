"""Gram anchoring: the patches' cosine similarities of a student against those of a teacher."""

import torch
import torch.nn.functional as F
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

CLIPS = ("none", "both", "teacher")
SMALLEST_NORM = 1e-12
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Devices of the native op in this build.
_KERNEL_DEVICES = () if _library.module is None else ("cpu", "cuda") if _library.build_info()["cuda"] else ("cpu",)


def gram_loss(student: Tensor, teacher: Tensor, *, clip: str = "none") -> Tensor:
    """Mean squared difference of the patches' cosine similarities.

    loss = mean over s, i, j of (phi(cos(x_si, x_sj)) - psi(cos(y_si, y_sj)))^2;  phi, psi: identity or max(., 0)

    fp32 features stay fp32 under autocast: rounding them to bf16 costs 2 to 30 % of the gradient as student and teacher
    come close. The kernels take them as pairs of 16-bit numbers, three products for one. The similarities of all images
    are never held at once; the gradient is computed in forward, backward is a multiplication.

    Args:
        student: (S, N, D) features, fp32, bf16, fp16 or fp64; any strides.
        teacher: (S, N, D) features, of the student's type or another; no gradient flows to them.
        clip: `"none"`; `"both"`: negative similarities count as zero on both sides; `"teacher"`: the teacher's only.
            Similarities of exactly zero pass the gradient.
    Returns:
        scalar, fp32 (fp64 for fp64 features).
    Raises:
        ValueError: wrong shape, type, device or clip.
    Source:
        DINOv3 (arXiv 2508.10104), section 4.2.
    """
    _check_inputs("gram_loss", student, teacher, clip)
    if reference_forced():
        return gram_loss_reference(student, teacher, clip=clip)
    gradient = student.requires_grad and torch.is_grad_enabled()
    native = emulator_forced() or student.device.type in _KERNEL_DEVICES
    native = native and student.dtype in KERNEL_DTYPES and teacher.dtype in KERNEL_DTYPES
    op = native_ops().gram_loss if native else torch.ops.dinov3_ext.gram_loss_composition
    return op(student, teacher.detach(), clip, gradient)[0]


def gram_loss_reference(student: Tensor, teacher: Tensor, *, clip: str = "none") -> Tensor:
    """The plain twin of `gram_loss`: all similarity matrices at once, autograd's own backward."""
    _check_inputs("gram_loss_reference", student, teacher, clip)
    wide = torch.float64 if student.dtype is torch.float64 else torch.float32
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = (
            F.normalize(x.to(wide), dim=-1, eps=SMALLEST_NORM) for x in (student, teacher.detach())
        )  # (S, N, D)
        similarity, target = ours @ ours.transpose(1, 2), theirs @ theirs.transpose(1, 2)  # (S, N, N)
        if clip == "both":
            similarity = torch.where(similarity < 0, 0.0, similarity)
        if clip != "none":
            target = torch.where(target < 0, 0.0, target)
        return (similarity - target).square().mean()


def _grad_dtype(student: Tensor) -> torch.dtype:
    """The gradient waits for its upstream factor, often the scale of an fp16 loss: without it fp16 is too narrow."""
    return torch.float32 if student.dtype is torch.float16 else student.dtype


@torch.library.custom_op("dinov3_ext::gram_loss_composition", mutates_args=())
def _composition(student: Tensor, teacher: Tensor, clip: str, gradient: bool) -> tuple[Tensor, Tensor]:
    """The native op in PyTorch operations: (loss (), d loss / d student (S, N, D), or (0,) when not asked for)."""
    wide = torch.float64 if student.dtype is torch.float64 else torch.float32
    images, patches, _ = student.shape
    entries = images * patches * patches
    loss = student.new_zeros((), dtype=wide)
    grad = student.new_empty(student.shape if gradient else 0, dtype=_grad_dtype(student))
    with torch.autocast(student.device.type, enabled=False):
        for image in range(images):
            x = student[image].to(wide)
            inverse = x.norm(dim=-1, keepdim=True).clamp_min(SMALLEST_NORM).reciprocal()  # (N, 1)
            x = x * inverse
            y = F.normalize(teacher[image].to(wide), dim=-1, eps=SMALLEST_NORM)
            similarity, target = x @ x.T, y @ y.T  # (N, N)
            kept = similarity.clamp_min(0) if clip == "both" else similarity
            difference = kept - (target if clip == "none" else target.clamp_min(0))
            loss += difference.square().sum()
            if gradient:
                if clip == "both":
                    difference = difference.masked_fill_(similarity < 0, 0)
                along = (difference * similarity).sum(-1, keepdim=True)  # (N, 1): what the normalisation takes back
                # A row shorter than SMALLEST_NORM is divided by a constant: nothing is taken back.
                along = torch.where(inverse >= 1 / SMALLEST_NORM, 0.0, along)
                grad[image] = (difference @ x - along * x) * inverse * (4 / entries)
    return loss / entries, grad


def _fake(student: Tensor, teacher: Tensor, clip: str, gradient: bool) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if student.dtype is torch.float64 else torch.float32
    grad = student.new_empty(student.shape if gradient else 0, dtype=_grad_dtype(student))
    return student.new_empty((), dtype=wide), grad


def _keep_gradient(ctx, inputs, output) -> None:
    ctx.student_dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else autograd makes zeros of the gradient's size for the second output


def _scale_gradient(ctx, loss_grad: Tensor | None, _: Tensor | None) -> tuple:
    if loss_grad is None:
        return None, None, None, None
    (grad,) = ctx.saved_tensors
    if type(grad) is not Tensor or torch._C._autograd._get_current_graph_task_keep_graph():  # traced, or used again
        return (grad * loss_grad).to(ctx.student_dtype), None, None, None
    # The graph is used up: its gradient becomes the result, no second one is held.
    ctx.maybe_clear_saved_tensors()
    return grad.mul_(loss_grad).to(ctx.student_dtype), None, None, None


_composition.register_fake(_fake)
_composition.register_autograd(_scale_gradient, setup_context=_keep_gradient)


@for_each_library
def _register(namespace: str) -> None:
    torch.library.register_fake(f"{namespace}::gram_loss", _fake)
    torch.library.register_autograd(f"{namespace}::gram_loss", _scale_gradient, setup_context=_keep_gradient)


def _check_inputs(op: str, student: Tensor, teacher: Tensor, clip: str) -> None:
    if student.ndim != 3 or 0 in student.shape:
        raise ValueError(f"{op}: student must be (S, N, D), none of them zero; got {tuple(student.shape)}")
    if teacher.shape != student.shape:
        raise ValueError(
            f"{op}: teacher must have the student's shape {tuple(student.shape)}; got {tuple(teacher.shape)} "
            "(resize its patch grid first)"
        )
    if not student.is_floating_point() or not teacher.is_floating_point():
        raise ValueError(f"{op}: student and teacher must be floating point; got {student.dtype}, {teacher.dtype}")
    if student.device != teacher.device:
        raise ValueError(f"{op}: student and teacher must be on one device; got {student.device}, {teacher.device}")
    if clip not in CLIPS:
        raise ValueError(f"{op}: clip must be one of {', '.join(CLIPS)}; got {clip!r}")


@explains("gram_loss", "S", "N", "D")
def _explain(question: Question) -> Path:
    device, dtype = question.device, question.dtype
    composition = "PyTorch operations, one image at a time, gradient in forward"
    if dtype not in KERNEL_DTYPES or device.type not in ("cpu", "cuda"):
        return Path("gram_loss", "composition", f"{composition}; no kernel for {dtype} on {device.type}")
    if _library.module is None:
        return Path("gram_loss", "composition", f"{composition}; {_library.problem}")
    if device.type == "cpu" and not emulator_forced():
        return Path("gram_loss", "kernel", f"own CPU kernel, {_library.build_info()['cpu_variant']}")
    if device.type not in _KERNEL_DEVICES:
        return Path("gram_loss", "composition", f"{composition}; the library was built without nvcc: no CUDA kernels")
    numbers = "pairs of fp16 numbers, three products for one" if dtype is torch.float32 else "one fp16 number each"
    reason = f"own CUDA kernels, features on scaled rows as {numbers}"
    if question.shape is None or 0 in question.shape:
        return Path("gram_loss", "kernel", reason)
    plan = _library.module.gram_loss_plan(*question.shape, 2 if dtype is torch.float32 else 1, True)
    return Path(
        "gram_loss",
        "kernel",
        f"{reason}; tiles of {plan['tile']} x {plan['tile']}, {plan['tiles']} an image, on every architecture; "
        f"{plan['chunk']} images at a time, workspace {plan['workspace_bytes'] / 2**20:.1f} MiB",
    )
