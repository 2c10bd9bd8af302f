"""The commands that look at a trained backbone: k-NN, features, pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .build import load, run_config, view
from .data.sources import open_source
from .evaluation.extract import Extracted, extract, save_features
from .evaluation.knn import evaluate_knn as knn
from .evaluation.view import View


def evaluate_knn(
    *,
    backbone: str,
    step: int | None,
    train: str,
    test: str,
    k: tuple[int, ...],
    temperature: float,
    size: int | None,
    pooling: str,
    out: Path | None,
) -> None:
    """Print k-NN accuracy of a backbone on labelled sources, and write it as JSON if asked."""
    model, seen_as = _backbone(backbone, step, size)
    result = knn(*(_extracted(model, spec, seen_as, pooling) for spec in (train, test)), k=k, temperature=temperature)
    for score in result.scores:
        print(f"k={score.k}: accuracy {score.accuracy:.4f}, mean per class {score.mean_per_class:.4f}")
    print(f"{result.train_images} training and {result.test_images} test images, {result.classes} classes, {seen_as.size} px, {pooling}")
    if out is not None:
        print(f"wrote {result.write(out)}")


def features(*, backbone: str, step: int | None, data: str, out: Path, size: int | None, pooling: str) -> None:
    """Write the features of every image."""
    model, seen_as = _backbone(backbone, step, size)
    found = _extracted(model, data, seen_as, pooling)
    print(f"wrote {save_features(found, out)}: {found.features.shape[0]} x {found.features.shape[1]}, {seen_as.size} px, {pooling}")


def _backbone(run: str, step: int | None, size: int | None):
    model = load(run, step=step).to("cuda" if torch.cuda.is_available() else "cpu")
    seen_as = view(run_config(_run_of(run)), size)
    if seen_as.size % model.patch_size:
        low = max(seen_as.size // model.patch_size, 1) * model.patch_size
        raise ValueError(f"size: expected a multiple of the patch size {model.patch_size}, got {seen_as.size}; nearest: {low}, {low + model.patch_size}")
    return model, seen_as


def _run_of(backbone: str) -> Path:
    path = Path(backbone)
    return path.parent.parent if path.parent.name == "checkpoints" else path


def _extracted(model: torch.nn.Module, spec: str, seen_as: View, pooling: str) -> Extracted:
    source = open_source(spec)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(Path(spec).name, total=len(source))
        return extract(model, source, seen_as, pooling=pooling, progress=lambda done, _: progress.update(task, completed=done))
