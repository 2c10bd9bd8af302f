"""From a `Config` to the objects of a run: the only module that reads it.

`pretrain(config, out)` is `dinov3 pretrain` from Python; `load(run)` gives the backbone a run has trained.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from . import schedule
from .config import Config, from_yaml, leaves, to_dict, to_yaml
from .data.batch import CropBatch
from .data.loader import UnreadableCount, make_loader
from .data.sampler import BatchPlan
from .data.sources import Source, open_source
from .evaluation.extract import extract
from .evaluation.knn import evaluate_knn
from .evaluation.view import View
from .losses import DinoLoss, IbotLoss, KoLeoLoss, Term
from .models.heads import ProjectionHead
from .models.memory import training_memory
from .models.vit import VisionTransformer
from .train.checkpoint import checkpoint_config, load_teacher, saved_steps
from .train.distributed import Ranks, ranks, replicated
from .train.loop import Watchers, fit
from .train.networks import Networks, teacher_of
from .train.optimizer import adamw
from .train.progress import ProgressLine
from .train.run_folder import RunFolder
from .train.step import StepSettings, StepValues, TrainState

# what may differ between a run and its continuation without making it another run
FREE_ON_RESUME = (
    "run.steps",
    "run.minutes",
    "run.checkpoint_every",
    "run.keep",
    "run.history_every",
    "run.log_every",
    "run.evaluate_every",
    "run.max_skipped",
    "run.tensorboard",
    "run.wandb",
    "data.workers",
    "data.labelled",
    "data.max_unreadable",
    "recipe",
)


@dataclass(frozen=True)
class Finished:
    """How a run ended: the folder, the step it stands at, and why it stopped ("steps", "minutes" or "signal")."""

    out: Path
    step: int
    reason: str


def pretrain(config: Config, out: str | Path, *, console: Console | None = None) -> Finished:
    """Train, or continue the run in `out`: the same call resumes after a kill, bit for bit.

    Args:
        config: from a recipe.
        out: run folder, new, empty, or of this very run.
        console: where progress goes; None: standard output.

    Errors: ValueError for settings, data or folders that cannot work, before training starts; RuntimeError when the
        loss stays non-finite; OSError when a checkpoint cannot be written.
    """
    folder = RunFolder(Path(out))
    with ranks() as here:
        check(config, here.world_size)
        folder.check()
        _check_same_run(config, folder)
        console = console if here.first and console is not None else Console(quiet=not here.first)
        source = open_source(list(config.data.sources))
        labelled = [open_source(spec) for spec in config.data.labelled] if here.first else []
        check_memory(config, here)
        state = new_state(config, here)
        step = folder.newest_step()
        if step is not None:
            folder.checkpoints(config.run.keep).load(state, step)
        if here.first:
            folder.write_config(to_yaml(config))
            _say_start(console, config, source, here, folder, step)
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
                    unreadable=_unreadable(len(source), config.data.max_unreadable, progress),
                    evaluate=_evaluation(config, labelled) if labelled else None,
                ),
                ranks=here,
                config_yaml=to_yaml(config),
                progress=progress,
            )
    return Finished(folder.path, state.step, reason)


def new_state(config: Config, here: Ranks) -> TrainState:
    """Student, teacher and optimiser at step 0: a function of `run.seed`, the same on every rank."""
    student = networks(config).to(here.device)
    teacher = teacher_of(student)
    if config.run.compile:
        for block in [*student.backbone.blocks, *teacher.backbone.blocks]:
            block.compile()
    rules = config.optimizer
    optimizer = adamw(
        student, betas=rules.betas, layer_decay=rules.layer_decay, patch_embed_multiplier=rules.patch_embed_multiplier
    )
    return TrainState(student, teacher, optimizer, replicated(student, here.world_size))


def networks(config: Config) -> Networks:
    """Backbone and heads with the weights `run.seed` gives, without touching the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        backbone = VisionTransformer(config.backbone)
        dino_head = ProjectionHead(config.backbone.embed_dim, config.dino_head)
        ibot_head = ProjectionHead(config.backbone.embed_dim, config.ibot_head)
    return Networks(backbone, dino_head, ibot_head, checkpointing=config.run.checkpointing).train()


def terms(config: Config) -> tuple[Term, ...]:
    """The losses of pretraining; a term of weight 0 is left out."""
    losses = config.losses
    temperature = losses.student_temperature
    found: list[Term] = []
    if losses.dino:
        found.append(DinoLoss(weight=losses.dino, student_temperature=temperature, local_weight=losses.local_weight))
    if losses.ibot:
        found.append(IbotLoss(weight=losses.ibot, student_temperature=temperature))
    if losses.koleo:
        found.append(KoLeoLoss(weight=losses.koleo, group=losses.koleo_group))
    return tuple(found)


def step_values(config: Config, step: int) -> StepValues:
    """Every schedule at `step`."""
    rules, losses, steps = config.optimizer, config.losses, config.run.steps

    def scaled(rate: float) -> float:
        return schedule.scaled_learning_rate(rate, rule=rules.lr_rule, batch_size=config.run.batch_size)

    peak, end = scaled(rules.lr), scaled(rules.lr_end or 0.0)
    if rules.cooldown:
        rate = schedule.warmup_cooldown(step, peak=peak, end=end, warmup=rules.warmup, cooldown=rules.cooldown, steps=steps)
    elif rules.lr_end is not None:
        rate = schedule.warmup_cosine(step, peak=peak, end=end, warmup=rules.warmup, steps=steps)
    else:
        rate = schedule.warmup_constant(step, peak=peak, warmup=rules.warmup)

    def over_run(start: float, last: float | None) -> float:
        return start if last is None else schedule.cosine(step, start=start, end=last, steps=steps)

    return StepValues(
        learning_rate=rate,
        prototype_rate=0.0 if step < rules.freeze_prototypes else rate,
        weight_decay=over_run(rules.weight_decay, rules.weight_decay_end),
        momentum=over_run(rules.momentum, rules.momentum_end),
        teacher_temperature=schedule.linear(
            step,
            start=losses.teacher_temperature_start,
            end=losses.teacher_temperature,
            steps=losses.teacher_temperature_warmup,
        ),
    )


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


def load(run: str | Path, *, step: int | None = None) -> VisionTransformer:
    """The EMA teacher's backbone of a run, in evaluation mode on the CPU.

    Args:
        run: run folder, or one of its `checkpoints/step_...` folders.
        step: checkpoint to take; None: the newest; 0: the untrained weights the run started from.

    Errors: ValueError when there is no such run or checkpoint (naming those there are).
    """
    path = Path(run)
    if path.parent.name == "checkpoints" and path.is_dir():
        config, path = from_yaml(checkpoint_config(path)), path
    else:
        config, path = run_config(path), _checkpoint_of(path, step)
    found = networks(config)
    if path is not None:
        load_teacher(path, found)
    return found.backbone.eval().requires_grad_(False)


def run_config(run: str | Path) -> Config:
    """The effective config of a run folder."""
    folder = RunFolder(Path(run))
    if not folder.config.is_file():
        raise ValueError(f"expected a run folder with a config.yaml, got {str(run)!r}")
    return from_yaml(folder.config.read_text())


def check(config: Config, world_size: int = 1) -> None:
    """Errors: ValueError for settings that cannot work together or name no data, before any work."""
    if not config.data.sources:
        raise ValueError("data: expected a folder, file list, tar shards or torchvision:NAME, got nothing (data=PATH)")
    check_settings(config, world_size)


def check_settings(config: Config, world_size: int) -> None:
    """Errors: ValueError for settings that cannot work together on so many ranks."""
    run, crops, losses, patch = config.run, config.crops, config.losses, config.backbone.patch_size
    for key, size in (("crops.global_size", crops.global_size), ("crops.local_size", crops.local_size)):
        if size % patch or size < patch:
            low = max(size // patch, 1) * patch
            raise ValueError(f"{key}: expected a multiple of the patch size {patch}, got {size}; nearest: {low}, {low + patch}")
    parts = world_size * run.accumulate
    if run.batch_size < 1 or run.accumulate < 1 or run.batch_size % parts:
        raise ValueError(
            f"run.batch_size: expected a multiple of {world_size} ranks * {run.accumulate} micro-batches, got {run.batch_size}"
        )
    images = run.batch_size // parts
    group = images if losses.koleo_group is None else losses.koleo_group
    if losses.koleo and (group < 2 or (images % group and (run.batch_size // run.accumulate) % group)):
        raise ValueError(
            f"losses.koleo_group: expected at least 2 images that divide the batch of {images} per rank "
            f"(or {run.batch_size // run.accumulate} over all ranks), got {group}; or set losses.koleo=0"
        )
    for key, head in (("dino_head", config.dino_head), ("ibot_head", config.ibot_head)):
        if head.prototypes < 2:
            raise ValueError(f"{key}.prototypes: expected at least 2, got {head.prototypes}")
    allowed = {
        "run.precision": (run.precision, ("bf16", "fp32")),
        "run.checkpointing": (run.checkpointing, ("none", "selective", "full")),
        "crops.blur": (crops.blur, ("paper", "released")),
        "backbone.rope.draw": (config.backbone.rope.draw, ("sequence", "block")),
    }
    for key, (value, choices) in allowed.items():
        if value not in choices:
            raise ValueError(f"{key}: expected one of {', '.join(choices)}, got {value!r}")
    for key, value in (("run.steps", run.steps), ("run.checkpoint_every", run.checkpoint_every), ("run.log_every", run.log_every)):
        if value < 1:
            raise ValueError(f"{key}: expected at least 1, got {value}")
    if not 0.0 <= config.backbone.drop_path < 1.0:
        raise ValueError(f"backbone.drop_path: expected a rate in [0, 1), got {config.backbone.drop_path}")
    if len(config.data.labelled) not in (0, 2):
        raise ValueError(f"data.labelled: expected two sources, train and test, got {len(config.data.labelled)}")


def check_memory(config: Config, here: Ranks) -> None:
    """Errors: ValueError when the estimate of `dinov3 plan` does not fit the device."""
    if here.device.type == "cuda":
        available, where = torch.cuda.mem_get_info(here.device)[0], torch.cuda.get_device_name(here.device)
    else:
        available, where = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine's memory"
    needed = memory(config, here.world_size).total
    if needed > available:
        raise ValueError(
            f"run: this recipe needs about {needed / 2**30:.1f} GiB and {where} has {available / 2**30:.1f} GiB; "
            "lower run.batch_size, raise run.accumulate, or set run.checkpointing=full (see dinov3 plan)"
        )


def memory(config: Config, world_size: int = 1):
    """The memory estimate of one rank; see `models.memory`."""
    return training_memory(
        config.backbone,
        (config.dino_head, config.ibot_head),
        config.crops,
        images=config.run.batch_size // (world_size * config.run.accumulate),
        checkpointing=config.run.checkpointing,
        activation_bytes=2 if config.run.precision == "bf16" else 4,
        masking=config.masking,
    )


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
        workers=config.data.workers,
    )
    return iter(loader)


def _unreadable(images: int, limit: float, progress: ProgressLine) -> Callable[[tuple[str, ...]], None]:
    count = UnreadableCount(images, limit)

    def see(skipped: tuple[str, ...]) -> None:
        for entry in count.add(skipped):
            progress.say(f"unreadable image skipped: {entry}")

    return see


def _evaluation(config: Config, labelled: list[Source]) -> Callable[[TrainState], dict[str, float]]:
    def evaluate(state: TrainState) -> dict[str, float]:
        train, test = (extract(state.teacher.backbone, source, view(config), precision=config.run.precision) for source in labelled)
        score = evaluate_knn(train, test, k=(10,)).best
        return {"knn": score.accuracy, "knn_mean_per_class": score.mean_per_class}

    return evaluate


def view(config: Config, size: int | None = None) -> View:
    """How a run's images are evaluated: the global crop's side and the run's normalisation."""
    return View(size=size or config.crops.global_size, mean=config.crops.mean, std=config.crops.std)


def _check_same_run(config: Config, folder: RunFolder) -> None:
    """Errors: ValueError naming each key in which a run that has checkpoints differs from what is asked for."""
    if folder.newest_step() is None:
        return
    old, new = _dotted(run_config(folder.path)), _dotted(config)
    changed = [f"{k}: {old[k]!r} there, {new[k]!r} asked" for k in new if old[k] != new[k] and k not in FREE_ON_RESUME]
    if changed:
        raise ValueError(
            f"out: {folder.path} is a run with other settings, so it cannot be continued with these "
            f"({'; '.join(changed[:4])}{'; ...' if len(changed) > 4 else ''}); choose another out="
        )


def _dotted(config: Config) -> dict[str, object]:
    values = {}
    for key in leaves():
        value = to_dict(config)
        for part in key.split("."):
            value = value[part]
        values[key] = value
    return values


def _checkpoint_of(run: Path, step: int | None) -> Path | None:
    steps = saved_steps(run / "checkpoints")
    if step == 0:
        return None
    if step is not None and step not in steps:
        raise ValueError(f"{run}: no checkpoint of step {step}; there are {steps or 'none'}, and 0 is the untrained start")
    if not steps:
        raise ValueError(f"{run}: the run has no checkpoint yet; step=0 gives its untrained start")
    return run / "checkpoints" / f"step_{step or steps[-1]:08d}"


def _say_start(console: Console, config: Config, source: Source, here: Ranks, folder: RunFolder, step: int | None) -> None:
    run = config.run
    start = "from scratch" if step is None else f"continuing at step {step}"
    console.print(
        f"{config.recipe or 'run'}: {config.backbone.name}/{config.backbone.patch_size}, {len(source)} images, batch {run.batch_size} "
        f"on {here.world_size} x {here.device}, {run.precision}, {start}, into {folder.path}",
        highlight=False,
        soft_wrap=True,
    )
    if len(source) < run.batch_size:
        console.print(f"note: {len(source)} images are fewer than a batch of {run.batch_size}, so a step sees some of them twice", highlight=False)
    if run.accumulate > 1:
        seen = run.batch_size // run.accumulate
        console.print(f"note: run.accumulate={run.accumulate}: Sinkhorn-Knopp and KoLeo see one micro-batch of {seen} images", highlight=False)
