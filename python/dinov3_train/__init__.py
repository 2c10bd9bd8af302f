"""DINOv3 training on your own images: `pretrain(config, out)`, `load(run)`, and `recipes.recipe(name)`."""

from __future__ import annotations

__all__ = ["load", "pretrain"]


def pretrain(config, out, **settings):
    """Train or continue a run; see `dinov3_train.build.pretrain`."""
    from .build import pretrain as run  # torchvision, tensorboard and the rest load when they are needed

    return run(config, out, **settings)


def load(run, *, step=None):
    """The backbone a run has trained; see `dinov3_train.build.load`."""
    from .build import load as found

    return found(run, step=step)
