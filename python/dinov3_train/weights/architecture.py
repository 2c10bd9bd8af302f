"""The architecture of a backbone, read off its weights or off the configuration beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ..config import Backbone, ConvNeXtBackbone, Rope
from ..models.convnext import CONVNEXTS
from ..models.layers import hidden_width
from ..models.vit import BACKBONES

Architecture = Backbone | ConvNeXtBackbone
HEAD_WIDTH = 64  # of every size but the 7B
# what weights fix; the rest of a `Backbone` is a setting of training: drop path, augmented positions, first values
FIXED = (
    "name", "embed_dim", "depth", "heads", "ffn", "ffn_ratio", "patch_size", "registers", "norm_eps", "qkv_bias",
    "mask_k_bias", "untie_local_cls_norm",
)  # fmt: skip
CONVNEXT_FIXED = ("name", "depths", "dims", "patch_size", "norm_eps")


def recognised_convnext(state: Mapping[str, Tensor]) -> ConvNeXtBackbone:
    """The architecture that the weights of a ConvNeXt in our dialect have.

    Errors: ValueError for tensors that no ConvNeXt has.
    """
    counts: dict[int, int] = {}
    for key in state:
        if match := re.match(r"stages\.(\d+)\.(\d+)\.", key):
            stage, block = int(match[1]), int(match[2])
            counts[stage] = max(counts.get(stage, 0), block + 1)
    names = [f"stages.{stage}.0.dwconv.weight" for stage in range(len(counts))]
    _require(state, "norm.weight", *(names or ["stages.0.0.dwconv.weight"]), what="ConvNeXt")
    depths, dims = (
        tuple(counts.get(stage, 0) for stage in range(len(counts))),
        tuple(len(state[name]) for name in names),
    )
    return _convnext(depths, dims)


def recognised(state: Mapping[str, Tensor], *, head_width: int | None = None, base: float = 100.0) -> Backbone:
    """The architecture that weights in our dialect have.

    Args:
        state: our dialect.
        head_width: E, where the source tells it; None: that of the published size of this width, else 64.
        base: of the rotary periods.

    Errors: ValueError for tensors that no architecture of this package has.
    """
    _require(state, "cls_token", "patch_embed.proj.weight", "norm.weight")
    dim = state["cls_token"].shape[-1]
    depth = 1 + max((int(key.split(".")[1]) for key in state if key.startswith("blocks.")), default=-1)
    channels, height, width = state["patch_embed.proj.weight"].shape[1:]
    if depth < 1 or height != width or channels != 3:
        raise ValueError(
            f"weights: expected blocks and a square patch of 3 channels, got {depth} blocks and patches of "
            f"{channels} x {height} x {width}"
        )
    gated = "blocks.0.mlp.w1.weight" in state
    first = "blocks.0.mlp.w1.weight" if gated else "blocks.0.mlp.fc1.weight"
    _require(state, first)
    ffn, ratio = _feed_forward(dim, state[first].shape[0], gated)
    bias = "blocks.0.attn.qkv.bias" in state
    published = [size for size in BACKBONES.values() if (size.embed_dim, size.ffn, size.ffn_ratio) == (dim, ffn, ratio)]
    if head_width is None:
        head_width = dim // published[0].heads if published else HEAD_WIDTH
    if dim % head_width:
        raise ValueError(f"weights: the number of heads cannot be told from a width of {dim} without a configuration")
    found = Backbone(
        embed_dim=dim,
        depth=depth,
        heads=dim // head_width,
        ffn=ffn,
        ffn_ratio=ratio,
        patch_size=height,
        registers=state["storage_tokens"].shape[1] if "storage_tokens" in state else 0,
        qkv_bias=bias,
        untie_local_cls_norm="local_cls_norm.weight" in state,
        rope=Rope(base=base),
    )
    return replace(found, name=name_of(found))


def name_of(backbone: Backbone) -> str:
    """The published name of an architecture's size, or `vit_<width>x<depth>`."""
    for name, size in BACKBONES.items():
        sizes = [(b.embed_dim, b.depth, b.heads, b.ffn, b.ffn_ratio) for b in (size, backbone)]
        if sizes[0] == sizes[1]:
            return name
    return f"vit_{backbone.embed_dim}x{backbone.depth}"


def from_transformers(config: Mapping[str, object]) -> Architecture:
    """The architecture that a `config.json` of transformers' DINOv3ViTModel or DINOv3ConvNextModel describes.

    Errors: ValueError for another model type, or for what this package's transformer has not.
    """
    if config.get("model_type") == "dinov3_convnext":
        dims, depths = tuple(config["hidden_sizes"]), tuple(config["depths"])
        found = _convnext(depths, dims)
        return replace(found, norm_eps=config.get("layer_norm_eps", found.norm_eps))
    if config.get("model_type") != "dinov3_vit":
        raise ValueError(
            f"weights: expected a config.json of model_type dinov3_vit or dinov3_convnext, got "
            f"{config.get('model_type')!r}"
        )
    value = TRANSFORMERS_DEFAULTS | dict(config)
    wanted = {
        "hidden_act": "silu" if value["use_gated_mlp"] else "gelu",
        "key_bias": False,
        "proj_bias": True,
        "mlp_bias": True,
        "num_channels": 3,
        "value_bias": value["query_bias"],
    }
    other = [
        f"{key}={value[key]!r} ({expected!r} expected)" for key, expected in wanted.items() if value[key] != expected
    ]
    if other:
        raise ValueError(f"weights: config.json describes a model this package has not: {', '.join(other)}")
    dim, gated = value["hidden_size"], bool(value["use_gated_mlp"])
    ffn, ratio = _feed_forward(dim, value["intermediate_size"], gated)
    patch = value["patch_size"]
    found = Backbone(
        embed_dim=dim,
        depth=value["num_hidden_layers"],
        heads=value["num_attention_heads"],
        ffn=ffn,
        ffn_ratio=ratio,
        patch_size=patch if isinstance(patch, int) else patch[0],
        registers=value["num_register_tokens"],
        norm_eps=value["layer_norm_eps"],
        qkv_bias=bool(value["query_bias"]),
        rope=Rope(base=float(value["rope_theta"])),
    )
    return replace(found, name=name_of(found))


TRANSFORMERS_DEFAULTS = {  # of a DINOv3ViTConfig: config.json leaves out what equals them
    "patch_size": 16, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6,
    "hidden_act": "gelu", "layer_norm_eps": 1e-5, "rope_theta": 100.0, "image_size": 224, "num_channels": 3,
    "query_bias": True, "key_bias": False, "value_bias": True, "proj_bias": True, "mlp_bias": True,
    "use_gated_mlp": False, "num_register_tokens": 0,
}  # fmt: skip


def adopted(recipe: Architecture, weights: Architecture) -> Architecture:
    """The recipe's settings of training on the architecture of the weights."""
    if type(recipe) is not type(weights):
        return replace(weights, drop_path=recipe.drop_path)
    if isinstance(weights, ConvNeXtBackbone):
        return replace(recipe, **{key: getattr(weights, key) for key in CONVNEXT_FIXED})
    fixed = {key: getattr(weights, key) for key in FIXED}
    return replace(recipe, **fixed, rope=replace(recipe.rope, base=weights.rope.base))


def differences(recipe: Architecture, weights: Architecture) -> dict[str, tuple[object, object]]:
    """Config keys below `backbone` in which the two are different architectures: (recipe's, weights')."""
    if type(recipe) is not type(weights):
        return {"backbone": (recipe.name, weights.name)}
    if isinstance(weights, ConvNeXtBackbone):
        pairs = {f"backbone.{key}": (getattr(recipe, key), getattr(weights, key)) for key in CONVNEXT_FIXED[1:]}
        return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    pairs = {f"backbone.{key}": (getattr(recipe, key), getattr(weights, key)) for key in FIXED if key != "name"}
    pairs["backbone.rope.base"] = (recipe.rope.base, weights.rope.base)
    if recipe.ffn == weights.ffn and hidden_width(recipe) == hidden_width(weights):
        del pairs["backbone.ffn_ratio"]  # two ratios of one hidden width
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _convnext(depths: tuple[int, ...], dims: tuple[int, ...]) -> ConvNeXtBackbone:
    """Of a published size, or of another one under a name made of its widths; its patch is its stride."""
    for size in CONVNEXTS.values():
        if (size.depths, size.dims) == (depths, dims):
            return size
    found = ConvNeXtBackbone(name="convnext_" + "x".join(map(str, dims)), depths=depths, dims=dims)
    return replace(found, patch_size=found.stride)


def _feed_forward(dim: int, hidden: int, gated: bool) -> tuple[str, float]:
    """Kind and ratio that give this hidden width: of a published size where one has it, else computed."""
    for size in BACKBONES.values():
        if size.embed_dim == dim and (size.ffn != "mlp") == gated and hidden_width(size) == hidden:
            return size.ffn, size.ffn_ratio
    ratio = (1.5 if gated else 1.0) * hidden / dim
    kind = "swiglu" if gated else "mlp"
    for candidate in (ratio, (hidden + 0.5) * (1.5 if gated else 1.0) / dim):  # int() may fall one short
        if hidden_width(Backbone(embed_dim=dim, ffn=kind, ffn_ratio=candidate)) == hidden:
            return kind, candidate
    raise ValueError(f"weights: a gated feed-forward of width {hidden} is not a multiple of 8, as this package's are")


def _require(state: Mapping[str, Tensor], *keys: str, what: str = "vision transformer") -> None:
    missing = [key for key in keys if key not in state]
    if missing:
        some = ", ".join(re.sub(r"\.\d+\.", ".N.", key) for key in list(state)[:4])
        raise ValueError(f"weights: not a DINOv3 {what}: {', '.join(missing)} missing; it holds {some}, ...")
