"""`dinov3 demo`: all stages on photographs that are already on this machine, and a page that shows what was learned."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from rich.console import Console

from dinov3_train.build import Finished, load, pretrain, view
from dinov3_train.config import Config, replaced
from dinov3_train.data.decode import decode
from dinov3_train.data.sources import Source, open_source
from dinov3_train.demo_stages import PICTURED, Stage, later_stages, measured, stages_section
from dinov3_train.evaluation.extract import Extracted, extract
from dinov3_train.evaluation.knn import KnnResult, evaluate_knn
from dinov3_train.evaluation.maps import PatchMap, cosine_map, patch_at, patch_maps, pca_colors
from dinov3_train.evaluation.pictures import colored, cosine_floor, enlarged, ringed
from dinov3_train.evaluation.view import View
from dinov3_train.photographs import GAP, PHOTOGRAPHS, Photograph, halves, write_windows
from dinov3_train.recipes import recipe
from dinov3_train.report import Link, Page, read_metrics, series

QUICK = 5  # by which steps and minutes are divided
TRAIN_WINDOWS, HELD_OUT_WINDOWS = 64, 24  # of each photograph
NEIGHBOURS = (10,)
MAP_SIDE = 256  # short side in pixels at which whole photographs are mapped
COLOURED = ("astronaut", "cat", "pagoda", "dahlia", "coffee", "retina", "photographer", "tissue")
# (x, y) as shares of width and height, by photograph
POINTS = {
    "cat": (0.385, 0.43),
    "coffee": (0.33, 0.75),
    "pagoda": (0.32, 0.42),
    "dahlia": (0.48, 0.5),
    "astronaut": (0.36, 0.6),
}
PIXELS = 16  # side to which windows are reduced for the k-NN on raw pixels


@dataclass(frozen=True)
class Scores:
    """k-NN on held-out windows: on raw pixels, with the untrained and with the trained backbone."""

    pixels: KnnResult
    before: KnnResult
    after: KnnResult


def run_demo(out: str | Path, *, quick: bool = False, seed: int = 0) -> Path | None:
    """Cut the photographs, pretrain, refine, adapt, distil, judge, draw.

    Returns the page, `out/index.html`, or None when a signal ended a stage; prints where it is.

    Args:
        out: folder for `photographs/`, the run and the page; running again with the same arguments continues the run.
        quick: shorter runs, under 90 seconds on two cores; else under 6 minutes.
        seed: of the training.
    """
    out, began, console = Path(out), time.monotonic(), Console()
    console.print(
        f"photographs: {len(PHOTOGRAPHS)}, from the scikit-image and scikit-learn wheels, nothing is downloaded",
        soft_wrap=True,
    )
    train, held_out = write_windows(out / "photographs", train=TRAIN_WINDOWS, held_out=HELD_OUT_WINDOWS)
    config = demo_config(train, held_out, quick=quick, seed=seed)
    runs = out / f"run{'-quick' if quick else ''}-seed{seed}"
    console.rule("pretraining")
    finished = pretrain(config, runs / "pretrained", console=console)
    later = None
    if finished.reason != "signal":
        later = later_stages(finished.out, runs, config, share=QUICK if quick else 1, console=console)
    if later is None:
        console.print("stopped by a signal; the same command continues")
        return None
    trained = time.monotonic() - began
    console.rule("judging and drawing")
    backbones, sources = (load(finished.out, step=0), load(finished.out)), (open_source(train), open_source(held_out))
    scores = judge(backbones, sources, view(config))
    stages = [measured("untrained", backbones[0], sources, config)]
    stages.append(measured("pretrained", backbones[1], sources, config))
    stages += [measured(heading, load(folder), sources, config) for heading, folder in later.items()]
    page = demo_page(config, finished, scores, backbones, stages, minutes=trained / 60)
    path = page.write(out / "index.html")
    console.print(
        f"k-NN on held-out windows, {len(PHOTOGRAPHS)} classes = the photographs: "
        + ", ".join(f"{stage.heading} {100 * stage.knn:.0f} %" for stage in stages),
        soft_wrap=True,
    )
    console.print(f"{time.monotonic() - began:.0f} s in all; page: {path.resolve()}", soft_wrap=True)
    return path


def demo_config(train: Path, held_out: Path, *, quick: bool, seed: int) -> Config:
    """The demo recipe on these folders; quick is the same recipe with a fifth of the steps and of the time limit."""
    config = recipe("demo")
    share = QUICK if quick else 1
    steps = config.run.steps // share
    return replaced(
        config,
        {
            "data.sources": (str(train),),
            "data.labelled": (str(train), str(held_out)),
            "run.seed": seed,
            "run.steps": steps,
            "run.precision": _precision(),
            "run.minutes": None if config.run.minutes is None else config.run.minutes / share,
            "run.evaluate_every": max(steps // (3 if quick else 6), 1),
            "run.checkpoint_every": steps,
            "run.history_every": max(steps // 5, 1),  # for the choice of the Gram teacher
            "optimizer.warmup": min(config.optimizer.warmup, steps // 5),
        },
    )


def _precision() -> str:
    """bf16 where the processor multiplies it, else fp32: emulated bf16 would be slower."""
    if torch.cuda.is_available():
        return "bf16"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def judge(backbones: tuple[torch.nn.Module, torch.nn.Module], sources: tuple[Source, Source], seen_as: View) -> Scores:
    """k-NN from training windows to held-out windows; sources = (train, held out)."""
    pixels = evaluate_knn(*(_raw_pixels(source) for source in sources), k=NEIGHBOURS)
    before, after = (
        evaluate_knn(*(extract(backbone, source, seen_as) for source in sources), k=NEIGHBOURS)
        for backbone in backbones
    )
    return Scores(pixels, before, after)


def demo_page(
    config: Config,
    finished: Finished,
    scores: Scores,
    backbones: tuple[torch.nn.Module, torch.nn.Module],
    stages: list[Stage],
    *,
    minutes: float,
) -> Page:
    """The whole page; backbones = (untrained, pretrained); stages: all of them."""
    rows = read_metrics(finished.out / "metrics.jsonl")
    parameters = sum(parameter.numel() for parameter in backbones[1].parameters())
    page = Page(
        "A vision backbone, trained here from scratch",
        f"{finished.step} steps of DINOv3 pretraining on {len(PHOTOGRAPHS)} photographs, without a single label; then "
        f"Gram refinement, adaptation and two distilled students: {minutes:.1f} minutes on this machine.",
    )
    page.numbers(
        [
            (
                f"{_percent(scores.before)} \u2192 {_percent(scores.after)}",
                "k-NN on held-out windows, before and after",
            ),
            (f"{_mean_speed(rows):.0f}", "images per second"),
            (f"{parameters / 1e6:.1f} M", f"parameters, patches of {config.backbone.patch_size} px"),
        ]
    )
    _halves_section(page)
    _curves_section(page, rows)
    _knn_section(page, scores)
    images = {photograph.name: photograph.open() for photograph in PHOTOGRAPHS if photograph.name in COLOURED}
    seen_as = replace(view(config), size=MAP_SIDE)
    before, after = (
        {entry.name: entry for entry in patch_maps(backbone, list(images.items()), seen_as)} for backbone in backbones
    )
    _pca_section(page, before, after)
    _cosine_section(page, before, after)
    pictured = {name: images[name] for name in PICTURED}
    stages_section(page, stages[1:], pictured, seen_as)
    _closing_sections(page, config, finished)
    return page


def _halves_section(page: Page) -> None:
    page.section(
        "The photographs, and what was held out",
        f"Each photograph is cut in two. The backbone trains on {TRAIN_WINDOWS} windows of the left part (or the upper "
        f"one); {HELD_OUT_WINDOWS} windows of the dimmed part are kept for judging. The strip of {GAP} pixels between "
        "them belongs to neither, so no pixel is on both sides.",
    )
    page.gallery([(_split_picture(photograph), photograph.name) for photograph in PHOTOGRAPHS], width=170)


def _split_picture(photograph: Photograph) -> Image.Image:
    """The photograph with its held-out half dimmed and the gap dark, 360 pixels wide."""
    image = photograph.open()
    train, held_out = halves(image.size)
    split = Image.new("RGB", image.size, (20, 22, 26))
    split.paste(image.crop(train), train[:2])
    split.paste(Image.blend(image, Image.new("RGB", image.size, (20, 22, 26)), 0.45).crop(held_out), held_out[:2])
    ImageDraw.Draw(split).rectangle(train, outline=(255, 255, 255), width=max(2, image.width // 150))
    return split.resize((360, round(image.height * 360 / image.width)), Image.Resampling.LANCZOS)


def _curves_section(page: Page, rows: list[dict]) -> None:
    names = {
        "DINO, global crops": "dino_global",
        "DINO, local crops": "dino_local",
        "iBOT, masked patches": "ibot",
    }
    curves = {name: series(rows, key) for name, key in names.items() if series(rows, key)[0]}
    page.section(
        "Training",
        "The student sees small and masked views of an image and must give the answer that the teacher, its own "
        "running average, gives for the whole. The losses are cross-entropies in nats; lower means that student and "
        "teacher agree more.",
    )
    if curves:
        page.curve(curves, title="Losses", x_label="step", smooth=3)
    steps, shares = series(rows, "knn_mean_per_class")
    if steps:
        percent = [100 * share for share in shares]
        page.curve(
            {"k-NN accuracy on held-out windows, %": (steps, percent)}, title="k-NN while training", x_label="step"
        )


def _knn_section(page: Page, scores: Scores) -> None:
    page.section(
        "Does it see more than before?",
        "Each held-out window is given the class of its nearest training windows (k = 10, cosine similarity, weights "
        f"exp(similarity / 0.07)). The classes are the {len(PHOTOGRAPHS)} photographs themselves: this asks only if "
        "two parts of one picture look alike to the backbone. It is an honest sign of learning and no benchmark.",
    )
    chance = f"{100 / len(PHOTOGRAPHS):.1f} %"
    named = (
        (f"raw pixels, {PIXELS} x {PIXELS}", scores.pixels),
        ("backbone before training", scores.before),
        ("backbone after training", scores.after),
    )
    table = [("guessing", chance, chance)]
    for name, result in named:
        score = result.at(NEIGHBOURS[0])
        table.append((name, f"{100 * score.accuracy:.1f} %", f"{100 * score.mean_per_class:.1f} %"))
    page.table(("features", "accuracy", "mean per class"), table)


def _pca_section(page: Page, before: dict[str, PatchMap], after: dict[str, PatchMap]) -> None:
    page.section(
        "What each patch looks like to the backbone",
        "The features of all patches, reduced to their first three principal components and shown as red, green and "
        "blue. All photographs of a column share one basis: equal colours mean like features. Both halves are there, "
        "only one was trained on. The colours of the two columns cannot be compared with each other.",
    )
    columns = [dict(zip(maps, pca_colors([entry.features for entry in maps.values()]))) for maps in (before, after)]
    for name, entry in after.items():
        drawn = [
            (enlarged(colors[name], entry.image.size, False), heading) for colors, heading in zip(columns, HEADINGS)
        ]
        page.row([(entry.image, name), *drawn])


def _cosine_section(page: Page, before: dict[str, PatchMap], after: dict[str, PatchMap]) -> None:
    page.section(
        "One patch against all others",
        "Cosine similarity of the ringed patch to every patch of the same photograph, bright is similar. Each column "
        "has one scale for all photographs, given below it.",
    )
    cosines, lows = [], []
    for maps in (before, after):
        column = {name: cosine_map(maps[name].features, patch_at(maps[name].grid, POINTS[name])) for name in POINTS}
        cosines.append(column)
        lows.append(cosine_floor(list(column.values())))
    for name, point in POINTS.items():
        image, (rows, columns) = after[name].image, after[name].grid
        row, column = patch_at((rows, columns), point)
        centre = (column + 0.5) * image.width / columns, (row + 0.5) * image.height / rows
        pictures = [(ringed(image, centre), name)]
        for values, low, heading in zip(cosines, lows, HEADINGS):
            shares = (values[name].numpy() - low) / max(1 - low, 1e-6)
            drawn = ringed(enlarged(colored(shares), image.size, False), centre)
            pictures.append((drawn, f"{heading}, {low:.2f} to 1"))
        page.row(pictures)


def _closing_sections(page: Page, config: Config, finished: Finished) -> None:
    page.section(
        "What this is not",
        f"{len(PHOTOGRAPHS)} photographs teach a backbone about {len(PHOTOGRAPHS)} photographs. The released DINOv3 "
        "models saw 1.7 billion images with a network thousands of times larger. The steps are the same ones, though: "
        "point `dinov3 pretrain` at a folder of your own images for the real thing.",
        f"Run folder: {finished.out.parent.name}/{finished.out.name} (config.yaml, metrics.jsonl, checkpoints). "
        f"Recipe: {config.recipe}, "
        f"seed {config.run.seed}, batches of {config.run.batch_size}, {config.run.precision}.",
    )
    page.section(
        "Credits", "Photographs as shipped with scikit-image and scikit-learn, licences as these packages state them."
    )
    page.table(
        ("photograph", "by", "licence"),
        [(photograph.name, Link(photograph.credit, photograph.url), photograph.licence) for photograph in PHOTOGRAPHS],
    )


HEADINGS = ("before training", "after training")


def _raw_pixels(source: Source) -> Extracted:
    """Pixels of each image at 16 x 16, centred per image, as features (n, 768)."""
    images = [decode(source.read(number), source.name(number)) for number in range(len(source))]
    reduced = View(size=PIXELS)
    rows = torch.stack([reduced.normalized(reduced.pixels(image)).flatten() for image in images])
    labels = torch.tensor([source.label(number) for number in range(len(source))])
    names = tuple(source.name(number) for number in range(len(source)))
    return Extracted(rows - rows.mean(dim=1, keepdim=True), labels, names, tuple(source.classes))


def _mean_speed(rows: list[dict]) -> float:
    speeds = series(rows, "images_per_second")[1]
    return sum(speeds) / max(len(speeds), 1)


def _percent(result: KnnResult) -> str:
    return f"{100 * result.at(NEIGHBOURS[0]).mean_per_class:.0f} %"
