"""`dinov3 report`: what a run holds is on its page, several stand side by side, a browser shows it without a word."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from browser import browser, screenshot
from PIL import Image

from dinov3_train import recipes
from dinov3_train.build import pretrain, run_config
from dinov3_train.config import override
from dinov3_train.run_report import command, records, report_page

WIDTHS = (375, 768, 1280)


@pytest.fixture(scope="module")
def runs(recipe_file, image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    words = [f"data.sources=['{image_folder}']", "monitor.every=4", "monitor.images=6"]
    for name, more in (("first", []), ("second", ["optimizer.lr=2e-3", "run.steps=6"])):
        pretrain(override(recipes.recipe(str(recipe_file)), [*words, *more]), folder / name)
    result = {"probe": "segment", "metrics": {"miou": {"value": 0.4321, "low": 0.4, "high": 0.46, "images": 30}}}
    (folder / "first" / "results").mkdir()
    (folder / "first" / "results" / "segment.json").write_text(json.dumps(result))
    knn = {"scores": [{"k": 10, "accuracy": 0.75, "mean_per_class": 0.7}], "test_images": 40}
    (folder / "first" / "knn.json").write_text(json.dumps(knn))
    (folder / "first" / "other.json").write_text("[1, 2")
    return folder


def test_a_page_holds_the_whole_run(dinov3, runs, tmp_path):
    out = tmp_path / "deep" / "page.html"
    status, text, error = dinov3("report", runs / "first", f"out={out}", "pictures=2")
    assert status == 0, error
    assert f"wrote {out}" in text
    page = out.read_text()
    for heading in (
        "Run first",
        "What to look at first",
        "Losses",
        "Dense-feature health",
        "Probes",
        "What each patch looks like to the backbone",
        "Data",
        "Throughput",
        "Optimisation",
        "Settings",
        "Do it again",
    ):
        assert f">{heading}<" in page, heading
    for part in (
        "segment",
        "0.4321",
        "0.4 to 0.46",
        "k-NN, k=10",
        "0.75",
        "locality of patch similarity",
        "embed_dim: 32",
    ):
        assert part in page, part
    assert page.count('src="data:image/') == 2 * (3 + 3 + 3)  # per photograph: PCA, cosine and attention rows
    assert not re.search(r"<(script|link|iframe)|https?://", page)
    assert len(page) < 6 * 2**20


def test_the_command_gives_the_very_config(runs, recipe_file):
    record = records([runs / "first"])[0]
    text, checked = command(record)
    assert not checked  # a recipe of one's own is a file this page cannot know
    assert f"config={runs / 'first' / 'config.yaml'}" in text
    own = override(recipes.recipe("vit_tiny_cpu"), ["data.sources=['a b','c']", "optimizer.clip=null", "run.steps=7"])
    text, checked = command(type(record)(**(vars(record) | {"config": own})))
    assert checked
    assert text == (
        "dinov3 pretrain recipe=vit_tiny_cpu out=RUN \"data.sources=['a b',c]\" optimizer.clip=null run.steps=7"
    )
    stage = override(recipes.recipe("vit_tiny_cpu_refine"), ["data.sources=[c]", "gram.teacher=ema", "run.seed=5"])
    assert command(type(record)(**(vars(record) | {"config": stage}))) == (
        "dinov3 pretrain recipe=vit_tiny_cpu_refine out=RUN 'data.sources=[c]' gram.teacher=ema run.seed=5",
        True,
    )
    again = override(recipes.recipe(str(recipe_file)), [], patch=runs / "first" / "config.yaml")
    assert again == run_config(runs / "first")


def test_several_runs_share_curves_and_show_their_differences(dinov3, runs, tmp_path):
    out = tmp_path / "both.html"
    status, _, error = dinov3("report", runs / "first", runs / "second", f"out={out}", "pictures=1")
    assert status == 0, error
    page = out.read_text()
    assert "<td>optimizer.lr</td><td>0.001</td><td>0.002</td>" in page
    assert "<td>run.steps</td><td>12</td><td>6</td>" in page
    losses = page[page.index(">Losses<") : page.index(">Dense-feature health<")]
    assert losses.count("<polyline") == 2 * 5
    assert 'stroke-dasharray="9 5"' in losses  # the second run differs without colour too


def test_a_run_without_metrics_or_images_still_has_a_page(runs, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(runs / "first" / "config.yaml", bare / "config.yaml")
    page = report_page(records([bare]), pictures=2).html()
    assert "stopped at step 0 of 12" in page
    assert "No look was taken while training" in page
    gone = (bare / "config.yaml").read_text().replace(str(run_config(bare).data.sources[0]), str(tmp_path / "gone"))
    (bare / "config.yaml").write_text(gone)
    assert "No pictures: " in report_page(records([bare]), pictures=2).html()


def test_mistakes_are_one_line(dinov3, runs, tmp_path):
    cases = [
        ((), "missing out=PAGE.html"),
        (("out=page.pdf",), "report: out expects a .html file, got 'page.pdf'"),
        (("out=page.html",), "expected at least one run folder, got none"),
        ((tmp_path, "out=page.html"), "expected a run folder with a config.yaml"),
        ((runs / "first", runs / "first", "out=page.html"), "expected different runs"),
        ((runs / "first", "out=page.html", "pictures=-1"), "pictures expects at least 0"),
    ]
    for words, message in cases:
        status, _, error = dinov3("report", *words)
        assert status == 2, (words, error)
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.skipif(browser() is None, reason="needs Chromium")
def test_a_browser_shows_the_page_at_every_width_in_both_themes(runs, tmp_path):
    path = report_page(records([runs / "first", runs / "second"]), pictures=1).write(tmp_path / "page.html")
    for dark in (False, True):
        picture = tmp_path / f"{dark}.png"
        assert screenshot(path, picture, widths=WIDTHS, height=1200, dark=dark) == []
        image = Image.open(picture).convert("L")
        for left, width in zip((0, WIDTHS[0], sum(WIDTHS[:2])), WIDTHS):
            part = image.crop((left, 0, left + width, 1200))
            ground, (low, high) = part.getpixel((3, 3)), part.getextrema()
            assert ground < 60 if dark else ground > 230
            assert high - low > 150  # text on its ground
