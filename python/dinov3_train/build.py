"""From a `Config` to the objects of a run; with `validation` and `planning` the only module that reads it.

`pretrain(config, out)` is `dinov3 pretrain` from Python; `load(run)` gives the backbone a run has trained.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from . import schedule
from .config import Config, Gram, Optimizer, from_yaml, to_yaml
from .data.batch import CropBatch
from .data.loader import UnreadableCount, make_loader
from .data.mixture import draw_counts, mixture_lines, open_data
from .data.resolutions import resolutions
from .data.sampler import BatchPlan
from .data.sources import Source, open_source
from .evaluation.drift import drift, panel
from .evaluation.extract import extract
from .evaluation.knn import evaluate_knn
from .evaluation.monitor import PREFIX, Monitor, history_of
from .evaluation.panel import open_panel
from .evaluation.view import View
from .losses import (
    DenseHeadLoss,
    DinoLoss,
    FeatureDistillationLoss,
    GramLoss,
    IbotLoss,
    KoLeoLoss,
    PatchKoLeoLoss,
    Term,
)
from .models.architectures import backbone_of
from .models.convnext import ConvNeXt
from .models.heads import ProjectionHead
from .models.vit import VisionTransformer
from .report import read_metrics
from .train.checkpoint import load_start, save_history, saved_steps
from .train.distributed import Ranks, ranks, replicated
from .train.gram import GramTeacher
from .train.loop import Watchers, fit
from .train.networks import Networks, teacher_of
from .train.optimizer import adamw
from .train.progress import ProgressLine
from .train.run_folder import RunFolder
from .train.step import StepSettings, StepValues, TrainState
from .validation import check, check_gram_teacher, check_memory, check_same_architecture, check_same_run

if TYPE_CHECKING:
    from .weights import Resolved


@dataclass(frozen=True)
class Finished:
    """How a run ended: the folder, the step it stands at, and why it stopped ("steps", "minutes" or "signal")."""

    out: Path
    step: int
    reason: str


def pretrain(
    config: Config,
    out: str | Path,
    *,
    console: Console | None = None,
    complete: Callable[[Config, Ranks], Config] | None = None,
) -> Finished:
    """Train, or continue the run in `out`: the same call resumes after a kill, bit for bit. Serves every stage.

    Args:
        config: from a recipe.
        out: run folder, new, empty, or of this very run.
        console: where progress goes; None: standard output.
        complete: called once the ranks have met and the config is checked; returns the config with what could not be
            known before (a Gram teacher chosen by its scores), the same on all ranks.

    Errors: ValueError for settings, data or folders that cannot work, before training starts; RuntimeError when the
        loss stays non-finite; OSError when a checkpoint cannot be written.
    """
    from .weights.start import continued_config, description, first_config  # stands on this module

    folder = RunFolder(Path(out))
    if config.distillation.students and config.start.run is None:  # a student's run may be refined or adapted
        raise ValueError(f"recipe: {config.recipe} has students and a teacher, so it is for dinov3 distill")
    with ranks() as here:
        folder.check()
        imported = earlier = None
        if folder.newest_step() is not None:
            earlier = run_config(folder.path)
            config = continued_config(config, earlier)
        else:
            config, imported = first_config(config)
        check(config, here.world_size)  # after the weights, which may set patch size and heads
        if complete is not None:
            config = complete(config, here)
        if earlier is not None:
            check_same_run(config, earlier, str(folder.path))
        console = console if here.first and console is not None else Console(quiet=not here.first)
        source = open_data(config.data)
        labelled = [open_source(spec) for spec in config.data.labelled] if here.first else []
        check_memory(config, here.device, here.world_size)
        state = new_state(config, here, imported)
        step = folder.newest_step()
        if step is not None:
            folder.checkpoints(config.run.keep).load(state, step)
        elif config.start.run is not None:
            load_start(start_checkpoint(config), state, student=config.start.student, optimizer=config.start.optimizer)
        if here.first:
            folder.write_config(to_yaml(config))
            _say_start(console, config, source, here, folder, step)
            if imported is not None:
                save_history(folder.history, state)  # step 0: what drift is measured from, and a Gram teacher to choose
                for line in description(config, imported):
                    console.print(line, highlight=False, soft_wrap=True)
        progress = ProgressLine(
            config.run.steps, state.step, console, None if config.run.minutes is None else 60.0 * config.run.minutes
        )
        with progress:
            reason = fit(
                state,
                _batches(config, source, here, state.step),
                lambda number: step_values(config, number),
                settings=step_settings(config, here),
                run=config.run,
                folder=folder,
                watchers=Watchers(
                    unreadable=unreadable(len(source), config.data.max_unreadable, progress),
                    evaluate=evaluation(config, labelled) if labelled else None,
                    drawn=draw_counts(source, seed=config.run.seed, batch_size=config.run.batch_size),
                    monitor=monitor(config, source, folder, state.step, console) if here.first else None,
                    monitor_every=config.monitor.every,
                    drift=_drift(config, source, folder, progress) if here.first and config.run.drift_every else None,
                ),
                ranks=here,
                config_yaml=to_yaml(config),
                progress=progress,
            )
        progress.say(
            f"stopped by a signal at step {state.step}; the checkpoint is written, the same command continues"
            if reason == "signal"
            else f"done: {state.step} steps, {folder.path}"
        )
    return Finished(folder.path, state.step, reason)


def new_state(config: Config, here: Ranks, imported: Resolved | None = None) -> TrainState:
    """Student, teacher and optimiser at step 0: of `run.seed` and imported weights alone, the same on every rank."""
    student = networks(config)
    if imported is not None:
        from .weights.start import fill

        fill(student, imported, heads=config.init.heads)
    student = student.to(here.device)
    teacher = teacher_of(student)
    if config.run.compile:
        for block in [*student.backbone.blocks, *teacher.backbone.blocks]:
            block.compile()
    rules = config.optimizer
    optimizer = adamw(
        student, betas=rules.betas, layer_decay=rules.layer_decay, patch_embed_multiplier=rules.patch_embed_multiplier
    )
    state = TrainState(student, teacher, optimizer, replicated(student, here.world_size, here.group))
    if config.gram.weight or config.gram.features:
        state.gram_teacher = gram_teacher(config, state.teacher, here.device)
    return state


def gram_teacher(config: Config, teacher: Networks, device: torch.device) -> GramTeacher:
    """The Gram teacher that `gram.teacher` names, frozen, on `device`; for "ema" the EMA teacher's own backbone.

    Errors: ValueError when it cannot serve: none named, another patch size, another architecture although refreshed.
    """
    from .weights import resolve  # stands on this module

    gram, crops = config.gram, config.crops
    if gram.teacher == "ema":
        return GramTeacher(teacher.backbone, crops.mean, crops.std, gram.crops)
    if gram.teacher is None:
        raise ValueError(
            f"gram.teacher: gram.weight is {gram.weight:g}, expected ema or the weights of a Gram teacher, got nothing "
            "(dinov3 refine chooses one: teacher=auto)"
        )
    found = resolve(gram.teacher)
    check_gram_teacher(config, found)
    backbone = found.backbone.to(device).requires_grad_(False).eval()
    if config.run.compile and hasattr(backbone, "blocks"):
        for block in backbone.blocks:
            block.compile()
    return GramTeacher(backbone, found.mean, found.std, gram.crops)


def start_checkpoint(config: Config) -> Path:
    """The checkpoint that `start.run` names, the newest of a run folder, once it is known to fit.

    Errors: ValueError when there is none, or when it is of another architecture or has other heads.
    """
    path = Path(config.start.run)
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    earlier = run_config(run)
    check_same_architecture(config, earlier, str(run))
    if run != path:
        if not path.is_dir():
            raise ValueError(f"start.run: {path} does not exist")
        return path
    steps = saved_steps(run / "checkpoints")
    if not steps:
        raise ValueError(f"start.run: {run} has no checkpoint yet")
    return run / "checkpoints" / f"step_{steps[-1]:08d}"


def networks(config: Config) -> Networks:
    """Backbone and heads with the weights `run.seed` gives, without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        backbone = backbone_of(config.backbone)
        dino_head = ProjectionHead(config.backbone.embed_dim, config.dino_head)
        ibot_head = ProjectionHead(config.backbone.embed_dim, config.ibot_head)
        dense_head = ProjectionHead(config.backbone.embed_dim, config.ibot_head) if config.losses.dense else None
    # a head without a loss gets no gradient, which DistributedDataParallel would wait for
    dino_head.requires_grad_(config.losses.dino > 0)
    ibot_head.requires_grad_(config.losses.ibot > 0)
    return Networks(
        backbone,
        dino_head,
        ibot_head,
        checkpointing=config.run.checkpointing,
        hide_masked=config.masking.hide,
        dense_head=dense_head,
    ).train()


def terms(config: Config) -> tuple[Term, ...]:
    """The losses; a term of weight 0 is left out."""
    losses = config.losses
    temperature = losses.student_temperature
    found: list[Term] = []
    if losses.dino:
        found.append(DinoLoss(weight=losses.dino, student_temperature=temperature, local_weight=losses.local_weight))
    if losses.ibot:
        found.append(IbotLoss(weight=losses.ibot, student_temperature=temperature))
    if losses.koleo:
        found.append(KoLeoLoss(weight=losses.koleo, group=losses.koleo_group))
    if losses.koleo_patches:
        found.append(PatchKoLeoLoss(weight=losses.koleo_patches))
    if losses.dense:
        found.append(DenseHeadLoss(weight=losses.dense, student_temperature=temperature))
    if config.gram.weight:
        found.append(GramLoss(weight=config.gram.weight, clip=config.gram.clip, level=config.gram.level))
    if config.gram.features:
        found.append(FeatureDistillationLoss(weight=config.gram.features))
    return tuple(found)


def step_values(config: Config, step: int) -> StepValues:
    """Every schedule at `step`."""
    rules, losses, steps = config.optimizer, config.losses, config.run.steps

    def scaled(rate: float) -> float:
        return schedule.scaled_learning_rate(rate, rule=rules.lr_rule, batch_size=config.run.batch_size)

    peak, end = scaled(rules.lr), scaled(rules.lr_end or 0.0)
    if rules.cooldown:
        rate = schedule.warmup_cooldown(
            step,
            peak=peak,
            end=end,
            warmup=rules.warmup,
            cooldown=rules.cooldown,
            steps=steps,
            shape=rules.warmup_shape,
        )
    elif rules.lr_end is not None:
        rate = schedule.warmup_cosine(
            step, peak=peak, end=end, warmup=rules.warmup, steps=steps, shape=rules.warmup_shape
        )
    else:
        rate = schedule.warmup_constant(step, peak=peak, warmup=rules.warmup, shape=rules.warmup_shape)

    def over_run(start: float, last: float | None) -> float:
        return start if last is None else schedule.cosine(step, start=start, end=last, steps=steps)

    return StepValues(
        learning_rate=rate,
        prototype_rate=0.0 if step < rules.freeze_prototypes else rate,
        backbone_rate=rate * _backbone_share(rules, step),
        weight_decay=over_run(rules.weight_decay, rules.weight_decay_end),
        momentum=over_run(rules.momentum, rules.momentum_end),
        teacher_temperature=schedule.linear(
            step,
            start=losses.teacher_temperature_start,
            end=losses.teacher_temperature,
            steps=losses.teacher_temperature_warmup,
        ),
        weights=_part_weights(config, step),
        refresh_gram=_refreshes_gram(config.gram, step),
    )


def _backbone_share(rules: Optimizer, step: int) -> float:
    """Share of the learning rate that the backbone takes: 0 while frozen, then linear to `backbone_rate`."""
    frozen, ramp = rules.freeze_backbone or 0, rules.backbone_ramp or 0
    return 0.0 if step < frozen else schedule.linear(step + 1 - frozen, start=0.0, end=rules.backbone_rate, steps=ramp)


def _part_weights(config: Config, step: int) -> dict[str, float]:
    """Scheduled factors of the loss parts, beside the weights of their terms."""
    losses, gram, factors = config.losses, config.gram, {}
    if losses.local_weight_start is not None:
        now = schedule.cosine(
            step, start=losses.local_weight_start, end=losses.local_weight, steps=losses.local_weight_ramp
        )
        factors["dino_local"] = now / losses.local_weight
    if gram.weight and gram.ramp:
        factors["gram"] = schedule.cosine(step, start=0.0, end=1.0, steps=gram.ramp)
    return factors


def _refreshes_gram(gram: Gram, step: int) -> bool:
    """Whether the EMA is copied into the Gram teacher after `step`: when step + 1 is a multiple of the cadence."""
    done, every = step + 1, gram.refresh_every
    if not every or done % every or done < gram.refresh_start:
        return False
    before = max(-(-gram.refresh_start // every), 1)  # the first multiple that counts
    return gram.refreshes is None or done // every - before < gram.refreshes


def step_settings(config: Config, here: Ranks) -> StepSettings:
    """What `train_step` keeps over a run."""
    return StepSettings(
        terms=terms(config),
        seed=config.run.seed,
        batch_size=config.run.batch_size,
        sinkhorn_iterations=config.losses.sinkhorn_iterations,
        clip=config.optimizer.clip,
        autocast={"bf16": torch.bfloat16, "fp32": None}[config.run.precision],
        mean=config.crops.mean,
        std=config.crops.std,
        collectives=here.collectives,
        max_skipped=config.run.max_skipped,
    )


def load(run: str | Path, *, step: int | None = None) -> VisionTransformer | ConvNeXt:
    """A backbone in evaluation mode on the CPU: of a run its EMA teacher; see `weights.resolve`.

    Args:
        run: run folder, one of its `checkpoints/step_...` folders, or whatever else `weights.resolve` takes.
        step: checkpoint to take; None: the newest; 0: the untrained weights the run started from.

    Errors: ValueError when there is no such run or checkpoint (naming those there are).
    """
    from .weights import resolve  # stands on this module

    return resolve(run, step=step).backbone


def run_config(run: str | Path) -> Config:
    """The effective config of a run folder."""
    folder = RunFolder(Path(run))
    if not folder.config.is_file():
        raise ValueError(f"expected a run folder with a config.yaml, got {str(run)!r}")
    return from_yaml(folder.config.read_text())


def _batches(config: Config, source: Source, here: Ranks, start_step: int) -> Iterator[CropBatch]:
    run = config.run
    plan = BatchPlan(
        batch_size=run.batch_size, seed=run.seed, rank=here.rank, world_size=here.world_size, accumulate=run.accumulate
    )
    loader = make_loader(
        source,
        config.crops,
        config.masking,
        batch=plan,
        patch_size=config.backbone.patch_size,
        start_step=start_step,
        steps=run.steps,
        workers=min(os.cpu_count() or 1, 8) if config.data.workers is None else config.data.workers,
    )
    return iter(loader)


def unreadable(images: int, limit: float, progress: ProgressLine) -> Callable[[tuple[str, ...]], None]:
    """A watcher that counts unreadable images and says each once."""
    count = UnreadableCount(images, limit)

    def see(skipped: tuple[str, ...]) -> None:
        for entry in count.add(skipped):
            progress.say(f"unreadable image skipped: {entry}")

    return see


def evaluation(config: Config, labelled: list[Source]) -> Callable[[TrainState], dict[str, float]]:
    """The online k-NN of the EMA teacher on `data.labelled`."""

    def evaluate(state: TrainState) -> dict[str, float]:
        train, test = (
            extract(state.teacher.backbone, source, view(config), precision=config.run.precision) for source in labelled
        )
        score = evaluate_knn(train, test, k=(10,)).best
        return {"knn": score.accuracy, "knn_mean_per_class": score.mean_per_class}

    return evaluate


def monitor(
    config: Config, source: Source, folder: RunFolder, step: int, console: Console
) -> Callable[[TrainState], tuple[dict[str, float], list[str]]] | None:
    """The health monitor of a run that starts or continues at `step`; None where it is off or has nothing to look at.

    Its panel has fewer images than `monitor.images` where the source has no more, which is said.
    """
    wanted, spec = config.monitor.images, config.monitor.source
    if not config.monitor.every:
        return None
    panel_source = source if spec is None else open_source(spec)
    try:
        panel = open_panel(panel_source, view(config), images=wanted, patch_size=config.backbone.patch_size, at_least=2)
    except ValueError as error:
        if spec is not None:
            raise ValueError(f"monitor.source: {error}") from error
        console.print(f"note: no health monitor: {error}", highlight=False, soft_wrap=True)
        return None
    if len(panel.names) < wanted:
        console.print(
            f"note: the health monitor looks at {len(panel.names)} images, there are no more", highlight=False
        )
    rows = read_metrics(folder.metrics) if folder.metrics.is_file() else []
    found = Monitor(
        panel=panel,
        folder=folder.health,
        history=history_of(rows, until=step),
        settled=max(config.optimizer.warmup, config.run.steps // 20),
        temperature=config.losses.student_temperature,
        oldest_resume=lambda: min(folder.checkpoints().steps(), default=0),
    )
    weights = {"dino_head": config.losses.dino, "ibot_head": config.losses.ibot}

    def look(state: TrainState) -> tuple[dict[str, float], list[str]]:
        heads = {name: getattr(state.teacher, name) for name, weight in weights.items() if weight > 0}
        values, appeared = found.look(state.step, state.teacher.backbone, heads)
        return {PREFIX + key: value for key, value in values.items()}, [sign.text for sign in appeared]

    return look


def _drift(
    config: Config, source: Source, folder: RunFolder, progress: ProgressLine
) -> Callable[[TrainState], dict[str, float]] | None:
    """Features of the teacher beside those of the weights the run began with, which the thin history keeps."""
    from .weights import resolve

    path = folder.history / "step_00000000.safetensors"
    if not path.is_file():
        progress.say(f"note: {path} is not there, so drift from the starting weights is not shown")
        return None
    begun = panel(resolve(path).backbone, source, view(config), config.run.drift_images)

    def measure(state: TrainState) -> dict[str, float]:
        moved = drift(begun, state.teacher.backbone)
        progress.say(f"step {state.step}: {moved.words}")
        return {"drift_cls_cosine": moved.cls, "drift_patch_cosine": moved.patches}

    return measure


def view(config: Config, size: int | None = None) -> View:
    """How a run's images are evaluated: the global crop's side and the run's normalisation."""
    return View(size=size or config.crops.global_size, mean=config.crops.mean, std=config.crops.std)


def _say_start(
    console: Console, config: Config, source: Source, here: Ranks, folder: RunFolder, step: int | None
) -> None:
    run = config.run
    begun = "from scratch" if config.init.weights is None else f"from {config.init.weights}"
    if config.start.run is not None:
        begun = f"beginning with the {config.start.student} of {config.start.run}"
    start = begun if step is None else f"continuing at step {step}"
    console.print(
        f"{config.recipe or 'run'}: {config.backbone.name}/{config.backbone.patch_size}, {len(source)} images, "
        f"batch {run.batch_size} on {here.world_size} x {here.device}, {run.precision}, {start}, into {folder.path}",
        highlight=False,
        soft_wrap=True,
    )
    for line in mixture_lines(source, run.steps * run.batch_size):
        console.print(line, highlight=False, soft_wrap=True)
    if config.gram.weight:
        console.print(f"Gram teacher: {_gram_words(config)}", highlight=False, soft_wrap=True)
    if len(source) < run.batch_size:
        console.print(
            f"note: {len(source)} images are fewer than a batch of {run.batch_size}, so a step sees some of them twice",
            highlight=False,
        )
    if run.accumulate > 1:
        seen = run.batch_size // run.accumulate
        console.print(
            f"note: run.accumulate={run.accumulate}: Sinkhorn-Knopp and KoLeo see one micro-batch of {seen} images",
            highlight=False,
        )


def _gram_words(config: Config) -> str:
    gram, crops = config.gram, config.crops
    name = "the live EMA" if gram.teacher == "ema" else gram.teacher
    sides = sorted({each.gram_size or each.global_size for _, each in resolutions(crops)})
    refreshed = f", refreshed every {gram.refresh_every} steps" if gram.refresh_every else ", frozen"
    seen = " or ".join(map(str, sides))
    return f"{name}, at {seen} px, weight {gram.weight:g}{'' if gram.teacher == 'ema' else refreshed}"
