"""A training state small enough for tests: three blocks of width 32, 4 x 4 patches, random images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from dinov3_ext import ALONE, Collectives
from dinov3_train.config import Backbone, Head, Rope
from dinov3_train.data.batch import CropBatch
from dinov3_train.losses import DinoLoss, IbotLoss, KoLeoLoss, Term
from dinov3_train.models.heads import ProjectionHead
from dinov3_train.models.vit import VisionTransformer
from dinov3_train.train.networks import Networks, teacher_of
from dinov3_train.train.optimizer import adamw
from dinov3_train.train.step import StepSettings, StepValues, TrainState

GLOBAL_SIZE, LOCAL_SIZE, PATCH = 16, 8, 4
PATCHES = (GLOBAL_SIZE // PATCH) ** 2

BACKBONE = Backbone(
    name="test",
    embed_dim=32,
    depth=3,
    heads=2,
    patch_size=PATCH,
    registers=2,
    layer_scale=0.5,
    untie_local_cls_norm=True,
    drop_path=0.3,
    rope=Rope(rescale=2.0, jitter=1.1, shift=0.1),
)
STILL = replace(BACKBONE, drop_path=0.0, rope=Rope(rescale=None))  # nothing drawn at random
HEAD = Head(hidden=32, bottleneck=16, prototypes=24)

VALUES = StepValues(
    learning_rate=1e-3,
    prototype_rate=1e-3,
    backbone_rate=1e-3,
    weight_decay=0.04,
    momentum=0.9,
    teacher_temperature=0.07,
)


def networks(backbone: Backbone = BACKBONE, *, checkpointing: str = "none") -> Networks:
    """The same student every time; weights larger than at a run's start, so that everything matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = VisionTransformer(backbone), ProjectionHead(32, HEAD), ProjectionHead(32, HEAD)
        student = Networks(*parts, checkpointing=checkpointing)
        for parameter in student.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return student.train()


def state(
    backbone: Backbone = BACKBONE, *, shared: Callable = lambda student: student, checkpointing: str = "none"
) -> TrainState:
    """A state at step 0 whose teacher is not the student, as after some steps. `shared` makes `replicated`."""
    student = networks(backbone, checkpointing=checkpointing)
    teacher = teacher_of(student)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    optimizer = adamw(student, betas=(0.9, 0.99), layer_decay=0.9, patch_embed_multiplier=0.2)
    return TrainState(student, teacher, optimizer, shared(student))


def settings(
    *,
    batch_size: int = 4,
    koleo_group: int | None = None,
    collectives: Collectives = ALONE,
    terms: tuple[Term, ...] = (),
    clip: float | None = None,
    autocast: torch.dtype | None = None,
) -> StepSettings:
    """The three losses of pretraining and `terms` more."""
    losses = (
        DinoLoss(weight=1.0, student_temperature=0.1),
        IbotLoss(weight=1.0, student_temperature=0.1),
        KoLeoLoss(weight=0.1, group=koleo_group),
    )
    return StepSettings(
        terms=(*losses, *terms),
        seed=5,
        batch_size=batch_size,
        sinkhorn_iterations=3,
        clip=clip,
        autocast=autocast,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        collectives=collectives,
        max_skipped=3,
    )


def batch(
    positions: range, *, batch_size: int, step: int = 0, local_crops: int = 3, masked: range | None = None
) -> CropBatch:
    """The images at `positions` of a global batch, each a function of its sample index alone.

    masked: positions of which both global crops are masked, 3 and 5 patches; by default every other one.
    """
    indices = np.arange(step * batch_size + positions.start, step * batch_size + positions.stop)
    masked = range(0, batch_size, 2) if masked is None else masked
    generators = [np.random.default_rng(int(index)) for index in indices]
    images, masks = len(indices), torch.zeros(2, len(indices), PATCHES, dtype=torch.bool)

    def crops(count: int, side: int) -> torch.Tensor:
        drawn = np.stack([g.integers(0, 256, (count, 3, side, side), dtype=np.uint8) for g in generators], axis=1)
        return torch.from_numpy(drawn)  # (count, B, 3, side, side)

    for image, (position, generator) in enumerate(zip(positions, generators)):
        if position in masked:
            for crop, count in enumerate((3, 5)):
                masks[crop, image, generator.permutation(PATCHES)[:count]] = True
    weights = 1.0 / masks.sum(-1, keepdim=True).clamp(min=1)  # (2, B, 1)
    return CropBatch(
        global_crops=crops(2, GLOBAL_SIZE),
        local_crops=crops(local_crops, LOCAL_SIZE) if local_crops else None,
        gram_crops=None,
        masks=masks,
        mask_indices=masks.flatten().nonzero().flatten(),
        mask_weights=weights.expand(masks.shape)[masks],
        indices=torch.from_numpy(indices),
        names=tuple(f"photo_{index}.jpg" for index in indices[:images]),
        skipped=(),
    )


def gradients(found: TrainState) -> dict[str, torch.Tensor]:
    """The student's gradients by parameter name, copied."""
    return {name: parameter.grad.clone() for name, parameter in found.student.named_parameters()}
