"""`dinov3 health`: the measures of one checkpoint, or of all a run has kept, with what they mean and what is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from .build import run_config
from .data.sources import open_source
from .evaluation.health import gram_distance
from .evaluation.panel import Panel, PanelFeatures, measures, open_panel, panel_features
from .evaluation.signatures import MEASURES, Sign, all_signs
from .train.checkpoint import STEP_FOLDER, saved_steps
from .weights import Resolved, resolve

SHOWN = {  # columns of a history
    "locality": "locality",
    "cls_patch_similarity": "cls~patch",
    "patch_similarity": "patches",
    "pca_coherence": "pca",
    "norm_outliers": "outliers",
    "patch_rank": "rank",
    "resolution_agreement": "at 2x",
    "gram_start": "gram",
    "dense_quality": "quality",
}


def health(
    *,
    backbone: str,
    step: int | None,
    data: str | None,
    images: int | None,
    size: int | None,
    history: bool,
    out: Path | None,
) -> None:
    """Print the measures of a backbone on a panel, or of every checkpoint of a run, and the signs they show."""
    if out is not None and out.suffix != ".json":
        raise ValueError(f"health: out expects a .json file, got {str(out)!r}")
    if history and step is not None:
        raise ValueError("health: history=true looks at every step, so step= cannot be given with it")
    steps = kept_steps(backbone) if history else [step]
    first = resolve(backbone, step=steps[0])
    panel = panel_of(first, backbone, data, images, size)
    rows, distances = look_at(backbone, steps, panel, first)
    found = all_signs(rows, settled=_settled(backbone)) if history else _signs_alone(rows, step)
    console = Console(width=None if sys.stdout.isatty() else 160)  # a file or pipe has no edge to wrap at
    console.print(_history_table(rows) if history else _table(rows[0]))
    console.print(f"{len(panel.names)} images at {panel.view.size} px; {first.origin}", highlight=False, soft_wrap=True)
    for sign in found:
        console.print(f"warning: {sign.text}", highlight=False, soft_wrap=True)
    if not found:
        alone = not history and step != 0 and (Path(backbone) / "config.yaml").is_file()
        more = " in this checkpoint alone; history=true compares it with the run's earlier ones" if alone else ""
        console.print(f"no sign of degradation{more}", highlight=False)
    if out is not None:
        _write(out, backbone, panel, rows, distances, found)
        console.print(f"wrote {out}", highlight=False, soft_wrap=True)


def panel_of(found: Resolved, spec: str, data: str | None, images: int | None, size: int | None) -> Panel:
    """The panel a backbone is judged on: of `data`, or of the images its run was trained on.

    Errors: ValueError where there are no such images, or fewer than asked for.
    """
    if data is None:
        sources = list(run_config(_run_of(spec)).data.sources) if (_run_of(spec) / "config.yaml").is_file() else []
        if not sources:
            raise ValueError(f"health: {spec} does not name its images: data=PATH")
        source = open_source(sources)
    else:
        source = open_source(data.split(","))
    wanted = min(16, len(source)) if images is None else images
    return open_panel(source, found.view(size), images=wanted, patch_size=found.backbone.patch_size)


def kept_steps(spec: str) -> list[int]:
    """Every step of a run of which weights are there: the start, its checkpoints, its thin history.

    Errors: ValueError when there is no run, or nothing but its start.
    """
    run = Path(spec)
    run_config(run)  # says so where this is no run
    steps = {*saved_steps(run / "checkpoints"), *_thin(run)}
    if not steps:
        raise ValueError(f"health: {run} has no checkpoint and no history yet, so there is nothing to look back at")
    return sorted({0, *steps})


def weights_at(spec: str, step: int | None) -> Resolved:
    """A backbone at a step: a checkpoint with its heads, or the thin history without."""
    thin = {} if step is None else _thin(Path(spec))
    if step in thin and step not in saved_steps(Path(spec) / "checkpoints"):
        found = resolve(spec, step=0)
        found.backbone.load_state_dict(load_file(thin[step]))
        return Resolved(**(vars(found) | {"heads": None, "origin": str(thin[step])}))
    return resolve(spec, step=step)


def look_at(
    spec: str, steps: list[int | None], panel: Panel, first: Resolved
) -> tuple[list[dict[str, float]], list[list[float]]]:
    """One row of measures per step, and the Gram distances between all pairs of steps."""
    rows, seen = [], []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for number, step in enumerate(steps):
        found = first if number == 0 else weights_at(spec, step)
        features: PanelFeatures = panel_features(found.backbone.to(device), panel)
        heads = None if found.heads is None else {name: head.to(device) for name, head in found.heads.items()}
        start, previous = (seen[0], seen[-1]) if seen else (None, None)
        rows.append({"step": step or 0, **measures(features, heads=heads, start=start, previous=previous)})
        seen.append(features.patches)
    return rows, [[gram_distance(one, other) for other in seen] for one in seen]


def _signs_alone(rows: list[dict[str, float]], step: int | None) -> list[Sign]:
    """Signs of one checkpoint, which has no step of its own to be judged by; the untrained start is not judged."""
    return [] if step == 0 else all_signs([row | {"step": row["step"] or 1} for row in rows])


def _settled(spec: str) -> int:
    config = run_config(Path(spec))
    return max(config.optimizer.warmup, config.run.steps // 20)


def _table(row: dict[str, float]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("measure", "value", "range", "healthy"):
        table.add_column(heading, justify="right" if heading == "value" else "left")
    for key, measure in MEASURES.items():
        if key in row:
            table.add_row(measure.title, f"{row[key]:.3f}", measure.range, measure.healthy)
    return table


def _history_table(rows: list[dict[str, float]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("step", *SHOWN.values()):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(str(row["step"]), *(f"{row[key]:.3f}" if key in row else "" for key in SHOWN))
    return table


def _write(
    out: Path,
    spec: str,
    panel: Panel,
    rows: list[dict[str, float]],
    distances: list[list[float]],
    found: list[Sign],
) -> None:
    result = {
        "backbone": spec,
        "panel": {"names": panel.names, **panel.view.to_dict()},
        "looks": rows,
        "gram_distances": distances,
        "signs": [vars(sign) for sign in found],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


def _thin(run: Path) -> dict[int, Path]:
    """Files of the thin history by step."""
    paths = (run / "history").glob("step_*.safetensors")
    return {int(match[1]): path for path in paths if (match := STEP_FOLDER.search(path.stem))}


def _run_of(spec: str) -> Path:
    path = Path(spec)
    return path.parent.parent if path.parent.name == "checkpoints" else path
