"""`dinov3 evaluate ...`: every probe from `name=value` words to printed lines and a JSON file.

A probe's options are the fields of its settings; what words do not say comes from `preset=`, else from the settings.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import words as word_options
from .data.batch import patch_grid
from .data.sources import Source, open_source
from .evaluation.depth import DepthSettings, evaluate_depth
from .evaluation.extract import Extracted, extract, grouped
from .evaluation.heads import HeadTraining
from .evaluation.knn import KnnResult
from .evaluation.knn import evaluate_knn as knn
from .evaluation.labelled import check_sources
from .evaluation.linear import LinearSettings, evaluate_linear
from .evaluation.logistic import LogisticSettings, evaluate_logistic
from .evaluation.match import MatchSettings, evaluate_match, evaluate_pairs, read_pairs
from .evaluation.measure import ProbeResult
from .evaluation.retrieve import evaluate_retrieve
from .evaluation.robustness import RobustnessSettings, evaluate_robustness
from .evaluation.segment import SegmentSettings, evaluate_segment
from .evaluation.summary import lines
from .evaluation.view import AugmentedView, View
from .presets import PRESETS, preset
from .weights import Resolved, resolve
from .words import Option

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Call:
    """One evaluation: the resolved backbone on its device, the view, the words' values, where progress goes."""

    found: Resolved
    view: View
    values: dict[str, object]
    report: Report

    @property
    def backbone(self) -> torch.nn.Module:
        """The backbone."""
        return self.found.backbone

    def source(self, name: str) -> Source:
        """The source that the option `name` describes."""
        return open_source(self.values[name])

    def extracted(self, name: str, view: View | None = None) -> Extracted:
        """Pooled features of the source `name`, with groups where it is the test source; view: another than its own."""
        source = self.source(name)
        found = extract(
            self.backbone,
            source,
            view or self.view,
            pooling=self.values["pooling"],
            precision=self.values["precision"],
            progress=lambda done, total: self.report(f"{name} images", done, total),
        )
        return grouped(found, source, None if name in ("train", "gallery") else self.values["group"])

    def check_labels(self, probe: str, **what: int | None) -> None:
        """Errors of labels and groups, before any image is decoded."""
        check_sources(probe, self.source("train"), self.source("test"), group=self.values["group"], **what)

    def settings(self, defaults):
        """Settings of a probe with the values that were given."""
        return given(defaults, self.values)


@dataclass(frozen=True)
class Probe:
    """A command: its function, options of its own, defaults of the view, and the settings its options change."""

    run: Callable[[Call], ProbeResult | KnnResult]
    options: dict[str, Option]
    view: dict[str, object]
    settings: object = None


def evaluate(name: str, words: list[str]) -> None:
    """Run one probe, print what it found and write it as JSON if asked; the word `options` alone lists its options."""
    if words == ["options"]:
        Console().print(options_table(name))
        return
    values, probe = read(name, words), PROBES[name]
    began = time.monotonic()
    found = resolve(values["backbone"], step=values["step"])
    view = given(found.view(values["size"]), {key: values[key] for key in ("short_side", "resize")})
    patch_grid(view.size, found.backbone.patch_size, "size")
    if values["out"] is not None and values["out"].suffix != ".json":
        raise ValueError(f"out: expected a .json file, got {str(values['out'])!r}")
    found.backbone.to("cuda" if torch.cuda.is_available() else "cpu")
    with _progress() as report:
        result = probe.run(Call(found, view, values, report))
    result = replace(
        result,
        settings={
            "backbone": str(values["backbone"]),
            "step": values["step"],
            "origin": found.origin,
            **{key: values[key] for key in (*PATHS, "preset", "group") if values.get(key) is not None},
            **result.settings,
        },
    )
    for line in lines(result):
        print(line)
    print(f"{view.size} px, {found.origin}, {time.monotonic() - began:.0f} s")
    if values["preset"]:
        print(f"preset {values['preset']}: {preset(name, values['preset']).note}")
    if values["out"] is not None:
        print(f"wrote {result.write(values['out'])}")


def read(name: str, words: list[str]) -> dict[str, object]:
    """The values of all options of a probe: words, else the preset's, else the probe's own, else None."""
    probe = PROBES[name]
    values, _ = word_options.read(f"evaluate {name}", words, COMMON | probe.options)
    chosen = preset(name, values["preset"]).values if values["preset"] else {}
    unknown = set(chosen) - set(values)
    assert not unknown, f"preset of {name} names {unknown}"
    below = probe.view | chosen
    return {key: below.get(key) if value is None else value for key, value in values.items()}


def options_table(name: str) -> Table:
    """Every option of a probe, what it is, and the probe's presets."""
    probe, table = PROBES[name], Table(show_header=False, box=None, pad_edge=False)
    for key, option in (COMMON | probe.options).items():
        value = probe.view.get(key, _default(probe.settings, key))
        default = "" if value is None else f" (default: {_shown(value)})"
        table.add_row(f"{key}=", f"{option.help}{', required' if option.required else default}")
    for key, one in PRESETS.get(name, {}).items():
        values = " ".join(f"{option}={_shown(value)}" for option, value in one.values.items())
        table.add_row(f"preset={key}", f"{values}: {one.note}")
    return table


def _default(settings: object, key: str) -> object:
    """The value of a settings field, nested ones too; None where there is none."""
    if hasattr(settings, "training") and hasattr(settings.training, key):
        return getattr(settings.training, key)
    return getattr(settings, key, None)


def _shown(value: object) -> str:
    return ",".join(f"{part:g}" for part in value) if isinstance(value, tuple) else str(value)


def given(defaults, values: dict[str, object]):
    """A settings dataclass with those of `values` that it has a field for and that are not None; nested ones too."""
    changes = {}
    for entry in fields(defaults):
        current = getattr(defaults, entry.name)
        if isinstance(current, HeadTraining):
            changes[entry.name] = given(current, values)
        elif values.get(entry.name) is not None:
            changes[entry.name] = values[entry.name]
    return replace(defaults, **changes)


@contextmanager
def _progress() -> Iterator[Report]:
    """A bar on a terminal for each thing that is done; nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        tasks = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        yield report


def numbers(text: str) -> tuple[float, ...]:
    """Numbers between commas."""
    return tuple(float(part) for part in text.split(","))


def counts(text: str) -> tuple[int, ...]:
    """Whole numbers between commas."""
    return tuple(int(part) for part in text.split(","))


def _options(**helps: tuple[Callable, str]) -> dict[str, Option]:
    return {name: Option(kind, help=text) for name, (kind, text) in helps.items()}


COMMON = {
    "backbone": Option(str, required=True, help="RUN, a weights file, hf:ID or timm:NAME"),
    "step": Option(int, help="checkpoint step of a run; 0 is the untrained start; default: the newest"),
    "preset": Option(str, help="settings by name: dinov3 (the released evaluation), paper"),
    "size": Option(int, help="side in pixels; default: the backbone's own"),
    "short_side": Option(int, help="side in pixels to which the short side is resized before the crop; default: size"),
    "resize": Option(str, help="short_side_center_crop, or squash (nothing is cut off, the aspect is lost)"),
    "precision": Option(str, help="fp32 or bf16"),
    "out": Option(Path, help="JSON file for the result"),
}
SOURCES = {
    "train": Option(str, required=True, help="PATH"),
    "test": Option(str, required=True, help="PATH"),
    "group": Option(str, help="column of the test manifest, or entry of the images' .json, to score by group"),
}
PATHS = ("train", "test", "gallery", "queries", "data", "pairs")
POOLED = SOURCES | _options(pooling=(str, "cls, patch_mean or cls+patch"))
FEW = _options(shots=(int, "few-shot: training images of each class"), seed=(int, "seed of every draw"))
HEADS = _options(
    learning_rates=(numbers, "rates, commas between several"),
    weight_decays=(numbers, "weight decays, commas between several"),
    optimizer=(str, "sgd or adamw"),
    steps=(int, "steps of training the linear layer"),
    batch_size=(int, "images of a step"),
    betas=(numbers, "of adamw, two with a comma"),
    warmup=(int, "steps of rising rate"),
    schedule=(str, "cosine or constant"),
    dropout=(float, "share of channels dropped"),
    clip=(float, "largest norm of a head's gradient"),
    held_out=(float, "share of the training images that choose among settings"),
)
DENSE = (
    SOURCES
    | HEADS
    | _options(
        images=(int, "few-shot: labelled training images"),
        upsample=(int, "values per patch side at which the loss compares"),
        layer=(int, "block (ConvNeXt: stage) whose patches are used, from 0; default: the last"),
        images_at_once=(int, "images the backbone sees at once"),
        seed=(int, "seed of every draw"),
    )
)
WHOLE_IMAGE = {"resize": "squash", "precision": "fp32"}
CROP = {"resize": "short_side_center_crop", "precision": "fp32", "pooling": "cls"}


def _knn(call: Call) -> KnnResult:
    names = ("k", "temperature", "shots", "seed")
    call.check_labels("knn", shots=call.values["shots"], k=max(call.values["k"]))
    return knn(call.extracted("train"), call.extracted("test"), **{name: call.values[name] for name in names})


def _logistic(call: Call) -> ProbeResult:
    settings = call.settings(LogisticSettings())
    call.check_labels("logistic", shots=settings.shots)
    return evaluate_logistic(call.extracted("train"), call.extracted("test"), settings=settings, progress=call.report)


def _linear(call: Call) -> ProbeResult:
    settings = call.settings(LinearSettings())
    call.check_labels("linear", shots=settings.shots)
    device = next(call.backbone.parameters()).device
    return evaluate_linear(
        call.extracted("train"),
        call.extracted("test"),
        views=[call.extracted("train", view) for view in _views(call, settings.training.seed)],
        settings=settings,
        device=device,
        progress=call.report,
    )


def _views(call: Call, seed: int) -> list[AugmentedView]:
    """The random crops that the linear probe trains on, none by default."""
    count = call.values["views"] or 0
    if count < 0:
        raise ValueError(f"views: expected at least 0 random crops of each image, got {count}")
    view = call.view
    return [
        AugmentedView(size=view.size, mean=view.mean, std=view.std, seed=seed, epoch=epoch) for epoch in range(count)
    ]


def _segment(call: Call) -> ProbeResult:
    return evaluate_segment(
        call.backbone,
        call.source("train"),
        call.source("test"),
        call.view,
        settings=call.settings(SegmentSettings()),
        group=call.values["group"],
        progress=call.report,
    )


def _depth(call: Call) -> ProbeResult:
    return evaluate_depth(
        call.backbone,
        call.source("train"),
        call.source("test"),
        call.view,
        settings=call.settings(DepthSettings()),
        group=call.values["group"],
        progress=call.report,
    )


def _match(call: Call) -> ProbeResult:
    settings = call.settings(MatchSettings())
    data, pairs = call.values["data"], call.values["pairs"]
    if (data is None) == (pairs is None):
        raise ValueError("evaluate match: expected data=PATH (known warps) or pairs=FILE.json (known keypoints)")
    if pairs is not None and call.values["group"] is not None:
        raise ValueError("group: expected none, the pairs of a JSON file name their own")
    if pairs is not None:
        return evaluate_pairs(call.backbone, read_pairs(pairs), call.view, settings=settings, progress=call.report)
    group = call.values["group"]
    return evaluate_match(
        call.backbone, call.source("data"), call.view, settings=settings, group=group, progress=call.report
    )


def _retrieve(call: Call) -> ProbeResult:
    if call.values["queries"] is None:
        source = call.source("gallery")
        gallery = grouped(call.extracted("gallery"), source, call.values["group"])
        return evaluate_retrieve(gallery, progress=call.report)
    return evaluate_retrieve(call.extracted("gallery"), call.extracted("queries"), progress=call.report)


def _robustness(call: Call) -> ProbeResult:
    return evaluate_robustness(
        call.backbone,
        call.source("test"),
        call.view,
        train=None if call.values["train"] is None else call.source("train"),
        settings=call.settings(RobustnessSettings()),
        group=call.values["group"],
        progress=call.report,
    )


PROBES = {
    "knn": Probe(
        _knn,
        POOLED
        | FEW
        | _options(k=(counts, "numbers of neighbours, commas between several"), temperature=(float, "of the votes")),
        CROP | {"k": (10,), "temperature": 0.07, "seed": 0},
    ),
    "logistic": Probe(
        _logistic,
        POOLED
        | FEW
        | _options(
            strengths=(numbers, "values of C, commas between several"),
            held_out=(float, "share of the training images that choose among them"),
            iterations=(int, "at most so many of L-BFGS"),
            tolerance=(float, "largest gradient at which it stops"),
        ),
        CROP,
        LogisticSettings(),
    ),
    "linear": Probe(
        _linear,
        POOLED | FEW | HEADS | _options(views=(int, "random crops of each training image to train on; 0: its view")),
        CROP,
        LinearSettings(),
    ),
    "segment": Probe(
        _segment,
        DENSE | _options(classes=(int, "number of classes; default: from the masks")),
        WHOLE_IMAGE,
        SegmentSettings(),
    ),
    "depth": Probe(
        _depth,
        DENSE
        | _options(
            bins=(int, "number of depths"),
            nearest=(float, "depth of the first bin in metres; default: from the training maps"),
            farthest=(float, "depth of the last bin in metres; default: from the training maps"),
        ),
        WHOLE_IMAGE,
        DepthSettings(),
    ),
    "match": Probe(
        _match,
        _options(
            data=(str, "PATH of images to be warped"),
            pairs=(Path, "JSON file of image pairs with keypoints"),
            group=(str, "column of the manifest, or entry of the images' .json, to score by group"),
            images=(int, "at most so many"),
            strength=(float, "how far a corner moves, as a share of the side"),
            thresholds=(numbers, "shares of the side within which a match is right, ascending"),
            keypoints=(int, "corners looked for in an image"),
            layer=(int, "block (ConvNeXt: stage) whose patches are used, from 0; default: the last"),
            seed=(int, "seed of the warps"),
        ),
        WHOLE_IMAGE,
        MatchSettings(),
    ),
    "retrieve": Probe(
        _retrieve,
        {"gallery": Option(str, required=True, help="PATH")}
        | _options(
            queries=(str, "PATH; default: each image of the gallery against all others"),
            group=(str, "column of the queries' manifest, or entry of their .json, to score by group"),
            pooling=(str, "cls, patch_mean or cls+patch"),
        ),
        CROP,
    ),
    "robustness": Probe(
        _robustness,
        {"test": SOURCES["test"], "group": SOURCES["group"]}
        | _options(
            train=(str, "PATH with labels, for k-NN at every scale"),
            scales=(numbers, "factors on the size, commas between several"),
            images=(int, "at most so many for the maps"),
            k=(int, "neighbours"),
        ),
        {"resize": "short_side_center_crop", "precision": "fp32"},
        RobustnessSettings(),
    ),
}
assert set(PRESETS) <= set(PROBES)
