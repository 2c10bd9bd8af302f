"""Gram anchoring: the patches' cosine similarities of a student against those of a teacher."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_ext._paths import Path, Question, explains, reference_forced

CLIPS = ("none", "both", "teacher")
SMALLEST_NORM = 1e-12


def gram_loss(student: Tensor, teacher: Tensor, *, clip: str = "none") -> Tensor:
    """Mean squared difference of the patches' cosine similarities.

    loss = mean over s, i, j of (phi(cos(x_si, x_sj)) - psi(cos(y_si, y_sj)))^2;  phi, psi: identity or max(., 0)

    fp32 features stay fp32 under autocast: rounding them to bf16 costs 2 to 30 % of the gradient as student and teacher
    come close. One image's similarities are held at a time, in forward; backward is a multiplication.

    Args:
        student: (S, N, D) features, fp32, bf16, fp16 or fp64.
        teacher: (S, N, D) features; no gradient flows to them.
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
    return torch.ops.dinov3_ext.gram_loss(student, teacher.detach(), clip, gradient)[0]


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


@torch.library.custom_op("dinov3_ext::gram_loss", mutates_args=())
def _gram_loss(student: Tensor, teacher: Tensor, clip: str, gradient: bool) -> tuple[Tensor, Tensor]:
    """(loss (), d loss / d student (S, N, D), or (0,) when not asked for)."""
    wide = torch.float64 if student.dtype is torch.float64 else torch.float32
    images, patches, _ = student.shape
    entries = max(images * patches * patches, 1)
    loss = student.new_zeros((), dtype=wide)
    grad = torch.empty_like(student) if gradient else student.new_empty(0)
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


@_gram_loss.register_fake
def _(student: Tensor, teacher: Tensor, clip: str, gradient: bool) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if student.dtype is torch.float64 else torch.float32
    return student.new_empty((), dtype=wide), torch.empty_like(student) if gradient else student.new_empty(0)


def _keep_gradient(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _scale_gradient(ctx, loss_grad: Tensor, _: Tensor | None) -> tuple:
    (grad,) = ctx.saved_tensors
    return (grad * loss_grad).to(grad.dtype), None, None, None


_gram_loss.register_autograd(_scale_gradient, setup_context=_keep_gradient)


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
    return Path(
        "gram_loss",
        "composition",
        "PyTorch operations, one image at a time, gradient in forward; no kernel of our own yet",
    )
