"""The losses of DINOv3 written once more from the paper, as loops over single numbers in float64, and inputs for them.

Nothing here is shared with the implementation but the formulas; gradients are autograd's through these loops.
"""

import math

import torch
from torch import Tensor

from dinov3_ext import sinkhorn_knopp
from dinov3_train.data.batch import CropBatch
from dinov3_train.losses import Outputs, Targets

STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.07


def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> list[list[float]]:
    """Logits (n, K) -> assignment n x K. Prototype masses to 1/K, then sample masses to 1/n, three times; times n."""
    n, prototypes = logits.shape
    q = [[math.exp(float(logits[b, k]) / temperature) for k in range(prototypes)] for b in range(n)]
    total = sum(map(sum, q))
    q = [[value / total for value in row] for row in q]
    for _ in range(iterations):
        for k in range(prototypes):
            mass = sum(q[b][k] for b in range(n))
            for b in range(n):
                q[b][k] /= mass * prototypes
        for b in range(n):
            mass = sum(q[b])
            q[b] = [value / (mass * n) for value in q[b]]
    return [[value * n for value in row] for row in q]


def cross_entropy(student: Tensor, target: list[float]) -> Tensor:
    """-sum_k q_k log softmax(z / 0.1)_k for one row of logits (K,)."""
    normaliser = sum(torch.exp(z / STUDENT_TEMPERATURE) for z in student).log()
    return -sum(q * (z / STUDENT_TEMPERATURE - normaliser) for q, z in zip(target, student))


def dino(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Student (G + L, B, K), teacher (G, B, K): means over images and pairs, (global, local)."""
    crops, images, _ = teacher.shape
    targets = sinkhorn(teacher.flatten(0, 1), TEACHER_TEMPERATURE)  # of all global crops of the batch together
    global_losses, local_losses = [], []
    for s in range(student.shape[0]):
        for t in range(crops):
            if s == t:
                continue
            for b in range(images):
                loss = cross_entropy(student[s, b], targets[t * images + b])
                (global_losses if s < crops else local_losses).append(loss)
    zero = student.new_zeros(())
    return tuple(sum(losses) / len(losses) if losses else zero for losses in (global_losses, local_losses))


def ibot(student: Tensor, teacher: Tensor, masks: Tensor) -> Tensor:
    """Student and teacher (M, K) at the masked patches of masks (G, B, N), in their order."""
    targets = sinkhorn(teacher, TEACHER_TEMPERATURE) if len(teacher) else []
    total, row = student.sum() * 0.0, 0
    for crop in masks.flatten(0, 1):
        masked = int(crop.sum())
        for _ in range(masked):
            total = total + cross_entropy(student[row], targets[row]) / masked
            row += 1
    assert row == len(student)
    return total / (masks.shape[0] * masks.shape[1])


def koleo(cls: Tensor, group: int) -> Tensor:
    """CLS (G, B, D): -mean_b log(distance to the nearest of the group + 1e-8), summed over crops."""
    total = cls.new_zeros(())
    for crop in cls:
        unit = [x / sum(value * value for value in x).sqrt() for x in crop]
        for b, x in enumerate(unit):
            others = [o for o in range(b // group * group, (b // group + 1) * group) if o != b]
            nearest = unit[max(others, key=lambda o: (x @ unit[o]).item())]
            distance = sum((x_d - n_d + 1e-8) ** 2 for x_d, n_d in zip(x, nearest)).sqrt()
            total = total - torch.log(distance + 1e-8) / len(unit)
    return total


def masks_of(counts: list[list[int]], patches: int) -> Tensor:
    """Masks bool (G, B, N) with so many masked patches per crop, scattered."""
    masks = torch.zeros(len(counts), len(counts[0]), patches, dtype=torch.bool)
    for crop, row in enumerate(counts):
        for image, count in enumerate(row):
            masks[crop, image, torch.randperm(patches)[:count]] = True
    return masks


def batch_of(masks: Tensor) -> CropBatch:
    """A batch of which losses read only the masks (G, B, N)."""
    images = masks.shape[1]
    return CropBatch(
        global_crops=torch.zeros(masks.shape[0], images, 3, 4, 4, dtype=torch.uint8),
        local_crops=None,
        gram_crops=None,
        masks=masks,
        mask_indices=masks.flatten().nonzero().flatten(),
        mask_weights=(1.0 / masks.sum(-1, keepdim=True).clamp(min=1)).expand(masks.shape)[masks],
        indices=torch.arange(images),
        names=tuple(map(str, range(images))),
        skipped=(),
    )


def outputs_of(
    *, cls: Tensor | None = None, dino_logits: Tensor | None = None, ibot_logits: Tensor | None = None
) -> Outputs:
    """Student outputs of which a loss reads one field."""
    nothing = torch.empty(0)
    fields = [nothing if tensor is None else tensor for tensor in (cls, dino_logits, ibot_logits)]
    return Outputs(cls=fields[0], patches=nothing, dino_logits=fields[1], ibot_logits=fields[2])


def targets_of(dino_logits: Tensor, ibot_logits: Tensor) -> Targets:
    """Teacher logits (G, B, K) and (M, K) with their potentials."""
    return Targets(
        dino_logits=dino_logits,
        dino_potentials=sinkhorn_knopp(dino_logits.flatten(0, 1), temperature=TEACHER_TEMPERATURE),
        ibot_logits=ibot_logits,
        ibot_potentials=sinkhorn_knopp(ibot_logits, temperature=TEACHER_TEMPERATURE),
        temperature=TEACHER_TEMPERATURE,
    )


def gradient(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Gradients of a scalar, zeros where it does not depend on an input."""
    return list(torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True, materialize_grads=True))
