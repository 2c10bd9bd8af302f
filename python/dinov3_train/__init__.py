"""DINOv3 training on your own images: `pretrain(config, out)`, `refine`, `adapt`, `distill`, `load(run)`, `recipes`."""

from __future__ import annotations

__all__ = ["adapt", "distill", "load", "pretrain", "refine"]


def pretrain(config, out, **settings):
    """Train or continue a run; see `dinov3_train.build.pretrain`."""
    from .build import pretrain as run  # torchvision, tensorboard and the rest load when they are needed

    return run(config, out, **settings)


def load(run, *, step=None):
    """The backbone a run has trained; see `dinov3_train.build.load`."""
    from .build import load as found

    return found(run, step=step)


def refine(run, out, **settings):
    """Gram anchoring of a pretrained run; see `dinov3_train.refinement.refine`."""
    from .refinement import refine as stage

    return stage(run, out, **settings)


def adapt(run, out, **settings):
    """High-resolution adaptation of a refined run; see `dinov3_train.refinement.adapt`."""
    from .refinement import adapt as stage

    return stage(run, out, **settings)


def distill(config, out, **settings):
    """Students of a frozen teacher; see `dinov3_train.distillation.distill`."""
    from .distillation import distill as run

    return run(config, out, **settings)
