"""AdamW with layer-wise learning rates and the weight-decay exclusions of the paper."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .networks import Networks


@dataclass(frozen=True)
class GroupRule:
    """How a parameter follows the schedules: multipliers of learning rate and weight decay; is it a prototype layer,
    is it the backbone's."""

    learning_rate: float
    weight_decay: float
    prototypes: bool
    backbone: bool


def group_rule(
    name: str, *, depth: int, layer_decay: float, patch_embed_multiplier: float, stages: tuple[int, ...] = ()
) -> GroupRule:
    """The rule of one parameter by its dotted name in `Networks`.

    Depth index: 0 for patch embedding, CLS, registers and mask token; i + 1 for block i; depth + 1 for final norms and
    heads; in a ConvNeXt of `stages` blocks per stage 0 for the stem, the next block's for a convolution between stages.
    Learning rate: layer_decay^(depth + 1 - index), the patch embedding times `patch_embed_multiplier` more.
    No weight decay for names that end in `bias` or hold `norm` or `gamma`; CLS, register and mask tokens are decayed.

    Source: spec 4.4 and trap 9.
    """
    parts = name.split(".")
    index = depth + 1
    if parts[0] == "backbone" and parts[1] == "blocks":
        index = int(parts[2]) + 1
    elif parts[0] == "backbone" and (
        parts[1] == "patch_embed" or parts[1].endswith("_token") or parts[1] == "storage_tokens"
    ):
        index = 0
    elif parts[0] == "backbone" and parts[1] == "stages":
        index = sum(stages[: int(parts[2])]) + int(parts[3]) + 1
    elif parts[0] == "backbone" and parts[1] == "downsample_layers":
        index = sum(stages[: int(parts[2])]) + 1 if int(parts[2]) else 0
    rate = layer_decay ** (depth + 1 - index)
    if parts[0] == "backbone" and parts[1] == "patch_embed":
        rate *= patch_embed_multiplier
    exempt = name.endswith("bias") or "norm" in name or "gamma" in name
    if (
        parts[1] == "downsample_layers"
    ):  # a norm and a convolution, numbered: stem 4 x 4 then norm, elsewhere norm first
        exempt = exempt or parts[3] == ("1" if parts[2] == "0" else "0")
    prototypes = parts[0].endswith("_head") and "prototypes" in name
    return GroupRule(rate, 0.0 if exempt else 1.0, prototypes, parts[0] == "backbone")


def adamw(
    networks: Networks, *, betas: tuple[float, float], layer_decay: float, patch_embed_multiplier: float
) -> torch.optim.AdamW:
    """One fused AdamW over all trainable parameters; each group keeps its `rule` for `set_rates`.

    State is created here, not at the first step, so that a checkpoint of any step has the same entries.
    """
    groups: dict[GroupRule, list[nn.Parameter]] = {}
    depth, stages = networks.backbone.depth, getattr(networks.backbone.backbone, "depths", ())
    for name, parameter in networks.named_parameters():
        if parameter.requires_grad:
            rule = group_rule(
                name,
                depth=depth,
                layer_decay=layer_decay,
                patch_embed_multiplier=patch_embed_multiplier,
                stages=stages,
            )
            groups.setdefault(rule, []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": p, "rule": r} for r, p in groups.items()], lr=0.0, betas=betas, fused=True
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def set_rates(
    optimizer: torch.optim.AdamW,
    *,
    learning_rate: float,
    prototype_rate: float,
    backbone_rate: float,
    weight_decay: float,
) -> None:
    """Give every group its learning rate and weight decay of this step; a rate of 0 leaves weights as they are."""
    for group in optimizer.param_groups:
        rule: GroupRule = group["rule"]
        rate = prototype_rate if rule.prototypes else backbone_rate if rule.backbone else learning_rate
        group["lr"] = rate * rule.learning_rate
        group["weight_decay"] = weight_decay * rule.weight_decay
