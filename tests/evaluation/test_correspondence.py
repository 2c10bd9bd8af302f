"""Patches found again in another view: features that know their place, features that do not, and the geometry."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dinov3_train.evaluation.correspondence import correspondence, make_pairs, pair_features, true_places
from dinov3_train.evaluation.panel import Panel
from dinov3_train.evaluation.view import View
from dinov3_train.models.vit import Features

SIDE, PATCH, IMAGES = 64, 8, 6
GRID = SIDE // PATCH


@pytest.fixture(scope="module", name="panel")
def panel_fixture() -> Panel:
    """Smooth random pictures: places can be told apart, also after colour changes."""
    generator, finer = np.random.default_rng(0), []
    for _ in range(IMAGES):
        small = Image.fromarray(generator.integers(0, 255, (9, 9, 3), dtype=np.uint8))
        finer.append(torch.from_numpy(np.array(small.resize((2 * SIDE, 2 * SIDE), Image.Resampling.BICUBIC))))
    finer = torch.stack(finer).permute(0, 3, 1, 2)
    pixels = nn.functional.avg_pool2d(finer.float(), 2).round().to(torch.uint8)
    return Panel(names=tuple("abcdef"), pixels=pixels, finer=finer, view=View(size=SIDE))


def test_pairs_are_a_function_of_the_seed(panel):
    one, again, other = make_pairs(panel), make_pairs(panel), make_pairs(panel, seed=1)
    assert torch.equal(one.second, again.second)
    assert not torch.equal(one.second, other.second)
    left, top, side = one.boxes.T
    assert (side >= 0.6).all()
    assert (side <= 0.9).all()
    assert (left + side <= 1).all()
    assert (top + side <= 1).all()


def test_features_that_are_places_are_always_found_again(panel):
    """A feature that tells the place in the first view: of the second view's patches, where they come from."""
    pairs = make_pairs(panel)

    def feature(x, y):  # (..., ) in patches -> unit vectors that are most alike for the nearest places
        a, b = (np.pi / 2) * x / GRID, (np.pi / 2) * y / GRID
        return torch.stack([a.cos(), a.sin(), b.cos(), b.sin()], dim=-1)

    centres = torch.arange(GRID) + 0.5
    first = feature(centres[None, :].expand(GRID, -1), centres[:, None].expand(-1, GRID)).expand(IMAGES, -1, -1, -1)
    places = true_places(pairs, (GRID, GRID))
    second = feature(places[..., 0], places[..., 1]).unflatten(1, (GRID, GRID))
    assert correspondence(first, second, pairs).min() == 1.0
    wrong = second.flip(1)
    assert correspondence(first, wrong, pairs).mean() < 0.5


def test_the_places_are_those_of_the_pixels(panel):
    """The second view's patch shows what the first view has at that place, but for colour: rank the mean grey."""
    pairs = make_pairs(panel)
    places = true_places(pairs, (GRID, GRID))
    grey = panel.pixels.float().mean(1)  # (n, Y, X)
    near = (places * PATCH).round().long().clamp(0, SIDE - 1)
    there = torch.stack([grey[n][near[n, :, 1], near[n, :, 0]] for n in range(IMAGES)])
    here = nn.functional.avg_pool2d(pairs.second.float().mean(1)[:, None], PATCH).flatten(1)
    for one, other in zip(there, here):
        assert np.corrcoef(one.numpy(), other.numpy())[0, 1] > 0.6


@pytest.mark.parametrize("kind", ["constant", "noise"])
def test_features_without_a_place_are_at_chance(panel, kind):
    pairs, generator = make_pairs(panel), torch.Generator().manual_seed(0)
    shape = (IMAGES, GRID, GRID, 16)
    make = {"constant": lambda: torch.ones(shape), "noise": lambda: torch.randn(shape, generator=generator)}[kind]
    assert correspondence(make(), make(), pairs).mean() < 0.12  # chance is pi / 64 = .05


class Pixels(nn.Module):
    """The patches' own pixels, centred, as features."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def features(self, images: torch.Tensor) -> Features:
        rows = nn.functional.unfold(nn.functional.avg_pool2d(images, 2), PATCH // 2, stride=PATCH // 2).mT
        rows = rows - rows.mean(dim=-1, keepdim=True)
        return Features(rows[:, 0], rows[:, :0], rows, (GRID, GRID))


def test_more_than_chance_for_pixels_and_less_under_noise(panel):
    pairs = make_pairs(panel)
    first, second = pair_features(Pixels(), pairs)
    assert first.shape == (IMAGES, GRID, GRID, 48)
    found = correspondence(first, second, pairs).mean()
    noise = torch.randn(second.shape, generator=torch.Generator().manual_seed(0))
    assert found > 0.15
    assert correspondence(first, second + 3 * noise, pairs).mean() < 0.6 * found
