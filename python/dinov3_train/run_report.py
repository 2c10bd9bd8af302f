"""`dinov3 report`: one self-contained page of a run, or of several side by side."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from .build import run_config
from .commands_health import weights_at
from .config import Config, override, to_dict, to_yaml
from .data.decode import UnreadableImage, decode
from .data.sources import Source, open_source
from .evaluation.comparison import column, strips
from .evaluation.monitor import history_of
from .evaluation.pictures import Strip
from .evaluation.signatures import MEASURES, all_signs
from .recipes import recipe
from .report import Page, read_metrics, series
from .train.checkpoint import saved_steps

LOSSES = {
    "loss": "all terms with their weights",
    "dino_global": "DINO, global crops, nats",
    "dino_local": "DINO, local crops, nats",
    "ibot": "iBOT, masked patches, nats",
    "koleo": "KoLeo, spread of the images",
    "gram": "Gram anchoring",
}
OPTIMIZATION = {
    "learning_rate": "learning rate",
    "weight_decay": "weight decay",
    "momentum": "momentum of the teacher",
    "teacher_temperature": "teacher temperature",
    "gradient_norm/backbone": "gradient norm, backbone",
    "gradient_norm/dino_head": "gradient norm, DINO head",
    "gradient_norm/ibot_head": "gradient norm, iBOT head",
}
SPEED = {"images_per_second": "images per second", "data_wait": "share of time waiting for data"}
SCORES = {"knn": "k-NN accuracy", "knn_mean_per_class": "k-NN, mean per class"}
YAML_WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
CHANGED = 40  # settings that differ, at most, in the table


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a run folder holds: its name on the page, config, metrics, looks and the newest checkpoint's step."""

    name: str
    path: Path
    config: Config
    rows: list[dict]
    looks: list[dict[str, float]]
    checkpoints: list[int]

    @property
    def step(self) -> int:
        """The last step logged or saved."""
        return int(max([row["step"] for row in self.rows] + self.checkpoints, default=0))

    @property
    def settled(self) -> int:
        """Steps before which health is not judged."""
        return max(self.config.optimizer.warmup, self.config.run.steps // 20)


def report(runs: Sequence[str | Path], out: str | Path, *, pictures: int = 4) -> Path:
    """Write the page of one or several runs.

    Args:
        runs: run folders.
        out: FILE.html.
        pictures: photographs to show features of, 0 for none; they are taken from the first run's images.

    Errors: ValueError for no run, a folder that is no run, another suffix, a negative number of pictures.
    """
    if Path(out).suffix != ".html":
        raise ValueError(f"report: out expects a .html file, got {str(out)!r}")
    if not runs:
        raise ValueError("report: expected at least one run folder, got none")
    if pictures < 0:
        raise ValueError(f"report: pictures expects at least 0, got {pictures}")
    return report_page(records(runs), pictures=pictures).write(out)


def records(runs: Sequence[str | Path]) -> list[Record]:
    """Read the run folders. Errors: ValueError naming a folder that is no run, or given twice."""
    paths = [Path(run) for run in runs]
    resolved = [path.resolve() for path in paths]
    twice = [str(path) for path, real in zip(paths, resolved) if resolved.count(real) > 1]
    if twice:
        raise ValueError(f"report: expected different runs, got {twice[0]} twice")
    short = len({path.name for path in resolved}) == len(resolved)
    found = []
    for path, real in zip(paths, resolved):
        config = run_config(path)
        rows = read_metrics(path / "metrics.jsonl") if (path / "metrics.jsonl").is_file() else []
        found.append(
            Record(
                name=real.name if short else f"{real.parent.name}/{real.name}",
                path=path,
                config=config,
                rows=rows,
                looks=history_of(rows),
                checkpoints=saved_steps(path / "checkpoints"),
            )
        )
    return found


def report_page(runs: Sequence[Record], *, pictures: int) -> Page:
    """The whole page."""
    first = runs[0]
    one = len(runs) == 1
    title = f"Run {first.name}" if one else "Runs " + ", ".join(run.name for run in runs)
    page = Page(title, _lead(first) if one else f"{len(runs)} runs side by side.")
    if one:
        page.numbers(_numbers(first))
    else:
        _summary_table(page, runs)
    _warnings(page, runs)
    _curves(
        page,
        runs,
        "Losses",
        LOSSES,
        "Cross-entropies in nats where nothing else is said; lower is better within a run.",
    )
    _curves(page, runs, "k-NN while training", SCORES, "On labelled images, by the EMA teacher's CLS token.")
    health_section(page, {run.name: run.looks for run in runs})
    _probes(page, runs)
    if pictures:
        _pictures(page, runs, pictures)
    _data(page, runs)
    _curves(page, runs, "Throughput", SPEED, "Validation, health and checkpoints are not counted in images per second.")
    _curves(page, runs, "Optimisation", OPTIMIZATION, "")
    _settings(page, runs)
    _reproduce(page, runs)
    return page


def health_section(page: Page, looks: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Curves of every measure that was taken, by run, each with its equation and what healthy looks like."""
    if not any(looks.values()):
        page.section(
            "Dense-feature health",
            "No look was taken while training (monitor.every=0); dinov3 health looks afterwards.",
        )
        return
    page.section(
        "Dense-feature health",
        "Without labels, on a fixed panel of images. Under each curve: its equation, its range, and what a healthy "
        "backbone shows.",
    )
    entries = []
    for key, measure in MEASURES.items():
        lines = {name: series(rows, key) for name, rows in looks.items() if series(rows, key)[0]}
        if lines:
            caption = f"{measure.equation}; {measure.range}. Healthy: {measure.healthy}."
            entries.append((measure.title, lines, caption))
    page.charts(entries, x_label="step")
    without = [name for name, rows in looks.items() if not rows]
    if without:
        page.text(
            f"No look was taken in {', '.join(without)}: dinov3 health backbone=RUN history=true looks afterwards."
        )


def command(run: Record) -> tuple[str, bool]:
    """The command that trains this run again, and whether it was checked to give this very config."""
    config = run.config
    base = _base(config.recipe)
    if base is None:
        return f"dinov3 pretrain recipe=RECIPE.py config={shlex.quote(str(run.path / 'config.yaml'))} out=RUN", False
    before, after = _flat(to_dict(base)), _flat(to_dict(config))
    words = [f"{key}={_word(value)}" for key, value in after.items() if before.get(key, ...) != value]
    try:
        same = override(base, words) == config
    except ValueError:
        same = False
    if not same:
        words = [f"config={run.path / 'config.yaml'}"]
    return " ".join(["dinov3", "pretrain", f"recipe={base.recipe}", "out=RUN", *map(_shell, words)]), same


def _base(name: str) -> Config | None:
    """The recipe of this name; of a later stage without one, the recipe it came from; None where there is neither."""
    for candidate in (name, name.removesuffix("_refine"), name.removesuffix("_adapt")):
        try:
            return recipe(candidate)
        except ValueError:
            continue
    return None


def _lead(run: Record) -> str:
    config, crop = run.config, run.config.crops.global_size
    ended = "finished" if run.step >= config.run.steps else f"stopped at step {run.step} of {config.run.steps}"
    return (
        f"{config.recipe or 'run'}: {config.backbone.name}, patches of {config.backbone.patch_size} px, global crops "
        f"of {crop} px, batches of {config.run.batch_size}, {config.run.precision}; {ended}."
    )


def _numbers(run: Record) -> list[tuple[str, str]]:
    entries = [(f"{run.step:,}", "steps"), (f"{run.step * run.config.run.batch_size:,}", "images seen")]
    speed = _mean(run, "images_per_second")
    if speed:
        entries.append((f"{speed:.1f}", "images per second"))
    best = max(series(run.rows, "knn_mean_per_class")[1], default=None)
    if best is not None:
        entries.append((f"{100 * best:.1f} %", "best k-NN, mean per class"))
    if run.looks:
        entries.append((f"{run.looks[-1]['locality']:.2f}", "locality of patch similarity"))
    return entries


def _summary_table(page: Page, runs: Sequence[Record]) -> None:
    rows = [[run.name, *("" for _ in range(5))] for run in runs]
    for row, run in zip(rows, runs):
        best = max(series(run.rows, "knn_mean_per_class")[1], default=math.nan)
        quality = run.looks[-1]["dense_quality"] if run.looks else math.nan
        values = (run.step, run.step * run.config.run.batch_size, _mean(run, "images_per_second"), best, quality)
        shown = ("{:,.0f}", "{:,.0f}", "{:.1f}", "{:.3f}", "{:.3f}")
        row[1:] = [text.format(value) if value == value else "not measured" for text, value in zip(shown, values)]
    page.table(("run", "steps", "images seen", "images/s", "best k-NN", "dense quality"), rows)


def _warnings(page: Page, runs: Sequence[Record]) -> None:
    entries = []
    for run in runs:
        name = "" if len(runs) == 1 else f"{run.name}, "
        entries += [("Health", f"{name}{sign.text}") for sign in all_signs(run.looks, settled=run.settled)]
        waiting = _mean(run, "data_wait")
        if waiting > 0.2:
            entries.append(
                ("Throughput", f"{name}{100 * waiting:.0f} % of the time went into waiting for data: more data.workers")
            )
        spent = sum(series(run.looks, "seconds")[1])
        total = max(series(run.rows, "seconds")[1], default=0.0)
        if total and spent > 0.02 * total and len(run.looks) > 2:
            entries.append(
                ("Monitor", f"{name}health took {100 * spent / total:.1f} % of the time: a larger monitor.every")
            )
        if run.step < run.config.run.steps:
            entries.append(
                ("Not finished", f"{name}step {run.step} of {run.config.run.steps}; the same command continues")
            )
    page.section("What to look at first")
    if entries:
        page.signs(entries)
    else:
        page.signs([("All well", "no sign of degradation, finished, not starved of data")], good=True)


def _curves(page: Page, runs: Sequence[Record], heading: str, keys: Mapping[str, str], text: str) -> None:
    entries = []
    for key, title in keys.items():
        lines = {run.name: series(run.rows, key) for run in runs if series(run.rows, key)[0]}
        lines = {name: xy for name, xy in lines.items() if any(map(math.isfinite, xy[1]))}
        if lines:
            entries.append((title, lines, ""))
    if entries:
        page.section(heading, *([text] if text else []))
        page.charts(entries, x_label="step")


def _probes(page: Page, runs: Sequence[Record]) -> None:
    """Every JSON result below the run folders that a probe has written."""
    rows = []
    for run in runs:
        for path in sorted(run.path.glob("**/*.json")):
            rows += [(run.name, path.relative_to(run.path).as_posix(), *entry) for entry in _probe_rows(path)]
    page.section("Probes")
    if rows:
        header = ("run", "file", "probe", "metric", "value", "interval", "images")
        kept = rows if len(runs) > 1 else [row[1:] for row in rows]
        page.table(header if len(runs) > 1 else header[1:], kept)
    else:
        page.text(
            f"No result in the run folder yet: dinov3 evaluate knn ... out={runs[0].path}/knn.json puts one there."
        )


def _probe_rows(path: Path) -> list[tuple[str, str, str, str, str]]:
    """(probe, metric, value, interval, images) of one JSON file; nothing for a file that is no probe's."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    if not isinstance(result, dict):
        return []
    if isinstance(result.get("metrics"), dict) and "probe" in result:
        return [
            (
                str(result["probe"]),
                metric,
                _number(found.get("value")),
                f"{_number(found.get('low'))} to {_number(found.get('high'))}",
                str(found.get("images", "")),
            )
            for metric, found in result["metrics"].items()
            if isinstance(found, dict)
        ]
    if isinstance(result.get("scores"), list) and all(isinstance(s, dict) and "k" in s for s in result["scores"]):
        images = str(result.get("test_images", ""))
        return [
            (f"k-NN, k={score['k']}", name.replace("_", " "), _number(score[name]), "", images)
            for score in result["scores"]
            for name in ("accuracy", "mean_per_class")
            if isinstance(score.get(name), (int, float))
        ]
    return []


def _pictures(page: Page, runs: Sequence[Record], count: int) -> None:
    """Photographs with PCA maps, a cosine map and attention: the start and the newest checkpoint of each run."""
    page.section("What each patch looks like to the backbone")
    try:
        images = _photographs(open_source(list(runs[0].config.data.sources)), count)
    except (ValueError, OSError) as error:
        page.text(f"No pictures: {error}.")
        return
    columns = []
    for run in runs:
        for step in [0, *run.checkpoints[-1:]] if len(runs) == 1 else run.checkpoints[-1:]:
            found = weights_at(str(run.path), step)
            heading = ("the start" if step == 0 else f"step {step}") if len(runs) == 1 else f"{run.name}, step {step}"
            columns.append(column(heading, found.backbone, images, found.view(2 * found.size)))
    if not columns:
        page.text("No pictures: there is no checkpoint yet.")
        return
    one_basis = len({one.maps[0].features.shape[-1] for one in columns}) == 1
    page.text(
        "The first three principal components of all patch features as red, green and blue. "
        + ("One basis for all pictures: " if one_basis else "One basis for the pictures of a column: ")
        + "equal colours mean like features."
    )
    _rows(page, strips(columns, kind="pca"))
    page.text("Cosine similarity of the ringed patch, the middle one, to all others; bright is similar.")
    _rows(page, strips(columns, kind="cosine"))
    attending = [one for one in columns if one.attention is not None]
    if attending:
        page.text(
            "Attention of the CLS token in the last block, mean over heads, bright up to a picture's 99th percentile."
        )
        _rows(page, strips(attending, kind="attention"))


def _rows(page: Page, found: Sequence[Strip]) -> None:
    for strip in found:
        page.row([(tile, strip.caption if n == 0 else strip.headings[n]) for n, tile in enumerate(strip.tiles)])


def _photographs(source: Source, count: int) -> list[tuple[str, Image.Image]]:
    found = []
    for number in range(min(count, len(source))):
        index = number * len(source) // min(count, len(source))
        try:
            image = decode(source.read(index), source.name(index))
        except (UnreadableImage, OSError):
            continue
        found.append((source.name(index).replace(":", "/").rsplit("/", 1)[-1], image))
    if not found:
        raise ValueError("none of the run's images can be read")
    return found


def _data(page: Page, runs: Sequence[Record]) -> None:
    page.section("Data", "What was drawn from each source until the last logged step.")
    rows = []
    for run in runs:
        drawn = next(
            (row for row in reversed(run.rows) if any(key.startswith(("drawn/", "epochs")) for key in row)), {}
        )
        parts = {key.removeprefix("drawn/"): value for key, value in drawn.items() if key.startswith("drawn/")}
        seen = run.step * run.config.run.batch_size
        if parts:
            for name, images in parts.items():
                epochs = _number(drawn.get(f"epochs/{name}"))
                rows.append((run.name, name, f"{images:,.0f}", f"{100 * images / max(seen, 1):.1f} %", epochs))
        else:
            sources = ", ".join(run.config.data.sources)
            rows.append((run.name, sources, f"{seen:,}", "100.0 %", _number(drawn.get("epochs"))))
    page.table(("run", "source", "images drawn", "share", "epochs"), rows)


def _settings(page: Page, runs: Sequence[Record]) -> None:
    flat = [_flat(to_dict(run.config)) for run in runs]
    page.section("Settings")
    if len(runs) > 1:
        keys = list(dict.fromkeys(key for values in flat for key in values))
        differing = [key for key in keys if len({repr(values.get(key)) for values in flat}) > 1]
        if differing:
            page.text(f"{len(differing)} settings differ.")
            rows = [(key, *(_word(values.get(key)) for values in flat)) for key in differing[:CHANGED]]
            page.table(("setting", *(run.name for run in runs)), rows)
        else:
            page.text("All settings are the same.")
    for run in runs:
        page.code(to_yaml(run.config), summary=f"All settings of {run.name}")


def _reproduce(page: Page, runs: Sequence[Record]) -> None:
    from importlib.metadata import PackageNotFoundError, version

    page.section("Do it again")
    for run in runs:
        text, checked = command(run)
        page.code(text)
        page.text(
            "Checked: this command gives exactly the settings above."
            if checked
            else "These settings are not those of a recipe with changes; the command takes them from the run folder."
        )
    try:
        installed = version("dinov3-ext")
    except PackageNotFoundError:
        installed = "not installed"
    page.text(f"Page made with dinov3-ext {installed}, torch {torch.__version__}.")


def _flat(values: Mapping, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _word(value: object) -> str:
    """A setting as the command line reads it."""
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(_entry(entry) for entry in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _entry(value: object) -> str:
    """An entry of a list; texts that YAML could take for something else are quoted."""
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z/][\w./@%+=-]*", value) and value not in YAML_WORDS
    return _word(value) if plain or not isinstance(value, str) else f"'{value}'"


def _shell(word: str) -> str:
    """A word as a shell takes it, in double quotes where it has single ones."""
    return f'"{word}"' if "'" in word and not set(word) & set('"$`\\!') else shlex.quote(word)


def _mean(run: Record, key: str) -> float:
    values = [value for value in series(run.rows, key)[1] if math.isfinite(value)]
    return sum(values) / len(values) if values else 0.0


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "" if value is None else str(value)
