"""Recipes: found by name and by file; each one builds."""

import dataclasses

import pytest
import torch

from dinov3_train import build, recipes, validation
from dinov3_train.config import Data, from_yaml, to_yaml


def test_recipes_are_found_by_name_and_by_file(tmp_path):
    with pytest.raises(ValueError, match="no recipe named 'vit_smal'; nearest: .*vit_small"):
        recipes.recipe("vit_smal")
    mine = tmp_path / "mine.py"
    mine.write_text("from dinov3_train.config import Config\n\n\ndef mine():\n    return Config(recipe='mine')\n")
    assert recipes.recipe(str(mine)).recipe == "mine"
    mine.write_text("mine = 3\n")
    with pytest.raises(ValueError, match=r"must hold a function mine\(\) that returns a Config"):
        recipes.recipe(str(mine))


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_builds(name):
    """Checked, written and read again, and its networks made (without memory: on the meta device)."""
    config = dataclasses.replace(recipes.recipe(name), data=Data(sources=("images",)))
    assert config.recipe == name
    assert recipes.summary(name)
    validation.check(config)
    assert from_yaml(to_yaml(config)) == config
    with torch.device("meta"):
        networks = build.networks(config)
    assert networks.backbone.depth == config.backbone.depth
    assert build.terms(config)
    for step in (0, config.run.steps // 2, config.run.steps):
        values = build.step_values(config, step)
        assert 0.0 <= values.learning_rate < 0.1
        assert 0.9 < values.momentum <= 1.0
