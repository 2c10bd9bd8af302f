"""The demo after pretraining: Gram refinement, adaptation, distillation; and what each did, on the demo's page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from rich.console import Console
from torch import nn

from dinov3_train.build import Finished, view
from dinov3_train.config import Config, Distillation, Masking, replaced
from dinov3_train.data.sources import Source
from dinov3_train.distillation import distill
from dinov3_train.evaluation.correspondence import correspondence, make_pairs, pair_features
from dinov3_train.evaluation.extract import extract
from dinov3_train.evaluation.knn import evaluate_knn
from dinov3_train.evaluation.maps import patch_maps, pca_colors
from dinov3_train.evaluation.panel import open_panel
from dinov3_train.evaluation.pictures import enlarged
from dinov3_train.evaluation.view import View
from dinov3_train.refinement import adapt, refine, stage_config
from dinov3_train.report import Page
from dinov3_train.stages import adaptation, refinement

STUDENTS = {"vit_micro": "student, a ViT", "convnext_micro": "student, a ConvNeXt"}
STEPS = {"refined": 60, "adapted": 24, "students": 150}
MINUTES = {"refined": 0.8, "adapted": 0.5, "students": 1.2}
MIX = ((96, 32, 128, 0.7), (128, 32, 160, 0.3))  # global, local and Gram side of the adaptation in pixels, share
PANEL = 48  # held-out windows on which patches are looked for again
PICTURED = ("cat", "astronaut", "dahlia")


@dataclass(frozen=True)
class Stage:
    """A finished stage: its heading, its backbone, and what is measured of it on held-out windows."""

    heading: str
    backbone: nn.Module
    knn: float  # share, mean per class
    found_again: float  # share of patches


def later_stages(run: Path, out: Path, config: Config, *, share: int, console: Console) -> dict[str, Path] | None:
    """Refine, adapt and distil the pretrained `run`; run folders by heading, or None when a signal ended a stage.

    Args:
        run: the pretraining.
        out: the folder that takes the run folders `refined`, `adapted` and `students`.
        config: of the pretraining.
        share: steps and minutes are divided by it.
        console: where progress goes.
    """
    refined, adapted, students = out / "refined", out / "adapted", out / "students"

    def limits(name: str) -> dict[str, object]:
        steps = max(STEPS[name] // share, 4)
        return {"run.steps": steps, "run.minutes": MINUTES[name] / share, "run.checkpoint_every": steps}

    console.rule("Gram refinement")
    settings = limits("refined") | {"gram.ramp": 4, "losses.local_weight_ramp": 4, "gram.refresh_every": 0}
    settings |= {"crops.gram_size": config.crops.global_size * 3 // 2}
    if _stopped(refine(run, refined, config=_stage(refinement, run, settings), console=console)):
        return None
    console.rule("high-resolution adaptation")
    settings = limits("adapted") | {"crops.mix": MIX, "crops.global_size": MIX[-1][0], "crops.gram_size": MIX[-1][2]}
    settings |= {"run.checkpointing": "none", "optimizer.warmup": 4}
    if _stopped(adapt(refined, adapted, config=_stage(adaptation, refined, settings), console=console)):
        return None
    console.rule("distillation")
    config = replace(
        config,
        recipe="demo_distill",
        masking=Masking(hide=False),
        distillation=Distillation(teacher=str(adapted), students=tuple(STUDENTS)),
    )
    config = replaced(
        config, limits("students") | {"run.evaluate_every": 0, "run.history_every": 0, "monitor.every": 0}
    )
    if _stopped(distill(config, students, console=console)):
        return None
    return {"refined": refined, "adapted": adapted} | {STUDENTS[name]: students / name for name in STUDENTS}


def _stage(stage, run: Path, settings: dict[str, object]) -> Config:
    return replaced(stage_config(stage, run), settings | {"run.evaluate_every": 0, "monitor.every": 0})


def _stopped(finished: Finished) -> bool:
    return finished.reason == "signal"


def measured(heading: str, backbone: nn.Module, sources: tuple[Source, Source], config: Config) -> Stage:
    """k-NN from training to held-out windows, and how often a patch is found again in another view of its window.

    Args:
        sources: (train, held out).
    """
    seen_as = view(config)
    score = evaluate_knn(*(extract(backbone, source, seen_as) for source in sources), k=(10,)).best
    panel = open_panel(sources[1], seen_as, images=PANEL, patch_size=config.backbone.patch_size, at_least=2)
    pairs = make_pairs(panel)
    found_again = float(correspondence(*pair_features(backbone, pairs), pairs).mean())
    return Stage(heading, backbone, score.mean_per_class, found_again)


def stages_section(page: Page, stages: Sequence[Stage], images: dict[str, Image.Image], seen_as: View) -> None:
    """The table of all stages, what each is for, and the patch features of a few photographs after each."""
    page.section(
        "The whole recipe",
        "Gram refinement holds the similarities between patches to those of an earlier teacher, chosen by a measure "
        "that needs no labels; adaptation does the same while the crops grow; distillation lets smaller networks "
        "follow the adapted teacher. After a minute of pretraining there is little to repair: this shows that the "
        "stages run and what they keep, not what they can do.",
    )
    rows = [
        (
            stage.heading,
            f"{sum(p.numel() for p in stage.backbone.parameters()) / 1e6:.2f} M",
            f"{100 * stage.knn:.1f} %",
            f"{100 * stage.found_again:.1f} %",
        )
        for stage in stages
    ]
    page.table(("backbone", "parameters", "k-NN on held-out windows", "patches found again"), rows)
    page.text(
        "Patches found again: two views of one held-out window under a known crop, flip and colour change; the share "
        "of patches whose most similar patch in the other view is the right one. The ConvNeXt's maps are interpolated "
        "from a grid four times as coarse, so that neighbours are alike: its figure is no match for the others'.",
    )
    columns = []
    for stage in stages:
        maps = {entry.name: entry for entry in patch_maps(stage.backbone, list(images.items()), seen_as)}
        colors = dict(zip(maps, pca_colors([entry.features for entry in maps.values()])))
        columns.append({name: enlarged(colors[name], maps[name].image.size, False) for name in maps})
    for name in images:
        page.row([(column[name], stage.heading) for column, stage in zip(columns, stages)])
