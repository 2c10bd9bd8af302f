"""Training from imported weights: what they decide in the config, and how they get into the networks of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..build import run_config
from ..config import Config, Head
from ..models import key_maps
from ..train.networks import Networks
from . import resolve
from .architecture import adopted, differences
from .dialects import HEADS
from .resolved import Resolved
from .runs import run_of

SHARE_FROZEN = 20  # a backbone under fresh heads is frozen for one step in so many
HEAD_SIZES = ("hidden", "bottleneck", "prototypes", "layers")


def first_config(config: Config) -> tuple[Config, Resolved | None]:
    """The config of a new run with what `init.weights` decides written into it, and those weights.

    With `init.architecture=weights` backbone, heads (where the weights have some) and normalisation follow the weights.

    Errors: ValueError when the weights cannot be resolved, or, with `init.architecture=recipe`, listing every key in
        which recipe and weights differ.
    """
    init = config.init
    if init.weights is None:
        if init.architecture == "weights":
            raise ValueError(
                f"init: recipe {config.recipe} continues from existing weights, expected init=SPEC (a run, a file, "
                "hf:OWNER/NAME or timm:NAME), got nothing; or set init.architecture=recipe to start from random weights"
            )
        if config.start.run is not None and init.licence is None:  # a stage after a run that began with weights
            before = run_config(run_of(Path(config.start.run)) or config.start.run).init
            config = replace(config, init=replace(init, origin=before.origin, licence=before.licence))
        return _with_warm_up(config, fresh_heads=False), None
    found = resolve(init.weights)
    heads = found.heads if init.heads else None
    if init.architecture == "weights":
        config = _following(config, found, heads)
    else:
        _check_fits(config, found, heads)
    config = replace(config, init=replace(init, origin=found.origin, licence=found.licence))
    return _with_warm_up(config, fresh_heads=heads is None), found


def continued_config(config: Config, earlier: Config) -> Config:
    """The config of a run that is continued: what the weights decided when it began, without a look at them."""
    init, rules = config.init, config.optimizer
    if init.weights == earlier.init.weights:
        if init.weights is not None and init.architecture == "weights":
            config = replace(
                config,
                backbone=adopted(config.backbone, earlier.backbone),
                dino_head=_sized(config.dino_head, earlier.dino_head) if init.heads else config.dino_head,
                ibot_head=_sized(config.ibot_head, earlier.ibot_head) if init.heads else config.ibot_head,
                crops=replace(config.crops, mean=earlier.crops.mean, std=earlier.crops.std),
            )
        config = replace(config, init=replace(init, origin=earlier.init.origin, licence=earlier.init.licence))
    kept = {
        key: getattr(earlier.optimizer, key)
        for key in ("freeze_backbone", "backbone_ramp")
        if getattr(rules, key) is None
    }
    return replace(config, optimizer=replace(rules, **kept))


def fill(networks: Networks, found: Resolved, *, heads: bool) -> None:
    """Copy imported weights into the networks: the backbone, and the heads if wanted and there."""
    key_maps.load(networks.backbone, found.backbone.state_dict())
    if heads and found.heads is not None:
        for name in HEADS:
            key_maps.load(getattr(networks, name), found.heads[name].state_dict())


def description(config: Config, found: Resolved) -> list[str]:
    """What is said when a run begins with imported weights, one line each."""
    with_heads = config.init.heads and found.heads is not None
    heads = "with their heads" if with_heads else "with fresh heads"
    shape = found.architecture
    lines = [
        f"weights: {found.origin} ({shape.name}/{shape.patch_size}, width {shape.embed_dim}, depth {shape.depth}), "
        f"{heads}",
        f"licence of these weights: {found.licence}",
    ]
    frozen, ramp = config.optimizer.freeze_backbone, config.optimizer.backbone_ramp
    if frozen:
        then = f", then its rate rises over {ramp} steps" if ramp else ""
        lines.append(f"the backbone is frozen for {frozen} steps while the heads learn{then}")
    elif not with_heads:
        lines.append(
            "note: the heads are fresh and the backbone moves from the first step (optimizer.freeze_backbone=0)"
        )
    return lines


def _following(config: Config, found: Resolved, heads: dict | None) -> Config:
    config = replace(
        config,
        backbone=adopted(config.backbone, found.architecture),
        crops=replace(config.crops, mean=found.mean, std=found.std),
    )
    if heads is None:
        return config
    return replace(
        config,
        dino_head=_sized(config.dino_head, heads["dino_head"].head),
        ibot_head=_sized(config.ibot_head, heads["ibot_head"].head),
    )


def _check_fits(config: Config, found: Resolved, heads: dict | None) -> None:
    differ = differences(config.backbone, found.architecture)
    crops = config.crops
    differ |= {
        f"crops.{key}": (tuple(ours), tuple(theirs))
        for key, ours, theirs in (("mean", crops.mean, found.mean), ("std", crops.std, found.std))
        if max(abs(a - b) for a, b in zip(ours, theirs)) > 5e-3  # published with two or three digits
    }
    for name, head in (heads or {}).items():
        ours = getattr(config, name)
        differ |= {
            f"{name}.{key}": (getattr(ours, key), getattr(head.head, key))
            for key in HEAD_SIZES
            if getattr(ours, key) != getattr(head.head, key)
        }
    if differ:
        listed = ", ".join(f"{key} is {theirs} in the weights, {ours} asked" for key, (ours, theirs) in differ.items())
        fixes = ["init.architecture=weights follows the weights"]
        if any("head" in key for key in differ):
            fixes.append("init.heads=false takes fresh heads")
        if "backbone" not in differ:  # of one kind: each key can be set
            fixes.append("or by hand: " + " ".join(f"{key}={_word(theirs)}" for key, (_, theirs) in differ.items()))
        raise ValueError(f"init: {found.origin} does not fit recipe {config.recipe}: {listed}; {', '.join(fixes)}")


def _word(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ",".join(f"{part:g}" for part in value) + "]"  # of the mean, of ConvNeXt's depths
    return str(value).lower() if isinstance(value, bool) else str(value)


def _sized(head: Head, other: Head) -> Head:
    return replace(head, **{key: getattr(other, key) for key in HEAD_SIZES})


def _with_warm_up(config: Config, *, fresh_heads: bool) -> Config:
    """`freeze_backbone` and `backbone_ramp` as numbers."""
    rules = config.optimizer
    frozen, ramp = rules.freeze_backbone, rules.backbone_ramp
    if frozen is None:
        frozen = max(rules.warmup, config.run.steps // SHARE_FROZEN) if fresh_heads else 0
    return replace(
        config, optimizer=replace(rules, freeze_backbone=frozen, backbone_ramp=frozen if ramp is None else ramp)
    )
