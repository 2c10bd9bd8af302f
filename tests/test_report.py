"""Pages stand alone, are ASCII, escape what they are given; curves go through their points; metrics survive a kill."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dinov3_train.report import Link, Page, curve_svg, data_uri, read_metrics, running_mean, series

VOID = {"meta", "img", "line", "path", "polyline"}


class Document(HTMLParser):
    """Fails on tags that do not nest; collects attributes and text."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.attributes, self.words = [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def full_page() -> Page:
    image = Image.linear_gradient("L").convert("RGB")
    return (
        Page("A <run> & its features", "What it learned")
        .section("Curves", "First.", "Second, gr\u00fcn.")
        .numbers([("0.91", "k-NN"), ("12", "images/s")])
        .curve({"loss": ([0, 1, 2], [3.0, 2.0, 1.5]), "ibot": ([0, 2], [1, 1])}, title="Loss", x_label="step", smooth=2)
        .picture(image, "a gradient")
        .gallery([(image, 'one "quoted"'), (image, "two")])
        .row([(image, "left"), (image, "right")])
        .table(["photograph", "licence"], [["cat", Link("CC0", "https://example.org/?a=1&b=2")]])
    )


def test_page_is_whole_ascii_and_alone(tmp_path):
    path = full_page().write(tmp_path / "deep" / "page.html")
    text = path.read_bytes().decode("ascii")
    document = Document(text)
    sources = [value for _, name, value in document.attributes if name in ("src", "srcset", "data")]
    assert len(sources) == 5
    assert all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"<(script|link|iframe)|@import|url\(", text)
    assert [value for _, name, value in document.attributes if name == "href"] == ["https://example.org/?a=1&b=2"]
    words = "".join(document.words)
    assert "A <run> & its features" in words
    assert "gr\u00fcn" in words
    assert ("img", "alt", 'one "quoted"') in document.attributes
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert 'name="viewport"' in text
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]


def test_same_page_same_bytes():
    assert full_page().html() == full_page().html()


def test_curve_goes_through_its_points():
    svg = curve_svg({"loss": ([0, 50, 100], [0.0, 10.0, 5.0])}, title="t", x_label="step")
    (points,) = re.findall(r'points="([^"]+)"', svg)
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, point.split(","))) for point in points.split()]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y2 - y1 == pytest.approx((y0 - y1) / 2, abs=0.2)
    assert y0 > y1
    assert ">100<" in svg
    assert ">10<" in svg


def test_curve_leaves_gaps_and_accepts_flat_or_single_values():
    svg = curve_svg({"a": ([0, 1, 2, 3, 4], [1, 2, float("nan"), 2, float("inf")])}, title="t", x_label="x")
    assert svg.count("<polyline") == 2
    for xs, ys in (([3], [7]), ([0, 1], [2.0, 2.0]), ([0, 1], [0, 0]), ([0, 1], [-1e-9, 1e9])):
        assert "nan" not in curve_svg({"a": (xs, ys)}, title="t", x_label="x")


def test_running_mean():
    assert running_mean([1, 2, 3, 4], 1) == [1, 2, 3, 4]
    assert running_mean([1, 2, 3, float("nan")], 3) == [1.5, 2, 2.5, 3]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="'loss' expects as many x as y, got 2 and 1"):
        Page("p").curve({"loss": ([0, 1], [1])}, title="t", x_label="x")
    with pytest.raises(ValueError, match="at least one finite point"):
        Page("p").curve({"loss": ([0], [float("nan")])}, title="t", x_label="x")
    with pytest.raises(ValueError, match="expect 2 cells, got 1"):
        Page("p").table(["a", "b"], [["only"]])
    with pytest.raises(ValueError, match=r"metrics.jsonl does not exist"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_metrics_survive_a_cut_line_but_not_a_damaged_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.5}\n{"step": 2, "knn": 0.5}\n{"step": 3, "loss": 2}\n{"step": 4, "lo')
    rows = read_metrics(path)
    assert series(rows, "loss") == ([1.0, 3.0], [3.5, 2.0])
    assert series(rows, "knn") == ([2.0], [0.5])
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_metrics(path)


def test_flat_maps_are_kept_exact_and_photographs_small():
    patches = Image.effect_noise((16, 16), 80).convert("RGB").resize((256, 256), Image.Resampling.NEAREST)
    assert data_uri(patches).startswith("data:image/png;base64,")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    photograph = Image.fromarray(noise).resize((256, 256), Image.Resampling.BICUBIC)
    assert data_uri(photograph).startswith("data:image/jpeg;base64,")


def test_transparent_parts_stay_transparent():
    picture = Image.new("RGBA", (64, 32), (0, 0, 0, 0))
    picture.paste((200, 30, 30, 255), (0, 0, 32, 32))
    kind, data = data_uri(picture).split(";base64,")
    assert kind == "data:image/webp"
    back = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA")
    assert back.getpixel((48, 16))[3] == 0
    assert back.getpixel((16, 16))[0] > 180
