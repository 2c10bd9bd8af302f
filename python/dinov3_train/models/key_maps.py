"""State dicts of a ViT in four dialects, both ways: ours, official, transformers (DINOv3ViTModel), timm (vit_*_dinov3).

Ours is the official dialect without what is recomputed: `rope_embed.periods` and `qkv.bias_mask`. The others are
reached through ours. Nothing is loaded half: a key no rule knows, a missing one or another shape ends in one error
listing them.

What a dialect cannot hold: transformers has no local CLS norm; timm has no mask token and no local CLS norm; neither
has a K bias, and one that is not 0 is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dinov3_train.models.rope import periods

State = dict[str, Tensor]

_TRANSFORMERS = [  # (ours, transformers)
    ("cls_token", "embeddings.cls_token"),
    ("storage_tokens", "embeddings.register_tokens"),
    ("mask_token", "embeddings.mask_token"),
    ("patch_embed.proj.", "embeddings.patch_embeddings."),
    ("attn.qkv.", "attention.qkv."),
    ("attn.proj.", "attention.o_proj."),
    ("ls1.gamma", "layer_scale1.lambda1"),
    ("ls2.gamma", "layer_scale2.lambda1"),
    ("mlp.fc1.", "mlp.up_proj."),
    ("mlp.fc2.", "mlp.down_proj."),
    ("mlp.w1.", "mlp.gate_proj."),
    ("mlp.w2.", "mlp.up_proj."),
    ("mlp.w3.", "mlp.down_proj."),
    ("blocks.", "model.layer."),
]
_TIMM = [  # (ours, timm)
    ("storage_tokens", "reg_token"),
    ("ls1.gamma", "gamma_1"),
    ("ls2.gamma", "gamma_2"),
    ("mlp.w1.", "mlp.fc1_g."),
    ("mlp.w2.", "mlp.fc1_x."),
    ("mlp.w3.", "mlp.fc2."),
]
_OURS = re.compile(
    r"(cls_token|storage_tokens|mask_token|patch_embed\.proj\.(weight|bias)|(local_cls_)?norm\.(weight|bias)"
    r"|blocks\.\d+\.(norm[12]\.(weight|bias)|attn\.(qkv|proj)\.(weight|bias)|ls[12]\.gamma"
    r"|mlp\.(fc[12]|w[123])\.(weight|bias)))"
)


def load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a state dict in our dialect into the model; ValueError listing all missing, unexpected and reshaped keys."""
    expected = model.state_dict()
    problems = [f"missing {key}" for key in expected if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in expected]
    problems += [
        f"{key} {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    _raise(problems, "load: the weights do not fit the model")
    model.load_state_dict(state)


def from_official(state: Mapping[str, Tensor], *, strict: bool = True) -> State:
    """Official -> ours; where not `strict`, keys no rule knows keep their name, for `load` to list.

    The bias mask is applied to the bias and left out: the model makes its own {1, 0, 1} mask. Released files hold zero
    biases under zero masks, so q and v could never learn a bias there; here they can, and the outputs are the same.
    """
    ours: State = {}
    for key, tensor in state.items():
        if key == "rope_embed.periods" or key.endswith("qkv.bias_mask"):
            continue
        mask = state.get(key.replace("qkv.bias", "qkv.bias_mask")) if key.endswith("qkv.bias") else None
        if mask is not None and not bool(mask.isfinite().all()):  # old files hold a mask that was never set
            mask = _bias_mask(tensor)
        ours[key] = tensor if mask is None else tensor * mask.to(tensor.dtype)
    return _with_registers(_known(ours, "from_official") if strict else ours)


def to_official(state: Mapping[str, Tensor], *, heads: int, base: float = 100.0) -> State:
    """Ours -> official: adds the periods (fp32, of `heads` and `base`) and the {1, 0, 1} bias masks."""
    official = dict(_known(state, "to_official"))
    width = official["cls_token"].shape[-1]
    official["rope_embed.periods"] = periods(width // heads, base)
    if official["storage_tokens"].shape[1] == 0:  # a model without registers has no such key
        del official["storage_tokens"]
    for key in [key for key in state if key.endswith("attn.qkv.bias")]:
        official[key.replace("qkv.bias", "qkv.bias_mask")] = _bias_mask(official[key])
    return official


def to_transformers(state: Mapping[str, Tensor]) -> State:
    """Ours -> transformers: qkv split in three; the K bias and the local CLS norm have no place there."""
    theirs: State = {}
    for key, tensor in _known(state, "to_transformers").items():
        name = _renamed(key, _TRANSFORMERS)
        if key.startswith("local_cls_norm."):
            continue
        if ".qkv." in name:
            _no_k_bias(key, tensor, "to_transformers")
            for letter, part in zip("qkv", tensor.chunk(3)):
                if not (letter == "k" and key.endswith("bias")):
                    theirs[name.replace(".qkv.", f".{letter}_proj.")] = part.clone()
        else:
            theirs[name] = tensor[None] if key == "mask_token" else tensor
    return theirs


def from_transformers(state: Mapping[str, Tensor], *, strict: bool = True) -> State:
    """Transformers -> ours: q, k, v joined; the K bias, which they lack, is 0. `strict`: see `from_official`.

    Blocks are called `model.layer.N` in a model of transformers 5 and `layer.N` in files and in version 4.
    """
    ours: State = {}
    state = {f"model.{key}" if key.startswith("layer.") else key: tensor for key, tensor in state.items()}
    gated = any(".mlp.gate_proj." in key for key in state)
    rules = [(theirs, ours_) for ours_, theirs in _TRANSFORMERS if not ours_.startswith("mlp.fc" if gated else "mlp.w")]
    for key, tensor in state.items():
        projection = re.fullmatch(r"(.*attention)\.([qkv])_proj\.(weight|bias)", key)
        if projection is None:
            ours[_renamed(key, rules)] = tensor[0] if key == "embeddings.mask_token" else tensor
        elif projection[2] == "q":
            parts = [state.get(f"{projection[1]}.{letter}_proj.{projection[3]}") for letter in "qkv"]
            parts = [torch.zeros_like(tensor) if part is None and key.endswith("bias") else part for part in parts]
            _raise([key] if any(part is None for part in parts) else [], "from_transformers: no k or v beside")
            ours[_renamed(f"{projection[1]}.qkv.{projection[3]}", rules)] = torch.cat(parts)
    return _with_registers(_known(ours, "from_transformers") if strict else ours)


def to_timm(state: Mapping[str, Tensor], *, qkv_bias: bool) -> State:
    """Ours -> timm.

    Args:
        state: our dialect.
        qkv_bias: for a `*_qkvb` model (q_bias, v_bias) or one without bias.

    Errors: ValueError when a q or v bias is not zero and the target has none.
    """
    theirs: State = {}
    for key, tensor in _known(state, "to_timm").items():
        name = _renamed(key, _TIMM)
        if key == "mask_token" or key.startswith("local_cls_norm.") or tensor.shape[1:2] == (0,):
            continue
        if not key.endswith("attn.qkv.bias"):
            theirs[name] = tensor
            continue
        _no_k_bias(key, tensor, "to_timm")
        q, _, v = tensor.chunk(3)
        if qkv_bias:
            theirs[name.replace("qkv.bias", "q_bias")], theirs[name.replace("qkv.bias", "v_bias")] = (
                q.clone(),
                v.clone(),
            )
        elif bool(q.any()) or bool(v.any()):
            raise ValueError(f"to_timm: {key} is not zero, expected a model with bias (vit_*_dinov3_qkvb)")
    return theirs


def from_timm(state: Mapping[str, Tensor], *, qkv_bias: bool, strict: bool = True) -> State:
    """Timm -> ours.

    Args:
        state: of a `vit_*_dinov3` or `vit_*_dinov3_qkvb` model.
        qkv_bias: whether our model has a qkv bias, 0 where timm's has none. The mask token, which timm lacks, is 0.
        strict: see `from_official`.

    Errors: ValueError when timm's model has a bias and ours has not.
    """
    ours: State = {}
    rules = [(theirs, ours_) for ours_, theirs in _TIMM]
    gated = any(".mlp.fc1_g." in key for key in state)
    rules = rules if gated else [rule for rule in rules if rule[0] != "mlp.fc2."]
    for key, tensor in state.items():
        if key.endswith((".v_bias", ".k_bias")):
            continue
        if key.endswith(".q_bias"):
            if not qkv_bias:
                raise ValueError(f"from_timm: got {key}, expected a model without qkv bias")
            v = state[key.replace("q_bias", "v_bias")]
            ours[key.replace("q_bias", "qkv.bias")] = torch.cat((tensor, torch.zeros_like(tensor), v))
            continue
        ours[_renamed(key, rules)] = tensor
        if qkv_bias and key.endswith("qkv.weight"):
            ours.setdefault(key.replace("qkv.weight", "qkv.bias"), tensor.new_zeros(len(tensor)))
    ours.setdefault("mask_token", torch.zeros_like(ours["cls_token"][0]) if "cls_token" in ours else torch.zeros(0))
    return _with_registers(_known(ours, "from_timm") if strict else ours)


def _with_registers(state: State) -> State:
    """Ours holds an empty (1, 0, D) tensor where a model has no registers; the other dialects leave it out."""
    if "cls_token" in state:
        state.setdefault("storage_tokens", torch.zeros(1, 0, state["cls_token"].shape[-1]))
    return state


def _renamed(key: str, rules: list[tuple[str, str]]) -> str:
    for old, new in rules:
        key = re.sub(rf"(^|(?<=\.)){re.escape(old)}", new, key)
    return key


def _bias_mask(bias: Tensor) -> Tensor:
    """{1, 0, 1} over the q, k and v thirds of a bias (3 D,)."""
    return torch.tensor([1.0, 0.0, 1.0], dtype=bias.dtype).repeat_interleave(len(bias) // 3)


def _no_k_bias(key: str, tensor: Tensor, what: str) -> None:
    if key.endswith("bias") and bool(tensor.chunk(3)[1].any()):
        raise ValueError(f"{what}: the K third of {key} is not zero, and it has none there")


def _known(state: Mapping[str, Tensor], what: str) -> State:
    _raise([key for key in state if _OURS.fullmatch(key) is None], f"{what}: no rule for these keys")
    return dict(state)


def _raise(problems: list[str], what: str) -> None:
    if problems:
        more = f" and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise ValueError(f"{what}: {', '.join(problems[:12])}{more}")
