"""What is refused before any work: settings that do not go together, missing memory, the folder of another run."""

from __future__ import annotations

import os

import torch

from .config import Backbone, Config, ConvNeXtBackbone, to_dict
from .data.batch import patch_grid
from .data.mixture import check_mixing
from .models.architectures import side_multiple
from .models.memory import TrainingMemory, training_memory

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
)


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
    run, crops, losses = config.run, config.crops, config.losses
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
    if not 0.0 <= config.backbone.drop_path < 1.0:
        raise ValueError(f"backbone.drop_path: expected a rate in [0, 1), got {config.backbone.drop_path}")
    if len(config.data.labelled) not in (0, 2):
        raise ValueError(f"data.labelled: expected two sources, train and test, got {len(config.data.labelled)}")


def _check_sides(config: Config) -> None:
    crops, backbone = config.crops, config.backbone
    sides = [("crops.global_size", crops.global_size)]
    sides += [("crops.local_size", crops.local_size)] if crops.locals else []
    for key, side in sides:
        patch_grid(side, backbone.patch_size, key)
        multiple = side_multiple(backbone)
        if side % multiple:
            raise ValueError(
                f"{key}: {backbone.name} needs a multiple of its stride of {multiple} pixels "
                f"(nearest: {max(side // multiple, 1) * multiple} or {-(-side // multiple) * multiple}), got {side}"
            )
    if isinstance(backbone, ConvNeXtBackbone) and config.masking.hide:
        raise ValueError(
            f"masking.hide: expected false for {backbone.name}, as a ConvNeXt has no mask token; "
            "the iBOT term is then taken at visible places"
        )


def check_memory(config: Config, device: torch.device, world_size: int) -> None:
    """Errors: ValueError when the estimate of `dinov3 plan` does not fit the device."""
    if device.type == "cuda":
        available, where = torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_name(device)
    else:
        available, where = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine's memory"
    needed = memory(config, world_size).total
    if needed > available:
        raise ValueError(
            f"run: this recipe needs about {needed / 2**30:.1f} GiB and {where} has {available / 2**30:.1f} GiB; "
            "lower run.batch_size, raise run.accumulate, or set run.checkpointing=full (see dinov3 plan)"
        )


def memory(config: Config, world_size: int = 1) -> TrainingMemory:
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
