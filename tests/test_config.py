"""The typed config: overrides, errors that name the nearest key, YAML there and back."""

import dataclasses
import difflib

import pytest

from dinov3_train.config import (
    SECTIONS,
    Config,
    ConvNeXtBackbone,
    from_dict,
    from_yaml,
    leaves,
    override,
    replaced,
    to_dict,
    to_yaml,
)


def test_overrides_replace_leaves_and_leave_the_rest():
    config = override(Config(), ["optimizer.lr=1e-3", "backbone.rope.rescale=null", "run.compile=true", "run.steps=7"])
    assert config.optimizer.lr == 1e-3
    assert config.backbone.rope.rescale is None
    assert config.run.compile is True
    assert config.run.steps == 7
    back = replaced(config, {"optimizer.lr": Config().optimizer.lr, "backbone.rope.rescale": 2.0})
    assert replaced(back, {"run.compile": False, "run.steps": Config().run.steps}) == Config()


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("optimizer.clip=3", 3.0),  # a whole number where a float is wanted
        ("optimizer.clip=null", None),
        ("optimizer.betas=[0.9,0.99]", (0.9, 0.99)),
        ("crops.color_jitter=[0,0,0,0]", (0.0, 0.0, 0.0, 0.0)),
        ("data.sources=/a/b.tar", ("/a/b.tar",)),  # one word is a tuple of one
        ("data.sources=[/a, torchvision:CIFAR10]", ("/a", "torchvision:CIFAR10")),
        ("data.sources=torchvision:CIFAR10", ("torchvision:CIFAR10",)),
        ("data.sources=0123", ("0123",)),  # a name of digits stays as it was typed
        ("data.sources=1e3", ("1e3",)),
        ("data.sources=yes", ("yes",)),
        ("data.sources=*.jpg", ("*.jpg",)),
        ("data.sources=/a/[b", ("/a/[b",)),
        ("data.sources=[a", ("[a",)),
        ("data.sources=a=b", ("a=b",)),
        ("data.sources=/with: colon", ("/with: colon",)),
        ("data.sources=a # b", ("a # b",)),
        ("run.wandb=007", "007"),
        ("run.wandb=null", None),
        ("run.wandb='null'", "null"),
        ("recipe=x", "x"),
    ],
)
def test_values(word, value):
    found = to_dict(override(Config(), [word]))
    for part in word.partition("=")[0].split("."):
        found = found[part]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optimizer.lr", "expected key.sub=value, got 'optimizer.lr'"),
        ("=1", "expected key.sub=value"),
        ("optimiser.lr=1", "unknown key 'optimiser.lr'; nearest: optimizer.lr"),
        ("run.batchsize=1", "unknown key 'run.batchsize'; nearest: run.batch_size"),
        ("batch_size=1", "unknown key 'batch_size'; nearest: run.batch_size"),
        ("crops=3", "unknown key 'crops'; nearest: crops.globals, crops.locals"),
        ("run.steps=1.5", "run.steps expects int, got 1.5"),
        ("run.steps=true", "run.steps expects int, got True"),
        ("run.steps=many", "run.steps expects int, got 'many'"),
        ("run.compile=1", "run.compile expects bool, got 1"),
        ("optimizer.lr=null", "optimizer.lr expects float, got None"),
        ("optimizer.clip=off", r"optimizer.clip expects float \| null"),
        ("optimizer.betas=[0.9]", r"optimizer.betas expects tuple\[float, float\], got \[0.9\]"),
        ("optimizer.betas=0.9", "optimizer.betas expects"),
        ("optimizer.betas=[0.9,b]", "optimizer.betas expects"),
        ("backbone.rope={base: 3}", "unknown key 'backbone.rope'; nearest: backbone.rope.base"),
        ("data.sources=[[a]]", "data.sources expects"),
    ],
)
def test_errors_name_the_key_and_what_was_expected(word, message):
    with pytest.raises(ValueError, match=message):
        override(Config(), [word])


def test_every_misspelt_key_finds_its_own():
    """One letter dropped from any key: that key is among the nearest."""
    for key in leaves():
        wrong = key[:-2] + key[-1]
        if wrong in leaves():
            continue
        with pytest.raises(ValueError) as caught:
            override(Config(), [f"{wrong}=1"])
        assert key in str(caught.value) or len(difflib.get_close_matches(wrong, leaves(), n=10)) > 3


def test_leaves_cover_every_field_of_every_section():
    names = {key.rsplit(".", 1)[-1] for key in leaves()}
    sections = {
        "backbone",
        "rope",
        "dino_head",
        "ibot_head",
        "crops",
        "masking",
        "data",
        "losses",
        "optimizer",
        "run",
        "monitor",
        "init",
        "gram",
        "start",
        "distillation",
    }
    assert {f.name for section in SECTIONS for f in dataclasses.fields(section)} == names | sections


def test_yaml_there_and_back():
    config = replaced(
        Config(recipe="a: b # c"),
        {
            "data.sources": ("0123", "1e3", "null", "yes", "~", "a: b", "gr\u00fc\u00df.tar", "${run.steps}", ""),
            "run.wandb": "3",
        },
    )
    assert from_yaml(to_yaml(config)) == config
    assert from_yaml(to_yaml(Config())) == Config()
    assert from_dict(to_dict(config)) == config


def test_a_missing_key_takes_its_default_and_an_unknown_one_is_an_error():
    assert from_yaml("run: {steps: 3}") == replaced(Config(), {"run.steps": 3})
    with pytest.raises(ValueError, match="unknown key 'run.step'; nearest: run.steps"):
        from_yaml("run: {step: 3}")
    with pytest.raises(ValueError, match="run is a section.*got 3"):
        from_yaml("run: 3")
    with pytest.raises(ValueError, match="config: expected YAML keys and values, got list"):
        from_yaml("[1, 2]")
    with pytest.raises(ValueError, match="config: expected YAML keys and values"):
        from_yaml("run: {steps: 3")


def test_patch_files(tmp_path):
    patch = tmp_path / "patch.yaml"
    patch.write_text("run:\n  steps: 3\n  seed: 4\ncrops: {global_scale: [0.5, 1]}\noptimizer.lr: 0.5\n")
    config = override(Config(), ["run.seed=5"], patch=patch)
    assert (config.run.steps, config.run.seed, config.crops.global_scale, config.optimizer.lr) == (
        3,
        5,
        (0.5, 1.0),
        0.5,
    )
    with pytest.raises(ValueError, match="expected a YAML file, got .*nowhere.yaml"):
        override(Config(), [], patch=tmp_path / "nowhere.yaml")
    patch.write_text("run:\n  stepz: 3\n")
    with pytest.raises(ValueError, match="unknown key 'run.stepz'; nearest: run.steps"):
        override(Config(), [], patch=patch)
    patch.write_text("")
    assert override(Config(), [], patch=patch) == Config()


def test_sections_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().run.steps = 3


def test_a_backbone_is_a_vit_or_a_convnext():
    config = dataclasses.replace(Config(), backbone=ConvNeXtBackbone(depths=(1, 2), dims=(8, 16)))
    again = from_yaml(to_yaml(override(config, ["backbone.depths=[2,2]", "backbone.patch_size=8"])))
    assert again.backbone == ConvNeXtBackbone(depths=(2, 2), dims=(8, 16), patch_size=8)
    assert (again.backbone.stride, again.backbone.depth, again.backbone.embed_dim) == (8, 4, 16)
    with pytest.raises(ValueError, match=r"backbone.heads is no key of a ConvNeXtBackbone"):
        override(config, ["backbone.heads=2"])
    with pytest.raises(ValueError, match=r"backbone.depths is no key of a Backbone"):
        override(Config(), ["backbone.depths=[2,2]"])
    with pytest.raises(ValueError, match=r"unknown key 'backbone.stages'"):
        override(config, ["backbone.stages=2"])
