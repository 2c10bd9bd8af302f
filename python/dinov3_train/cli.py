"""`dinov3`: the command line. Options are `name=value` words; dotted names override the recipe's config."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from . import words as word_options
from .cli_curate import curate_app
from .words import Option

PLAIN = {"no_args_is_help": True, "rich_markup_mode": None}  # brackets in help texts are meant
app = typer.Typer(
    name="dinov3",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="DINOv3 training on your own images: pretrain, evaluate, look.",
    **PLAIN,
)
evaluate_app = typer.Typer(
    help="Judge the features of a backbone; `evaluate PROBE options` lists all options.", **PLAIN
)
visualize_app = typer.Typer(help="Pictures of patch features.", **PLAIN)
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(visualize_app, name="visualize")
app.add_typer(curate_app, name="curate")

Words = Annotated[list[str] | None, typer.Argument(help="name=value options", show_default=False)]
BACKBONE = {
    "backbone": Option(str, required=True, help="RUN, FILE, folder, hf:OWNER/NAME or timm:NAME"),
    "step": Option(int, help="checkpoint step; 0 is the untrained start; default: the newest"),
}


def main() -> None:
    """Entry point: a user's mistake is one line on standard error and exit status 2, a failed run 1, a signal 143."""
    _wait_patiently()
    try:
        app(standalone_mode=True)
    except ValueError as error:
        _fail(error, 2)
    except (OSError, RuntimeError) as error:
        _fail(error, 1)


def _wait_patiently() -> None:
    """Threads that wait for others sleep soon, unless the user has said how they wait; before torch loads OpenMP.

    With another program on one of two cores OpenMP's own default trains 11 times slower than this; alone 5 % faster.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def _fail(error: BaseException, status: int) -> None:
    print(f"dinov3: error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(status)


@app.command()
def pretrain(
    words: Words = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show the effective config and stop.")] = False,
) -> None:
    """Train a backbone: recipe=NAME data=PATH out=RUN [init=WEIGHTS] [key.sub=value ...]. The same line resumes."""
    config, out = _config(words or [], "pretrain", need_out=not print_config)
    from .build import pretrain as run
    from .config import to_yaml

    if print_config:
        print(to_yaml(config), end="")
        return
    finished = run(config, out, console=Console())
    if finished.reason == "signal":
        sys.exit(143)


@app.command()
def refine(
    words: Words = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show the effective config and stop.")] = False,
) -> None:
    """Gram anchoring: run=RUN|init=WEIGHTS out=RUN2 [teacher=auto|ema|WEIGHTS] [recipe=NAME] [data=PATH] [key.sub=]."""
    from .refinement import refine as run
    from .stages import refinement

    extra = {
        "init": Option(str, help="weights from elsewhere to begin with, in place of run; needs recipe, data, teacher"),
        "teacher": Option(str, default="auto", help="auto, ema, or WEIGHTS (a run, a checkpoint, a file, hf:, timm:)"),
        "labelled": Option(
            str, help="images with masks to score the checkpoints with, in place of the label-free score"
        ),
    }
    _stage(run, refinement, "refine", words or [], extra, print_config)


@app.command()
def adapt(
    words: Words = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show the effective config and stop.")] = False,
) -> None:
    """High-resolution adaptation: run=RUN out=RUN2 [teacher=WEIGHTS] [recipe=NAME] [data=PATH] [key.sub=value ...]."""
    from .refinement import adapt as run
    from .stages import adaptation

    extra = {"teacher": Option(str, help="WEIGHTS of the Gram teacher, or ema; default: the EMA teacher of run")}
    _stage(run, adaptation, "adapt", words or [], extra, print_config)


def _stage(run, stage, command: str, words: list[str], extra: dict[str, Option], print_config: bool) -> None:
    from .config import to_yaml
    from .refinement import stage_config

    options = {
        "run": Option(str, help="RUN to begin with, or one of its checkpoints"),
        "out": Option(Path, required=not print_config, help="RUN2, a folder of its own"),
        "recipe": Option(
            str, help="NAME (see dinov3 recipes); default: the run's own settings, changed for this stage"
        ),
        "data": Option(str, help="folder, file list, tar shards or torchvision:NAME; default: the run's images"),
        "config": Option(Path, help="YAML file with overrides"),
    }
    values, overrides = word_options.read(command, words, options | extra, rest=True)
    init = values.get("init")
    if (values["run"] is None) == (init is None):
        both = "run=RUN or init=WEIGHTS" if "init" in extra else "run=RUN"
        raise ValueError(f"{command}: expected {both}, got {'both' if init is not None else 'neither'}")
    if init is not None:
        overrides = [f"init.weights={_quoted(init)}", *overrides]
    config = stage_config(
        stage,
        values["run"],
        name=values["recipe"],
        overrides=[*_sources(values["data"]), *overrides],
        patch=values["config"],
    )
    if print_config:
        print(to_yaml(config), end="")
        return
    more = {name: values[name] for name in extra if name != "init"}
    finished = run(values["run"], values["out"], config=config, console=Console(), **more)
    if finished.reason == "signal":
        sys.exit(143)


@app.command()
def distill(
    words: Words = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show the effective config and stop.")] = False,
) -> None:
    """Students of a frozen teacher: teacher=RUN students=vit_small,convnext_tiny data=PATH out=DIR [recipe=distill]
    [config=FILE.yaml] [key.sub=value | STUDENT.key.sub=value ...]. The same line resumes; DIR/STUDENT is a run."""
    config, out = _distill_config(words or [], need_out=not print_config)
    from .config import to_yaml
    from .distillation import distill as run

    if print_config:
        print(to_yaml(config), end="")
        return
    finished = run(config, out, console=Console())
    if finished.reason == "signal":
        sys.exit(143)


def _distill_config(words: list[str], *, need_out: bool):
    from .config import override
    from .recipes import recipe

    options = {
        "teacher": Option(str, help="RUN, or whatever else backbone= takes"),
        "students": Option(str, help="names of backbones, commas between several"),
        "data": Option(str, help="folder, file list, tar shards, torchvision:NAME or manifest; commas between several"),
        "out": Option(Path, required=need_out, help="DIR"),
        "recipe": Option(str, default="distill", help="NAME (see dinov3 recipes)"),
        "config": Option(Path, help="YAML file with overrides"),
    }
    values, overrides = word_options.read("distill", words, options, rest=True)
    config = recipe(values["recipe"])
    students = config.distillation.students
    if values["students"] is not None:
        students = tuple(name.strip() for name in values["students"].split(","))
    prefixes = tuple(f"{name}." for name in (*students, "vit", "convnext"))
    own = tuple(word for word in overrides if word.startswith(prefixes))
    distillation = replace(
        config.distillation,
        students=students,
        teacher=values["teacher"] or config.distillation.teacher,
        overrides=config.distillation.overrides + own,
    )
    words = [*_sources(values["data"]), *(word for word in overrides if word not in own)]
    return override(replace(config, distillation=distillation), words, values["config"]), values["out"]


def _config(words: list[str], command: str, *, need_out: bool):
    from .config import override
    from .recipes import recipe

    options = {
        "recipe": Option(str, required=True, help="NAME (see dinov3 recipes)"),
        "data": Option(str, help="folder, file list, tar shards, torchvision:NAME or manifest; commas between several"),
        "out": Option(Path, required=need_out, help="RUN"),
        "init": Option(str, help="weights to start from: RUN, FILE, folder, hf:OWNER/NAME or timm:NAME"),
        "config": Option(Path, help="YAML file with overrides"),
        "architecture": Option(str, help="NAME such as vit_small or convnext_tiny, instead of the recipe's backbone"),
    }
    values, overrides = word_options.read(command, words, options, rest=True)
    config = recipe(values["recipe"])
    if values["architecture"] is not None:
        config = replace(config, backbone=_architecture(values["architecture"], config.backbone.patch_size))
    if values["init"] is not None:
        overrides = [f"init.weights={_quoted(values['init'])}", *overrides]
    return override(config, [*_sources(values["data"]), *overrides], values["config"]), values["out"]


def _sources(data: str | None) -> list[str]:
    """data=... as an override of the config."""
    from .data.sources import split_commas

    return [] if data is None else [f"data.sources=[{','.join(_quoted(part) for part in split_commas(data))}]"]


def _architecture(name: str, patch_size: int):
    from .models.architectures import architecture

    return replace(architecture(name), patch_size=patch_size)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


@app.command()
def recipes() -> None:
    """The recipes that come with the package."""
    from .recipes import names, summary

    table = Table(show_header=False, box=None, pad_edge=False)
    for name in names():
        table.add_row(name, summary(name))
    Console().print(table)


@app.command()
def plan(words: Words = None) -> None:
    """Memory per GPU and FLOPs per step: recipe=NAME [ranks=N] [key.sub=value ...]."""
    from .planning import plan_table

    options = {"ranks": Option(int, default=1, help="number of GPUs")}
    ranks = [word for word in words or [] if word.startswith("ranks=")]
    config, _ = _config([word for word in words or [] if word not in ranks], "plan", need_out=False)
    values, _ = word_options.read("plan", ranks, options)
    Console().print(plan_table(config, values["ranks"]))


@app.command()
def doctor() -> None:
    """What is built, which device and threads will be used, and what is missing."""
    from .doctor import lines

    table = Table(show_header=False, box=None, pad_edge=False)
    for what, how in lines():
        table.add_row(what, how)
    Console().print(table)


@evaluate_app.command("knn")
def evaluate_knn(words: Words = None) -> None:
    """k-NN on labelled sources: backbone=RUN train=PATH test=PATH [k=10,20] [size=N] [pooling=cls] [out=FILE.json]."""
    _evaluate("knn", words)


@evaluate_app.command("logistic")
def evaluate_logistic(words: Words = None) -> None:
    """Logistic regression: backbone=RUN train=PATH test=PATH [strengths=0.1,1] [shots=N] [size=N] [out=FILE.json]."""
    _evaluate("logistic", words)


@evaluate_app.command("linear")
def evaluate_linear(words: Words = None) -> None:
    """Linear probe by SGD: backbone=RUN train=PATH test=PATH [learning_rates=0.01,0.1] [shots=N] [out=FILE.json]."""
    _evaluate("linear", words)


@evaluate_app.command("segment")
def evaluate_segment(words: Words = None) -> None:
    """Linear segmentation, mIoU: backbone=RUN train=PATH test=PATH, masks NAME.mask.png [images=N] [out=FILE.json]."""
    _evaluate("segment", words)


@evaluate_app.command("depth")
def evaluate_depth(words: Words = None) -> None:
    """Linear depth, RMSE: backbone=RUN train=PATH test=PATH, maps NAME.depth.png (16-bit mm) or NAME.depth.npy (m)."""
    _evaluate("depth", words)


@evaluate_app.command("match")
def evaluate_match(words: Words = None) -> None:
    """Patch correspondence, PCK: backbone=RUN data=PATH (known warps) or pairs=FILE.json (known keypoints)."""
    _evaluate("match", words)


@evaluate_app.command("retrieve")
def evaluate_retrieve(words: Words = None) -> None:
    """Instance retrieval, mAP: backbone=RUN gallery=PATH [queries=PATH] [size=N] [pooling=cls] [out=FILE.json]."""
    _evaluate("retrieve", words)


@evaluate_app.command("robustness")
def evaluate_robustness(words: Words = None) -> None:
    """The same images at 0.5x to 4x: backbone=RUN test=PATH [train=PATH] [scales=0.5,1,2,4] [out=FILE.json]."""
    _evaluate("robustness", words)


def _evaluate(probe: str, words: list[str] | None) -> None:
    from .commands_evaluate import evaluate

    evaluate(probe, words or [])


@app.command()
def features(words: Words = None) -> None:
    """Features of every image: backbone=RUN data=PATH out=FILE.safetensors|.npy [size=PIXELS] [pooling=cls]."""
    from .commands import features as run

    options = BACKBONE | {
        "data": Option(str, required=True, help="PATH"),
        "out": Option(Path, required=True, help="FILE.safetensors or FILE.npy"),
        "size": Option(int, help="side in pixels; default: the recipe's global crop"),
        "pooling": Option(str, default="cls", help="cls, patch_mean or cls+patch"),
    }
    values, _ = word_options.read("features", words or [], options)
    run(**values)


@app.command()
def export(
    words: Words = None,
    to: Annotated[str | None, typer.Option("--to", help="hf, timm, meta, safetensors or onnx; as to=NAME.")] = None,
) -> None:
    """Weights written out: backbone=RUN out=PATH [to=hf|timm|meta|safetensors|onnx] [heads=true]; checked there."""
    from .commands_export import export_weights as run

    options = BACKBONE | {
        "to": Option(str, help="hf, timm, meta, safetensors or onnx; default: by the suffix of out"),
        "out": Option(Path, required=True, help="new file or folder"),
        "heads": Option(_yes, default=False, help="true or false: the projection heads too (safetensors)"),
    }
    values, _ = word_options.read("export", [*(words or []), *([] if to is None else [f"to={to}"])], options)
    run(**values)


@visualize_app.command("pca")
def visualize_pca(words: Words = None) -> None:
    """PCA of patch features as RGB: backbone=RUN data=PATH out=FILE.png [images=8] [size=PIXELS]."""
    from .commands import visualize_pca as run

    values, _ = word_options.read("visualize pca", words or [], _picture_options())
    run(**values)


@visualize_app.command("cosine")
def visualize_cosine(words: Words = None) -> None:
    """Similarity of one patch to all others: backbone=RUN data=PATH out=FILE.png [images=8] [size=N] [point=X,Y]."""
    from .commands import visualize_cosine as run

    options = _picture_options() | {
        "point": Option(_point, default=(0.5, 0.5), help="x,y as shares of width and height")
    }
    values, _ = word_options.read("visualize cosine", words or [], options)
    run(**values)


@visualize_app.command("attention")
def visualize_attention(words: Words = None) -> None:
    """Where CLS and registers look: backbone=RUN data=PATH out=FILE.png [images=8] [block=-1]."""
    from .commands_pictures import visualize_attention as run

    options = _picture_options() | {"block": Option(int, default=-1, help="number of the block; -1: the last")}
    values, _ = word_options.read("visualize attention", words or [], options)
    run(**values)


@visualize_app.command("compare")
def visualize_compare(words: Words = None) -> None:
    """Checkpoints side by side: backbone=RUN [steps=0,400,800] [other=RUN2] data=PATH out=FILE.png [kind=pca]."""
    from .commands_pictures import visualize_compare as run

    options = _several_options() | {
        "kind": Option(str, default="pca", help="pca, cosine or attention"),
        "point": Option(_point, default=(0.5, 0.5), help="x,y as shares of width and height"),
    }
    values, _ = word_options.read("visualize compare", words or [], options)
    run(**values)


@visualize_app.command("click")
def visualize_click(words: Words = None) -> None:
    """A page on which one clicks a patch: backbone=RUN data=PATH out=PAGE.html [steps=0,800] [other=RUN2]."""
    from .commands_pictures import visualize_click as run

    options = _several_options() | {
        "out": Option(Path, required=True, help="PAGE.html"),
        "images": Option(int, default=12, help="how many"),
    }
    values, _ = word_options.read("visualize click", words or [], options)
    run(**values)


@app.command()
def health(words: Words = None) -> None:
    """Label-free measures of patch features: backbone=RUN [data=PATH] [history=true] [images=16] [out=FILE.json]."""
    from .commands_health import health as run

    options = BACKBONE | {
        "data": Option(str, help="PATH; default: the images of the run"),
        "images": Option(int, help="how many, spread evenly over the data; default: 16"),
        "size": Option(int, help="side in pixels; default: the recipe's global crop"),
        "history": Option(_yes, default=False, help="true: every checkpoint of the run"),
        "out": Option(Path, help="FILE.json"),
    }
    values, _ = word_options.read("health", words or [], options)
    run(**values)


@app.command()
def report(words: Words = None) -> None:
    """One HTML page of a run, or of several side by side: RUN [RUN2 ...] out=PAGE.html [pictures=4]."""
    from .run_report import report as run

    options = {
        "out": Option(Path, required=True, help="PAGE.html"),
        "pictures": Option(int, default=4, help="photographs to show features of; 0: none"),
    }
    runs = [word for word in words or [] if word.partition("=")[0] not in options]
    values, _ = word_options.read("report", [word for word in words or [] if word not in runs], options)
    path = run(runs, values["out"], pictures=values["pictures"])
    Console().print(f"wrote {path}: {path.stat().st_size / 2**20:.1f} MB", highlight=False, soft_wrap=True)


@app.command()
def demo(
    words: Words = None,
    quick: Annotated[bool, typer.Option("--quick", help="Under 90 seconds on two cores.")] = False,
) -> None:
    """All stages on photographs that scikit-image and scikit-learn bring, write a page: [out=FOLDER] [seed=0]."""
    from .demo import run_demo

    options = {
        "out": Option(Path, default=Path("dinov3-demo"), help="FOLDER"),
        "seed": Option(int, default=0, help="seed"),
    }
    values, _ = word_options.read("demo", words or [], options)
    if run_demo(values["out"], quick=quick, seed=values["seed"]) is None:
        sys.exit(143)


@app.command()
def study(
    name: Annotated[
        str | None, typer.Argument(help="which one; without it they are listed", show_default=False)
    ] = None,
    words: Words = None,
) -> None:
    """A question answered by runs that differ in one thing: NAME out=FOLDER [seeds=0,1,2] [minutes=M] [...]."""
    from .studies.command import run_named

    run_named(name, words or [])


def _picture_options() -> dict[str, Option]:
    return BACKBONE | {
        "data": Option(str, required=True, help="PATH"),
        "out": Option(Path, required=True, help="FILE.png"),
        "images": Option(int, default=8, help="how many"),
        "size": Option(int, help="short side in pixels; default: twice the recipe's global crop"),
    }


def _several_options() -> dict[str, Option]:
    options = {name: option for name, option in _picture_options().items() if name != "step"}
    return options | {
        "steps": Option(_steps, default=(), help="checkpoints of the run, commas between several; 0: its start"),
        "other": Option(str, help="another backbone to stand beside it"),
    }


def _steps(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _yes(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


def _point(text: str) -> tuple[float, float]:
    x, y = (float(part) for part in text.split(","))
    if not (0.0 <= x <= 1.0 and 0.0 <= y <= 1.0):
        raise ValueError(text)
    return x, y


if __name__ == "__main__":
    main()
