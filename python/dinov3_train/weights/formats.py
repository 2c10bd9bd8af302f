"""The forms weights are exported in: how each is written, and how its own library reads it back.

A reader gives `see(images (B, 3, Y, X)) -> Features` of what is on disk, through the library the form is for, so that
what is compared with our features is what its users will get.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import Backbone, ConvNeXtBackbone
from ..models import convnext_key_maps, key_maps
from ..models.layers import SWIGLU_ALIGNMENT, hidden_width
from ..models.vit import Features
from . import metadata
from .cards import IDENTIFIERS
from .dialects import parts_of
from .files import Stated, from_file, resolved
from .onnx_model import OUTPUTS, graph_of
from .resolved import Resolved

See = Callable[[Tensor], Features]
TIMM_NAMES = {  # of our published sizes; any other one is written as the nearest of these with other arguments
    "vit_small": "vit_small_patch16_dinov3", "vit_small_plus": "vit_small_plus_patch16_dinov3",
    "vit_base": "vit_base_patch16_dinov3", "vit_large": "vit_large_patch16_dinov3",
    "vit_huge_plus": "vit_huge_plus_patch16_dinov3", "vit_7b": "vit_7b_patch16_dinov3",
}  # fmt: skip


# ---- transformers ----


def write_hf(found: Resolved, folder: Path, heads: bool) -> None:
    """A folder that `transformers.AutoModel.from_pretrained` takes, with its image processor."""
    transformers = _library("transformers")
    shape, state = found.architecture, found.backbone.state_dict()
    if isinstance(shape, ConvNeXtBackbone):
        config = transformers.DINOv3ConvNextConfig(
            depths=list(shape.depths), hidden_sizes=list(shape.dims), layer_norm_eps=shape.norm_eps,
            layer_scale_init_value=shape.layer_scale, image_size=found.size,
        )  # fmt: skip
        model, theirs = transformers.DINOv3ConvNextModel(config), convnext_key_maps.to_transformers(state)
    else:
        gated = shape.ffn != "mlp"
        config = transformers.DINOv3ViTConfig(
            hidden_size=shape.embed_dim, intermediate_size=hidden_width(shape), num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads, patch_size=shape.patch_size, num_register_tokens=shape.registers,
            use_gated_mlp=gated, hidden_act="silu" if gated else "gelu", query_bias=shape.qkv_bias,
            value_bias=shape.qkv_bias, layer_norm_eps=shape.norm_eps, rope_theta=shape.rope.base,
            layerscale_value=shape.layer_scale, image_size=found.size, pos_embed_rescale=shape.rope.rescale,
        )  # fmt: skip
        model, theirs = transformers.DINOv3ViTModel(config), key_maps.to_transformers(state)
    key_maps.load(model, theirs)
    with _without_bars(transformers):
        model.save_pretrained(folder)
    size = {"height": found.size, "width": found.size}
    processor = {"image_processor_type": "DINOv3ViTImageProcessor", "size": size, "resample": 3, "do_resize": True}
    processor |= {"do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
    processor |= {"image_mean": list(found.mean), "image_std": list(found.std)}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n")
    single = folder / "model.safetensors"
    if single.is_file():  # not split into shards
        save_file(load_file(single), single, _header(found, heads=False))


def read_hf(path: Path, found: Resolved) -> See:
    """Through transformers: `AutoModel.from_pretrained`."""
    transformers = _library("transformers")
    with _without_bars(transformers):
        model = transformers.AutoModel.from_pretrained(path).eval()
    registers = found.backbone.registers

    def see(images: Tensor) -> Features:
        tokens = model(images).last_hidden_state  # (B, 1 + R + N, D)
        return Features(tokens[:, 0], tokens[:, 1 : 1 + registers], tokens[:, 1 + registers :], _grid(images, found))

    return see


# ---- timm ----


def write_timm(found: Resolved, folder: Path, heads: bool) -> None:
    """A folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` takes."""
    shape, state = found.architecture, found.backbone.state_dict()
    if isinstance(shape, ConvNeXtBackbone):
        name, arguments = "convnext_tiny", {"depths": list(shape.depths), "dims": list(shape.dims)}
        theirs, pool = convnext_key_maps.to_timm(state), "avg"
    else:
        name, arguments, bias = _timm_arguments(shape, state)
        theirs, pool = key_maps.to_timm(state, qkv_bias=bias), "token"
    size = [3, found.size, found.size]
    seen = {"input_size": size, "mean": list(found.mean), "std": list(found.std), "num_classes": 0}
    seen |= {"interpolation": "bicubic", "crop_pct": 1.0, "license": _short(found.licence), "fixed_input_size": False}
    config = {"architecture": name, "num_classes": 0, "num_features": shape.embed_dim, "global_pool": pool}
    config |= {"model_args": arguments, "pretrained_cfg": seen}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(_contiguous(theirs), folder / "model.safetensors", _header(found, heads=False))


def read_timm(path: Path, found: Resolved) -> See:
    """Through timm: `create_model("local-dir:...", pretrained=True)`."""
    return see_timm(_library("timm").create_model(f"local-dir:{path}", pretrained=True, num_classes=0), found)


def see_timm(model: nn.Module, found: Resolved) -> See:
    """What a model of timm sees, in our terms."""
    model.eval()
    registers, convnext = found.backbone.registers, isinstance(found.architecture, ConvNeXtBackbone)

    def see(images: Tensor) -> Features:
        tokens = model.forward_features(images)
        if convnext:  # a map (B, D, h, w) before the norm, which timm keeps in the head
            patches = model.head.norm(tokens).flatten(2).transpose(1, 2)
            cls = model.forward_head(tokens, pre_logits=True)
            return Features(cls, patches[:, :0], patches, _grid(images, found))
        return Features(tokens[:, 0], tokens[:, 1 : 1 + registers], tokens[:, 1 + registers :], _grid(images, found))

    return see


def _timm_arguments(shape: Backbone, state: dict[str, Tensor]) -> tuple[str, dict[str, object], bool]:
    """Name, arguments and whether the q and v biases are there: timm's models without them are the released ones."""
    if shape.norm_eps != 1e-5:
        raise ValueError(f"export: timm's DINOv3 models have norms with eps 1e-5, and these weights {shape.norm_eps:g}")
    bias = any(bool(tensor.any()) for key, tensor in state.items() if key.endswith("attn.qkv.bias"))
    gated = shape.ffn != "mlp"
    name = TIMM_NAMES.get(shape.name, "vit_small_plus_patch16_dinov3" if gated else "vit_small_patch16_dinov3")
    name = f"{name}_qkvb" if bias else name
    arguments: dict[str, object] = {
        "patch_size": shape.patch_size, "embed_dim": shape.embed_dim, "depth": shape.depth, "num_heads": shape.heads,
        "mlp_ratio": hidden_width(shape) / shape.embed_dim, "num_reg_tokens": shape.registers, "qkv_bias": bias,
        "rope_temperature": shape.rope.base, "dynamic_img_size": True,
    }  # fmt: skip
    if gated:
        arguments |= {"swiglu_mlp": True, "swiglu_align_to": SWIGLU_ALIGNMENT[shape.ffn]}
    return name, arguments, bias


# ---- the released files' form ----


def write_meta(found: Resolved, path: Path, heads: bool) -> None:
    """A `.pth` with the keys of the released files, and `<file>.json` with what those cannot hold."""
    shape, state = found.architecture, found.backbone.state_dict()
    if isinstance(shape, ConvNeXtBackbone):
        official = convnext_key_maps.to_official(state)
    else:
        official = key_maps.to_official(state, heads=shape.heads, base=shape.rope.base)
    torch.save(_contiguous(official), path)
    _describe(found, path)


def read_meta(path: Path, found: Resolved) -> See:
    """Through torch: the keys must be those of the released files, all and no more; then as `resolve` reads them."""
    state = torch.load(path, weights_only=True)
    wanted = official_keys(found.architecture)
    if set(state) != wanted:
        raise ValueError(f"export: {path.name} has other keys than released files: {sorted(set(state) ^ wanted)[:6]}")
    note = metadata.from_json(path.with_name(path.name + ".json").read_text(), str(path))
    return resolved(parts_of(state, str(path)), Stated(), note, origin=str(path)).backbone.features


def official_keys(shape: Backbone | ConvNeXtBackbone) -> set[str]:
    """The keys a released file of this architecture has (spec 8.2), written out one by one."""
    pair = ("weight", "bias")
    if isinstance(shape, ConvNeXtBackbone):
        last = len(shape.depths)
        keys = {f"{name}.{part}" for name in ("norm", "norms.3") for part in pair}
        keys |= {f"downsample_layers.{s}.{place}.{part}" for s in range(last) for place in (0, 1) for part in pair}
        for stage, depth in enumerate(shape.depths):
            for block in range(depth):
                names = ("dwconv", "norm", "pwconv1", "pwconv2")
                keys |= {f"stages.{stage}.{block}.{name}.{part}" for name in names for part in pair}
                keys.add(f"stages.{stage}.{block}.gamma")
        return keys
    keys = {"cls_token", "mask_token", "rope_embed.periods", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    keys |= {"storage_tokens"} if shape.registers else set()
    norms = ("norm", "local_cls_norm") if shape.untie_local_cls_norm else ("norm",)
    keys |= {f"{norm}.{part}" for norm in norms for part in pair}
    linears = ("fc1", "fc2") if shape.ffn == "mlp" else ("w1", "w2", "w3")
    names = ("norm1", "norm2", "attn.proj", *(f"mlp.{linear}" for linear in linears))
    bias = ("attn.qkv.bias", "attn.qkv.bias_mask") if shape.qkv_bias else ()
    for block in range(shape.depth):
        keys |= {f"blocks.{block}.{name}.{part}" for name in names for part in pair}
        keys |= {f"blocks.{block}.{name}" for name in ("attn.qkv.weight", "ls1.gamma", "ls2.gamma", *bias)}
    return keys


# ---- this package's own form ----


def write_safetensors(found: Resolved, path: Path, heads: bool) -> None:
    """One file in our own dialect that says in its header what it is; with the heads if asked."""
    state = dict(found.backbone.state_dict())
    if heads:
        if found.heads is None:
            raise ValueError(f"export: heads=true, and {found.origin} has no heads")
        state = {f"backbone.{key}": tensor for key, tensor in state.items()}
        for name, head in found.heads.items():
            state |= {f"{name}.{key}": tensor for key, tensor in head.state_dict().items()}
    save_file(_contiguous(state), path, _header(found, heads=heads))


def read_safetensors(path: Path, found: Resolved) -> See:
    """Through `resolve`."""
    return from_file(path).backbone.features


# ---- ONNX ----


def write_onnx(found: Resolved, path: Path, heads: bool) -> None:
    """One graph of images (B, 3, Y, X); B, Y and X are known only when it runs."""
    for name in ("onnx", "onnxscript"):
        _library(name)
    graph, side = graph_of(found.backbone), found.side_multiple
    images = torch.zeros(2, 3, 2 * side, 3 * side)
    sizes = {0: torch.export.Dim("batch")} | {
        axis: side * torch.export.Dim(name) for axis, name in ((2, "rows"), (3, "columns"))
    }
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter about itself
        program = torch.onnx.export(
            graph, (images,), dynamo=True, input_names=["images"], output_names=list(OUTPUTS),
            dynamic_shapes={"images": sizes}, verbose=False,
        )  # fmt: skip
    said = {"licence": found.licence, "origin": found.origin}
    program.model.metadata_props.update(said | _header(found, heads=False))
    size = sum(tensor.numel() * tensor.element_size() for tensor in found.backbone.state_dict().values())
    program.save(path, external_data=size > 1.5 * 2**30)  # one protocol buffer holds 2 GiB
    _describe(found, path)


def read_onnx(path: Path, found: Resolved) -> See:
    """Through onnxruntime, on the CPU."""
    session = _library("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def see(images: Tensor) -> Features:
        cls, registers, patches = map(torch.from_numpy, session.run(list(OUTPUTS), {"images": images.numpy()}))
        return Features(cls, registers, patches, _grid(images, found))

    return see


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"export: needs the library {name}: pip install 'dinov3-ext[export]'") from error


def _without_bars(transformers: ModuleType) -> ExitStack:
    """Its progress bars off inside a `with`."""
    stack, logging = ExitStack(), transformers.utils.logging
    if logging.is_progress_bar_enabled():
        logging.disable_progress_bar()
        stack.callback(logging.enable_progress_bar)
    return stack


def _header(found: Resolved, *, heads: bool) -> dict[str, str]:
    return {"format": "pt", metadata.KEY: metadata.to_json(metadata.about(found, heads=heads))}


def _describe(found: Resolved, path: Path) -> None:
    path.with_name(path.name + ".json").write_text(metadata.to_json(metadata.about(found, heads=False)) + "\n")


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.contiguous() for key, tensor in state.items()}


def _grid(images: Tensor, found: Resolved) -> tuple[int, int]:
    return images.shape[2] // found.backbone.patch_size, images.shape[3] // found.backbone.patch_size


def _short(licence: str) -> str:
    name, other = IDENTIFIERS.get(licence, ("", None))
    return other or name
