"""ConvNeXt: sizes, parity with transformers and timm at random weights, key maps, draws, features on a finer grid."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dinov3_train.config import ConvNeXtBackbone, Head
from dinov3_train.models import convnext, convnext_key_maps, flops, key_maps
from dinov3_train.models.architectures import architecture, backbone_of
from dinov3_train.models.convnext import CONVNEXTS, ConvNeXt
from dinov3_train.models.draws import TrainingDraws, training_draws
from dinov3_train.models.heads import ProjectionHead
from dinov3_train.train.networks import Networks
from dinov3_train.train.optimizer import adamw, group_rule

# to the unit as transformers and timm count them; 29, 50, 89 and 198 million with the classifier of ImageNet
PARAMETERS = {
    "convnext_tiny": 27_820_128,
    "convnext_small": 49_454_688,
    "convnext_base": 87_566_464,
    "convnext_large": 196_230_336,
}
SMALL = ConvNeXtBackbone(name="test", depths=(2, 1, 3, 2), dims=(8, 16, 24, 32), layer_scale=0.5)
# fp32 against fp32 on features of unit size after 8 blocks: some hundred roundings of values up to 4 (spacing 2^-22)
PARITY = 200 * 2.0**-22


def model(**changes):
    """A small model whose every parameter matters."""
    torch.manual_seed(0)
    built = ConvNeXt(replace(SMALL, **changes)).eval()
    with torch.no_grad():
        for key, parameter in built.named_parameters():
            parameter.add_((0.2 if parameter.ndim > 1 else 0.05) * torch.randn_like(parameter))
            assert key
    return built


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(features):
    return torch.cat((features.cls[:, None], features.patches), dim=1)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_to_the_unit(name):
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    with torch.device("meta"):
        built = getattr(convnext, name)()
        theirs = timm.create_model(f"{name}.dinov3_lvd1689m", pretrained=False)
        sizes = CONVNEXTS[name]
        config = transformers.DINOv3ConvNextConfig(depths=list(sizes.depths), hidden_sizes=list(sizes.dims))
        other = transformers.DINOv3ConvNextModel(config)
    counts = [sum(p.numel() for p in each.parameters()) for each in (built, theirs, other)]
    assert counts == [PARAMETERS[name]] * 3
    assert flops.backbone_parameters(CONVNEXTS[name]) == PARAMETERS[name]
    assert (built.patch_size, built.stride, built.embed_dim) == (32, 32, sizes.dims[-1])


@pytest.mark.parametrize("prefix", ["model.", ""])
@torch.no_grad()
def test_transformers_both_ways(prefix):
    transformers = pytest.importorskip("transformers")
    config = transformers.DINOv3ConvNextConfig(depths=list(SMALL.depths), hidden_sizes=list(SMALL.dims))
    built, theirs = model(), transformers.DINOv3ConvNextModel(config).eval()
    key_maps.load(theirs, convnext_key_maps.to_transformers(built.state_dict()))
    pixels = images(2, 3, 64, 96)
    expected = theirs(pixels)
    torch.testing.assert_close(tokens(built.features(pixels)), expected.last_hidden_state, rtol=0, atol=PARITY)
    torch.testing.assert_close(built(pixels), expected.pooler_output, rtol=0, atol=PARITY)
    state = {key.replace("model.", prefix): value for key, value in theirs.state_dict().items()}
    key_maps.load(model(layer_scale=0.1), convnext_key_maps.from_transformers(state))
    same(convnext_key_maps.from_transformers(state), built.state_dict())


@torch.no_grad()
def test_timm_both_ways():
    timm = pytest.importorskip("timm")
    built = model()
    theirs = timm.create_model(
        "convnext_tiny.dinov3_lvd1689m", pretrained=False, depths=SMALL.depths, dims=SMALL.dims
    ).eval()
    key_maps.load(theirs, convnext_key_maps.to_timm(built.state_dict()))
    pixels = images(2, 3, 64, 96)
    last, features = theirs.forward_features(pixels), built.features(pixels)
    torch.testing.assert_close(features.cls, theirs(pixels), rtol=0, atol=PARITY)
    patches = theirs.head.norm(last).flatten(2).transpose(1, 2)
    torch.testing.assert_close(features.patches, patches, rtol=0, atol=PARITY)
    same(convnext_key_maps.from_timm(theirs.state_dict()), built.state_dict())


def same(found, expected):
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_official_both_ways_and_the_second_name_of_the_norm():
    built = model()
    official = convnext_key_maps.to_official(built.state_dict())
    assert set(official) - set(built.state_dict()) == {"norms.3.weight", "norms.3.bias"}
    assert {"downsample_layers.0.0.weight", "stages.2.1.dwconv.bias", "stages.0.0.gamma"} < set(official)
    same(convnext_key_maps.from_official(official), built.state_dict())
    with pytest.raises(ValueError, match=r"norms.3.bias differs from norm.bias"):
        convnext_key_maps.from_official(official | {"norms.3.bias": official["norm.bias"] + 1})


def test_loud_on_keys_without_a_rule():
    maps = convnext_key_maps
    for convert in (maps.from_official, maps.from_transformers, maps.from_timm, maps.to_transformers, maps.to_timm):
        with pytest.raises(ValueError, match=r"no rule for these keys: classifier.weight"):
            convert({"classifier.weight": torch.zeros(1)})


def test_a_finer_patch_resizes_the_map_before_the_norm():
    coarse, fine = model(), model(patch_size=16)
    pixels = images(2, 3, 64, 96)
    found, plain = fine.features(pixels), coarse.features(pixels)
    assert (plain.grid, found.grid) == ((2, 3), (4, 6))
    assert (plain.patches.shape, found.patches.shape) == ((2, 6, 32), (2, 24, 32))
    assert found.registers.shape == (2, 0, 32)
    assert torch.equal(found.cls, plain.cls)
    last = coarse.intermediate_layers(pixels, 1, norm=False)[0].patches.transpose(1, 2).unflatten(2, (2, 3))
    wanted = F.interpolate(last, size=(4, 6), mode="bilinear", antialias=True)
    expected = fine.norm(wanted.flatten(2).transpose(1, 2))
    torch.testing.assert_close(found.patches, expected, rtol=0, atol=PARITY)


def test_cls_is_the_normed_mean_of_the_map():
    built, pixels = model(), images(2, 3, 64, 64)
    last = built.intermediate_layers(pixels, 1, norm=False)[0].patches  # (2, 4, 32)
    torch.testing.assert_close(built(pixels), built.norm(last.mean(dim=1)), rtol=0, atol=PARITY)


def test_intermediate_stages_come_on_the_grid_of_the_patch():
    found = model(patch_size=16).intermediate_layers(images(1, 3, 64, 32), [0, 3])
    assert [tuple(each.patches.shape) for each in found] == [(1, 8, 8), (1, 8, 32)]
    with pytest.raises(ValueError, match=r"layers expects 1 to 4 stages from 0, got \[4\]"):
        model().intermediate_layers(images(1, 3, 64, 32), [4])


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match=r"image sides expect multiples of 32 pixels, got 48x64"):
        model(patch_size=16).features(images(1, 3, 48, 64))
    with pytest.raises(ValueError, match=r"a ConvNeXt has no mask token"):
        model().forward_packed([images(1, 3, 32, 32)], masks=[torch.ones(1, 1, dtype=torch.bool)])
    with pytest.raises(ValueError, match=r"one number per stage"):
        ConvNeXt(replace(SMALL, dims=(8, 16)))
    with pytest.raises(ValueError, match=r"no backbone named 'convnext_tiney'; nearest: convnext_tiny"):
        architecture("convnext_tiney")


def test_groups_share_nothing_but_the_weights():
    built = model()
    crops = [images(4, 3, 64, 32), images(6, 3, 32, 32, seed=2)]
    for together, alone in zip(built.forward_packed(crops, masks=[None, None], local=[False, True]), crops):
        torch.testing.assert_close(tokens(together), tokens(built.features(alone)), rtol=0, atol=PARITY)


def test_drop_path_runs_the_kept_images_only_and_makes_up_for_it():
    backbone = replace(SMALL, drop_path=0.5)
    built, pixels = model(drop_path=0.5), images(4, 3, 32, 32)
    draws = training_draws(
        backbone, seed=0, step=3, indices=np.arange(12, 16), first=0, crops_per_image=(1, 0), batch_size=4
    )
    assert draws.rope is None
    assert draws.kept.shape == (8, 2, 4)
    assert 0 < draws.kept[:, 0].mean() < 1
    found = built.forward_packed([pixels], draws=draws)[0]
    block, x = built.stages[0][0], built.downsample_layers[0](pixels)
    kept = torch.from_numpy(draws.kept[0, 0])
    expected = torch.where(kept[:, None, None, None], x + 2.0 * (block(x, None) - x), x)
    rows = built._kept([pixels], draws)[0][0]
    torch.testing.assert_close(block(x, rows), expected, rtol=0, atol=PARITY)
    all_kept = TrainingDraws(rope=None, per_block=False, kept=np.ones((8, 2, 4), dtype=bool), keep_share=1.0)
    whole = built.forward_packed([pixels], draws=all_kept)[0]
    torch.testing.assert_close(whole.cls, built(pixels), rtol=0, atol=PARITY)
    assert not torch.equal(found.cls, whole.cls)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_changes_no_gradient(mode):
    gradients = []
    for each in ("none", mode):
        built = model().train()
        features = built.forward_packed([images(2, 3, 32, 32)], checkpointing=each)[0]
        (features.cls.pow(2).sum() + features.patches.pow(3).sum()).backward()
        gradients.append([parameter.grad for parameter in built.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients))


def test_flops_equal_the_counted_ones():
    built = model()
    crops, groups = [images(2, 3, 64, 32), images(3, 3, 32, 32)], [(2, 64, 32), (3, 32, 32)]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        built.forward_packed(crops)
    assert counter.get_total_flops() == flops.backbone_flops(SMALL, groups)
    with FlopCounterMode(display=False) as counter:
        sum(out.patches.sum() + out.cls.sum() for out in built.forward_packed(crops)).backward()
    # torch counts the weight gradient of a depthwise convolution as that of a dense one
    dense = sum(
        2 * depth * count * positions * 49 * dim * (dim - 1)
        for count, *sides in groups
        for depth, dim, positions in zip(SMALL.depths, SMALL.dims, flops.stage_positions(SMALL, (1, *sides)))
    )
    assert counter.get_total_flops() == flops.backbone_flops(SMALL, groups, backward=True) + dense


def test_rules_of_the_optimiser():
    rules = {"depth": 8, "layer_decay": 0.5, "patch_embed_multiplier": 0.2, "stages": SMALL.depths}
    rates = {
        "backbone.downsample_layers.0.0.weight": 9,  # the stem
        "backbone.stages.0.0.pwconv1.weight": 8,
        "backbone.stages.2.1.dwconv.weight": 4,  # block 2 + 1 + 1 from 0
        "backbone.downsample_layers.2.1.weight": 5,  # before block 3
        "backbone.stages.3.1.gamma": 1,
        "backbone.norm.weight": 0,
        "dino_head.prototypes.weight": 0,
    }
    for name, power in rates.items():
        assert group_rule(name, **rules).learning_rate == 0.5**power, name
    exempt = {
        name
        for name, parameter in Networks(model(), *heads(), checkpointing="none").named_parameters()
        if group_rule(name, **rules).weight_decay == 0.0
    }
    every = dict(Networks(model(), *heads(), checkpointing="none").named_parameters())
    assert exempt == {name for name, parameter in every.items() if parameter.ndim == 1}
    optimizer = adamw(
        Networks(model(), *heads(), checkpointing="none"),
        betas=(0.9, 0.99),
        layer_decay=0.9,
        patch_embed_multiplier=0.2,
    )
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(every)


def heads():
    head = Head(hidden=8, bottleneck=4, prototypes=6)
    return ProjectionHead(32, head), ProjectionHead(32, head)


def test_bf16_autocast_keeps_norms_and_the_sum_in_fp32():
    built = backbone_of(replace(SMALL, patch_size=16))
    with torch.autocast("cpu", torch.bfloat16):
        features = built.features(images(2, 3, 32, 32))
    assert features.cls.dtype is torch.float32
    assert features.patches.dtype is torch.float32
    exact = built.features(images(2, 3, 32, 32))
    # bf16 keeps 2^-9 of a number; a LayerNorm of 32 channels of a few blocks' sums adds some tens of roundings
    torch.testing.assert_close(features.cls, exact.cls, rtol=0, atol=0.1)
