"""A torchvision dataset by name, as a source of images."""

from __future__ import annotations

import difflib
import inspect

from PIL import Image

from .sources import Source


def open_torchvision(spec: str) -> Source:
    """`torchvision:NAME[:key=value]...`: root=PATH, split=..., train=true, download=true, whatever the dataset takes.

    `split=train` or `split=test` also serves the datasets that have a `train` switch. Nothing is downloaded unless
    `download=true` is given. Errors: an unknown name or option, with the nearest; a dataset that is not there.
    """
    import torchvision.datasets as datasets  # slow to import, and no other source needs it

    name, *options = spec.split(":")[1:]
    if name not in datasets.__all__:
        close = difflib.get_close_matches(name, datasets.__all__, n=3, cutoff=0.4)
        hint = f"; nearest: {', '.join(close)}" if close else ""
        raise ValueError(f"data: torchvision has no dataset {name!r}{hint}")
    builder = getattr(datasets, name)
    arguments = _arguments(spec, options, set(inspect.signature(builder.__init__).parameters) - {"self"})
    try:
        return TorchvisionSource(name, builder(**arguments))
    except (RuntimeError, OSError, TypeError, ValueError, ImportError) as error:
        raise ValueError(f"data: {spec}: {error} (root=PATH says where it lies, download=true fetches it)") from error


def _arguments(spec: str, options: list[str], accepted: set[str]) -> dict[str, str | bool | int]:
    """Keyword arguments from `key=value` texts, each key one the dataset takes."""
    arguments: dict[str, str | bool | int] = {}
    for option in options:
        key, equals, text = option.partition("=")
        if key == "split" and "split" not in accepted and "train" in accepted and text in ("train", "test"):
            key, text = "train", str(text == "train").lower()
        if not equals or key not in accepted:
            usable = sorted(accepted - {"transform", "target_transform", "transforms", "loader"})
            raise ValueError(f"data: {spec}: expected options out of {', '.join(usable)} as key=value, got {option!r}")
        switches = {"true": True, "false": False}
        arguments[key] = switches.get(text.lower(), int(text) if text.isdigit() else text)
    if "root" in accepted and "root" not in arguments:
        raise ValueError(f"data: {spec}: expected root=PATH, the folder of the dataset, got none")
    return arguments


class TorchvisionSource(Source):
    """The images of a torchvision dataset; labels where its target is one integer."""

    def __init__(self, name: str, dataset) -> None:
        self._name, self._dataset = name, dataset
        classes = getattr(dataset, "classes", None)
        self.classes = [str(entry) for entry in classes] if isinstance(classes, (list, tuple)) else None
        targets = getattr(dataset, "targets", None)
        self._targets = targets if targets is not None and len(targets) == len(dataset) else None
        if len(dataset) == 0:
            raise ValueError("the dataset is empty")

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, index: int) -> str:
        return f"torchvision:{self._name}[{index}]"

    def read(self, index: int) -> Image.Image:
        image = self._dataset[index][0]
        if not isinstance(image, Image.Image):
            raise ValueError(f"data: {self.name(index)}: expected a PIL image, got {type(image).__name__}")
        return image

    def label(self, index: int) -> int | None:
        target = self._targets[index] if self._targets is not None else self._dataset[index][1]
        try:
            return int(target)
        except (TypeError, ValueError):
            return None
