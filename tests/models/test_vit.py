"""The vision transformer: sizes, token handling, packing, gradients, precision."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dinov3_train.config import Rope
from dinov3_train.models import vit
from dinov3_train.models.draws import training_draws
from dinov3_train.models.layers import hidden_width
from dinov3_train.models.vit import BACKBONES, VisionTransformer

SMALL = replace(BACKBONES["vit_tiny"], embed_dim=64, heads=2, depth=3, patch_size=8, layer_scale=0.5)
# reordered fp32 sums: a few dozen roundings of values of about 4, whose spacing is 2^-22
REORDERED = 64 * 2.0**-22
PARAMETERS = {
    "vit_small": 21_601_152,
    "vit_small_plus": 28_697_472,
    "vit_base": 85_669_632,
    "vit_large": 303_154_176,
    "vit_large_plus": 403_915_776,
    "vit_huge_plus": 840_633_600,
    "vit_7b": 6_716_035_072,
}


def model(seed=0, **changes):
    """A small model whose every parameter matters: gains, biases and tokens are random too."""
    torch.manual_seed(seed)
    built = VisionTransformer(replace(SMALL, **changes))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return built


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flat(features):
    return torch.cat((features.cls[:, None], features.registers, features.patches), dim=1)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_to_the_unit(name):
    with torch.device("meta"):
        count = sum(p.numel() for p in getattr(vit, name)().parameters())
        untied = VisionTransformer(replace(BACKBONES[name], untie_local_cls_norm=True))
    assert count == PARAMETERS[name]
    assert sum(p.numel() for p in untied.parameters()) - count == 2 * untied.embed_dim


def test_swiglu_widths():
    plus = replace(SMALL, ffn="swiglu", ffn_ratio=6.0)
    assert hidden_width(replace(plus, embed_dim=384)) == 1536
    assert hidden_width(replace(plus, embed_dim=1280)) == 5120
    assert hidden_width(BACKBONES["vit_7b"]) == 8192
    with pytest.raises(ValueError, match=r"ffn expects one of mlp, swiglu"):
        hidden_width(replace(plus, ffn="relu"))


def test_state_dict_names():
    keys = set(model(untie_local_cls_norm=True).state_dict())
    assert {key for key in keys if not key.startswith("blocks.")} == {
        "cls_token", "storage_tokens", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias",
        "norm.weight", "norm.bias", "local_cls_norm.weight", "local_cls_norm.bias",
    }  # fmt: skip
    assert {key.removeprefix("blocks.0.") for key in keys if key.startswith("blocks.0.")} == {
        "norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias",
        "ls1.gamma", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight",
        "mlp.fc2.bias", "ls2.gamma",
    }  # fmt: skip


def test_initial_values():
    torch.manual_seed(0)
    built = VisionTransformer(replace(SMALL, embed_dim=256, heads=4))
    assert not built.mask_token.any()
    assert not built.blocks[0].attn.qkv.bias.any()
    assert built.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert built.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert built.patch_embed.proj.weight.abs().max() <= (3 * 8**2) ** -0.5
    assert (built.blocks[1].ls2.gamma == 0.5).all()


@pytest.mark.parametrize("shape", [(16, 16), (24, 40), (8, 32)])
def test_shapes_of_rectangles(shape):
    features = model().features(images(2, 3, *shape))
    h, w = shape[0] // 8, shape[1] // 8
    assert features.grid == (h, w)
    assert features.cls.shape == (2, 64)
    assert features.registers.shape == (2, 4, 64)
    assert features.patches.shape == (2, h * w, 64)


def test_sides_that_do_not_fit_name_the_nearest():
    with pytest.raises(ValueError, match=r"got 20x5; nearest: height 16 or 24, width 8$"):
        model().features(images(1, 3, 20, 5))
    with pytest.raises(ValueError, match=r"expect float \(S, 3, Y, X\), got torch.uint8"):
        model().features(images(1, 3, 16, 16).to(torch.uint8))


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_packed_equals_one_by_one(ffn):
    """Crop groups share nothing but the weights. Other matrix sizes may sum in another order: a few roundings."""
    built = model(ffn=ffn).eval()
    crops = [images(4, 3, 32, 24), images(6, 3, 16, 16, seed=2)]
    mask = torch.rand(4, 12, generator=torch.Generator().manual_seed(3)) < 0.3
    packed = built.forward_packed(crops, masks=[mask, None], local=[False, True])
    alone = [built.forward_packed([crops[0]], masks=[mask])[0], built.features(crops[1])]
    for ours, expected in zip(packed, alone):
        torch.testing.assert_close(flat(ours), flat(expected), rtol=0, atol=REORDERED)
    single = built.features(crops[1][2:3])
    torch.testing.assert_close(flat(single), flat(packed[1])[2:3], rtol=0, atol=REORDERED)


def test_mask_token_stands_for_masked_patches_only():
    built = model().eval()
    crop, mask = images(2, 3, 16, 16), torch.tensor([[True, False, False, True], [False] * 4])
    expected = flat(built.forward_packed([crop], masks=[mask])[0])
    changed = crop.clone()
    changed[0, :, :8, :8], changed[0, :, 8:, 8:] = 7.0, -7.0  # behind the mask
    assert torch.equal(flat(built.forward_packed([changed], masks=[mask])[0]), expected)
    torch.testing.assert_close(flat(built.features(crop))[1], expected[1], rtol=0, atol=REORDERED)
    assert not torch.allclose(flat(built.features(crop))[0], expected[0], atol=1e-3)
    with pytest.raises(ValueError, match=r"mask expects bool \(2, 4\)"):
        built.forward_packed([crop], masks=[mask[:1]])


def test_intermediate_layers():
    built, crop = model().eval(), images(2, 3, 16, 24)
    (last,) = built.intermediate_layers(crop, 1)
    assert torch.equal(flat(last), flat(built.features(crop)))
    chosen = built.intermediate_layers(crop, [2, 0], norm=False)
    assert torch.equal(built.norm(flat(chosen[0])), flat(last))
    assert torch.equal(flat(built.intermediate_layers(crop, 3)[0]), built.norm(flat(chosen[1])))
    assert torch.equal(built(crop), last.cls)
    with pytest.raises(ValueError, match=r"layers expects 1 to 3 blocks"):
        built.intermediate_layers(crop, [3])


def test_local_norm_is_keyed_on_the_flag_and_on_training():
    built = model(untie_local_cls_norm=True)
    local, wide = images(2, 3, 16, 16), images(2, 3, 32, 32)
    for crops, flags in (([wide, local], [False, True]), ([local, wide], [True, False])):
        found = dict(zip(flags, built.train().forward_packed(crops, local=flags)))
        plain = dict(zip(flags, built.eval().forward_packed(crops, local=flags)))
        assert not torch.allclose(found[True].cls, plain[True].cls, atol=1e-3)
        assert not torch.allclose(found[True].registers, plain[True].registers, atol=1e-3)
        assert torch.equal(found[True].patches, plain[True].patches)
        assert torch.equal(found[False].cls, plain[False].cls)


def test_k_bias():
    """Masked: multiplied by zero. Unmasked: invisible to softmax, unless rotary positions turn it with the patches."""
    masked, plain = model().eval(), model(mask_k_bias=False).eval()
    assert masked.state_dict().keys() == plain.state_dict().keys()
    one_patch, crop = images(2, 3, 8, 8), images(2, 3, 16, 16)  # a single patch lies at coordinate 0: not rotated
    torch.testing.assert_close(
        flat(plain.features(one_patch)), flat(masked.features(one_patch)), rtol=0, atol=REORDERED
    )
    expected = flat(masked.features(crop))
    assert not torch.allclose(flat(plain.features(crop)), expected, atol=1e-3)
    with torch.no_grad():
        for block in masked.blocks:
            block.attn.qkv.bias[64:128] += 3.0
    assert torch.equal(flat(masked.features(crop)), expected)


@pytest.mark.parametrize("draw", ["sequence", "block"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_every_parameter_has_a_gradient(draw, checkpointing):
    built = model(untie_local_cls_norm=True, drop_path=0.4, rope=Rope(shift=0.1, jitter=1.2, draw=draw)).train()
    draws = training_draws(
        built.backbone, seed=0, step=1, indices=np.arange(2), first=0, crops_per_image=(2, 3), batch_size=2
    )
    crops = [images(4, 3, 24, 24), images(6, 3, 16, 16)]

    def gradients(mode):
        built.zero_grad(set_to_none=True)
        out = built.forward_packed(crops, draws=draws, local=[False, True], checkpointing=mode)
        sum(flat(features).pow(3).mean() for features in out).backward()
        return {name: parameter.grad for name, parameter in built.named_parameters()}

    found, expected = gradients(checkpointing), gradients("none")
    assert [name for name, gradient in found.items() if gradient is None] == []
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not found["mask_token"].any()
    assert all(gradient.any() for name, gradient in found.items() if name != "mask_token")


def test_all_sequences_dropped_still_reaches_every_parameter():
    built = model(depth=1, drop_path=0.9).train()
    draws = training_draws(
        built.backbone, seed=0, step=0, indices=np.arange(1), first=0, crops_per_image=(1,), batch_size=1
    )
    draws = replace(draws, kept=np.zeros_like(draws.kept))
    out = flat(built.forward_packed([images(1, 3, 16, 16)], draws=draws)[0])
    out.pow(3).mean().backward()
    assert all(parameter.grad is not None for parameter in built.parameters())
    assert not built.blocks[0].attn.qkv.weight.grad.any()
    assert not built.blocks[0].mlp.fc1.weight.grad.any()


def test_without_mask_or_local_crops_every_parameter_still_has_a_gradient():
    built = model(untie_local_cls_norm=True).train()
    flat(built.forward_packed([images(2, 3, 16, 16)])[0]).pow(3).mean().backward()
    assert all(parameter.grad is not None for parameter in built.parameters())


def test_unknown_checkpointing_and_foreign_draws_are_refused():
    built, crop = model(drop_path=0.5).train(), images(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"checkpointing: expected one of none, selective, full"):
        built.forward_packed([crop], checkpointing="some")
    arguments = {"seed": 0, "step": 0, "indices": np.arange(3), "first": 0, "batch_size": 3}
    with pytest.raises(ValueError, match=r"draws are for 2 crop groups, got 1"):
        built.forward_packed([crop], draws=training_draws(built.backbone, crops_per_image=(1, 1), **arguments))
    with pytest.raises(ValueError, match=r"rope expects 2 rows for a crop group, got 3"):
        built.forward_packed([crop], draws=training_draws(built.backbone, crops_per_image=(1,), **arguments))


def test_bf16_autocast_stays_close():
    """Each of 3 blocks rounds to bf16 (spacing 2^-8) some ten times; features are of size 1."""
    built, crop = model().eval(), images(4, 3, 32, 32)
    with torch.no_grad():
        expected = flat(built.features(crop))
        with torch.autocast("cpu", torch.bfloat16):
            found = flat(built.features(crop))
    assert found.dtype == torch.float32
    assert (found - expected).abs().mean() < 2.0**-7
    assert (found - expected).abs().max() < 2.0**-3


def test_weights_in_another_type_and_no_registers():
    built = model(registers=0)
    found = built.features(images(2, 3, 16, 16))
    assert found.registers.shape == (2, 0, 64)
    assert built.bfloat16().features(images(2, 3, 16, 16).bfloat16()).cls.dtype == torch.bfloat16
    doubled = model(registers=0).double().features(images(2, 3, 16, 16).double())
    assert (doubled.cls - found.cls).abs().max() < REORDERED


def test_inference_mode_leaves_no_tensor_behind_that_training_trips_over():
    built, crop = model(), images(2, 3, 16, 56)
    with torch.inference_mode():
        built.features(crop)
    flat(built.features(crop)).sum().backward()


def test_compiled_blocks_equal_eager():
    pytest.importorskip("torch._inductor")
    built, crop = model(depth=1), images(2, 3, 16, 16)
    expected = flat(built.features(crop))
    for block in built.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    found = flat(built.features(crop))
    torch.testing.assert_close(found, expected, rtol=0, atol=REORDERED)
    found.pow(3).mean().backward()
    assert built.blocks[0].attn.qkv.weight.grad.any()
