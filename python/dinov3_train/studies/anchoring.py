"""What the studies of dense features share: a pretraining that all arms of a seed go on from, and how runs are judged.

An arm is the pretraining's config changed as `stages.refinement` changes it, so that arms differ in the one thing they
are about; every arm trains the same number of steps on the same images.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..build import pretrain
from ..config import Config, override, replaced
from ..data.sources import open_source, split_commas
from ..evaluation.health import locality, pca_coherence
from ..evaluation.monitor import history_of
from ..evaluation.panel import open_panel, panel_features
from ..evaluation.segment import SegmentSettings, evaluate_segment
from ..evaluation.signatures import all_signs
from ..recipes import recipe as recipe_by_name
from ..report import read_metrics
from ..stages import refinement
from ..train.run_folder import RunFolder
from ..weights import resolve
from ..words import Option
from .results import Score, grouped_score, ratio_score
from .runner import Arm

PANEL = 32  # images of which the coherence of similarities is measured

OPTIONS = {
    "data": Option(str, required=True, help="images to train on, commas between several"),
    "train": Option(str, required=True, help="PATH with masks, to train the dense probe"),
    "test": Option(str, required=True, help="PATH with masks, to judge it"),
    "recipe": Option(str, default="vit_tiny_cpu", help="NAME or FILE.py of the pretraining"),
    "steps": Option(int, default=600, help="of the pretraining that all arms go on from"),
    "more": Option(int, default=150, help="steps of every arm after it"),
    "size": Option(int, help="side in pixels of the dense probe; default: twice the recipe's global crop"),
    "probe_steps": Option(int, default=300, help="of the dense probe's linear layer"),
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What both studies ask for; `OPTIONS` says what each is. overrides: dotted settings of the pretraining."""

    data: str
    train: str
    test: str
    recipe: str = "vit_tiny_cpu"
    steps: int = 600
    more: int = 150
    size: int | None = None
    probe_steps: int = 300
    overrides: tuple[str, ...] = ()


def pretraining(asked: Asked, *, history_every: int) -> Config:
    """The config of the pretraining, which keeps its teacher every `history_every` steps.

    Errors: ValueError for steps below 1, and whatever the recipe or its settings refuse.
    """
    for name in ("steps", "more", "probe_steps"):
        if getattr(asked, name) < 1:
            raise ValueError(f"study: {name} expects at least 1, got {getattr(asked, name)}")
    config = override(recipe_by_name(asked.recipe), asked.overrides)
    return replaced(
        config,
        {
            "data.sources": tuple(split_commas(asked.data)),
            "run.steps": asked.steps,
            "run.history_every": history_every,
            "run.checkpoint_every": asked.steps,
            "run.keep": 1,
            "monitor.every": max(asked.steps // 6, 1),
        },
    )


def continued(base: Config, run: Path, more: int, changes: dict[str, object]) -> Config:
    """`more` steps after the pretraining in `run`, with what an arm changes; without a Gram term unless it asks.

    The EMA, by which arms are judged, keeps at most e^-5 of its start: few steps would not show in a slower one.
    """
    staged = refinement(base)
    values = {
        "start.run": str(RunFolder(run).checkpoints().path(base.run.steps)),
        "run.steps": more,
        "run.checkpoint_every": more,
        "monitor.every": max(more // 3, 1),
        "optimizer.momentum": min(staged.optimizer.momentum, max(1.0 - 5.0 / more, 0.0)),
        "gram.weight": 0.0,
        "gram.ramp": more // 10,
        "gram.refresh_every": 0,
        "gram.refreshes": None,
        "crops.gram_size": None,
        "losses.local_weight_ramp": more // 10,
    }
    return replaced(staged, values | changes)


def start(base: Config, bases: Path) -> Arm:
    """The arm that ends where the others begin: its run is the seed's pretraining."""

    def train(seed: int, folder: Path, minutes: float | None, console: Console) -> bool:
        if not pretrained(base, bases, seed, minutes, console):
            return False
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.symlink_to(os.path.relpath(bases / f"seed{seed}", folder.parent), target_is_directory=True)
        return True

    return Arm("start", "where all arms begin", train)


def pretrained(base: Config, bases: Path, seed: int, minutes: float | None, console: Console) -> bool:
    """Pretrain in bases/seedN, or go on there; whether it is finished."""
    config = replaced(base, {"run.seed": seed, "run.minutes": minutes})
    return pretrain(config, bases / f"seed{seed}", console=console).reason == "steps"


def trainer(
    base: Config, bases: Path, changes: Callable[[Path], dict[str, object]], more: int
) -> Callable[[int, Path, float | None, Console], bool]:
    """What an `Arm` does: the seed's pretraining if it is not there yet, then the arm's own steps.

    Args:
        base: of the pretraining.
        bases: folder of the pretrainings; arms of one folder share them.
        changes: from the pretraining's folder to the settings the arm changes.
        more: steps of the arm.
    """

    def train(seed: int, folder: Path, minutes: float | None, console: Console) -> bool:
        began = time.monotonic()
        if not pretrained(base, bases, seed, minutes, console):
            return False
        left = None if minutes is None else max(minutes - (time.monotonic() - began) / 60.0, 0.01)
        own, run = replaced(base, {"run.seed": seed}), bases / f"seed{seed}"
        config = replaced(continued(own, run, more, changes(run)), {"run.minutes": left})
        return pretrain(config, folder, console=console).reason == "steps"

    return train


def measured(asked: Asked, side: int) -> Callable[[Path, int], dict[str, Score]]:
    """How a run is judged: mIoU of a linear layer, locality and coherence of similarities, signs the monitor gave.

    Args:
        asked: of the study.
        side: in pixels, of probe and panel.

    Errors: ValueError for sources that cannot be opened, before any training.
    """
    train, test = open_source(split_commas(asked.train)), open_source(split_commas(asked.test))
    training = SegmentSettings().training
    settings = SegmentSettings(training=type(training)(**(vars(training) | {"steps": asked.probe_steps})))

    def measure(folder: Path, seed: int) -> dict[str, Score]:
        found = resolve(str(folder))
        seen_as = found.view(side)
        result = evaluate_segment(found.backbone, train, test, seen_as, settings=settings)
        panel = open_panel(test, seen_as, images=min(PANEL, len(test)), patch_size=found.backbone.patch_size)
        patches = panel_features(found.backbone, panel).patches
        each = [locality(image[None]) for image in patches]
        looks = history_of(read_metrics(folder / "metrics.jsonl"))
        return {
            "mIoU": ratio_score(result.image_counts[..., 0], result.image_counts.sum(dim=-1)),
            "locality": grouped_score(each, [0] * len(each)),
            "coherence": Score(pca_coherence(patches)),
            "signs": Score(float(len(all_signs(looks)))),
        }

    return measure


def kept_at(run: Path, step: int) -> str:
    """The teacher's weights that a pretraining kept at a step of its thin history."""
    return str(RunFolder(run).history_file(step))


def probe_side(asked: Asked, base: Config) -> int:
    """Side in pixels of the dense probe."""
    return asked.size or 2 * base.crops.global_size


def earliest(asked: Asked) -> int:
    """The first step whose weights a pretraining can keep: 0 where it begins from weights, else 1."""
    return 1 if override(recipe_by_name(asked.recipe), asked.overrides).init.weights is None else 0


def cadence(steps: Sequence[int], last: int) -> int:
    """The widest cadence of a history that keeps all of `steps`; `last` where that is step 0 alone."""
    return math.gcd(*steps) or last
