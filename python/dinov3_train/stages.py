"""From the config of one stage to that of the next: what refinement and adaptation change, and nothing else.

The recipes `..._refine` and `..._adapt` stand on these; `dinov3 refine` and `dinov3 adapt` without a recipe apply them
to the settings of the run they continue, whatever its size.
"""

from __future__ import annotations

from dataclasses import replace

from .config import Config, Crops, Gram, Start

GRAM_WEIGHT = 2.0  # paper; the published high-resolution file says 1.5
ADAPTED_GRAM_WEIGHT = 1.5
# global, local and Gram sides of the adaptation as multiples of the pretraining's global, local and global side, and
# their share of the steps: 256 / 112 px become the paper's (512, 112, 768), (768, 112 to 336, 1152)
MIX = ((2, 1, 3, 0.3), (3, 1, 4.5, 0.3), (3, 1.5, 4.5, 0.3), (3, 2, 4.5, 0.05), (3, 3, 4.5, 0.05))


def refinement(pretraining: Config) -> Config:
    """Gram anchoring after this pretraining (paper section 4, spec 5).

    A fifth of its steps, as published (200k after 1M); the effect is there after a hundredth. Gram crops at twice the
    global crop's side; the Gram weight rises within half a percent of those steps; three copies of the EMA into the
    Gram teacher, a twentieth of the steps apart; learning rate times 0.6, constant; local DINO weight 0.5.
    """
    steps = max(pretraining.run.steps // 5, 1)
    last = pretraining.optimizer
    return replace(
        pretraining,
        recipe=f"{pretraining.recipe or 'run'}_refine",
        crops=replace(pretraining.crops, gram_size=2 * pretraining.crops.global_size),
        gram=Gram(weight=GRAM_WEIGHT, ramp=steps // 200, refresh_every=max(steps // 20, 1), refreshes=3),
        start=Start(student="student", optimizer=True),
        init=replace(pretraining.init, weights=None, architecture="recipe"),  # the run has them; their licence stays
        losses=replace(
            pretraining.losses,
            teacher_temperature_start=pretraining.losses.teacher_temperature,
            teacher_temperature_warmup=0,
            local_weight=0.5,
            local_weight_start=pretraining.losses.local_weight,
            local_weight_ramp=steps // 200,
        ),
        optimizer=replace(
            last,
            lr=0.6 * last.lr,
            lr_end=None,
            warmup=0,
            cooldown=0,
            weight_decay=last.weight_decay if last.weight_decay_end is None else last.weight_decay_end,
            weight_decay_end=None,
            momentum=max(last.momentum, min(last.momentum_end or 0.0, 0.999)),
            momentum_end=None,
            freeze_prototypes=0,
            freeze_backbone=0,
            backbone_ramp=0,
        ),
        run=replace(
            pretraining.run,
            steps=steps,
            minutes=None,
            seed=pretraining.run.seed + 1,  # other images first, other crops
            checkpointing="none" if pretraining.run.checkpointing == "none" else "full",
            history_every=0,
            drift_every=0,
        ),
    )


def adaptation(refined: Config) -> Config:
    """High-resolution adaptation after this refinement (paper section 5.1, spec 5).

    A twentieth of its steps; mixed crop sizes, half the batch; student and EMA teacher begin as the refined EMA
    teacher, which is the Gram teacher too; a quarter of the learning rate after a cosine ramp over a third of the
    steps; full activation checkpointing.
    """
    steps, batch = max(refined.run.steps // 20, 1), max(refined.run.batch_size // 2, 2)
    return replace(
        refined,
        recipe=f"{(refined.recipe or 'run').removesuffix('_refine')}_adapt",
        crops=mixed(refined.crops, refined.backbone.patch_size),
        gram=Gram(weight=ADAPTED_GRAM_WEIGHT),
        start=Start(student="teacher", optimizer=False),
        losses=replace(refined.losses, local_weight_start=None, local_weight_ramp=0),
        optimizer=replace(
            refined.optimizer,
            lr=0.25 * refined.optimizer.lr,
            lr_end=None,
            cooldown=0,
            warmup=steps // 3,
            warmup_shape="cosine",
            momentum=max(refined.optimizer.momentum, min(refined.optimizer.momentum_end or 0.0, 0.999)),
            momentum_end=None,
        ),
        run=replace(
            refined.run,
            steps=steps,
            minutes=None,
            seed=refined.run.seed + 1,
            batch_size=batch,
            checkpointing="full",
            history_every=0,
        ),
    )


def mixed(crops: Crops, patch_size: int) -> Crops:
    """These crops with the paper's mix of sides, scaled to them and rounded to whole patches."""

    def side(pixels: float) -> int:
        return max(round(pixels / patch_size), 1) * patch_size

    wide, local = crops.global_size, crops.local_size
    mix = tuple((side(g * wide), side(n * local), side(t * wide), share) for g, n, t, share in MIX)
    return replace(crops, global_size=mix[-1][0], gram_size=mix[-1][2], mix=mix)
