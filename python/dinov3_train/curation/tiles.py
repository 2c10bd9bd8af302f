"""Thumbnails of a pool's images, and sheets of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw, ImageOps

from ..data.decode import UnreadableImage, decode
from ..data.sources import Source

TILE, GAP, COLUMNS = 112, 4, 6  # pixels; pictures of a sheet side by side
RING = (255, 176, 0)
GREY = (122, 127, 136)  # of what cannot be read, and of what was left out


@dataclass
class Tiles:
    """Thumbnails by (source, index); each source is opened once. Errors: ValueError for one that cannot be opened."""

    open_source: Callable[[str], Source]
    _sources: dict[str, Source] = field(default_factory=dict)

    def source(self, spec: str) -> Source:
        """The opened source."""
        if spec not in self._sources:
            self._sources[spec] = self.open_source(spec)
        return self._sources[spec]

    def tile(self, spec: str, index: int) -> Image.Image:
        """A square of `TILE` pixels from the middle of the image, a grey one where it cannot be read."""
        source = self.source(spec)

        def reduction(width: int, height: int) -> int:
            return max(1, min(width, height) // TILE)

        try:
            picture = decode(source.read(index), source.name(index), reduction=reduction)
        except (UnreadableImage, OSError):
            return Image.new("RGB", (TILE, TILE), GREY)
        return ImageOps.fit(picture, (TILE, TILE), Image.Resampling.LANCZOS)


def sheet(tiles: Sequence[tuple[Image.Image, str]], columns: int = COLUMNS) -> Image.Image:
    """Pictures side by side, each shown "plain", "ringed" or "dimmed", in lines of `columns`; nothing between them."""
    lines = -(-len(tiles) // columns)
    paper = Image.new("RGBA", (columns * (TILE + GAP) - GAP, lines * (TILE + GAP) - GAP), (0, 0, 0, 0))
    for number, (tile, how) in enumerate(tiles):
        left, top = number % columns * (TILE + GAP), number // columns * (TILE + GAP)
        if how == "dimmed":
            grey = ImageOps.grayscale(tile).convert("RGB")
            tile = Image.blend(grey, Image.new("RGB", tile.size, GREY), 0.5)
        paper.paste(tile, (left, top))
        if how == "ringed":
            box, draw = (left, top, left + TILE - 1, top + TILE - 1), ImageDraw.Draw(paper)
            draw.rectangle(box, outline=(0, 0, 0), width=6)
            draw.rectangle(box, outline=RING, width=4)
    return paper
