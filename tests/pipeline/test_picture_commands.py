"""`dinov3 visualize attention|compare|click` on a run: files, and one line for what cannot work."""

from __future__ import annotations

import pytest
from PIL import Image

from dinov3_train import recipes
from dinov3_train.build import pretrain
from dinov3_train.config import override


@pytest.fixture(scope="module")
def run(recipe_file, image_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("pictures") / "run"
    words = [f"data.sources=['{image_folder}']", "run.steps=4", "run.checkpoint_every=2", "monitor.every=0"]
    pretrain(override(recipes.recipe(str(recipe_file)), words), out)
    return out


def test_sheets_and_page(dinov3, run, image_folder, tmp_path):
    common = (f"backbone={run}", f"data={image_folder}", "images=2")
    for words, name in (
        (("attention", *common, "block=0"), "attention.png"),
        (("compare", *common, "steps=0,2,4"), "pca.png"),
        (("compare", *common, "kind=cosine", "point=0.1,0.9"), "cosine.png"),
        (("compare", *common, "kind=attention", "steps=0,4"), "attending.png"),
    ):
        status, text, error = dinov3("visualize", *words, f"out={tmp_path / name}")
        assert status == 0, error
        with Image.open(tmp_path / name) as picture:
            assert f"{picture.width} x {picture.height}" in text
    page = tmp_path / "click.html"
    status, text, error = dinov3("visualize", "click", *common, "steps=0,4", f"out={page}")
    assert status == 0, error
    assert "step 4" in page.read_text()
    assert "MB" in text


def test_mistakes_are_one_line(dinov3, run, image_folder, tmp_path):
    cases = [
        (("compare", "kind=depth", "out=a.png"), "kind expects one of pca, cosine, attention"),
        (("compare", "steps=0,3", "out=a.png"), "no checkpoint of step 3"),
        (("compare", "steps=2,2", "out=a.png"), "expected different backbones"),
        (("compare", "steps=a", "out=a.png"), "steps expects"),
        (("attention", "block=7", "out=a.png"), "block expects a number in [-2, 2), got 7"),
        (("attention", "out=a.jpg"), "expected a .png file"),
        (("click", "out=a.png"), "expects a .html file"),
        (("click", "out=a.html", "images=0"), "images: expected at least 1"),
        (("click", "out=a.html", "size=30"), "multiple of the patch size 8"),
    ]
    for words, message in cases:
        words = [words[0], f"backbone={run}", f"data={image_folder}", *words[1:]]
        status, _, error = dinov3("visualize", *words)
        assert status == 2, (words, error)
        assert message in error
        assert error.count("\n") == 1
