"""State dicts of a ConvNeXt in four dialects, both ways: ours, official, transformers (DINOv3ConvNextModel), timm.

Ours is the official dialect without `norms.3`, a second name of `norm`. Nothing is loaded half: a key no rule knows is
an error, and `key_maps.load` refuses missing, unexpected and reshaped ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]

_OURS = re.compile(
    r"(norm|downsample_layers\.\d+\.[01]|stages\.\d+\.\d+\.(dwconv|norm|pwconv1|pwconv2))\.(weight|bias)"
    r"|stages\.\d+\.\d+\.gamma"
)
_TRANSFORMERS = [  # (ours, theirs), whole keys
    (r"norm\.(\w+)", r"layer_norm.\1"),
    (r"downsample_layers\.(\d+)\.(.*)", r"model.stages.\1.downsample_layers.\2"),
    (r"stages\.(\d+)\.(\d+)\.dwconv\.(\w+)", r"model.stages.\1.layers.\2.depthwise_conv.\3"),
    (r"stages\.(\d+)\.(\d+)\.norm\.(\w+)", r"model.stages.\1.layers.\2.layer_norm.\3"),
    (r"stages\.(\d+)\.(\d+)\.pwconv([12])\.(\w+)", r"model.stages.\1.layers.\2.pointwise_conv\3.\4"),
    (r"stages\.(\d+)\.(\d+)\.gamma", r"model.stages.\1.layers.\2.gamma"),
]
_FROM_TRANSFORMERS = [  # older releases of transformers name the stages without "model."
    (r"layer_norm\.(\w+)", r"norm.\1"),
    (r"(?:model\.)?stages\.(\d+)\.downsample_layers\.(.*)", r"downsample_layers.\1.\2"),
    (r"(?:model\.)?stages\.(\d+)\.layers\.(\d+)\.depthwise_conv\.(\w+)", r"stages.\1.\2.dwconv.\3"),
    (r"(?:model\.)?stages\.(\d+)\.layers\.(\d+)\.layer_norm\.(\w+)", r"stages.\1.\2.norm.\3"),
    (r"(?:model\.)?stages\.(\d+)\.layers\.(\d+)\.pointwise_conv([12])\.(\w+)", r"stages.\1.\2.pwconv\3.\4"),
    (r"(?:model\.)?stages\.(\d+)\.layers\.(\d+)\.gamma", r"stages.\1.\2.gamma"),
]
_TIMM = [
    (r"norm\.(\w+)", r"head.norm.\1"),
    (r"downsample_layers\.0\.(.*)", r"stem.\1"),
    (r"downsample_layers\.(\d+)\.(.*)", r"stages.\1.downsample.\2"),
    (r"stages\.(\d+)\.(\d+)\.dwconv\.(\w+)", r"stages.\1.blocks.\2.conv_dw.\3"),
    (r"stages\.(\d+)\.(\d+)\.norm\.(\w+)", r"stages.\1.blocks.\2.norm.\3"),
    (r"stages\.(\d+)\.(\d+)\.pwconv([12])\.(\w+)", r"stages.\1.blocks.\2.mlp.fc\3.\4"),
    (r"stages\.(\d+)\.(\d+)\.gamma", r"stages.\1.blocks.\2.gamma"),
]
_FROM_TIMM = [
    (r"head\.norm\.(\w+)", r"norm.\1"),
    (r"stem\.(.*)", r"downsample_layers.0.\1"),
    (r"stages\.(\d+)\.downsample\.(.*)", r"downsample_layers.\1.\2"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.(\w+)", r"stages.\1.\2.dwconv.\3"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.norm\.(\w+)", r"stages.\1.\2.norm.\3"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc([12])\.(\w+)", r"stages.\1.\2.pwconv\3.\4"),
    (r"stages\.(\d+)\.blocks\.(\d+)\.gamma", r"stages.\1.\2.gamma"),
]


def from_official(state: Mapping[str, Tensor], *, strict: bool = True) -> State:
    """Official -> ours; where not `strict`, keys no rule knows keep their name, for `key_maps.load` to list.

    Errors: ValueError where `norms.3` differs from `norm`, whose second name it is.
    """
    for part in ("weight", "bias"):
        first, second = state.get(f"norm.{part}"), state.get(f"norms.3.{part}")
        if first is not None and second is not None and not torch.equal(first, second):
            raise ValueError(f"from_official: norms.3.{part} differs from norm.{part}, expected the same numbers")
    ours = {key: value for key, value in state.items() if not key.startswith("norms.3.")}
    return _known(ours, "from_official") if strict else ours


def to_official(state: Mapping[str, Tensor]) -> State:
    """Ours -> official: adds the second name of the final norm."""
    ours = _known(state, "to_official")
    return ours | {f"norms.3.{part}": ours[f"norm.{part}"].clone() for part in ("weight", "bias")}


def to_transformers(state: Mapping[str, Tensor]) -> State:
    """Ours -> transformers."""
    return _mapped(_known(state, "to_transformers"), _TRANSFORMERS, "to_transformers")


def from_transformers(state: Mapping[str, Tensor], *, strict: bool = True) -> State:
    """Transformers -> ours, of releases with and without the prefix `model.`; `strict`: see `from_official`."""
    ours = _mapped(state, _FROM_TRANSFORMERS, "from_transformers", strict)
    return _known(ours, "from_transformers") if strict else ours


def to_timm(state: Mapping[str, Tensor]) -> State:
    """Ours -> timm (`convnext_*` with num_classes=0)."""
    return _mapped(_known(state, "to_timm"), _TIMM, "to_timm")


def from_timm(state: Mapping[str, Tensor], *, strict: bool = True) -> State:
    """Timm -> ours; `strict`: see `from_official`."""
    ours = _mapped(state, _FROM_TIMM, "from_timm", strict)
    return _known(ours, "from_timm") if strict else ours


def _mapped(state: Mapping[str, Tensor], rules: list[tuple[str, str]], what: str, strict: bool = True) -> State:
    renamed = {
        key: next((match.expand(new) for old, new in rules if (match := re.fullmatch(old, key))), None) for key in state
    }
    _raise_unknown([key for key, name in renamed.items() if name is None and strict], what)
    return {renamed[key] or key: tensor for key, tensor in state.items()}


def _known(state: Mapping[str, Tensor], what: str) -> State:
    _raise_unknown([key for key in state if _OURS.fullmatch(key) is None], what)
    return dict(state)


def _raise_unknown(keys: list[str], what: str) -> None:
    if keys:
        more = f" and {len(keys) - 12} more" if len(keys) > 12 else ""
        raise ValueError(f"{what}: no rule for these keys: {', '.join(keys[:12])}{more}")
