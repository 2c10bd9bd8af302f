"""One rank of tests/train/test_distributed.py: `python one_rank.py FOLDER` under the environment torchrun would set.

Runs every case and saves what it saw as FOLDER/rank_R.pt: {case: {"losses", "gradients", "weights", "finite", ...}}.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tiny_training import BACKBONE, VALUES, batch, gradients, settings, state

from dinov3_train.losses import GramLoss, LossPart
from dinov3_train.models.vit import VisionTransformer
from dinov3_train.train.distributed import Ranks, any_rank, barrier, ranks, replicated
from dinov3_train.train.gram import GramTeacher
from dinov3_train.train.step import train_step


@dataclass(frozen=True)
class Case:
    """A step over a global batch. images: of the global batch; nan_rank: whose loss or gradient is made not finite."""

    images: int = 8
    accumulate: int = 1
    koleo_group: int = 4
    masked: tuple[int, ...] = (0, 3, 4, 6)
    rope_draw: str = "sequence"
    local_crops: int = 3
    nan_rank: int | None = None
    nan_in_gradient: bool = False
    gram_level: str | None = None  # of a Gram term against a teacher of its own


CASES = {
    "groups within a rank": Case(),
    "rotary draws per block": Case(rope_draw="block"),
    "a group over all ranks": Case(koleo_group=8),
    "groups across the border": Case(images=12, koleo_group=4),  # six images a rank: the middle group has two of each
    "masks on the first rank only": Case(masked=(0, 1, 2)),
    "nothing masked": Case(masked=()),
    "accumulation": Case(images=16, accumulate=2, masked=(0, 3, 5, 9, 10, 11)),
    "global crops only": Case(local_crops=0),
    "Gram term per image": Case(gram_level="image"),
    "Gram term over the batch": Case(gram_level="batch"),
}
BROKEN = {
    "nan loss": Case(nan_rank=1),
    "nan gradient": Case(nan_rank=1, nan_in_gradient=True),
    "nan loss on the first rank": Case(nan_rank=0),
}


def run(case: Case, here: Ranks) -> dict:
    """One step of this rank's share; with world size 1 the whole batch."""
    backbone = replace(
        BACKBONE,
        rope=replace(BACKBONE.rope, draw=case.rope_draw),
        untie_local_cls_norm=case.local_crops > 0,  # without local crops it would have no gradient
    )
    found = state(backbone, shared=lambda student: replicated(student, here.world_size))

    terms = ()
    if case.gram_level is not None:
        terms = (GramLoss(weight=2.0, level=case.gram_level),)
        found.gram_teacher = gram_teacher()

    def broken(outputs, targets, record, collectives):
        if here.rank != case.nan_rank:
            return []
        zero = outputs.cls * 0.0
        return [LossPart("broken", zero.sum().sqrt() if case.nan_in_gradient else zero.sum() * float("nan"), 1.0)]

    before = {name: value.clone() for name, value in found.student.state_dict().items()}
    report = train_step(
        found,
        [shares(case, here, part) for part in range(case.accumulate)],
        VALUES,
        settings(
            batch_size=case.images, koleo_group=case.koleo_group, collectives=here.collectives, terms=(*terms, broken)
        ),
    )
    names = ("loss", "dino_global", "dino_local", "ibot", "koleo", "gram")
    losses = {name: report.losses[name] for name in names if name in report.losses}
    after = found.student.state_dict()
    return {
        "losses": {n: here.collectives.all_reduce(v.clone(), "sum") / here.world_size for n, v in losses.items()},
        "gradients": gradients(found),
        "weights": {name: value.clone() for name, value in after.items()},
        "teacher": {name: value.clone() for name, value in found.teacher.state_dict().items()},
        "finite": report.finite,
        "skipped": found.skipped,
        "moved": any(not torch.equal(before[name], after[name]) for name in before),
    }


def gram_teacher() -> GramTeacher:
    """The teacher of another seed, frozen, on the global crops."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        backbone = VisionTransformer(BACKBONE).eval().requires_grad_(False)
    return GramTeacher(backbone, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def shares(case: Case, here: Ranks, part: int):
    """This rank's contiguous slice of micro-batch `part`."""
    images = case.images // case.accumulate // here.world_size
    first = (part * here.world_size + here.rank) * images
    return batch(range(first, first + images), batch_size=case.images, local_crops=case.local_crops, masked=case.masked)


def exchanges(here: Ranks) -> dict:
    """What the collectives give: sums, maxima, gathered rows and the gradient through a gather."""
    row = torch.tensor([[float(here.rank + 1), -float(here.rank)]], requires_grad=True)  # (1, 2)
    gathered = here.collectives.all_gather(row)  # (W, 2)
    (gathered * (here.rank + 1)).pow(2).sum().backward()
    mine = torch.tensor([1.0, float(here.rank)])
    return {
        "gathered": gathered.detach(),
        "gradient": row.grad,
        "sum": here.collectives.all_reduce(mine, "sum"),
        "max": here.collectives.all_reduce(mine, "max"),
        "kept": mine,
        "any": any_rank((here.rank == 1, False), here.collectives, here.device)[0],
        "none": any_rank((here.rank == 1, False), here.collectives, here.device)[1],
        "place": (here.rank, here.world_size, here.first, here.collectives.rank, here.collectives.world_size),
    }


def main(folder: Path) -> None:
    """All cases on this rank."""
    torch.set_num_threads(1)
    with ranks() as here:
        found = {name: run(case, here) for name, case in (CASES | BROKEN).items()}
        found["exchanges"] = exchanges(here)
        barrier()
    torch.save(found, folder / f"rank_{here.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
