"""From the tensors of a file, in whatever dialect, to ours: backbone and heads, every tensor accounted for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import Head
from ..models import convnext_key_maps, key_maps
from ..models.architectures import backbone_of
from ..models.convnext import ConvNeXt
from ..models.heads import ProjectionHead
from ..models.vit import BACKBONES, VisionTransformer
from .architecture import Architecture

State = dict[str, Tensor]
HEADS = ("dino_head", "ibot_head")
WRAPPERS = ("teacher", "model", "state_dict")  # names under which checkpoints keep a state dict
PREFIX = re.compile(r"^(module\.|_orig_mod\.)+")


@dataclass(frozen=True)
class Parts:
    """Weights in our dialect. backbone, and heads by name.

    dialect: "official", "transformers" or "timm"; convnext: whether they are of a ConvNeXt.
    head_width, base: of the rotary positions, where the tensors tell.
    """

    dialect: str
    convnext: bool
    backbone: State
    heads: dict[str, State]
    head_width: int | None = None
    base: float = 100.0


def parts_of(content: object, where: str) -> Parts:
    """The parts of what a file holds.

    Args:
        content: a state dict, or one below "teacher", "model" or "state_dict"; keys may be prefixed `backbone.`,
            `dino_head.` and `ibot_head.`.
        where: the file, for errors.

    Errors: ValueError when it is no state dict or its keys are of no dialect.
    """
    state = _state(content, where)
    backbone, heads = state, {}
    if any(key.startswith("backbone.") for key in state):
        backbone = {key.removeprefix("backbone."): t for key, t in state.items() if not key.startswith(HEADS)}
        for name in HEADS:
            head = {key.removeprefix(f"{name}."): t for key, t in state.items() if key.startswith(f"{name}.")}
            if head:
                heads[name] = {key.replace("last_layer.", "prototypes."): tensor for key, tensor in head.items()}
    dialect, convnext = dialect_of(backbone)
    if convnext:
        convert = getattr(convnext_key_maps, f"from_{dialect}")
        return Parts(dialect, True, convert(backbone, strict=False), heads)
    if dialect == "transformers":
        return Parts(dialect, False, key_maps.from_transformers(backbone, strict=False), heads)
    if dialect == "timm":
        bias = _timm_bias(backbone)
        return Parts(dialect, False, key_maps.from_timm(backbone, qkv_bias=bias, strict=False), heads)
    width, base = _rotary(backbone)
    return Parts(dialect, False, key_maps.from_official(backbone, strict=False), heads, width, base)


TELLING = {  # (dialect, ConvNeXt): names that nothing else has
    ("transformers", False): r"embeddings\..*",
    ("timm", False): r"reg_token|blocks\.\d+\.(gamma_[12]|attn\.q_bias|mlp\.fc1_[gx]\..*)",
    ("transformers", True): r"(model\.)?stages\.\d+\.layers\..*",
    ("timm", True): r"stem\..*|stages\.\d+\.blocks\..*",
    ("official", True): r"downsample_layers\..*",
}


def dialect_of(state: Mapping[str, Tensor]) -> tuple[str, bool]:
    """Dialect, and whether it is a ConvNeXt, by telling names; else the official vision transformer."""
    for found, pattern in TELLING.items():
        if any(re.fullmatch(pattern, key) for key in state):
            return found
    return "official", False


def network(state: State, found: Architecture, where: str) -> VisionTransformer | ConvNeXt:
    """The backbone of these weights: evaluation mode, fp32, CPU, without gradients.

    Errors: ValueError listing all missing, unexpected and reshaped keys.
    """
    with torch.random.fork_rng(devices=[]):  # first values are drawn and thrown away
        model = backbone_of(found)
    try:
        key_maps.load(model, {key: tensor.float() for key, tensor in state.items()})
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).removeprefix('load: ')}") from error
    return model.eval().requires_grad_(False)


def projection_heads(states: Mapping[str, State], where: str) -> dict[str, ProjectionHead] | None:
    """The heads of these weights, or None unless both are there; their sizes are read off the tensors."""
    if set(states) != set(HEADS):
        return None
    found = {}
    for name, state in states.items():
        try:
            head = _head(state)
            width = state["mlp.0.weight"].shape[1]
        except (KeyError, ValueError, IndexError) as error:
            raise ValueError(f"{where}: {name} is not a projection head: {', '.join(sorted(state))}") from error
        with torch.random.fork_rng(devices=[]):
            module = ProjectionHead(width, head)
        key_maps.load(module, {key: tensor.float() for key, tensor in state.items()})
        found[name] = module.eval().requires_grad_(False)
    return found


def _head(state: State) -> Head:
    numbers = sorted(int(key.split(".")[1]) for key in state if re.fullmatch(r"mlp\.\d+\.weight", key))
    prototypes, bottleneck = state["prototypes.weight"].shape
    return Head(
        hidden=state["mlp.0.weight"].shape[0], bottleneck=bottleneck, prototypes=prototypes, layers=len(numbers)
    )


def _state(content: object, where: str) -> State:
    for name in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{where}: expected a state dict of tensors, got {type(content).__name__}")
    other = [str(key) for key, tensor in content.items() if not isinstance(tensor, Tensor)]
    if other:
        raise ValueError(f"{where}: expected a state dict of tensors; {', '.join(other[:4])} are none")
    return {PREFIX.sub("", key): tensor for key, tensor in content.items()}


def _timm_bias(state: Mapping[str, Tensor]) -> bool:
    """A `*_qkvb` model has a bias; one without gets a zero bias that can learn, where the published size has one."""
    if any(key.endswith(".q_bias") for key in state):
        return True
    dim = state["cls_token"].shape[-1] if "cls_token" in state else 0
    return any(size.embed_dim == dim and size.qkv_bias for size in BACKBONES.values())


def _rotary(state: Mapping[str, Tensor]) -> tuple[int | None, float]:
    """Head width and base from the official periods base^(2k / (E/2)), k < E/4, which files keep rounded to bf16."""
    periods = state.get("rope_embed.periods")
    if periods is None or len(periods) < 2:
        return None, 100.0
    quarter = len(periods)
    base = float(periods[-1].double() ** (quarter / (quarter - 1)))
    return 4 * quarter, 100.0 if abs(base - 100.0) < 1.0 else base
