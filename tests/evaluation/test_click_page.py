"""The click page: cosines survive 8 bits, twelve images stay under 6 MB, a click in a browser draws the right map."""

import base64
import json
import re

import numpy as np
import pytest
import torch
from browser import after_scripts, browser, screenshot
from PIL import Image

from dinov3_train.evaluation.click_page import click_page, quantized
from dinov3_train.evaluation.maps import PatchMap, cosine_map


def maps(count: int, grid: tuple[int, int] = (6, 8), width: int = 24, seed: int = 0) -> list[PatchMap]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        features = torch.randn(*grid, width, generator=generator) + 0.5
        pixels = np.random.default_rng(number).integers(0, 255, (grid[0], grid[1], 3)).astype(np.uint8)
        image = Image.fromarray(pixels).resize((grid[1] * 16, grid[0] * 16), Image.Resampling.BICUBIC)
        found.append(PatchMap(f"photo <{number}>", image, features))
    return found


def test_cosines_survive_eight_bits():
    panel = maps(3)
    packed = quantized(panel, budget=10**9)
    assert packed.rows.shape == (3 * 48, 24)
    assert packed.rows.dtype == torch.int8
    exact = torch.nn.functional.normalize(torch.cat([entry.features.flatten(0, 1) for entry in panel]), dim=1)
    kept = torch.nn.functional.normalize(packed.rows.float(), dim=1)
    worst = (exact @ exact.T - kept @ kept.T).abs().max()
    assert worst < 0.02
    assert packed.error <= worst + 1e-6
    few = quantized(panel, budget=3 * 48 * 5)
    assert few.rows.shape[1] == 5
    assert few.error > packed.error  # and the page says so


def test_a_page_of_twelve_images_is_small_and_stands_alone(tmp_path):
    panel = maps(12, grid=(32, 32), width=1024)  # features no axis can be spared of: the worst case
    other = maps(12, grid=(32, 32), width=384)
    path = click_page([("before", panel), ("after", other)]).write(tmp_path / "page.html")
    assert path.stat().st_size < 6 * 2**20
    text = path.read_text()
    assert not re.search(r"https?://|<link|<iframe|\bfetch\(|import\(", text)
    assert "photo &lt;3&gt;" in text
    assert "photo <3>" not in text


def test_refusals():
    with pytest.raises(ValueError, match=r"the same photographs, at least one, got \[\]"):
        click_page([])
    with pytest.raises(ValueError, match=r"got \[0\]"):
        click_page([("one", [])])
    with pytest.raises(ValueError, match=r"got \[2, 3\]"):
        click_page([("one", maps(2)), ("two", maps(3))])


CLICK = """
const canvas = document.querySelectorAll(".click canvas")[1], box = canvas.getBoundingClientRect();
canvas.dispatchEvent(new MouseEvent("click", {bubbles: true, clientX: box.left + box.width * 0.69,
  clientY: box.top + box.height * 0.25}));
canvas.focus();
canvas.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowDown", bubbles: true, cancelable: true}));
const shown = [0, 1].map((n) => [...document.querySelectorAll(".click canvas")[n].getContext("2d")
  .getImageData(0, 0, 8, 6).data]);
document.body.insertAdjacentHTML("beforeend", `<pre id="found">${JSON.stringify({
  said: document.getElementById("said").textContent, low: document.getElementById("low").textContent,
  values: [0, 1].map((n) => [...similarities(n)]), rings: [...document.querySelectorAll(".ring")].map((r) => r.hidden),
  left: document.querySelectorAll(".ring")[1].style.left, shown})}</pre>`);
"""


@pytest.mark.skipif(browser() is None, reason="needs Chromium")
def test_a_click_shows_the_similarity_of_that_patch(tmp_path):
    panel, other = maps(2), maps(2, seed=7)
    path = click_page([("other", other), ("own", panel)]).write(tmp_path / "page.html")
    text, console = after_scripts(path, CLICK)
    assert console == []
    written = re.findall(r'<pre id="found">(.*?)</pre>', text, re.S)[-1]  # the first is in the script itself
    found = json.loads(written.replace("&lt;", "<").replace("&gt;", ">"))
    assert found["said"] == "photo <1>: row 3, column 6"  # the click met row 2, column 6; the key moved it down
    expected = cosine_map(panel[1].features, (2, 5))
    np.testing.assert_allclose(np.array(found["values"][1]).reshape(6, 8), expected, atol=0.02)
    unit = torch.nn.functional.normalize(panel[0].features, dim=2)
    across = unit @ torch.nn.functional.normalize(panel[1].features[2, 5], dim=0)
    np.testing.assert_allclose(np.array(found["values"][0]).reshape(6, 8), across, atol=0.02)
    assert found["rings"] == [True, False]
    assert found["left"] == "68.75%"
    pixels = np.array(found["shown"][1]).reshape(6, 8, 4)
    lightness = pixels[..., :3] @ (0.2126, 0.7152, 0.0722)
    assert np.unravel_index(lightness.argmax(), (6, 8)) == (2, 5)
    order = expected.flatten().argsort()
    assert lightness.ravel()[order[-3:]].mean() > lightness.ravel()[order[:24]].mean() + 40
    assert (pixels[..., 3] == round(75 * 2.55)).all()


@pytest.mark.skipif(browser() is None, reason="needs Chromium")
def test_the_page_at_three_widths_in_both_themes(tmp_path):
    path = click_page([("own", maps(4))]).write(tmp_path / "page.html")
    for dark in (False, True):
        picture = tmp_path / f"{dark}.png"
        assert screenshot(path, picture, widths=(375, 768, 1280), height=900, dark=dark) == []
        image = Image.open(picture).convert("L")
        corners = [image.getpixel((left + 3, 3)) for left in (0, 375, 375 + 768)]
        assert max(corners) < 60 if dark else min(corners) > 230


def test_the_script_is_shipped_beside_the_module():
    page = click_page([("own", maps(1))]).html()
    assert "function similarities(image)" in page
    data = json.loads(re.search(r'id="panel">(.*?)</script>', page, re.S)[1])
    rows = np.frombuffer(base64.b64decode(data["models"][0]["rows"]), np.int8)
    assert rows.size == 48 * data["models"][0]["width"]
    assert len(data["colors"]) == 256 * 6
