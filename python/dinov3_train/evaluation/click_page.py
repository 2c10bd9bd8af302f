"""A page on which one clicks a patch and sees what is similar to it, in its own photograph and in all others.

One file without a server: photographs, features (reduced and in 8 bits) and the script are inside.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dinov3_train.evaluation.maps import PatchMap
from dinov3_train.evaluation.pictures import COLOR_MAP
from dinov3_train.report import Page

BUDGET = 3_000_000  # bytes of features of all backbones together, before base64 adds a third
CHECKED = 4096  # patches against which the reduced cosines of 64 others are compared


@dataclass(frozen=True)
class Quantized:
    """Features of all patches of a panel in 8 bits: int8 (patches, d), and the largest error of a cosine seen."""

    rows: Tensor
    error: float


def quantized(maps: Sequence[PatchMap], budget: int) -> Quantized:
    """Unit features on their first d principal axes (not centred: cosines stay cosines), each row at full scale.

    d = min(D, budget / patches); the scale of a row falls out of its cosines.

    Args:
        maps: of one backbone.
        budget: bytes.
    """
    unit = F.normalize(torch.cat([entry.features.flatten(0, 1) for entry in maps]), dim=1)  # (n, D)
    width = max(1, min(unit.shape[1], budget // len(unit)))
    axes = torch.linalg.eigh((unit.T @ unit).double()).eigenvectors[:, -width:].float()  # (D, d)
    reduced = unit @ axes
    rows = (reduced / reduced.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) * 127).round().to(torch.int8)
    back = F.normalize(rows.float(), dim=1)
    some, others = (torch.linspace(0, len(unit) - 1, min(n, len(unit))).long() for n in (64, CHECKED))
    error = (unit[some] @ unit[others].T - back[some] @ back[others].T).abs().max()
    return Quantized(rows, float(error))


def click_page(
    models: Sequence[tuple[str, Sequence[PatchMap]]], *, title: str = "Click a patch", budget: int = BUDGET
) -> Page:
    """The page.

    Args:
        models: (name, maps of the photographs) of each backbone; all of the same photographs, in one order.
        title: of the page.
        budget: bytes for the features of all backbones.

    Errors: ValueError for no backbone, no photograph, or backbones with different photographs.
    """
    names = [[entry.name for entry in maps] for _, maps in models]
    if not names or not names[0] or any(other != names[0] for other in names):
        raise ValueError(f"click_page: models expect the same photographs, at least one, got {[len(n) for n in names]}")
    packed = [quantized(maps, budget // len(models)) for _, maps in models]
    panel = {
        "images": [{"name": entry.name, "alt": f"photograph {entry.name}"} for entry in models[0][1]],
        "models": [
            {
                "name": name,
                "grids": [list(entry.grid) for entry in maps],
                "width": part.rows.shape[1],
                "rows": base64.b64encode(part.rows.numpy().tobytes()).decode("ascii"),
            }
            for (name, maps), part in zip(models, packed)
        ],
        "colors": _color_table(),
    }
    page = Page(
        title,
        "Click any patch, or move it with the arrow keys: every photograph shows where its like is. Bright is similar.",
    )
    page.embed(_body(panel, [_jpeg(entry.image) for entry in models[0][1]]))
    errors = ", ".join(f"{name} {part.error:.3f} ({part.rows.shape[1]} of {maps[0].features.shape[2]} dimensions)"
                       for (name, maps), part in zip(models, packed))  # fmt: skip
    page.text(
        "Features are kept in 8 bits on their principal axes, so that this page needs no server; the largest error of "
        f"a cosine found: {errors}."
    )
    script = files("dinov3_train.evaluation").joinpath("click_page.js").read_text()
    data = json.dumps(panel).replace("<", "\\u003c")
    return page.embed(f'<script type="application/json" id="panel">{data}</script>\n<script>\n{script}</script>')


def _body(panel: dict, pictures: Sequence[str]) -> str:
    last = len(panel["models"]) - 1
    options = "".join(
        f'<label><input type="radio" name="model" value="{number}"{" checked" if number == last else ""}> '
        f"{_escaped(model['name'])}</label>"
        for number, model in enumerate(panel["models"])
    )
    choice = f"<fieldset><legend>backbone</legend>{options}</fieldset>"
    figures = "".join(
        f'<figure class="click" data-image="{number}"><div><img src="{picture}" alt="{_escaped(image["alt"])}">'
        f'<canvas tabindex="0" role="button" aria-label="similarity over {_escaped(image["alt"])}"></canvas>'
        f'<span class="ring" hidden></span></div><figcaption>{_escaped(image["name"])}</figcaption></figure>'
        for number, (image, picture) in enumerate(zip(panel["images"], pictures))
    )
    return f"""<style>
.controls {{ display: flex; flex-wrap: wrap; gap: .75rem 1.5rem; align-items: center; margin: 1rem 0; position: sticky;
  top: 0; background: var(--paper); padding: .5rem 0; z-index: 2; }}
.controls fieldset {{ border: 1px solid var(--line); border-radius: 8px; padding: .2rem .8rem .4rem; }}
.controls label {{ margin-right: 1rem; }} .controls output {{ font-variant-numeric: tabular-nums; min-height: 1.5em; }}
.bar {{ display: inline-flex; align-items: center; gap: .5rem; }} .bar canvas {{ width: 120px; height: 14px; }}
.panel {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 260px), 1fr)); gap: 1rem; }}
.click {{ margin: 0; }} .click div {{ position: relative; }}
.click canvas {{ position: absolute; inset: 0; width: 100%; height: 100%; image-rendering: pixelated; cursor: crosshair;
  border-radius: 8px; }}
.click canvas:focus-visible {{ outline: 3px solid var(--s1); outline-offset: 2px; }}
.ring {{ position: absolute; width: 16px; height: 16px; margin: -8px 0 0 -8px; border: 3px solid #fff;
  border-radius: 50%; box-shadow: 0 0 0 2px #000, inset 0 0 0 1px #000; pointer-events: none; }}
.ring[hidden] {{ display: none; }}
</style>
<noscript><p>This page needs JavaScript, which runs on it alone and sends nothing.</p></noscript>
<div class="controls">{choice}
<label>map over photograph <input type="range" id="mix" min="0" max="100" value="75"></label>
<span class="bar"><span id="low"></span><canvas id="scale" width="256" height="1"></canvas><span>1</span></span>
<output id="said" aria-live="polite"></output></div>
<div class="panel">{figures}</div>"""


def _jpeg(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "jpeg", quality=85, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _color_table() -> str:
    """256 colours of the sheets' map as hexadecimal digits."""
    import matplotlib
    import numpy as np

    return matplotlib.colormaps[COLOR_MAP](np.arange(256), bytes=True)[:, :3].tobytes().hex()


def _escaped(text: str) -> str:
    from html import escape

    return escape(text)
