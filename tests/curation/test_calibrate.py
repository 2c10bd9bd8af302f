"""The measured threshold: re-encoded images reach it, whatever the backbone's scale of similarities."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dinov3_train.curation.calibrate import HIGHEST, calibrate, re_encoded
from dinov3_train.curation.embed import EmbedSettings, features, open_pool
from dinov3_train.data.sources import open_source
from dinov3_train.evaluation.view import View

VIEW = View(size=16)


class Pixels(nn.Module):
    """CLS = pixels shrunk to 4 x 4, plus a constant that brings all of them close to each other."""

    embed_dim = 48

    def __init__(self, constant: float):
        super().__init__()
        self.constant = nn.Parameter(torch.tensor(constant))

    def features(self, images):
        """Images (S, 3, Y, X) normalised."""
        found = nn.functional.adaptive_avg_pool2d(images, 4).flatten(1) + self.constant
        return type("F", (), {"cls": found, "patches": found[:, None]})


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(60):
        small = Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8))
        small.resize((48, 40), Image.Resampling.BICUBIC).save(tmp_path / f"{number:02d}.png")
    return open_pool([str(tmp_path)], open_source)


@pytest.mark.parametrize("constant", [0.0, 20.0])
def test_re_encoded_images_reach_it_and_others_do_not(images, constant):
    backbone = Pixels(constant)
    found = calibrate(backbone, images, VIEW, settings=EmbedSettings())
    assert found.images == 60
    assert found.others == 0.0
    pictures = [Image.open(images.sources[0].name(n)).convert("RGB") for n in range(60)]

    def rows(some):
        return nn.functional.normalize(
            features(backbone, torch.stack([VIEW.pixels(p) for p in some]), VIEW, EmbedSettings()), dim=1
        )

    similar = (rows(pictures) * rows([re_encoded(p) for p in pictures])).sum(dim=1)
    assert 0.94 <= float((similar >= found.threshold).float().mean()) <= 1.0
    assert found.threshold <= HIGHEST


def test_unreadable_images_are_left_out_and_none_is_an_error(images, tmp_path):
    for number in range(60):
        (tmp_path / f"{number:02d}.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="none of 60 images drawn to find a threshold can be read"):
        calibrate(Pixels(0.0), images, VIEW, settings=EmbedSettings())
