"""What goes with exported weights for people to read: where they come from, their licence, how to use them."""

from __future__ import annotations

from pathlib import Path

from . import licences
from .resolved import Resolved

IDENTIFIERS = {  # of a model card's header: (license, license_name)
    licences.DINOV3: ("other", "dinov3-license"),
    licences.KNOWN["apache-2.0"]: ("apache-2.0", None),
    licences.KNOWN["mit"]: ("mit", None),
    licences.KNOWN["cc-by-nc-4.0"]: ("cc-by-nc-4.0", None),
}
USE = {
    "hf": 'model = transformers.AutoModel.from_pretrained("{name}")',
    "timm": 'model = timm.create_model("local-dir:{name}", pretrained=True, num_classes=0)',
    "meta": 'state = torch.load("{name}", weights_only=True)  # the keys of the released DINOv3 files',
    "safetensors": 'backbone = dinov3_train.load("{name}")',
    "onnx": 'session = onnxruntime.InferenceSession("{name}")  # images (B, 3, Y, X) -> cls, registers, patches',
}


def note(found: Resolved, name: str, to: str) -> str:
    """Plain text: origin, licence, architecture, how images are prepared, how it is loaded."""
    shape = found.architecture
    numbers = [" ".join(f"{value:g}" for value in values) for values in (found.mean, found.std)]
    return (
        f"Weights: {name}, {shape.name}, features of width {shape.embed_dim}, patches of {shape.patch_size} pixels.\n"
        f"Exported by dinov3-ext from: {found.origin}\n"
        f"Licence of these weights: {found.licence}\n"
        f"Images: RGB in [0, 1], minus mean {numbers[0]}, divided by {numbers[1]}; {found.size} x {found.size} pixels "
        f"or any other multiple of {found.side_multiple}.\n"
        f"To load: {USE[to].format(name=name)}\n"
    )


def card(found: Resolved, name: str, to: str) -> str:
    """The note as a model card, its licence in the header where one is known."""
    licence, licence_name = IDENTIFIERS.get(found.licence, (None, None))
    header = [f"library_name: {'transformers' if to == 'hf' else 'timm'}", "pipeline_tag: image-feature-extraction"]
    if licence is not None:
        header.append(f"license: {licence}")
    if licence_name is not None:
        header.append(f"license_name: {licence_name}")
    return "---\n" + "\n".join(header) + f"\n---\n\n# {name}\n\n" + note(found, name, to).replace("\n", "\n\n")


def write_beside(found: Resolved, path: Path, to: str) -> list[Path]:
    """The files for people: `README.md` and `LICENSE.txt` inside a folder, `<file>.license.txt` beside a file."""
    text = note(found, path.name, to)
    if path.is_dir():
        (path / "README.md").write_text(card(found, path.name, to))
        (path / "LICENSE.txt").write_text(text)
        return []
    beside = path.with_name(path.name + ".license.txt")
    beside.write_text(text)
    return [beside]
