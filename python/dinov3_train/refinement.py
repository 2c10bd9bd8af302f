"""`dinov3 refine` and `dinov3 adapt`: the stages after pretraining, each in a folder and with a step count of its own.

Both take an earlier run's student, EMA teacher and heads and train on with the Gram term. What a stage changes in the
settings is in `stages`; which checkpoint serves as Gram teacher is chosen in `gram_choice`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from .build import Finished, pretrain, run_config, start_checkpoint
from .config import Config, override, replaced
from .gram_choice import choose_teacher, pinned
from .recipes import recipe
from .stages import adaptation, refinement
from .train.distributed import Ranks
from .train.run_folder import RunFolder


def stage_config(
    stage: Callable[[Config], Config],
    run: str | Path | None,
    *,
    name: str | None = None,
    overrides: Sequence[str] = (),
    patch: Path | None = None,
) -> Config:
    """The settings of the stage after `run`: a recipe's, or the run's own as `stage` changes them.

    Args:
        stage: `stages.refinement` or `stages.adaptation`.
        run: the run to begin with; its images are taken unless the overrides name others. None: the overrides name
            `init.weights` and sources, and a recipe is needed.
        name: recipe; None: `stage` of the run's own config.
        overrides, patch: as `config.override` takes them.

    Errors: ValueError for a folder that is no run, an unknown recipe, key or value.
    """
    if run is None:
        if name is None:
            raise ValueError("recipe: weights without a run bring no settings, expected recipe=NAME (dinov3 recipes)")
        config = replaced(recipe(name), {"start.optimizer": False})
        return override(config, overrides, patch)
    earlier = run_config(run)
    config = stage(earlier) if name is None else recipe(name)
    images = config.data.sources or earlier.data.sources
    config = replaced(config, {"data.sources": images, "start.run": str(run)})
    return override(config, overrides, patch)


def refine(
    run: str | Path | None,
    out: str | Path,
    *,
    teacher: str = "auto",
    config: Config | None = None,
    labelled: str | None = None,
    console: Console | None = None,
) -> Finished:
    """Gram anchoring of a pretrained run; the same call resumes.

    Args:
        run: pretraining run, or one of its checkpoints; student, EMA, heads and AdamW's moments come from it. None: the
            config names weights in `init.weights`; heads they do not have are fresh.
        out: run folder of the refinement, new, empty, or of this very refinement.
        teacher: Gram teacher: "auto" scores what the pretraining kept and takes the best, "ema" is the live EMA, else
            weights as `weights.resolve` takes them.
        config: None: the run's own settings as `stages.refinement` changes them.
        labelled: images with masks for the choice of the teacher in place of the label-free score.

    Errors: as `build.pretrain`, and ValueError for a run without history under "auto".
    """
    console = console or Console()
    config = config or stage_config(refinement, run)
    if run is None and teacher == "auto":
        raise ValueError(
            "teacher=auto: it chooses among the checkpoints of run=RUN; expected teacher=WEIGHTS or ema with init="
        )

    def choose(config: Config, here: Ranks) -> str:
        if run is None:
            return pinned(teacher)
        return choose_teacher(config, Path(run), Path(out), teacher, labelled=labelled, here=here, console=console)

    return _train(config, run, out, teacher=teacher, choose=choose, console=console)


def adapt(
    run: str | Path,
    out: str | Path,
    *,
    teacher: str | None = None,
    config: Config | None = None,
    console: Console | None = None,
) -> Finished:
    """High-resolution adaptation of a refined run; the same call resumes.

    Args:
        run: refined run, or one of its checkpoints; student and EMA begin as its EMA teacher, AdamW afresh.
        out: run folder of the adaptation.
        teacher: Gram teacher; None: the EMA teacher of `run`, as the paper has it.
        config: None: the run's own settings as `stages.adaptation` changes them.

    Errors: as `build.pretrain`.
    """
    console = console or Console()
    config = config or stage_config(adaptation, run)
    wanted = teacher or str(run)
    return _train(config, run, out, teacher=wanted, choose=lambda *_: pinned(wanted), console=console)


def _train(
    config: Config,
    run: str | Path | None,
    out: str | Path,
    *,
    teacher: str,
    choose: Callable[[Config, Ranks], str],
    console: Console,
) -> Finished:
    folder = RunFolder(Path(out))
    begun = run_config(out) if folder.config.is_file() else None
    if run is not None:
        config = _pinned_start(config, Path(run), begun)
    if config.gram.weight == 0:
        return pretrain(config, out, console=console)

    def complete(config: Config, here: Ranks) -> Config:
        if begun is not None and begun.gram.teacher is not None and _same_source(teacher, begun.gram.teacher):
            chosen = begun.gram.teacher
        else:
            chosen = choose(config, here)
        live = {"gram.refresh_every": 0, "gram.refreshes": None} if chosen == "ema" else {}  # it is always fresh
        return replaced(config, {"gram.teacher": chosen, **live})

    return pretrain(config, out, console=console, complete=complete)


def _pinned_start(config: Config, run: Path, begun: Config | None) -> Config:
    """The config with the very checkpoint it begins with: a run that trains on must not change what a resume means."""
    if begun is not None and begun.start.run is not None and _same_source(str(run), begun.start.run):
        return replaced(config, {"start.run": begun.start.run})
    return replaced(config, {"start.run": str(start_checkpoint(replaced(config, {"start.run": str(run)})))})


def _same_source(asked: str, pinned: str) -> bool:
    """Whether the pinned weights are what was asked for: the same, chosen by "auto", or a checkpoint of that run."""
    return asked in ("auto", pinned) or Path(pinned).parent.parent == Path(asked)
