"""Openly licensed photographs inside the scikit-image and scikit-learn wheels, cut into training and held-out halves.

Nothing is downloaded. Licences are as the two packages state them (docstrings of `skimage.data`, README.txt of
`sklearn.datasets`); photographs of theirs without a stated open licence are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from dinov3_train.counter import uniform

GAP = 24  # pixels between the halves that belong to neither
WINDOW = 96  # side of the stored windows in pixels
SMALLEST = 0.4  # of a window, as a share of the half's short side

CC0 = "CC0 1.0"
PUBLIC = "public domain"
FREE = "no known copyright restrictions"
CC_BY = "CC BY 2.0"
FLICKR = "https://www.flickr.com/photos/"


@dataclass(frozen=True)
class Photograph:
    """A photograph: its class name, where its wheel keeps it, and whom to thank."""

    name: str
    package: str
    file: str
    credit: str
    licence: str
    url: str

    def open(self) -> Image.Image:
        """RGB. Errors: ValueError when the package is not installed or no longer holds the file."""
        spec = find_spec(self.package)
        if spec is None or spec.origin is None:
            distribution = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[self.package]
            raise ValueError(f"demo: the photograph {self.name!r} is inside {distribution}: pip install {distribution}")
        path = Path(spec.origin).parent / self.file
        if not path.is_file():
            raise ValueError(f"demo: expected the photograph {self.name!r} at {path}, which does not exist")
        with Image.open(path) as image:
            return image.convert("RGB")


def _scikit_image(name: str, file: str, credit: str, licence: str) -> Photograph:
    url = "https://scikit-image.org/docs/stable/api/skimage.data.html"
    return Photograph(name, "skimage", f"data/{file}", credit, licence, url)


def _scikit_learn(name: str, file: str, credit: str, photo: str) -> Photograph:
    return Photograph(name, "sklearn", f"datasets/images/{file}", credit, CC_BY, FLICKR + photo)


PHOTOGRAPHS = (
    _scikit_image("astronaut", "astronaut.png", "NASA (Eileen Collins)", PUBLIC),
    _scikit_image("cat", "chelsea.png", "Stefan van der Walt", CC0),
    _scikit_learn("pagoda", "china.jpg", "danielbuechele, Flickr", "danielbuechele/6061409035/"),
    _scikit_learn("dahlia", "flower.jpg", "vultilion, Flickr", "vultilion/6056698931/"),
    _scikit_image("coffee", "coffee.png", "Rachel Michetti, Pikolo Espresso Bar", CC0),
    _scikit_image("rocket", "rocket.jpg", "SpaceX", PUBLIC),
    _scikit_image("photographer", "camera.png", "Lav Varshney", CC0),
    _scikit_image("coins", "coins.png", "Brooklyn Museum Collection", FREE),
    _scikit_image("galaxies", "hubble_deep_field.jpg", "NASA, Hubble eXtreme Deep Field", PUBLIC),
    _scikit_image("retina", "retina.jpg", "Mikael Haggstrom, Wikimedia Commons", CC0),
    _scikit_image("tissue", "ihc.png", "Center for Microscopy and Molecular Imaging", FREE),
    _scikit_image("bricks", "brick.png", "CC0Textures", CC0),
    _scikit_image("gravel", "gravel.png", "CC0Textures", CC0),
    _scikit_image("grass", "grass.png", "linolafett, DeviantArt", CC0),
)


def halves(size: tuple[int, int]) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Boxes (left, top, right, bottom) of the training and the held-out half of an image of `size` = (width, height).

    The longer side is cut in the middle; a strip of `GAP` pixels there belongs to neither, so no pixel is in both.
    """
    width, height = size
    if width >= height:
        return (0, 0, (width - GAP) // 2, height), ((width + GAP) // 2, 0, width, height)
    return (0, 0, width, (height - GAP) // 2), (0, (height + GAP) // 2, width, height)


def window_boxes(name: str, box: tuple[int, int, int, int], count: int) -> list[tuple[int, int, int, int]]:
    """`count` square windows inside a box, a function of the name: side from 0.4 to 1 of the short side, anywhere."""
    left, top, right, bottom = box
    boxes = []
    for share, across, down in uniform(0, f"demo windows {name}", range(count), 3):
        side = round((SMALLEST + (1 - SMALLEST) * share) * min(right - left, bottom - top))
        x = left + int(across * (right - left - side + 1))
        y = top + int(down * (bottom - top - side + 1))
        boxes.append((x, y, x + side, y + side))
    return boxes


def write_windows(folder: Path, *, train: int, held_out: int) -> tuple[Path, Path]:
    """Write windows of every photograph as `folder/{train,held-out}/<name>/NNN.png`, each `WINDOW` pixels square.

    Args:
        train, held_out: windows of each photograph's half.

    The same folder and counts give the same files. Returns the two folders.
    """
    folders = folder / "train", folder / "held-out"
    for photograph in PHOTOGRAPHS:
        image = photograph.open()
        for target, box, count in zip(folders, halves(image.size), (train, held_out)):
            place = target / photograph.name
            place.mkdir(parents=True, exist_ok=True)
            for number, window in enumerate(window_boxes(f"{target.name} {photograph.name}", box, count)):
                pixels = image.resize((WINDOW, WINDOW), Image.Resampling.BICUBIC, box=window)
                pixels.save(place / f"{number:03d}.png", compress_level=1)
    return folders
