"""Key maps and numeric parity with the models of transformers and timm at random weights."""

from dataclasses import replace

import pytest
import torch

from dinov3_train.models import key_maps
from dinov3_train.models.vit import BACKBONES, VisionTransformer

# fp32 against fp32 on features of unit size after 3 blocks: some hundred roundings of values up to 4 (spacing 2^-22)
PARITY = 200 * 2.0**-22


def model(name, **changes):
    torch.manual_seed(0)
    built = VisionTransformer(replace(BACKBONES[name], depth=3, **changes)).eval()
    with torch.no_grad():
        for key, parameter in built.named_parameters():
            parameter.copy_(0.05 * torch.randn_like(parameter) + (1.0 if "norm" in key and "weight" in key else 0.0))
            if key.endswith("qkv.bias"):
                parameter.chunk(3)[1].zero_()
    return built


def tokens(built, images):
    features = built.features(images)
    return torch.cat((features.cls[:, None], features.registers, features.patches), dim=1)


def same(found, expected, *, but=()):
    assert set(found) == set(expected)
    assert [key for key in expected if key not in but and not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize(("name", "bias"), [("vit_small", True), ("vit_small_plus", True), ("vit_small", False)])
@torch.no_grad()
def test_transformers_both_ways(name, bias):
    transformers = pytest.importorskip("transformers")
    gated = name.endswith("plus")
    config = transformers.DINOv3ViTConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=6, num_register_tokens=4,
        use_gated_mlp=gated, hidden_act="silu" if gated else "gelu", query_bias=bias, value_bias=bias,
    )  # fmt: skip
    built, theirs = model(name, qkv_bias=bias), transformers.DINOv3ViTModel(config).eval()
    key_maps.load(theirs, key_maps.to_transformers(built.state_dict()))
    images = torch.randn(2, 3, 48, 80)
    expected = theirs(images)
    torch.testing.assert_close(tokens(built, images), expected.last_hidden_state, rtol=0, atol=PARITY)
    torch.testing.assert_close(built(images), expected.pooler_output, rtol=0, atol=PARITY)
    same(key_maps.from_transformers(theirs.state_dict()), built.state_dict())


@pytest.mark.parametrize("suffix", ["", "_qkvb"])
@pytest.mark.parametrize("name", ["vit_small", "vit_small_plus"])
@torch.no_grad()
def test_timm_both_ways(name, suffix):
    timm = pytest.importorskip("timm")
    bias = bool(suffix)
    theirs = timm.create_model(f"{name}_patch16_dinov3{suffix}", pretrained=False, depth=3).eval()
    built, images = model(name, qkv_bias=bias), torch.randn(2, 3, 48, 80)
    key_maps.load(theirs, key_maps.to_timm(built.state_dict(), qkv_bias=bias))
    torch.testing.assert_close(tokens(built, images), theirs.forward_features(images), rtol=0, atol=PARITY)
    back = key_maps.from_timm(theirs.state_dict(), qkv_bias=bias)
    same(back, built.state_dict(), but=("mask_token",))
    assert not back["mask_token"].any()


def test_timm_without_bias_into_a_model_with_bias_and_not_the_other_way():
    built = model("vit_small", qkv_bias=False)
    with_bias = key_maps.from_timm(key_maps.to_timm(built.state_dict(), qkv_bias=False), qkv_bias=True)
    key_maps.load(model("vit_small"), with_bias)
    assert not with_bias["blocks.2.attn.qkv.bias"].any()
    biased = model("vit_small").state_dict()
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv.bias is not zero"):
        key_maps.to_timm(biased, qkv_bias=False)
    with pytest.raises(ValueError, match=r"expected a model without qkv bias"):
        key_maps.from_timm(key_maps.to_timm(biased, qkv_bias=True), qkv_bias=False)
    biased["blocks.1.attn.qkv.bias"][400] = 1.0
    for convert in (key_maps.to_transformers, lambda state: key_maps.to_timm(state, qkv_bias=True)):
        with pytest.raises(ValueError, match=r"the K third of blocks.1.attn.qkv.bias is not zero"):
            convert(biased)


def test_official_both_ways_and_the_bias_mask_is_repaired():
    built = model("vit_small", untie_local_cls_norm=True)
    official = key_maps.to_official(built.state_dict(), heads=6)
    assert official["rope_embed.periods"].shape == (16,)
    assert official["blocks.0.attn.qkv.bias_mask"].view(3, 384)[:, 0].tolist() == [1.0, 0.0, 1.0]
    same(key_maps.from_official(official), built.state_dict())
    released = {key: torch.zeros_like(v) if "qkv.bias" in key else v for key, v in official.items()}
    key_maps.load(built, key_maps.from_official(released))
    built.train().features(torch.randn(1, 3, 32, 32)).cls.pow(3).sum().backward()
    q, k, v = built.blocks[0].attn.qkv.bias.grad.chunk(3)
    assert q.any()
    assert not k.any()
    assert v.any()
    unset = {key: torch.full_like(v, torch.nan) if "bias_mask" in key else v for key, v in official.items()}
    assert torch.equal(key_maps.from_official(unset)["blocks.1.attn.qkv.bias"], official["blocks.1.attn.qkv.bias"])


def test_loud_on_missing_unexpected_and_reshaped_keys():
    built = model("vit_small")
    state = dict(built.state_dict())
    del state["norm.bias"]
    state["cls_token"], state["blocks.0.extra"] = torch.zeros(1, 1, 8), torch.zeros(1)
    with pytest.raises(
        ValueError, match=r"missing norm.bias, unexpected blocks.0.extra, cls_token \(1, 1, 8\) instead"
    ):
        key_maps.load(built, state)
    for convert in (key_maps.from_official, key_maps.from_transformers, key_maps.to_transformers):
        with pytest.raises(ValueError, match=r"no rule for these keys: head.weight"):
            convert({"head.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"no rule for these keys: head.weight"):
        key_maps.from_timm({"cls_token": torch.zeros(1, 1, 4), "head.weight": torch.zeros(1)}, qkv_bias=True)
