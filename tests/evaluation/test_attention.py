"""Attention of CLS and registers against a plain computation, and the block it was asked for."""

import pytest
import torch

from dinov3_train.config import Backbone
from dinov3_train.evaluation.attention import prefix_attention
from dinov3_train.models.vit import VisionTransformer


@pytest.fixture(name="backbone", scope="module")
def backbone_fixture() -> VisionTransformer:
    torch.manual_seed(0)
    vit = VisionTransformer(Backbone(embed_dim=32, depth=3, heads=2, patch_size=8, registers=2, layer_scale=1.0))
    for block in vit.blocks:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.4)
    return vit


def test_attention_reproduces_the_output_of_the_block(backbone):
    """Shares times values, over patches and prefix, are what the attention hands to its projection."""
    images = torch.randn(2, 3, 16, 24)
    caught = {}
    block = backbone.blocks[1]
    handles = [
        block.attn.register_forward_pre_hook(lambda m, inputs: caught.update(tokens=inputs[0])),
        block.attn.register_forward_hook(lambda m, inputs, output: caught.update(output=output)),
    ]
    with torch.no_grad():
        backbone.features(images)
    for handle in handles:
        handle.remove()
    shares = prefix_attention(backbone, images, block=1)
    assert shares.shape == (2, 3, 2, 2, 3)
    total = shares.sum(dim=(-1, -2))
    assert ((total > 0) & (total < 1)).all()
    with torch.no_grad():
        qkv = block.attn.qkv(caught["tokens"]).view(2, -1, 3, 2, 16)  # (S, T, 3, H, E)
        query, key, value = (qkv[:, :, part].transpose(1, 2) for part in range(3))  # (S, H, T, E)
        prefix = (query[:, :, :3] @ key[:, :, :3].mT / 4).exp()  # prefix tokens are not turned: (S, H, 3, 3)
        # scale of the softmax from the share the patches have: e_prefix / (e_prefix + e_patches) = 1 - total
        missing = (1 - total).transpose(1, 2)  # (S, H, 3)
        own = prefix / prefix.sum(-1, keepdim=True) * missing[..., None]
        mixed = own @ value[:, :, :3] + shares.flatten(-2).transpose(1, 2) @ value[:, :, 3:]
        output = block.ls1.after(block.attn.proj, mixed.transpose(1, 2).flatten(2))  # (S, 3, D)
    torch.testing.assert_close(output, caught["output"].view(2, -1, 32)[:, :3], rtol=1e-4, atol=1e-5)


def test_blocks_count_from_both_ends_and_modes_stay(backbone):
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(prefix_attention(backbone.train(), images), prefix_attention(backbone, images, block=2))
    assert backbone.training
    assert not torch.equal(prefix_attention(backbone, images, block=0), prefix_attention(backbone, images, block=2))
    assert not backbone.blocks[0].attn._forward_pre_hooks


def test_refusals(backbone):
    with pytest.raises(ValueError, match=r"block expects a number in \[-3, 3\), got 3"):
        prefix_attention(backbone, torch.zeros(1, 3, 16, 16), block=3)
    with pytest.raises(ValueError, match="expects attention blocks, got Linear"):
        prefix_attention(torch.nn.Linear(2, 2), torch.zeros(1, 3, 16, 16))
