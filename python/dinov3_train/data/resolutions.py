"""Mixed resolutions: which crop sides a step has, as a pure function of (seed, step)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .. import counter
from ..config import Crops


def resolutions(crops: Crops) -> list[tuple[float, Crops]]:
    """Every entry of the mix as (probability, crops of those sides); without a mix the crops themselves, 1.0."""
    return [
        (share, replace(crops, global_size=wide, local_size=local, gram_size=gram or None, mix=()))
        for wide, local, gram, share in crops.mix
    ] or [(1.0, crops)]


def resolution(crops: Crops, *, seed: int, step: int) -> int:
    """Which entry of `resolutions(crops)` serves this step: the same for all ranks, workers and micro-batches."""
    if not crops.mix:
        return 0
    edges = np.cumsum([share for share, _ in resolutions(crops)])
    return int(np.searchsorted(edges / edges[-1], counter.uniform(seed, "resolution", step, 1)[0], side="right"))
