"""`dinov3 distill`: a frozen teacher into one or many students, each in a run folder of its own.

`distill(config, out)` is the command from Python. `config.distillation` says teacher and students, the rest is as in
pretraining; `student_configs` gives the config each student's run keeps.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from .build import (
    Finished,
    evaluation,
    monitor,
    networks,
    new_state,
    run_config,
    step_settings,
    step_values,
    unreadable,
)
from .config import Config, Distillation, override, to_yaml
from .data.loader import make_loader
from .data.mixture import draw_counts, mixture_lines, open_data
from .data.sampler import BatchPlan
from .data.sources import Source, open_source
from .distill.groups import check_groups, group_sizes
from .distill.loop import Student, fit_students
from .distill.teacher import FrozenTeacher
from .models.architectures import architecture
from .models.flops import training_flops
from .train.checkpoint import saved_steps
from .train.distributed import Ranks, ranks, replicated, subgroup
from .train.loop import Watchers, fit
from .train.networks import Networks, teacher_of
from .train.optimizer import adamw
from .train.progress import ProgressLine
from .train.run_folder import RunFolder
from .train.step import TrainState
from .validation import check, check_distillation, check_memory_of_all, check_same_run
from .weights import Resolved, resolve
from .weights.licences import OWN

OVERRIDDEN = ("backbone.", "dino_head.", "ibot_head.", "losses.", "optimizer.")  # what students may differ in


def distill(config: Config, out: str | Path, *, console: Console | None = None) -> Finished:
    """Train the students, or continue those in `out`: the same call resumes after a kill, bit for bit.

    Args:
        config: from a recipe, with `distillation.teacher` and `distillation.students`.
        out: folder; each student's run is OUT/NAME, heads trained for a teacher without are OUT/teacher.
        console: where progress goes; None: standard output.

    Errors: ValueError for settings, weights, data or folders that cannot work, before training starts; RuntimeError
        when a loss stays non-finite; OSError when a checkpoint cannot be written.
    """
    out = Path(out)
    with ranks() as here:
        console = console if here.first and console is not None else Console(quiet=not here.first)
        if not config.distillation.teacher:
            raise ValueError("distillation.teacher: expected a run or other weights, got nothing (teacher=RUN)")
        teacher = resolve(config.distillation.teacher)
        config = seen_by(config, teacher, console)
        students = student_configs(config, teacher.architecture.patch_size)
        check_distillation(config, students, teacher)
        sizes = sizes_of(config, students, here.world_size)
        for name, student in students.items():
            size = here.world_size if sizes is None else sizes[list(students).index(name)]
            check(student, here.world_size)
            check(student, size)
            _check_folder(RunFolder(out / name), student)
        mine = list(students)
        group = here
        source = open_data(config.data)
        if sizes is not None:
            number, group = subgroup(here, sizes)
            mine = [mine[number]]
        check_memory_of_all([students[name] for name in mine], teacher.backbone, here.device, group.world_size)
        step = _common_step(out, students)
        _say_start(console, students, sizes, teacher, source, here, step, out)
        if teacher.heads is None:
            reason = train_heads(config, teacher, out / "teacher", source, here, console)
            if reason != "steps":
                return Finished(out, 0, reason)
            teacher = resolve(out / "teacher")
        return _fit(
            {name: students[name] for name in mine}, teacher, out, step,
            source=source, here=here, group=group, console=console,
        )  # fmt: skip


def seen_by(config: Config, teacher: Resolved, console: Console) -> Config:
    """The config with the normalisation that the teacher's weights were trained with, and with their licence."""
    if teacher.licence != OWN:  # students of imported weights say so wherever they go
        config = replace(
            config, init=replace(config.init, origin=f"distilled from {teacher.origin}", licence=teacher.licence)
        )
    mean, std = tuple(teacher.mean), tuple(teacher.std)
    if (config.crops.mean, config.crops.std) == (mean, std):
        return config
    console.print(f"note: images are normalised as the teacher's weights expect: mean {mean}, std {std}")
    return replace(config, crops=replace(config.crops, mean=mean, std=std))


def student_configs(config: Config, patch_size: int) -> dict[str, Config]:
    """The config of each student by name: its architecture at the teacher's patch size, nothing hidden, its overrides.

    Errors: ValueError for a name that is unknown or comes twice, none at all, an override of what all students share.
    """
    wanted = config.distillation.students
    if not wanted or len(set(wanted)) != len(wanted):
        raise ValueError(
            f"distillation.students: expected names of backbones, each once (such as vit_small,convnext_tiny), "
            f"got {', '.join(wanted) or 'none'}"
        )
    for word in config.distillation.overrides:
        name, _, rest = word.partition(".")
        if not any(student.startswith(name) for student in wanted) and name not in ("vit", "convnext"):
            raise ValueError(f"distillation.overrides: {word!r} names none of the students {', '.join(wanted)}")
        if not rest.startswith(OVERRIDDEN):
            raise ValueError(
                f"distillation.overrides: students may differ in {', '.join(OVERRIDDEN)} keys, got {word!r}"
            )
    found = {}
    for name in wanted:
        described = replace(architecture(name), patch_size=patch_size)
        own = [word.partition(".") for word in config.distillation.overrides]
        own_words = [rest for prefix, _, rest in own if name.startswith(prefix)]
        masking = replace(config.masking, hide=False)
        found[name] = override(replace(config, backbone=described, masking=masking), own_words)
    return found


def sizes_of(config: Config, students: dict[str, Config], world_size: int) -> tuple[int, ...] | None:
    """Ranks of each student; None: every rank trains all of them.

    Errors: ValueError for groups that do not fit the world, the students or the batch.
    """
    wanted, names = config.distillation.groups, list(students)
    if wanted:
        check_groups(wanted, students=names, ranks=world_size, batch_size=config.run.batch_size)
    if len(names) == 1 or world_size < len(names):
        return None
    costs = [student_cost(each) for each in students.values()]
    return wanted or group_sizes(costs, ranks=world_size, batch_size=config.run.batch_size)


def student_cost(config: Config) -> float:
    """FLOPs of a student per image, heads included, the teacher not."""
    heads = (config.dino_head, config.ibot_head)
    parts = training_flops(config.backbone, heads, config.crops, config.masking, images=1)
    return parts["student"] + parts["heads"]


def train_heads(config: Config, teacher: Resolved, out: Path, source: Source, here: Ranks, console: Console) -> str:
    """Train DINO and iBOT heads on a frozen backbone for `distillation.head_steps`, as a run of its own in `out`.

    The heads learn prototypes of the backbone's features: Sinkhorn-Knopp balances them, crops of an image agree on
    them, and nothing is hidden. Returns the reason it ended: "steps" or "signal".
    """
    steps, crops = config.distillation.head_steps, config.crops
    config = replace(
        config,
        recipe=f"{config.recipe}, heads of the teacher",
        backbone=teacher.architecture,
        distillation=Distillation(),
        crops=replace(crops, global_size=config.distillation.teacher_size or crops.global_size),
        masking=replace(config.masking, hide=False),
        losses=replace(config.losses, koleo=0.0),
        optimizer=replace(config.optimizer, warmup=min(config.optimizer.warmup, steps // 10), cooldown=0, lr_end=None),
        run=replace(config.run, steps=steps, minutes=None, history_every=0, evaluate_every=0),
        monitor=replace(config.monitor, every=0),
    )
    folder = RunFolder(out)
    _check_folder(folder, config)
    state = _heads_state(config, teacher, here)
    step = folder.newest_step()
    if step == steps:
        return "steps"
    if step is not None:
        folder.checkpoints(config.run.keep).load(state, step)
    if here.first:
        folder.write_config(to_yaml(config))
        start = "from scratch" if step is None else f"continuing at step {step}"
        console.print(f"heads of the teacher, which comes without: {steps} steps, {start}, into {out}", soft_wrap=True)
    progress = ProgressLine(steps, state.step, console, None)
    with progress:
        return fit(
            state,
            iter(_loader(config, config, source, here, state.step)),
            lambda number: step_values(config, number),
            settings=step_settings(config, here),
            run=config.run,
            folder=folder,
            watchers=Watchers(unreadable=unreadable(len(source), config.data.max_unreadable, progress)),
            ranks=here,
            config_yaml=to_yaml(config),
            progress=progress,
        )


def _heads_state(config: Config, teacher: Resolved, here: Ranks) -> TrainState:
    """Fresh heads on the teacher's backbone, which is left out of the optimiser."""
    student = networks(config)
    student.backbone.load_state_dict(teacher.backbone.state_dict())
    student.backbone.requires_grad_(False)
    student = student.to(here.device)
    rules = config.optimizer
    optimizer = adamw(student, betas=rules.betas, layer_decay=1.0, patch_embed_multiplier=1.0)
    return TrainState(student, teacher_of(student), optimizer, replicated(student, here.world_size, here.group))


def _fit(
    configs: dict[str, Config],
    teacher: Resolved,
    out: Path,
    step: int | None,
    *,
    source: Source,
    here: Ranks,
    group: Ranks,
    console: Console,
) -> Finished:
    """Train this rank's students from `step`."""
    shared = next(iter(configs.values()))
    frozen = FrozenTeacher(
        Networks(
            teacher.backbone, teacher.heads["dino_head"], teacher.heads["ibot_head"], checkpointing="none"
        ).to(here.device)
    )  # fmt: skip
    labelled = [open_source(spec) for spec in shared.data.labelled] if group.first else []
    limit = None if shared.run.minutes is None else 60.0 * shared.run.minutes
    progress = ProgressLine(shared.run.steps, step or 0, console, limit)
    see = unreadable(len(source), shared.data.max_unreadable, progress)
    students = []
    for name, config in configs.items():
        folder, state = RunFolder(out / name), new_state(config, group)
        if step is not None:
            folder.checkpoints(config.run.keep, group.group).load(state, step)
        if group.first:
            folder.write_config(to_yaml(config))
        seen = step_settings(config, group)
        watchers = Watchers(
            unreadable=see,
            evaluate=evaluation(config, labelled) if labelled else None,
            drawn=draw_counts(source, seed=config.run.seed, batch_size=config.run.batch_size),
            monitor=monitor(config, source, folder, state.step, console) if group.first else None,
            monitor_every=config.monitor.every,
        )
        students.append(
            Student(
                name=name,
                state=state,
                settings=replace(seen, teacher=frozen, student_size=config.crops.global_size),
                values_at=_values_at(config),
                run=config.run,
                folder=folder,
                watchers=watchers,
                config_yaml=to_yaml(config),
            )
        )
    with progress:
        reason = fit_students(
            students,
            iter(_loader(shared, _teachers_crops(shared), source, here, step or 0)),
            frozen,
            run=shared.run,
            world=here,
            group=group,
            progress=progress,
        )
    finished = students[0].state.step
    progress.say(
        f"stopped by a signal at step {finished}; the checkpoints are written, the same command continues"
        if reason == "signal"
        else f"done: {finished} steps, {out}"
    )
    return Finished(out, finished, reason)


def _values_at(config: Config) -> Callable[[int], object]:
    return lambda number: step_values(config, number)


def _teachers_crops(config: Config) -> Config:
    """The config with global crops of the side that the teacher sees."""
    size = config.distillation.teacher_size or config.crops.global_size
    return replace(config, crops=replace(config.crops, global_size=size))


def _loader(config: Config, cut: Config, source: Source, here: Ranks, start_step: int):
    """Batches with the crops of `cut` and masks on the grid of `config`'s students."""
    run = config.run
    return make_loader(
        source,
        cut.crops,
        config.masking,
        batch=BatchPlan(
            batch_size=run.batch_size, seed=run.seed, rank=here.rank, world_size=here.world_size,
            accumulate=run.accumulate,
        ),
        patch_size=config.backbone.patch_size,
        start_step=start_step,
        steps=run.steps,
        workers=min(os.cpu_count() or 1, 8) if config.data.workers is None else config.data.workers,
        mask_grid=config.crops.global_size // config.backbone.patch_size,
    )  # fmt: skip


def _check_folder(folder: RunFolder, config: Config) -> None:
    folder.check()
    if folder.newest_step() is not None:
        check_same_run(config, run_config(folder.path), str(folder.path))


def _common_step(out: Path, students: Sequence[str]) -> int | None:
    """The newest step of which every student has a checkpoint; None where none has any.

    Errors: ValueError where some have checkpoints and no step is common to all.
    """
    steps = {name: set(saved_steps(out / name / "checkpoints")) for name in students}
    common = set.intersection(*steps.values())
    if common or not any(steps.values()):
        return max(common, default=None)
    if min(map(len, steps.values())) == 0:
        return None if all(len(found) <= 1 for found in steps.values()) else _no_common(out, steps)
    return _no_common(out, steps)


def _no_common(out: Path, steps: dict[str, set[int]]) -> int:
    listed = "; ".join(f"{name}: {sorted(found) or 'none'}" for name, found in steps.items())
    raise ValueError(f"out: the students in {out} have no checkpoint of the same step ({listed}); choose another out=")


def _say_start(
    console: Console,
    students: dict[str, Config],
    sizes: tuple[int, ...] | None,
    teacher: Resolved,
    source: Source,
    here: Ranks,
    step: int | None,
    out: Path,
) -> None:
    config = next(iter(students.values()))
    seen = config.distillation.teacher_size or config.crops.global_size
    named = [
        f"{name}/{each.backbone.patch_size}" + ("" if sizes is None else f" on {size} rank{'s' * (size > 1)}")
        for (name, each), size in zip(students.items(), sizes or [0] * len(students))
    ]
    start = "from scratch" if step is None else f"continuing at step {step}"
    described = f"{teacher.architecture.name}/{teacher.architecture.patch_size}"
    into = f"{', '.join(named)} at {config.crops.global_size} px"
    lines = [
        f"{config.recipe}: {described} at {seen} px ({teacher.origin}) into {into}",
        f"{len(source)} images, batch {config.run.batch_size} on {here.world_size} x {here.device}, "
        f"{config.run.precision}, {start}, into {out}",
        f"licence of the teacher's weights: {teacher.licence}",
        *mixture_lines(source, config.run.steps * config.run.batch_size),
    ]
    if sizes is not None:
        lines.append(f"lines below are of the first group; every student's numbers are in {out}/NAME/metrics.jsonl")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
