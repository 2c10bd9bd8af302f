"""The demo: photographs are there and credited, halves do not meet, and a tiny run ends in a whole page."""

import hashlib
import re

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3_train import demo, demo_stages
from dinov3_train.config import Backbone, Config, Crops, Data, Head, Losses, Optimizer, Run
from dinov3_train.photographs import GAP, PHOTOGRAPHS, Photograph, halves, window_boxes, write_windows

PHOTOGRAPHS_BY_NAME = {photograph.name: photograph for photograph in PHOTOGRAPHS}


def test_photographs_are_distinct_open_and_credited():
    assert len(PHOTOGRAPHS_BY_NAME) == len(PHOTOGRAPHS) == 14
    for photograph in PHOTOGRAPHS:
        image = photograph.open()
        assert image.mode == "RGB"
        assert min(image.size) >= 300
        assert photograph.credit
        assert photograph.licence
        assert photograph.url.startswith("https://")
    for name in (*demo.COLOURED, *demo.POINTS):
        assert name in PHOTOGRAPHS_BY_NAME
    assert set(demo.POINTS) <= set(demo.COLOURED)


def test_a_missing_photograph_is_named():
    lost = Photograph("lost", "skimage", "data/lost.png", "nobody", "none", "https://example.org")
    with pytest.raises(ValueError, match="expected the photograph 'lost' at .*lost.png, which does not exist"):
        lost.open()


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (512, 512), (101, 100)])
def test_halves_have_no_pixel_in_common_and_windows_stay_inside(size):
    seen = []
    for box in halves(size):
        mask = np.zeros(size[::-1], dtype=bool)
        mask[box[1] : box[3], box[0] : box[2]] = True
        seen.append(mask)
        for left, top, right, bottom in window_boxes("any", box, 200):
            assert box[0] <= left < right <= box[2]
            assert box[1] <= top < bottom <= box[3]
            assert right - left == bottom - top >= 0.39 * min(box[2] - box[0], box[3] - box[1])
    assert not (seen[0] & seen[1]).any()
    lost = ~(seen[0] | seen[1])
    assert lost.sum() in (GAP * min(size), (GAP + 1) * min(size))


def test_windows_are_the_same_every_time(tmp_path):
    def digest(folder):
        files = sorted(folder.rglob("*.png"))
        return len(files), hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

    first, again = (write_windows(tmp_path / name, train=2, held_out=1) for name in "ab")
    assert [digest(folder) for folder in first] == [digest(folder) for folder in again]
    assert digest(first[0])[0] == 2 * len(PHOTOGRAPHS)
    assert digest(first[1])[0] == len(PHOTOGRAPHS)
    assert Image.open(first[0] / "cat" / "001.png").size == (96, 96)


def tiny_recipe(name: str) -> Config:
    assert name == "demo"
    head = Head(hidden=16, bottleneck=8, prototypes=8)
    return Config(
        recipe="demo",
        backbone=Backbone(name="vit_demo", embed_dim=16, depth=1, heads=1, patch_size=8, layer_scale=1.0),
        dino_head=head,
        ibot_head=head,
        crops=Crops(global_size=32, local_size=32, locals=1),  # sides a ConvNeXt can take
        data=Data(workers=0),
        losses=Losses(),
        optimizer=Optimizer(warmup=1),
        run=Run(steps=12, batch_size=8, log_every=1, tensorboard=False),
    )


@pytest.fixture
def small(monkeypatch):
    """The demo with few windows, small maps and a tiny recipe."""
    monkeypatch.setattr(demo, "recipe", tiny_recipe)
    monkeypatch.setattr(demo, "TRAIN_WINDOWS", 2)
    monkeypatch.setattr(demo, "HELD_OUT_WINDOWS", 1)
    monkeypatch.setattr(demo, "MAP_SIDE", 32)
    monkeypatch.setattr(demo_stages, "MIX", ((32, 32, 64, 0.5), (64, 32, 64, 0.5)))
    monkeypatch.setattr(demo_stages, "PANEL", 4)


def test_a_tiny_demo_ends_in_a_page(tmp_path, small, capsys):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    path = demo.run_demo(tmp_path / "out", quick=True, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    printed = capsys.readouterr().out
    assert path == tmp_path / "out" / "index.html"
    assert "index.html" in printed.replace("\n", "")
    text = path.read_text("ascii")
    for photograph in PHOTOGRAPHS:
        assert f"<td>{photograph.name}</td>" in text
    stages = ("pretrained", "refined", "adapted", *demo_stages.STUDENTS.values())
    pictures = len(PHOTOGRAPHS) + 3 * len(demo.COLOURED) + 3 * len(demo.POINTS)
    assert text.count("<img") == pictures + len(stages) * len(demo_stages.PICTURED)
    for heading in stages:
        assert f"<td>{heading}</td>" in text
    assert "Losses" in text
    assert "k-NN while training" in text
    assert "guessing" in text
    assert not re.search(r"<(script|link|iframe)|src=\"http", text)
    for run in ("pretrained", "refined", "adapted", "students/vit_micro", "students/convnext_micro"):
        assert (tmp_path / "out" / "run-quick-seed3" / run / "config.yaml").is_file()


def test_running_again_continues_and_draws_the_same_page(tmp_path, small):
    first = demo.run_demo(tmp_path, quick=True).read_text()
    again = demo.run_demo(tmp_path, quick=True).read_text()
    strip = re.compile(r": [\d.]+ minutes on this machine")
    assert strip.sub("", first) == strip.sub("", again)
