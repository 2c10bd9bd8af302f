"""Sheets of pictures: photographs beside the maps of their patch features, as one image that can be saved as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from dinov3_train.evaluation.maps import PatchMap, cosine_map, patch_at, patch_maps, pca_colors
from dinov3_train.evaluation.view import View

PAPER, INK, FAINT = (255, 255, 255), (24, 26, 31), (104, 110, 122)
COLOR_MAP = "magma"  # lightness rises evenly, so the map reads in grey and without colour vision
MARGIN, GAP, TILE_GAP = 48, 40, 8
TITLE, TEXT, SMALL = 30, 19, 16


@dataclass(frozen=True)
class Strip:
    """Pictures of one photograph side by side, all of one aspect, under one caption; one heading for each picture."""

    caption: str
    tiles: tuple[Image.Image, ...]
    headings: tuple[str, ...] = ()


def pca_sheet(
    backbone: nn.Module,
    images: Sequence[tuple[str, Image.Image]],
    view: View,
    *,
    title: str = "Patch features, first three principal components as colours",
    smooth: bool = False,
    tile: int = 420,
    columns: int = 2,
) -> Image.Image:
    """Each photograph beside the first three principal components of its patch features as red, green and blue.

    One basis for all photographs: equal colours mean similar features.

    Args:
        backbone: has `features` and `patch_size`.
        images: (name, RGB image) pairs, at least one.
        view: its `size` is the short side in pixels at which the backbone sees each photograph.
        smooth: bicubic enlargement of the map instead of visible patches.
        tile: width of one picture in pixels.
        columns: pairs side by side.
    """
    maps = patch_maps(backbone, images, view)
    colors = pca_colors([entry.features for entry in maps])
    strips = [
        Strip(entry.name, (entry.image, enlarged(color, entry.image.size, smooth)), ("photograph", "patch features"))
        for entry, color in zip(maps, colors)
    ]
    return sheet(strips, title=title, note=_note(backbone, view), tile=tile, columns=columns)


def cosine_sheet(
    backbone: nn.Module,
    images: Sequence[tuple[str, Image.Image]],
    points: Sequence[Sequence[tuple[float, float]]],
    view: View,
    *,
    title: str = "Cosine similarity of one patch to all others",
    smooth: bool = False,
    tile: int = 420,
    columns: int = 1,
) -> Image.Image:
    """Each photograph beside one map for each chosen point; the point is ringed in the photograph and in its map.

    All maps share one colour scale, printed under the sheet, from the first percentile of all similarities to 1.

    Args: as `pca_sheet`, and
        points: for each image its points (x, y), shares of width and height in [0, 1], origin at the top left.

    Errors: ValueError for a number of point lists other than of images, an image without a point, a point outside.
    """
    if len(points) != len(images) or not all(points):
        counts = [len(entry) for entry in points]
        raise ValueError(f"cosine_sheet: points expects at least one for each of {len(images)} images, got {counts}")
    maps = patch_maps(backbone, images, view)
    patches = [[patch_at(entry.grid, point) for point in chosen] for entry, chosen in zip(maps, points)]
    cosines = [[cosine_map(entry.features, patch) for patch in chosen] for entry, chosen in zip(maps, patches)]
    low = cosine_floor([cosine for row in cosines for cosine in row])
    strips = [
        cosine_strip(entry, chosen, row, low=low, smooth=smooth) for entry, chosen, row in zip(maps, patches, cosines)
    ]
    return sheet(
        strips, title=title, note=_note(backbone, view), tile=tile, columns=columns, bar=(low, 1.0, "cosine similarity")
    )


def cosine_strip(
    entry: PatchMap, patches: Sequence[tuple[int, int]], cosines: Sequence[Tensor], *, low: float, smooth: bool = False
) -> Strip:
    """The photograph with its chosen patches ringed and numbered, and each one's map (h, w) scaled from `low` to 1."""
    side = entry.image.width // entry.grid[1]
    centres = [((column + 0.5) * side, (row + 0.5) * side) for row, column in patches]
    labels = [str(number + 1) if len(patches) > 1 else "" for number in range(len(patches))]
    photograph = entry.image
    tiles = []
    for centre, label, cosine in zip(centres, labels, cosines):
        photograph = ringed(photograph, centre, label)
        shares = (cosine.numpy() - low) / max(1.0 - low, 1e-6)
        tiles.append(ringed(enlarged(colored(shares), entry.image.size, smooth), centre, label))
    headings = tuple(f"similarity to patch {label}".rstrip() for label in labels)
    return Strip(entry.name, (photograph, *tiles), ("photograph", *headings))


def cosine_floor(cosines: Sequence[Tensor]) -> float:
    """The low end of a colour scale shared by maps (h, w): their first percentile, rounded down to a step of 0.05."""
    values = np.concatenate([cosine.numpy().ravel() for cosine in cosines])
    return float(max(-1.0, min(0.95, np.floor(np.percentile(values, 1) * 20) / 20)))


def colored(shares: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3) of shares (h, w) in [0, 1] in the sheet's colour map; values outside are cut."""
    import matplotlib

    return matplotlib.colormaps[COLOR_MAP](np.clip(shares, 0, 1), bytes=True)[..., :3]


def enlarged(colors: np.ndarray, size: tuple[int, int], smooth: bool) -> Image.Image:
    """The map uint8 (h, w, 3) at `size` = (width, height) pixels, as visible patches or bicubic."""
    return Image.fromarray(colors).resize(size, Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST)


def ringed(image: Image.Image, centre: tuple[float, float], label: str = "") -> Image.Image:
    """A copy with a white ring, dark on both sides, around a point in pixels, and a label beside it."""
    scale, radius = 4, max(image.size) / 40  # drawn four times too large and reduced: Pillow's circles are jagged
    half = round(radius * 2.6)
    size = 2 * half * scale
    patch, middle = Image.new("RGBA", (size, size)), size / 2
    draw = ImageDraw.Draw(patch)
    for share, width, color in ((1.25, 0.75, (0, 0, 0, 150)), (1.1, 0.45, (255, 255, 255, 255))):
        reach = radius * share * scale
        box = (middle - reach, middle - reach, middle + reach, middle + reach)
        draw.ellipse(box, outline=color, width=round(radius * width * scale))
    if label:
        ink = {"fill": (255, 255, 255), "stroke_fill": (0, 0, 0), "stroke_width": round(radius * 0.2 * scale)}
        side = -1 if centre[0] > 0.9 * image.width else 1
        at = (middle + side * radius * 1.3 * scale, middle - radius * 1.3 * scale)
        draw.text(
            at, label, font=font(round(radius * 2.2 * scale), bold=True), anchor="lm" if side > 0 else "rm", **ink
        )
    patch = patch.resize((2 * half, 2 * half), Image.Resampling.LANCZOS)
    result = image.convert("RGBA")
    result.alpha_composite(*_clipped(patch, (round(centre[0]) - half, round(centre[1]) - half), image.size))
    return result.convert("RGB")


def sheet(
    strips: Sequence[Strip],
    *,
    title: str,
    note: str = "",
    tile: int = 420,
    columns: int = 2,
    bar: tuple[float, float, str] | None = None,
) -> Image.Image:
    """All strips on white paper, left to right and down, under a title.

    Args:
        strips: one number of tiles in each.
        title, note: large and small line at the top.
        tile: width of each picture in pixels; its height follows from the aspect.
        columns: strips side by side.
        bar: low end, high end and name of the colour scale to print at the bottom.

    Errors: ValueError for no strips or differing numbers of tiles.
    """
    if len({len(strip.tiles) for strip in strips}) != 1:
        raise ValueError(f"sheet: strips expect one number of tiles each, got {[len(strip.tiles) for strip in strips]}")
    columns = min(columns, len(strips))
    blocks = [_block(strip, tile) for strip in strips]
    rows = [blocks[start : start + columns] for start in range(0, len(blocks), columns)]
    width = blocks[0].width
    head = TITLE + (TEXT + 18 if note else 0) + GAP
    paper_width = 2 * MARGIN + max(
        columns * width + (columns - 1) * GAP, round(font(TITLE, bold=True).getlength(title))
    )
    heights = [max(block.height for block in row) for row in rows]
    total = 2 * MARGIN + head + sum(heights) + GAP * (len(rows) - 1) + (GAP + 56 if bar else 0)
    paper = Image.new("RGB", (paper_width, total), PAPER)
    draw = ImageDraw.Draw(paper)
    draw.text((MARGIN, MARGIN), title, INK, font(TITLE, bold=True), anchor="lt")
    draw.text((MARGIN, MARGIN + TITLE + 16), note, FAINT, font(TEXT), anchor="lt")
    top = MARGIN + head
    for row, height in zip(rows, heights):
        for column, block in enumerate(row):
            paper.paste(block, (MARGIN + column * (width + GAP), top))
        top += height + GAP
    if bar:
        _draw_bar(paper, top, *bar)
    return paper


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, as matplotlib ships it."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _block(strip: Strip, tile: int) -> Image.Image:
    pictures = [_fitted(picture, tile) for picture in strip.tiles]
    above = SMALL + 12 if strip.headings else 0
    height = above + max(picture.height for picture in pictures) + TEXT + 16
    block = Image.new("RGB", (len(pictures) * (tile + TILE_GAP) - TILE_GAP, height), PAPER)
    draw = ImageDraw.Draw(block)
    for number, picture in enumerate(pictures):
        left = number * (tile + TILE_GAP)
        block.paste(picture, (left, above))
        if strip.headings:
            draw.text((left, 0), strip.headings[number], FAINT, font(SMALL), anchor="lt")
    draw.text((0, height - TEXT - 2), strip.caption, INK, font(TEXT), anchor="lt")
    return block


def _fitted(picture: Image.Image, width: int) -> Image.Image:
    height = max(1, round(picture.height * width / picture.width))
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _draw_bar(paper: Image.Image, top: int, low: float, high: float, name: str) -> None:
    width, height, ticks = 420, 18, 5
    ramp = np.repeat(colored(np.linspace(0, 1, width))[None], height, axis=0)
    paper.paste(Image.fromarray(ramp), (MARGIN, top))
    draw = ImageDraw.Draw(paper)
    for tick in range(ticks):
        share = tick / (ticks - 1)
        x = MARGIN + share * (width - 1)
        draw.line((x, top + height, x, top + height + 5), FAINT)
        anchor = "l" if tick == 0 else "r" if tick == ticks - 1 else "m"
        draw.text((x, top + height + 10), f"{low + share * (high - low):.2f}", FAINT, font(SMALL), anchor=anchor + "t")
    draw.text((MARGIN + width + 20, top + height / 2), name, INK, font(TEXT), anchor="lm")


def _clipped(patch: Image.Image, corner: tuple[int, int], size: tuple[int, int]) -> tuple[Image.Image, tuple[int, int]]:
    left, top = max(0, -corner[0]), max(0, -corner[1])
    right, bottom = min(patch.width, size[0] - corner[0]), min(patch.height, size[1] - corner[1])
    return patch.crop((left, top, right, bottom)), (corner[0] + left, corner[1] + top)


def _note(backbone: nn.Module, view: View) -> str:
    return f"short side {view.size} px, patches of {backbone.patch_size} px"
