"""Settings of probes by name: those of the released evaluation code and of the paper, as far as probes on features
that are extracted once can follow them."""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Values of a probe's options, and where they come from and differ."""

    values: dict[str, object]
    note: str


_ONE_VIEW = "features of one view of each image; the original trains on random crops and flips"
_TEN_VIEWS = "ten random crops and flips of each image in turn; the original draws a new one each time"
_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)

PRESETS: dict[str, dict[str, Preset]] = {
    "knn": {
        "dinov3": Preset(
            {"size": 224, "short_side": 256, "pooling": "cls", "k": (10, 20, 100, 200), "temperature": 0.07},
            "as the released evaluation",
        ),
    },
    "logistic": {
        "dinov3": Preset(
            {
                "size": 224,
                "pooling": "cls",
                "strengths": tuple(10.0 ** (-6 + 11 * number / 44) for number in range(45)),
                "held_out": 0.1,
                "iterations": 1000,
                "tolerance": 1e-12,
            },
            "as the released evaluation",
        ),
    },
    "linear": {
        "dinov3": Preset(
            {
                "size": 224,
                "short_side": 256,
                "pooling": "cls+patch",
                "optimizer": "sgd",
                "learning_rates": tuple(rate * 128 / 256 for rate in _RATES),
                "weight_decays": (0.0,),
                "steps": 12500,
                "views": 10,
                "batch_size": 128,
            },
            f"as the released evaluation, rates for one GPU; {_TEN_VIEWS}",
        ),
        "paper": Preset(
            {
                "size": 224,
                "short_side": 256,
                "pooling": "cls",
                "optimizer": "sgd",
                "learning_rates": tuple(rate * 1024 / 256 for rate in _RATES),
                "weight_decays": (0.0, 1e-5),
                "steps": 12500,
                "views": 10,
                "batch_size": 1024,
            },
            f"as the paper's text, with the rates of the released evaluation; {_TEN_VIEWS}",
        ),
    },
    "segment": {
        "dinov3": Preset(
            {
                "size": 512,
                "resize": "squash",
                "optimizer": "adamw",
                "learning_rates": (1e-3,),
                "weight_decays": (1e-3,),
                "steps": 40000,
                "batch_size": 16,
                "warmup": 1500,
                "dropout": 0.1,
                "upsample": 16,
            },
            f"as the released evaluation; {_ONE_VIEW}, and judges sliding windows of 512 px instead of the whole image",
        ),
        "paper": Preset(
            {
                "size": 512,
                "resize": "squash",
                "optimizer": "adamw",
                "learning_rates": (1e-4, 3e-4, 1e-3),
                "weight_decays": (1e-4, 1e-3),
                "steps": 40000,
                "batch_size": 16,
                "warmup": 1500,
                "dropout": 0.1,
                "upsample": 16,
            },
            f"as the paper's grid of rates; {_ONE_VIEW}",
        ),
    },
    "depth": {
        "dinov3": Preset(
            {
                "size": 480,
                "resize": "squash",
                "bins": 256,
                "nearest": 0.001,
                "farthest": 10.0,
                "optimizer": "adamw",
                "learning_rates": (3e-4,),
                "betas": (0.9, 0.99),
                "weight_decays": (1e-4,),
                "steps": 38400,
                "batch_size": 16,
                "warmup": 12800,
                "clip": 35.0,
            },
            f"as the released evaluation on NYU, in squares of 480 px for crops of 416 x 544; {_ONE_VIEW}",
        ),
    },
}


def preset(probe: str, name: str) -> Preset:
    """Errors: ValueError for a preset that the probe does not have, naming those it has."""
    known = PRESETS.get(probe, {})
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; nearest: {close[0]}" if close else ""
        raise ValueError(f"preset: evaluate {probe} has {', '.join(known) or 'none'}, got {name!r}{hint}")
    return known[name]
