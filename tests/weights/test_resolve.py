"""resolve: files and folders in every dialect, every tensor accounted for, one clear line for what is wrong."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from small_backbones import HEAD, MEAN, STD, built, largest_difference

from dinov3_train.models import convnext_key_maps, key_maps
from dinov3_train.weights import architecture, licences, resolve
from dinov3_train.weights.export import export
from dinov3_train.weights.files import IMAGENET, SATELLITE


def refused(spec, *parts, step=None):
    with pytest.raises(ValueError) as caught:
        resolve(spec, step=step)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value), caught.value


# ---- what is there ----


def test_a_released_file_and_its_dead_biases_can_learn_again(small, official):
    found = resolve(official)
    expected = small().backbone
    for block in expected.blocks:
        block.attn.qkv.bias.zero_()
    assert largest_difference(found.backbone, expected) == 0.0
    assert found.architecture == small().architecture
    assert (found.mean, found.std, found.size, found.licence) == (*IMAGENET, 128, licences.DINOV3)
    assert found.heads is None
    model = found.backbone.requires_grad_(True).train()
    model.features(torch.randn(1, 3, 32, 32)).cls.pow(3).sum().backward()
    q, k, v = model.blocks[0].attn.qkv.bias.grad.chunk(3)
    assert (q.any(), k.any(), v.any()) == (True, False, True)


def test_satellite_weights_have_their_own_statistics(small, official):
    satellite = official.with_name("dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth")
    shutil.copy(official, satellite)
    found = resolve(satellite)
    assert (found.mean, found.std, found.licence) == (*SATELLITE, licences.DINOV3)


def test_a_training_checkpoint_of_the_release_has_its_heads(small, tmp_path):
    found = small(heads=True)
    state = key_maps.to_official(found.backbone.state_dict(), heads=2)
    teacher = {f"backbone.{key}": tensor for key, tensor in state.items()}
    for name, head in found.heads.items():
        for key, tensor in head.state_dict().items():
            teacher[f"{name}.{key.replace('prototypes.', 'last_layer.')}"] = tensor
    torch.save({"teacher": teacher}, tmp_path / "teacher_checkpoint.pth")
    loaded = resolve(tmp_path / "teacher_checkpoint.pth")
    assert largest_difference(loaded.backbone, found.backbone) == 0.0
    for name, head in found.heads.items():
        ours, theirs = head.state_dict(), loaded.heads[name].state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert loaded.heads[name].head == HEAD


@pytest.mark.parametrize("kind", ["vit", "swiglu", "convnext"])
def test_a_file_of_timm_keys(small, tmp_path, kind):
    found = small(kind)
    state = found.backbone.state_dict()
    theirs = convnext_key_maps.to_timm(state) if kind == "convnext" else key_maps.to_timm(state, qkv_bias=True)
    save_file(theirs, tmp_path / "timm.safetensors")
    loaded = resolve(tmp_path / "timm.safetensors")
    assert loaded.architecture == found.architecture
    assert largest_difference(loaded.backbone, found.backbone) == 0.0
    assert loaded.licence == licences.UNKNOWN


def test_timm_names_give_the_model_timm_gives(small, monkeypatch):
    timm = pytest.importorskip("timm")
    found, create = small(), timm.create_model

    def with_weights(name, pretrained, num_classes):
        assert num_classes == 0
        model = create("vit_small_patch16_dinov3_qkvb", embed_dim=128, depth=2, num_heads=2, patch_size=8)
        if pretrained:
            key_maps.load(model, key_maps.to_timm(found.backbone.state_dict(), qkv_bias=True))
        return model

    monkeypatch.setattr(timm, "create_model", with_weights)
    loaded = resolve("timm:vit_small_patch16_dinov3_qkvb")
    assert largest_difference(loaded.backbone, found.backbone) == 0.0
    assert (loaded.architecture, loaded.size, loaded.licence) == (found.architecture, 256, licences.DINOV3)


def test_a_model_of_timm_with_our_keys_and_other_positions_is_refused(small, monkeypatch):
    timm = pytest.importorskip("timm")
    create = timm.create_model

    def of_another_kind(name, pretrained, num_classes):
        settings = {"embed_dim": 128, "depth": 2, "num_heads": 2, "patch_size": 8}
        model = create("vit_small_patch16_dinov3_qkvb", rope_temperature=10.0, **settings)
        if pretrained:
            key_maps.load(model, key_maps.to_timm(small().backbone.state_dict(), qkv_bias=True))
        return model

    monkeypatch.setattr(timm, "create_model", of_another_kind)
    refused("timm:vit_small_patch16_dinov3_qkvb", "not a DINOv3 model", "differ from timm's")


def test_transformers_folder_states_statistics_size_and_licence(small, tmp_path):
    transformers = pytest.importorskip("transformers")
    found = small()
    config = transformers.DINOv3ViTConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2, patch_size=8,
        num_register_tokens=4,
    )  # fmt: skip
    model = transformers.DINOv3ViTModel(config)
    key_maps.load(model, key_maps.to_transformers(found.backbone.state_dict()))
    model.save_pretrained(tmp_path / "model")
    seen = {"image_mean": MEAN, "image_std": STD, "size": {"height": 224, "width": 224}}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(seen))
    (tmp_path / "model" / "README.md").write_text("---\nlicense: other\nlicense_name: dinov3-license\n---\n# A model\n")
    for spec in (tmp_path / "model", tmp_path / "model" / "model.safetensors"):
        loaded = resolve(spec)
        assert largest_difference(loaded.backbone, found.backbone) == 0.0
        assert loaded.architecture == found.architecture
        assert (loaded.mean, loaded.std, loaded.size, loaded.licence) == (MEAN, STD, 224, licences.DINOV3)


def test_names_of_the_hub(small, tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    export(small(), "hf", tmp_path / "model")
    (tmp_path / "model" / "README.md").unlink()

    def download(repository, allow_patterns):
        assert (repository, "config.json" in allow_patterns) == ("me/model", True)
        return str(tmp_path / "model")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = resolve("hf:me/model")
    assert largest_difference(loaded.backbone, small().backbone) == 0.0
    assert loaded.origin.startswith("hf:me/model")


def test_an_unrelated_config_beside_a_file_is_not_asked(small, tmp_path):
    save_file(small().backbone.state_dict(), tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert resolve(tmp_path / "x.safetensors").architecture == small().architecture


def test_half_precision_is_read_as_fp32(small, tmp_path):
    state = {key: tensor.bfloat16() for key, tensor in small().backbone.state_dict().items()}
    save_file(state, tmp_path / "half.safetensors")
    assert {p.dtype for p in resolve(tmp_path / "half.safetensors").backbone.parameters()} == {torch.float32}


def test_without_registers_and_with_another_norm_of_local_crops(small, tmp_path):
    for changes in ({"registers": 0}, {"untie_local_cls_norm": True}):
        found = small(**changes)
        torch.save(key_maps.to_official(found.backbone.state_dict(), heads=2), tmp_path / "x.pth")
        loaded = resolve(tmp_path / "x.pth")
        assert loaded.architecture == found.architecture
        assert largest_difference(loaded.backbone, found.backbone) == 0.0


@pytest.mark.parametrize("name", ["vit_small", "vit_small_plus", "vit_base", "vit_large", "vit_huge_plus", "vit_7b"])
def test_published_sizes_are_recognised(name):
    from dinov3_train.models.vit import BACKBONES, VisionTransformer

    with torch.device("meta"):
        state = VisionTransformer(BACKBONES[name]).state_dict()
    assert architecture.recognised(state) == BACKBONES[name]


def test_drawing_first_values_does_not_touch_the_random_state(official):
    before = torch.get_rng_state()
    resolve(official)
    assert torch.equal(torch.get_rng_state(), before)


# ---- what is wrong ----


def test_missing_unexpected_and_reshaped_keys_are_one_error(small, official):
    state = torch.load(official)
    del state["blocks.1.norm2.bias"]
    state["head.weight"], state["mask_token"] = torch.zeros(1), torch.zeros(1, 4)
    torch.save(state, official)
    refused(
        official, official.name, "missing blocks.1.norm2.bias", "unexpected head.weight",
        "mask_token (1, 4) instead of (1, 128)",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"fc.weight": torch.zeros(2, 2)}, ("not a DINOv3 vision transformer", "cls_token", "fc.weight")),
        ({"a": 3}, ("expected a state dict of tensors", "a are none")),
        ([torch.zeros(1)], ("expected a state dict of tensors", "list")),
        ({}, ("expected a state dict",)),
    ],
)
def test_files_that_hold_something_else(tmp_path, content, parts):
    torch.save(content, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", "x.pth", *parts)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files(small, tmp_path, suffix, share):
    path = tmp_path / f"x{suffix}"
    export(small(), "meta" if suffix == ".pth" else "safetensors", path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused(path, str(path), "cannot be read", "cut short")


def test_names_that_are_not_there(tmp_path, monkeypatch):
    huggingface_hub, timm = pytest.importorskip("huggingface_hub"), pytest.importorskip("timm")
    refused(tmp_path / "no.pth", "no.pth does not exist")
    refused("nowhere", "run folder", "hf:OWNER/NAME", "'nowhere', which does not exist")
    refused(tmp_path, "which is none of these")
    (tmp_path / "x.txt").write_text("")
    refused(tmp_path / "x.txt", ".safetensors, .pth", "x.txt")
    refused("timm:vit_smal_patch16_dinov3", "no model of this name", "vit_small_patch16_dinov3")
    refused("timm:resnet18", "ResNet", "rotary")
    refused("hf:a/b/c", "expected hf:OWNER/NAME")
    refused(tmp_path, "a run folder to take a checkpoint of", step=3)

    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("Connection error\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused("hf:facebook/dinov3-vits16-pretrain-lvd1689m", "cannot be reached", "local cache")
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, pretrained, **k: offline() if pretrained else create(*a, **k))
    refused("timm:vit_small_patch16_dinov3", "cannot give these weights", "Connection error")
    for module, spec in (("huggingface_hub", "hf:a/b"), ("timm", "timm:vit_small_patch16_dinov3")):
        monkeypatch.setitem(sys.modules, module, None)
        refused(spec, f"needs the library {module}", "pip install 'dinov3-ext[export]'")


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"model_type": "vit"}, ("model_type", "dinov3_vit", "'vit'")),
        ({"what": 1}, ("neither of transformers", "nor of timm")),
        (
            {"architecture": "vit_small_patch16_rope_reg1_gap"},
            ("vit_small_patch16_rope_reg1_gap is not a DINOv3 model",),
        ),
        ({"model_type": "dinov3_vit", "key_bias": True}, ("key_bias=True (False expected)",)),
        ({"model_type": "dinov3_vit"}, ("model.safetensors", "not there")),
    ],
)
def test_folders_with_another_config(tmp_path, config, parts):
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, *parts)


def test_a_config_that_does_not_fit_its_weights(small, tmp_path):
    pytest.importorskip("transformers")
    export(small(), "hf", tmp_path / "model")
    state = key_maps.to_transformers(small(patch_size=16).backbone.state_dict())
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "model" / "model.safetensors")
    refused(tmp_path / "model", "patch_embed.proj.weight (128, 3, 16, 16) instead of (128, 3, 8, 8)")


# ---- recipe and weights ----


def test_differences_name_the_keys_and_training_settings_are_kept():
    recipe = replace(architecture.BACKBONES["vit_small"], drop_path=0.3, rope=replace(built_rope(), rescale=None))
    weights = replace(architecture.BACKBONES["vit_base"], patch_size=8, rope=replace(built_rope(), base=50.0))
    assert architecture.differences(recipe, weights) == {
        "backbone.embed_dim": (384, 768),
        "backbone.heads": (6, 12),
        "backbone.patch_size": (16, 8),
        "backbone.rope.base": (100.0, 50.0),
    }
    taken = architecture.adopted(recipe, weights)
    assert architecture.differences(taken, weights) == {}
    assert (taken.drop_path, taken.rope.rescale, taken.name) == (0.3, None, "vit_base")


def built_rope():
    return architecture.BACKBONES["vit_small"].rope


def test_two_ratios_of_one_hidden_width_are_no_difference(small):
    found = small("swiglu")
    assert built(found.architecture).blocks[0].mlp.w1.out_features == 512
    assert architecture.recognised(found.backbone.state_dict()).ffn_ratio == 6.0
