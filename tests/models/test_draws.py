"""Draws of a step: independent of ranks, exact drop path rate, unbiased."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dinov3_train.config import Rope
from dinov3_train.models.draws import drop_path_phases, systematic, training_draws
from dinov3_train.models.packing import block_inputs
from dinov3_train.models.vit import BACKBONES, VisionTransformer

BACKBONE = replace(BACKBONES["vit_tiny"], depth=4, drop_path=0.3, rope=Rope(shift=0.1, jitter=1.3, rescale=2.0))


def draws_of(images, first, *, batch=6, step=5, seed=0, backbone=BACKBONE, crops=(2, 3)):
    indices = step * batch + first + np.arange(images)
    return training_draws(
        backbone, seed=seed, step=step, indices=indices, first=first, crops_per_image=crops, batch_size=batch
    )


def by_image(values, crops, images):
    """Packed sequences (.., sum(crops) * images) as one (.., crops, images) per group."""
    parts = np.split(values, np.cumsum([count * images for count in crops])[:-1], axis=-1)
    return [part.reshape(*part.shape[:-1], count, images) for part, count in zip(parts, crops)]


@pytest.mark.parametrize("split", [(3, 3), (1, 5), (2, 2, 2)])
def test_ranks_are_slices_of_one(split):
    whole, crops, first = draws_of(6, 0), (2, 3), 0
    for images in split:
        part = draws_of(images, first)
        for ours, all_ in zip(by_image(part.kept, crops, images), by_image(whole.kept, crops, 6)):
            assert np.array_equal(ours, all_[..., first : first + images])
        for ours, all_, count in zip(part.rope, whole.rope, crops):
            for name in ("shift", "scale"):
                expected = getattr(all_, name).view(count, 6, 2)[:, first : first + images]
                assert torch.equal(getattr(ours, name).view(count, images, 2), expected)
        first += images


def test_per_block_rope_is_the_same_on_every_rank_and_differs_per_block():
    backbone = replace(BACKBONE, rope=Rope(draw="block"))
    whole, part = draws_of(6, 0, backbone=backbone), draws_of(2, 3, backbone=backbone)
    assert part.per_block
    assert all(torch.equal(a.scale, b.scale) for a, b in zip(whole.rope, part.rope))
    scales = torch.cat([draw.scale[:, 0] for draw in whole.rope])
    assert len(scales) == 8
    assert len(set(scales.tolist())) == 8
    assert torch.equal(whole.rope[0].scale[:, 0], whole.rope[0].scale[:, 1])


def test_draws_change_with_step_seed_and_crop():
    scales = [draws_of(6, 0, step=step, seed=seed).rope[0].scale for step, seed in ((5, 0), (6, 0), (5, 1))]
    assert len({tuple(scale.flatten().tolist()) for scale in scales}) == 3
    assert len(set(scales[0][:, 0].tolist())) == 12  # two crops of six images


def test_rescale_is_log_uniform():
    backbone = replace(BACKBONE, drop_path=0.0, rope=Rope(rescale=2.0))
    draw = draws_of(4000, 0, batch=4000, backbone=backbone, crops=(1, 0))
    assert draw.kept is None
    assert len(draw.rope) == 1
    logarithm = draw.rope[0].scale[:, 0].log2().double()
    assert logarithm.min() >= -1
    assert logarithm.max() <= 1
    # uniform in [-1, 1]: standard error of the mean 0.0091, of the square 0.0047; five of each
    assert abs(logarithm.mean()) < 0.046
    assert abs(logarithm.square().mean() - 1 / 3) < 0.024


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.4, 0.75])
@pytest.mark.parametrize("sequences", [1, 2, 5, 12])
def test_drop_path_counts_are_fixed_over_the_depth(rate, sequences):
    """Over the depth the kept sequences differ from depth * sequences * q by less than one, for any batch."""
    for step in range(20):
        phases = drop_path_phases(3, step, 0, "attention", 6)
        assert ((phases >= 0) & (phases < 1)).all()
        kept = systematic(np.arange(sequences), 1 - rate, phases)
        assert abs(kept.sum() - 6 * sequences * (1 - rate)) < 1
        assert np.ptp(kept.sum(1)) <= 1


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_drop_path_rate_is_exact_on_average(batch):
    """Share of steps a sequence is kept in: every sequence has the rate of its own, tiny batches too."""
    steps = 600
    kept = np.mean([draws_of(batch, 0, batch=batch, step=step).kept for step in range(steps)], axis=0)
    # a share of 600 draws: standard error 0.0187; the largest of 4 * 2 * 5 * batch shares stays within 5
    assert np.abs(kept - 0.7).max() < 5 * 0.0187
    assert abs(kept.mean() - 0.7) < 0.004  # stratified over the depth


def test_drop_path_is_unbiased():
    """With gain 1/q the mean over steps of the branches' sum is what a model without drop path gives (one block)."""
    torch.manual_seed(0)
    backbone = replace(BACKBONE, embed_dim=32, heads=2, depth=1, patch_size=8, layer_scale=1.0, drop_path=0.4)
    model = VisionTransformer(replace(backbone, rope=Rope(rescale=None)))
    crop, attention = torch.randn(3, 3, 16, 16), []
    model.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    with torch.no_grad():
        expected = model.intermediate_layers(crop, 1, norm=False)[0].cls
        for step in range(300):
            draws = draws_of(3, 0, batch=3, step=step, backbone=model.backbone, crops=(1,))
            x = model._tokens([crop], [None])
            inputs = block_inputs(model.backbone, model._groups([crop], draws), draws, x.device)[0]
            attention.append(model.blocks[0](x, inputs).view(3, 9, -1)[:, 0])
    start = model._tokens([crop], [None]).view(3, 9, -1)[:, 0]
    error = (torch.stack(attention).mean(0) - expected).norm() / (expected - start).norm()
    assert error < 5 * (0.4 / 0.6 / 300) ** 0.5 / 3**0.5  # five standard errors of a mean of 300, three sequences


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"expected positions within the global batch of 6, got 4 to 7"):
        draws_of(3, 4)
    with pytest.raises(ValueError, match=r"draw expects sequence or block, got 'step'"):
        draws_of(1, 0, backbone=replace(BACKBONE, rope=Rope(draw="step")))
    with pytest.raises(ValueError, match=r"drop_path expects a rate in \[0, 1\)"):
        draws_of(1, 0, backbone=replace(BACKBONE, drop_path=1.0))
