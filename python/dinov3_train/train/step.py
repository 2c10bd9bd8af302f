"""One step of DINOv3, whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from dinov3_ext import Collectives

from ..data.batch import CropBatch, normalize, resized
from ..losses import Targets, Term
from ..models.draws import training_draws
from .gram import GramTeacher
from .networks import MODULES, Networks, update_teacher
from .optimizer import set_rates


@dataclass(frozen=True, kw_only=True)
class StepValues:
    """What the schedules say at one step."""

    learning_rate: float
    prototype_rate: float
    backbone_rate: float
    weight_decay: float
    momentum: float
    teacher_temperature: float
    weights: Mapping[str, float] = field(default_factory=dict)  # scheduled factors of loss parts, by name; else 1
    refresh_gram: bool = False  # copy the EMA into the Gram teacher after this step


class TargetSource(Protocol):
    """Whatever the student follows: the EMA teacher, or the frozen one of a distillation. See `Networks.targets`."""

    def targets(
        self, batch: CropBatch, global_crops: Tensor, *, temperature: float, iterations: int, collectives: Collectives
    ) -> Targets: ...


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What does not change over a run."""

    terms: tuple[Term, ...]
    seed: int
    batch_size: int  # images over all ranks and micro-batches
    sinkhorn_iterations: int
    clip: float | None
    autocast: torch.dtype | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    collectives: Collectives
    max_skipped: int
    teacher: TargetSource | None = None  # frozen, of a distillation; None: the EMA teacher
    student_size: int | None = None  # side the student sees its global crops at, pixels; None: the batch's own


@dataclass
class TrainState:
    """All that training changes; a checkpoint is this and nothing else."""

    student: Networks
    teacher: Networks
    optimizer: torch.optim.AdamW
    replicated: nn.Module  # the student as the ranks share it: DistributedDataParallel, or the student itself
    step: int = 0
    skipped: int = 0  # non-finite steps in a row
    images: int = field(default=0)  # seen by this run, all ranks
    gram_teacher: GramTeacher | None = None  # of refinement and adaptation


@dataclass(frozen=True)
class StepReport:
    """What one step did: loss parts of this rank, gradient norms per module, and whether it was taken."""

    losses: dict[str, Tensor]  # scalars on the device, unweighted, and "loss", the weighted total
    gradient_norms: dict[str, Tensor]
    finite: bool


def train_step(
    state: TrainState, batches: Sequence[CropBatch], values: StepValues, settings: StepSettings
) -> StepReport:
    """Teacher targets, student outputs, losses, gradients, AdamW, EMA; the Gram teacher where there is one.

    Args:
        state: changed in place; left as it was (but for its counters) when a loss or gradient is not finite.
        batches: the step's micro-batches; Sinkhorn-Knopp and KoLeo see one at a time.
        values: of the schedules at `state.step`.
        settings: of the run.

    Errors: RuntimeError after `max_skipped` non-finite steps in a row, with the loss parts and image names.
    """
    device = next(state.student.parameters()).device
    teacher = state.teacher if settings.teacher is None else settings.teacher
    autocast = torch.autocast(device.type, settings.autocast, enabled=settings.autocast is not None)
    state.optimizer.zero_grad(set_to_none=True)
    losses: dict[str, Tensor] = {}

    for number, host_batch in enumerate(batches):
        batch = host_batch.to(device)
        global_crops = normalize(batch.global_crops, settings.mean, settings.std)  # (G, B, 3, Y, X)
        seen = global_crops if settings.student_size is None else resized(global_crops, settings.student_size)
        local_crops = None if batch.local_crops is None else normalize(batch.local_crops, settings.mean, settings.std)
        draws = training_draws(
            state.student.backbone.backbone,
            seed=settings.seed,
            step=state.step,
            indices=host_batch.indices.numpy(),
            first=int(host_batch.indices[0]) % settings.batch_size,
            crops_per_image=(len(global_crops), 0 if local_crops is None else len(local_crops)),
            batch_size=settings.batch_size,
        )
        last = number == len(batches) - 1
        with nullcontext() if last or not hasattr(state.replicated, "no_sync") else state.replicated.no_sync():
            with autocast:
                targets = teacher.targets(
                    batch,
                    global_crops,
                    temperature=values.teacher_temperature,
                    iterations=settings.sinkhorn_iterations,
                    collectives=settings.collectives,
                )
                if state.gram_teacher is not None:
                    patches = state.gram_teacher.patches(batch, state.student.backbone.patch_size)
                    targets = replace(targets, gram_patches=patches)
                outputs = state.replicated(batch, seen, local_crops, draws)
                parts = [
                    part for term in settings.terms for part in term(outputs, targets, batch, settings.collectives)
                ]
            loss = sum(values.weights.get(part.name, 1.0) * part.weight * part.value for part in parts)
            (loss / len(batches)).backward()
        for name, value in [("loss", loss), *((part.name, part.value) for part in parts)]:
            losses[name] = losses.get(name, 0.0) + value.detach().float() / len(batches)

    norms = clip_per_module(state.student, settings.clip)
    broken = torch.stack([*losses.values(), *norms.values()]).isfinite().all().logical_not().float()
    finite = float(settings.collectives.all_reduce(broken, "max")) == 0.0  # on all ranks together
    if finite:
        set_rates(
            state.optimizer,
            learning_rate=values.learning_rate,
            prototype_rate=values.prototype_rate,
            backbone_rate=values.backbone_rate,
            weight_decay=values.weight_decay,
        )
        state.optimizer.step()
        update_teacher(state.teacher, state.student, momentum=values.momentum)
    if values.refresh_gram and state.gram_teacher is not None:
        state.gram_teacher.refresh(state.teacher.backbone)
    state.step += 1
    state.images += settings.batch_size
    state.skipped = 0 if finite else state.skipped + 1
    if not finite and state.skipped >= settings.max_skipped:
        raise RuntimeError(_non_finite(state, losses, norms, batches))
    return StepReport(losses, norms, finite)


def clip_per_module(student: Networks, clip: float | None) -> dict[str, Tensor]:
    """Clip the gradients of backbone and heads separately to `clip`; the norms before clipping."""
    norms = {}
    for name, module in ((name, getattr(student, name)) for name in MODULES):
        if module is None:
            continue
        parameters = list(module.parameters())
        norms[name] = nn.utils.clip_grad_norm_(parameters, float("inf") if clip is None else clip)
    return norms


def _non_finite(
    state: TrainState, losses: dict[str, Tensor], norms: dict[str, Tensor], batches: Sequence[CropBatch]
) -> str:
    parts = ", ".join(f"{name} = {float(value):.4g}" for name, value in losses.items())
    gradients = ", ".join(f"{name} = {float(value):.4g}" for name, value in norms.items())
    names = [name for batch in batches for name in batch.names]
    shown = ", ".join(names[:16]) + (f" and {len(names) - 16} more" if len(names) > 16 else "")
    return (
        f"training stopped at step {state.step - 1}: {state.skipped} steps in a row were not finite and were "
        f"skipped, the weights are those of the last finite step. Loss parts: {parts}. Gradient norms: {gradients}. "
        f"Images: {shown}"
    )
