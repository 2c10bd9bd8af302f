"""What is refused before any work: settings that do not go together, missing memory, the folder of another run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from dinov3_ext.ops.gram_loss import CLIPS

from .config import Backbone, Config, ConvNeXtBackbone, Crops, to_dict
from .data.batch import patch_grid
from .data.mixture import check_mixing
from .data.resolutions import resolutions
from .models.architectures import side_multiple
from .models.memory import TrainingMemory, training_memory
from .schedule import SHAPES

if TYPE_CHECKING:
    from .weights import Resolved

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
    "run.drift_every",
    "run.drift_images",
    "data.workers",
    "data.labelled",
    "data.max_unreadable",
    "monitor.every",
    "monitor.images",
    "monitor.source",
    "recipe",
    "distillation.groups",
)

# of a backbone or head, what does not decide about the shape or meaning of its weights
FREE_OF_ARCHITECTURE = ("name", "layer_scale", "init_std", "prototype_std", "drop_path")


def check(config: Config, world_size: int = 1) -> None:
    """Errors: ValueError for settings that cannot work together or name no data, before any work."""
    if not config.data.sources:
        raise ValueError(
            "data: expected a folder, file list, tar shards, torchvision:NAME or manifest, got nothing (data=PATH)"
        )
    check_mixing(config.data)
    check_settings(config, world_size)


def check_settings(config: Config, world_size: int) -> None:
    """Errors: ValueError for settings that cannot work together on so many ranks."""
    run, crops, losses, gram = config.run, config.crops, config.losses, config.gram
    _check_sides(config)
    parts = world_size * run.accumulate
    if run.batch_size < 1 or run.accumulate < 1 or run.batch_size % parts:
        raise ValueError(
            f"run.batch_size: expected a multiple of {world_size} ranks * {run.accumulate} micro-batches, "
            f"got {run.batch_size}"
        )
    if min(losses.dino, losses.ibot, losses.koleo) < 0 or max(losses.dino, losses.ibot) <= 0:
        raise ValueError(
            "losses: expected weights of at least 0, and losses.dino or losses.ibot above 0, got "
            f"dino={losses.dino:g}, ibot={losses.ibot:g}, koleo={losses.koleo:g}"
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
        "crops.blur": (crops.blur, ("paper", "released", "none")),
        "init.architecture": (config.init.architecture, ("recipe", "weights")),
        "optimizer.warmup_shape": (config.optimizer.warmup_shape, tuple(SHAPES)),
        "gram.clip": (gram.clip, CLIPS),
        "gram.level": (gram.level, ("image", "batch")),
        "start.student": (config.start.student, ("student", "teacher")),
    }
    if isinstance(config.backbone, Backbone):
        allowed["backbone.rope.draw"] = (config.backbone.rope.draw, ("sequence", "block"))
    for key, (value, choices) in allowed.items():
        if value not in choices:
            raise ValueError(f"{key}: expected one of {', '.join(choices)}, got {value!r}")
    for key, value in (
        ("run.steps", run.steps),
        ("run.checkpoint_every", run.checkpoint_every),
        ("run.log_every", run.log_every),
        ("run.drift_images", run.drift_images),
    ):
        if value < 1:
            raise ValueError(f"{key}: expected at least 1, got {value}")
    if config.monitor.every < 0:
        raise ValueError(f"monitor.every: expected at least 0 (none), got {config.monitor.every}")
    if config.monitor.every and config.monitor.images < 2:
        raise ValueError(
            f"monitor.images: expected at least 2, got {config.monitor.images} (monitor.every=0: no monitor)"
        )
    _check_gram(config)
    for key, value in (
        ("optimizer.freeze_backbone", config.optimizer.freeze_backbone),
        ("optimizer.backbone_ramp", config.optimizer.backbone_ramp),
        ("optimizer.backbone_rate", config.optimizer.backbone_rate),
        ("run.drift_every", run.drift_every),
    ):
        if value is not None and value < 0:
            raise ValueError(f"{key}: expected at least 0, got {value}")
    if not 0.0 <= config.backbone.drop_path < 1.0:
        raise ValueError(f"backbone.drop_path: expected a rate in [0, 1), got {config.backbone.drop_path}")
    if len(config.data.labelled) not in (0, 2):
        raise ValueError(f"data.labelled: expected two sources, train and test, got {len(config.data.labelled)}")


def _check_sides(config: Config) -> None:
    """Errors: ValueError for crop sides that do not divide, a Gram crop below its global crop, shares that are none."""
    crops, backbone = config.crops, config.backbone
    _check_side("crops.global_size", crops.global_size, backbone)
    for number, (_, each) in enumerate(resolutions(crops)):
        prefix = f"crops.mix[{number}] " if crops.mix else "crops."
        _check_side(f"{prefix}global_size", each.global_size, backbone)
        if crops.locals:
            _check_side(f"{prefix}local_size", each.local_size, backbone)
        if each.gram_size is None:
            continue
        _check_side(f"{prefix}gram_size", each.gram_size, backbone)
        if each.gram_size < each.global_size:
            raise ValueError(
                f"{prefix}gram_size: the Gram teacher's crop expects at least the global crop's side "
                f"{each.global_size}, got {each.gram_size}"
            )
        if not (config.gram.weight or config.gram.features):
            raise ValueError(
                f"{prefix}gram_size: {each.gram_size} is set, but there is no Gram term (gram.weight=0); "
                "set gram.weight, or leave the Gram crop out"
            )
    shares = [share for *_, share in crops.mix]
    if shares and (min(shares) < 0 or abs(sum(shares) - 1.0) > 1e-6):
        raise ValueError(f"crops.mix: expected probabilities of at least 0 that sum to 1, got {shares}")
    if isinstance(backbone, ConvNeXtBackbone) and config.masking.hide:
        raise ValueError(
            f"masking.hide: expected false for {backbone.name}, as a ConvNeXt has no mask token; "
            "the iBOT term is then taken at visible places"
        )


def _check_side(key: str, side: int, backbone: Backbone | ConvNeXtBackbone) -> None:
    patch_grid(side, backbone.patch_size, key)
    multiple = side_multiple(backbone)
    if side % multiple:
        raise ValueError(
            f"{key}: {backbone.name} needs a multiple of its stride of {multiple} pixels "
            f"(nearest: {max(side // multiple, 1) * multiple} or {-(-side // multiple) * multiple}), got {side}"
        )


def _check_gram(config: Config) -> None:
    gram, losses = config.gram, config.losses
    whole = {
        "gram.ramp": gram.ramp,
        "gram.refresh_every": gram.refresh_every,
        "gram.refresh_start": gram.refresh_start,
        "gram.refreshes": gram.refreshes or 0,
        "losses.local_weight_ramp": losses.local_weight_ramp,
    }
    numbers = {"gram.weight": gram.weight, "gram.features": gram.features}
    numbers |= {"losses.koleo_patches": losses.koleo_patches, "losses.dense": losses.dense}
    for key, value in {**numbers, **whole}.items():
        if value < 0:
            raise ValueError(f"{key}: expected at least 0, got {value:g}")
    if gram.crops is not None and not 1 <= gram.crops <= config.crops.globals:
        raise ValueError(f"gram.crops: expected 1 to {config.crops.globals} global crops, got {gram.crops}")
    if gram.refresh_every and gram.teacher == "ema":
        raise ValueError(
            f"gram.refresh_every: the live EMA needs no refreshing, expected 0 with gram.teacher=ema, "
            f"got {gram.refresh_every}"
        )
    if losses.local_weight_start is not None and (losses.local_weight <= 0 or losses.local_weight_start < 0):
        raise ValueError(
            "losses.local_weight_start: expected at least 0 and losses.local_weight above 0, "
            f"got {losses.local_weight_start:g} and {losses.local_weight:g}"
        )


def check_gram_teacher(config: Config, found: Resolved) -> None:
    """Errors: ValueError when the weights that `gram.teacher` named cannot serve this run."""
    gram, patch = config.gram, config.backbone.patch_size
    if found.backbone.patch_size != patch:
        raise ValueError(
            f"gram.teacher: {found.origin} has patch size {found.backbone.patch_size}, expected the student's {patch}"
        )
    same = found.mean == config.crops.mean and found.std == config.crops.std
    changed = _other_architecture(found.architecture, config.backbone, "backbone")
    if gram.refresh_every and (changed or not same):
        what = "; ".join(changed[:3]) or "another normalisation"
        raise ValueError(
            f"gram.refresh_every: {found.origin} is no earlier state of this model ({what}), so the EMA cannot be "
            f"copied into it; expected 0, got {gram.refresh_every}"
        )


def check_same_architecture(config: Config, earlier: Config, where: str) -> None:
    """Errors: ValueError naming what keeps this run from taking the weights of the run in `where`."""
    changed = [
        line
        for name in ("backbone", "dino_head", "ibot_head")
        for line in _other_architecture(getattr(earlier, name), getattr(config, name), name)
    ]
    if changed:
        raise ValueError(
            f"start.run: {where} has another architecture ({'; '.join(changed[:4])}{'; ...' if changed[4:] else ''}); "
            "leave recipe= out to take the run's own"
        )


def _other_architecture(there: object, asked: object, name: str) -> list[str]:
    """Every difference between two sections that decides about the shape or meaning of weights."""
    if type(there) is not type(asked):
        return [f"{name}: {type(there).__name__} there, {type(asked).__name__} asked"]
    changed = []
    for entry in dataclasses.fields(there):
        old, new = getattr(there, entry.name), getattr(asked, entry.name)
        if entry.name == "rope":
            old, new = old.base, new.base
        if old != new and entry.name not in FREE_OF_ARCHITECTURE:
            key = f"{name}.rope.base" if entry.name == "rope" else f"{name}.{entry.name}"
            changed.append(f"{key}: {old!r} there, {new!r} asked")
    return changed


def check_memory(config: Config, device: torch.device, world_size: int) -> None:
    """Errors: ValueError when the estimate of `dinov3 plan` does not fit the device."""
    _check_fits(memory(config, world_size).total, device)


def _check_fits(needed: int, device: torch.device) -> None:
    if device.type == "cuda":
        available, where = torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_name(device)
    else:
        available, where = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine's memory"
    if needed > available:
        raise ValueError(
            f"run: this recipe needs about {needed / 2**30:.1f} GiB and {where} has {available / 2**30:.1f} GiB; "
            "lower run.batch_size, raise run.accumulate, or set run.checkpointing=full (see dinov3 plan)"
        )


def memory(config: Config, world_size: int = 1) -> TrainingMemory:
    """The memory estimate of one rank in the largest of its resolutions; see `models.memory`."""
    estimates = [
        training_memory(
            config.backbone,
            (config.dino_head, config.ibot_head),
            crops,
            images=config.run.batch_size // (world_size * config.run.accumulate),
            checkpointing=config.run.checkpointing,
            activation_bytes=2 if config.run.precision == "bf16" else 4,
            masking=config.masking,
        )
        for _, crops in counted_crops(config)
    ]
    return max(estimates, key=lambda estimate: estimate.total)


def counted_crops(config: Config) -> list[tuple[float, Crops]]:
    """(share of the steps, crop sides) of each resolution; the Gram side is what a Gram teacher sees, None without."""
    return [
        (
            share,
            dataclasses.replace(
                crops,
                gram_size=(crops.gram_size or crops.global_size)
                if config.gram.weight or config.gram.features
                else None,
            ),
        )
        for share, crops in resolutions(config.crops)
    ]


def check_memory_of_all(
    configs: Sequence[Config], teacher: torch.nn.Module, device: torch.device, world_size: int
) -> None:
    """Errors: ValueError when students that one rank trains, one after another, and their teacher do not fit it."""
    parts = [memory(config, world_size) for config in configs]
    held = sum(part.weights + part.teachers + part.gradients + part.optimizer for part in parts)
    passing = max(part.activations + part.heads + part.images for part in parts)
    frozen = 4 * sum(parameter.numel() for parameter in teacher.parameters())
    _check_fits(held + passing + frozen, device)


def check_distillation(config: Config, students: Mapping[str, Config], teacher: Resolved) -> None:
    """Errors: ValueError for a teacher and students that do not go together, before any work."""
    wanted = config.distillation
    patch, seen = teacher.architecture.patch_size, wanted.teacher_size or config.crops.global_size
    key = "distillation.teacher_size" if wanted.teacher_size else "crops.global_size"
    multiple = side_multiple(teacher.architecture)
    if seen % multiple:
        raise ValueError(
            f"{key}: the teacher {teacher.architecture.name}/{patch} needs a multiple of {multiple} pixels, got {seen}"
        )
    if teacher.heads is None and wanted.head_steps < 1:
        raise ValueError(
            f"distillation.teacher: expected a teacher with DINO and iBOT heads, such as a run of dinov3 pretrain, and "
            f"{teacher.origin} has none; distillation.head_steps=N trains heads on the frozen teacher first"
        )
    foreign = {
        "init.weights": config.init.weights,
        "start.run": config.start.run,
        "gram.weight": config.gram.weight,
        "crops.mix": config.crops.mix,
        "crops.gram_size": config.crops.gram_size,
    }
    for key, value in foreign.items():
        if value:
            raise ValueError(
                f"{key}: distillation starts from fresh weights, at one size, without a Gram term; got {value}"
            )
    for name, student in students.items():
        if student.backbone.patch_size != patch:
            raise ValueError(
                f"{name}.backbone.patch_size: expected the teacher's {patch}, got {student.backbone.patch_size}"
            )
        if student.run.keep < 2 and len(students) > 1:
            raise ValueError(f"run.keep: expected at least 2 with several students, got {student.run.keep}")
        for head, own in (("dino_head", student.dino_head), ("ibot_head", student.ibot_head)):
            theirs = own if teacher.heads is None else teacher.heads[head].head
            if own.prototypes != theirs.prototypes:
                raise ValueError(
                    f"{head}.prototypes: expected the {theirs.prototypes} of the teacher, got {own.prototypes} for "
                    f"{name}; set {head}.prototypes={theirs.prototypes}"
                )


def check_same_run(config: Config, earlier: Config, where: str) -> None:
    """Errors: ValueError naming the keys in which the run in `where`, begun with `earlier`, is another."""
    old, new = _dotted(to_dict(earlier)), _dotted(to_dict(config))
    changed = [
        f"{key}: {old.get(key, 'nothing')!r} there, {new.get(key, 'nothing')!r} asked"
        for key in {**old, **new}
        if old.get(key) != new.get(key) and key not in FREE_ON_RESUME
    ]
    if changed:
        raise ValueError(
            f"out: {where} is a run with other settings, so it cannot be continued with these "
            f"({'; '.join(changed[:4])}{'; ...' if len(changed) > 4 else ''}); choose another out="
        )


def _dotted(values: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
