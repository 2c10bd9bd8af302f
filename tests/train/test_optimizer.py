"""AdamW's groups: layer-wise rates, weight-decay exclusions, frozen prototypes, and the update itself."""

import pytest
import torch
from tiny_training import BACKBONE, networks

from dinov3_train.train.optimizer import adamw, group_rule, set_rates


def rule(name: str, depth: int = 24, layer_decay: float = 0.9):
    return group_rule(name, depth=depth, layer_decay=layer_decay, patch_embed_multiplier=0.2)


@pytest.mark.parametrize(("depth", "layer_decay", "multiplier"), [(40, 0.98, 0.0874), (24, 0.9, 0.0144)])
def test_patch_embedding_of_the_paper(depth, layer_decay, multiplier):
    """ViT-7B and ViT-L of ImageNet-1k, to the three digits published."""
    found = rule("backbone.patch_embed.proj.weight", depth, layer_decay).learning_rate
    assert float(f"{found:.3g}") == multiplier


@pytest.mark.parametrize(
    ("name", "exponent", "factor"),
    [
        ("backbone.patch_embed.proj.weight", 25, 0.2),
        ("backbone.patch_embed.proj.bias", 25, 0.2),
        ("backbone.cls_token", 25, 1.0),
        ("backbone.storage_tokens", 25, 1.0),
        ("backbone.mask_token", 25, 1.0),
        ("backbone.blocks.0.attn.qkv.weight", 24, 1.0),
        ("backbone.blocks.11.mlp.fc1.weight", 13, 1.0),
        ("backbone.blocks.23.ls2.gamma", 1, 1.0),
        ("backbone.norm.weight", 0, 1.0),
        ("backbone.local_cls_norm.weight", 0, 1.0),
        ("dino_head.mlp.0.weight", 0, 1.0),
        ("ibot_head.prototypes.weight", 0, 1.0),
    ],
)
def test_layer_decay(name, exponent, factor):
    assert rule(name).learning_rate == pytest.approx(factor * 0.9**exponent, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "decayed"),
    [
        ("backbone.cls_token", True),
        ("backbone.storage_tokens", True),
        ("backbone.mask_token", True),
        ("backbone.patch_embed.proj.weight", True),
        ("backbone.patch_embed.proj.bias", False),
        ("backbone.blocks.3.attn.qkv.weight", True),
        ("backbone.blocks.3.attn.qkv.bias", False),
        ("backbone.blocks.3.norm1.weight", False),
        ("backbone.blocks.3.ls1.gamma", False),
        ("backbone.norm.weight", False),
        ("backbone.local_cls_norm.weight", False),
        ("dino_head.mlp.2.bias", False),
        ("dino_head.prototypes.weight", True),
    ],
)
def test_weight_decay_exclusions(name, decayed):
    assert rule(name).weight_decay == float(decayed)


def test_prototypes_are_the_last_layers_of_the_heads_only():
    student = networks()
    found = {name for name, _ in student.named_parameters() if rule(name, depth=3).prototypes}
    assert found == {"dino_head.prototypes.weight", "ibot_head.prototypes.weight"}


def make(student):
    return adamw(student, betas=(0.9, 0.99), layer_decay=0.9, patch_embed_multiplier=0.2)


def test_every_parameter_is_in_one_group():
    student = networks()
    optimizer = make(student)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len({id(parameter) for parameter in held}) == len(list(student.parameters()))
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in student.parameters()}


def test_a_parameter_that_is_not_trained_is_in_no_group():
    student = networks()
    student.backbone.cls_token.requires_grad_(False)
    held = {id(parameter) for group in make(student).param_groups for parameter in group["params"]}
    assert id(student.backbone.cls_token) not in held


def test_two_updates_are_adamw():
    """Each parameter against the formula in float64, its rate and weight decay from its own rule."""
    student = networks()
    optimizer = make(student)
    exact = {name: parameter.detach().double() for name, parameter in student.named_parameters()}
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in exact.items()}
    for step, (rate, prototype_rate, decay) in enumerate([(1e-2, 0.0, 0.1), (2e-2, 1e-2, 0.2)], start=1):
        torch.manual_seed(step)
        for parameter in student.parameters():
            parameter.grad = torch.randn_like(parameter)
        set_rates(optimizer, learning_rate=rate, prototype_rate=prototype_rate, backbone_rate=rate, weight_decay=decay)
        optimizer.step()
        for name, parameter in student.named_parameters():
            own, gradient = rule(name, BACKBONE.depth), parameter.grad.double()
            first, second = moments[name]
            moments[name] = first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
            own_rate = (prototype_rate if own.prototypes else rate) * own.learning_rate
            value = exact[name] * (1 - own_rate * decay * own.weight_decay)
            direction = (first / (1 - 0.9**step)) / ((second / (1 - 0.99**step)).sqrt() + 1e-8)
            exact[name] = value - own_rate * direction
            # fp32 weights near 1: a spacing of 1.2e-7 for each of two updates of some roundings
            torch.testing.assert_close(parameter.double(), exact[name], rtol=5e-7, atol=5e-7)


def test_frozen_prototypes_do_not_move():
    student = networks()
    optimizer = make(student)
    before = student.dino_head.prototypes.weight.detach().clone()
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_rates(optimizer, learning_rate=1e-2, prototype_rate=0.0, backbone_rate=1e-2, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(student.dino_head.prototypes.weight, before)
    set_rates(optimizer, learning_rate=1e-2, prototype_rate=1e-2, backbone_rate=1e-2, weight_decay=0.1)
    optimizer.step()
    assert not torch.equal(student.dino_head.prototypes.weight, before)


def test_state_is_there_before_the_first_step_and_the_same_after():
    student = networks()
    optimizer = make(student)

    def shapes():
        return [
            {name: (tuple(value.shape), value.dtype) for name, value in optimizer.state[parameter].items()}
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]

    before = shapes()
    assert before
    assert all(entry.keys() == {"step", "exp_avg", "exp_avg_sq"} for entry in before)
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert shapes() == before
