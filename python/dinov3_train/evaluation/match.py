"""Correspondence of patch features: between an image and a warped copy, and between pairs with known keypoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dinov3_train.counter import uniform
from dinov3_train.data.batch import patch_grid
from dinov3_train.data.decode import UnreadableImage, decode
from dinov3_train.evaluation.extract import evaluating, forward, groups_of
from dinov3_train.evaluation.measure import ProbeResult, by_group, measured, ratio_of
from dinov3_train.evaluation.reading import prepared, warn_unreadable
from dinov3_train.evaluation.view import View

if TYPE_CHECKING:
    from dinov3_train.data.sources import Source


@dataclass(frozen=True, kw_only=True)
class MatchSettings:
    """How correspondences are asked for.

    images: at most so many, spread evenly over the source; None: all.
    strength: how far a corner moves in the warped copy at most, as a share of the side, in (0, 0.5).
    thresholds: a match counts as right within these shares of the side, ascending.
    keypoints: corners looked for in an image.
    layer: block whose patches are used, from 0; None: the last; precision: of the backbone; seed: of the warps.
    """

    images: int | None = 200
    strength: float = 0.2
    thresholds: tuple[float, ...] = (0.05, 0.1)
    keypoints: int = 64
    layer: int | None = None
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self):
        if self.images is not None and self.images < 1:
            raise ValueError(f"images: expected at least 1, got {self.images}")
        if not 0 < self.strength < 0.5:
            raise ValueError(f"strength: expected a share of the side in (0, 0.5), got {self.strength}")
        if not self.thresholds or list(self.thresholds) != sorted(self.thresholds) or self.thresholds[0] <= 0:
            raise ValueError(f"thresholds: expected ascending shares of the side above 0, got {self.thresholds}")
        if self.keypoints < 1:
            raise ValueError(f"keypoints: expected at least 1, got {self.keypoints}")


@dataclass(frozen=True)
class KeypointPair:
    """Two image files with points that show the same thing: source_points, target_points (n, 2), x and y in pixels.

    reach: length in pixels of the target that `thresholds` are shares of (the object's longer side, as in SPair-71k);
    None: the longer side of the target image.
    """

    source: Path
    target: Path
    source_points: tuple[tuple[float, float], ...]
    target_points: tuple[tuple[float, float], ...]
    reach: float | None = None
    group: str | None = None


DEFAULTS = MatchSettings()


def evaluate_match(
    backbone: nn.Module,
    source: Source,
    view: View,
    *,
    settings: MatchSettings = DEFAULTS,
    group: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ProbeResult:
    """Find the patches of an image in a copy warped by a known homography.

    Each point of the image whose place in the copy is known is matched to the copy's most similar patch (cosine). PCK@a
    is the share of points whose match lies within a of the side from the true place: "pck" for all patch centres,
    "keypoint_pck" for Harris corners, whose feature is interpolated between patches. "cycle_consistency" is the share
    of patch centres that come back to within one patch when the match is matched back; features without meaning reach
    about half, as nearest neighbours are often mutual.

    Args:
        backbone: has `features` and `patch_size`; on any device.
        source: images; no labels are needed.
        view: size, crop and normalisation.
        settings: number of images, warps, distances.
        group: name of what the source says about its images, by which PCK is also given.
        progress: called with (what, done, in all).

    Errors: ValueError for no images or none readable.
    Source: correspondence under homographies as in HPatches (arXiv 1704.05939); PCK of Yang and Ramanan (2013).
    """
    grid = (patch_grid(view.size, backbone.patch_size, "size"),) * 2
    if len(source) == 0:
        raise ValueError("match: expected at least one image, got an empty source")
    count = min(settings.images or len(source), len(source))
    numbers = [index * len(source) // count for index in range(count)]
    groups = None if group is None else dict(zip(numbers, groups_of(source, numbers, group)))
    rows, seen, unreadable = [], [], []
    with evaluating(backbone):
        for readable, failed in prepared(source, lambda image, *_: view.pixels(image), numbers=numbers, batch_size=16):
            unreadable += failed
            for number, pixels in readable:
                matrix = homography(settings.seed, number, settings.strength)
                copy = warped(pixels, matrix)
                found = forward(backbone, torch.stack([pixels, copy]), view, settings.precision, settings.layer)
                maps = [F.normalize(one.float(), dim=1).cpu() for one in found.patches]
                rows.append(_judged(maps, pixels, matrix, grid, settings))
                seen.append(number)
            if progress is not None:
                progress("images", len(seen) + len(unreadable), count)
    warn_unreadable("match", unreadable, count)
    if not rows:
        raise ValueError(f"match: expected at least one readable image, got {count} and none: {unreadable[0]}")
    values = torch.stack(rows)  # (n, M, 3)
    names = _names(settings)
    metrics = {name: measured(ratio_of(values[:, n, 0], values[:, n, 1])) for n, name in enumerate(names)}
    chance = {
        name: float(values[:, n, 2].sum() / values[:, n, 1].sum().clamp_min(1)) for n, name in enumerate(names[:-1])
    }
    main = ratio_of(values[:, 0, 0], values[:, 0, 1])
    return ProbeResult(
        probe="match",
        metrics=metrics,
        chance=chance,
        counts={"images": len(seen), "points": int(values[:, 0, 1].sum()), "keypoints": int(values[:, -2, 1].sum())},
        settings={**view.to_dict(), **asdict(settings)},
        groups=None if groups is None else by_group(names[0], main, [groups[number] for number in seen]),
    )


def evaluate_pairs(
    backbone: nn.Module,
    pairs: Sequence[KeypointPair],
    view: View,
    *,
    settings: MatchSettings = DEFAULTS,
    progress: Callable[[str, int, int], None] | None = None,
) -> ProbeResult:
    """Find the keypoints of one image in another: PCK over all points whose both places the view shows.

    Features at keypoints are interpolated between patches; the match is the centre of the most similar patch of the
    target; distances are measured in the target's own pixels, in shares of the pair's reach.

    Errors: ValueError for no pairs, images that cannot be read, or no point in view.
    Source: the semantic correspondence of SPair-71k (arXiv 1908.10543).
    """
    side = patch_grid(view.size, backbone.patch_size, "size")
    if not pairs:
        raise ValueError("match: expected at least one pair of images, got none")
    rows = []
    with evaluating(backbone):
        for done, pair in enumerate(pairs):
            images = [_opened(path) for path in (pair.source, pair.target)]
            pixels = torch.stack([view.pixels(image) for image in images])
            found = forward(backbone, pixels, view, settings.precision, settings.layer)
            maps = [F.normalize(one.float(), dim=1).cpu() for one in found.patches]
            rows.append(_judged_pair(maps, images, pair, view, side, settings.thresholds))
            if progress is not None:
                progress("pairs", done + 1, len(pairs))
    values = torch.stack(rows)  # (n, T, 3)
    if not values[:, 0, 1].sum() > 0:
        raise ValueError("match: expected keypoints inside the view, got none in any pair (resize=squash shows all)")
    names = [f"pck@{threshold:g}" for threshold in settings.thresholds][::-1]
    values = values.flip(1)
    groups = [pair.group for pair in pairs]
    main = ratio_of(values[:, 0, 0], values[:, 0, 1])
    return ProbeResult(
        probe="match",
        metrics={name: measured(ratio_of(values[:, n, 0], values[:, n, 1])) for n, name in enumerate(names)},
        chance={name: float(values[:, n, 2].sum() / values[:, n, 1].sum()) for n, name in enumerate(names)},
        counts={"pairs": len(pairs), "points": int(values[:, 0, 1].sum())},
        settings={**view.to_dict(), **asdict(settings)},
        groups=by_group(names[0], main, groups) if any(groups) else None,
    )


def read_pairs(path: str | Path) -> list[KeypointPair]:
    """Keypoint pairs of a JSON file: a list of objects with `source`, `target` (image files, relative to the JSON),

    `source_points`, `target_points` (lists of [x, y] in pixels, one for one), optionally `reach` and `group`.
    Errors: ValueError naming the entry that does not fit.
    """
    path = Path(path)
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"pairs: {path} cannot be read as JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"pairs: expected a list of at least one pair in {path}")
    found = []
    for number, entry in enumerate(entries):
        try:
            points = [tuple((float(x), float(y)) for x, y in entry[f"{side}_points"]) for side in ("source", "target")]
            files = [path.parent / entry[side] for side in ("source", "target")]
            reach = None if entry.get("reach") is None else float(entry["reach"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"pairs: {path}: pair {number} expects source, target, source_points and target_points ({error!r})"
            ) from error
        if len(points[0]) != len(points[1]) or not points[0]:
            raise ValueError(
                f"pairs: {path}: pair {number} expects as many source_points as target_points, at least one, got "
                f"{len(points[0])} and {len(points[1])}"
            )
        found.append(KeypointPair(*files, *points, reach, entry.get("group")))
    return found


def homography(seed: int, index: int, strength: float) -> Tensor:
    """float64 (3, 3): takes (x, y, 1) of an image, sides in [0, 1], to its warped copy; each corner moves by up to
    `strength` per axis. A function of (seed, index)."""
    moves = uniform(seed, "evaluation/homography", index, 8).reshape(4, 2)
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    targets = corners + strength * (2 * moves - 1)
    rows, right = [], []
    for (x, y), (u, v) in zip(corners, targets):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        right += [u, v]
    solved = np.linalg.solve(np.array(rows), np.array(right))
    return torch.from_numpy(np.append(solved, 1.0).reshape(3, 3))


def moved(points: Tensor, matrix: Tensor) -> Tensor:
    """Points (n, 2) of x and y under a homography (3, 3)."""
    found = F.pad(points.double(), (0, 1), value=1.0) @ matrix.T
    return found[:, :2] / found[:, 2:]


def warped(pixels: Tensor, matrix: Tensor) -> Tensor:
    """uint8 (3, Y, X) seen through a homography, bilinear; what lies outside the image is grey."""
    height, width = pixels.shape[1:]
    back = moved(centres((height, width)), torch.linalg.inv(matrix))  # where each new pixel comes from
    at = (2 * back - 1).float().view(1, height, width, 2)
    shifted = pixels.float()[None] - 128.0
    found = F.grid_sample(shifted, at, mode="bilinear", padding_mode="zeros", align_corners=False)[0] + 128.0
    return found.round().clamp(0, 255).to(torch.uint8)


def centres(grid: tuple[int, int]) -> Tensor:
    """float64 (h w, 2): x and y, in [0, 1], of the middle of each cell, row-major."""
    rows, columns = ((torch.arange(side, dtype=torch.float64) + 0.5) / side for side in grid)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1).flip(1)


def sampled(patches: Tensor, grid: tuple[int, int], points: Tensor) -> Tensor:
    """Features (n, D), unit length, at points (n, 2) of x and y in [0, 1], bilinear between patches (N, D)."""
    maps = patches.T.unflatten(1, grid)[None]  # (1, D, h, w)
    at = (2 * points - 1).to(maps.dtype)[None, None]
    found = F.grid_sample(maps, at, mode="bilinear", padding_mode="border", align_corners=False)[0, :, 0]
    return F.normalize(found.T, dim=1)


def corners(pixels: Tensor, count: int) -> Tensor:
    """float64 (n, 2): x and y in [0, 1] of up to `count` Harris corners of uint8 (3, Y, X), strongest first."""
    from skimage.feature import corner_harris, corner_peaks  # slow to import

    grey = pixels.float().mean(dim=0).numpy() / 255
    peaks = corner_peaks(
        corner_harris(grey, sigma=2), min_distance=4, num_peaks=count, exclude_border=4, threshold_abs=1e-7
    )
    places = torch.from_numpy(np.asarray(peaks, dtype=np.float64).reshape(-1, 2)).flip(1)
    return (places + 0.5) / torch.tensor(pixels.shape[:0:-1], dtype=torch.float64)


def _names(settings: MatchSettings) -> list[str]:
    shares = [f"{threshold:g}" for threshold in settings.thresholds[::-1]]
    return [f"pck@{s}" for s in shares] + [f"keypoint_pck@{s}" for s in shares] + ["cycle_consistency"]


def _judged(
    maps: list[Tensor], pixels: Tensor, matrix: Tensor, grid: tuple[int, int], settings: MatchSettings
) -> Tensor:
    """(M, 3): for each metric right points, points, and points that chance gets right (0 for the cycle)."""
    places = centres(grid)
    truth = moved(places, matrix)
    known = _inside(truth)
    match = (maps[0][known] @ maps[1].T).argmax(dim=1)  # (n,)
    rows = _counts(places[match], truth[known], places, settings.thresholds[::-1])
    points = corners(pixels, settings.keypoints)
    there = moved(points, matrix) if len(points) else points
    kept = _inside(there)
    answer = (sampled(maps[0], grid, points[kept]) @ maps[1].T).argmax(dim=1)
    rows += _counts(places[answer], there[kept], places, settings.thresholds[::-1])
    back = (maps[1][match] @ maps[0].T).argmax(dim=1)
    reach = 1.01 / grid[0]  # one patch, diagonals too; more for rounding
    apart = (places[back] - places[known]).abs().amax(dim=1)
    rows.append([(apart <= reach).sum(), known.sum(), 0])
    return torch.tensor(rows, dtype=torch.float64)


def _counts(found: Tensor, truth: Tensor, places: Tensor, thresholds: Sequence[float]) -> list[list[float]]:
    """Right points, points, and right points of a match with any patch, for each threshold."""
    apart = (found - truth).norm(dim=1)
    every = (places[:, None] - truth[None]).norm(dim=2)  # (N, n)
    return [
        [float((apart <= t).sum()), float(len(truth)), float((every <= t).double().mean(dim=0).sum())]
        for t in thresholds
    ]


def _inside(points: Tensor) -> Tensor:
    return ((points >= 0) & (points <= 1)).all(dim=1)


def _judged_pair(
    maps: list[Tensor],
    images: list[Image.Image],
    pair: KeypointPair,
    view: View,
    side: int,
    thresholds: Sequence[float],
) -> Tensor:
    """(T, 3): right points, points, and right points expected by chance, in the target's own pixels."""
    boxes = [view.seen(*image.size) for image in images]
    corner = [torch.tensor(box[:2], dtype=torch.float64) for box in boxes]
    extent = [torch.tensor([box[2] - box[0], box[3] - box[1]], dtype=torch.float64) for box in boxes]
    given = [torch.tensor(points, dtype=torch.float64) for points in (pair.source_points, pair.target_points)]
    shares = [(points - c) / e for points, c, e in zip(given, corner, extent)]
    kept = _inside(shares[0]) & _inside(shares[1])
    places = centres((side, side)) * extent[1] + corner[1]  # in pixels of the target
    match = (sampled(maps[0], (side, side), shares[0][kept]) @ maps[1].T).argmax(dim=1)
    reach = pair.reach or float(max(images[1].size))
    return torch.tensor(
        _counts(places[match] / reach, given[1][kept] / reach, places / reach, thresholds), dtype=torch.float64
    )


def _opened(path: Path) -> Image.Image:
    try:
        return decode(path.read_bytes(), str(path))
    except (OSError, UnreadableImage) as error:
        raise ValueError(f"pairs: cannot read {path} ({error})") from error
