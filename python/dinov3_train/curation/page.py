"""The page of `dinov3 curate report`: what a pool held, what was kept of it, and what the images look like."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pyarrow as pa

from .. import counter
from ..data.manifest import absolute_name
from ..data.sources import Source
from ..report import Page
from .curated import Curated, keys
from .tiles import COLUMNS, Tiles, sheet

SHEET = 12  # images of a sheet
CLUSTERS = 4  # sheets of each kind of cluster
STRIPS = 8  # rows of neighbours, and of duplicates


def curation_page(curated: Curated, open_source: Callable[[str], Source], *, seed: int = 0) -> Page:
    """The whole page; `seed` draws the images that are shown. Errors: ValueError for a source that cannot be opened."""
    if curated.pool is None:  # the manifest alone: nothing is known of what was left out
        curated = replace(curated, pool=curated.manifest)
        lead = f"{curated.manifest.num_rows:,} images. The folders that made this set are not here, so the page shows "
        lead += "only what was kept."
    else:
        sources = len(set(curated.pool["source"].to_pylist()))
        lead = f"{curated.manifest.num_rows:,} images kept of {curated.pool.num_rows:,} from {sources} "
        lead += f"source{'s' if sources != 1 else ''}."
    tiles, kept = Tiles(open_source), _kept(curated)
    paths = None if curated.paths is None else _inherited(curated)
    page = Page("A curated set of images", lead)
    page.numbers(_numbers(curated, paths, kept))
    _parts_section(page, curated, kept)
    if paths is not None:
        _sizes_section(page, paths, kept)
        _clusters_section(page, curated, paths, kept, tiles, seed)
    _neighbours_section(page, curated, tiles, seed)
    if curated.duplicate_group is not None:
        _duplicates_section(page, curated, tiles, seed)
    page.section("Settings", "What made this set, as the manifest keeps it.")
    page.table(("setting", "value"), _flat(curated.settings) or [("none", "the manifest says nothing")])
    return page


def effective(counts: np.ndarray) -> float:
    """exp(-sum p ln p) of counts (k,): how many clusters of one size would be spread as evenly; 0 without images."""
    shares = counts[counts > 0] / max(int(counts.sum()), 1)
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0


def _kept(curated: Curated) -> np.ndarray:
    """bool (n,): whether the manifest has the image."""
    wanted = set(keys(curated.manifest))
    return np.array([key in wanted for key in keys(curated.pool)], dtype=bool)


def _inherited(curated: Curated) -> np.ndarray:
    """int32 (n, levels): the paths, a removed duplicate having the clusters of the image of its group that stayed."""
    paths, groups = curated.paths.copy(), curated.duplicate_group
    if groups is not None:
        stayed = np.flatnonzero((groups >= 0) & (paths[:, 0] >= 0))
        of_group = dict(zip(groups[stayed].tolist(), stayed.tolist()))
        for row in np.flatnonzero((groups >= 0) & (paths[:, 0] < 0)).tolist():
            if int(groups[row]) in of_group:
                paths[row] = paths[of_group[int(groups[row])]]
    return paths


def _counts(labels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Images (k,) of each cluster among those of `mask`; k is the number of clusters that occur at all."""
    return np.bincount(labels[(labels >= 0) & mask], minlength=int(labels.max(initial=-1)) + 1)


def _numbers(curated: Curated, paths: np.ndarray | None, kept: np.ndarray) -> list[tuple[str, str]]:
    found = [(f"{curated.pool.num_rows:,}", "images in the pool"), (f"{curated.manifest.num_rows:,}", "images kept")]
    if curated.removed is not None:
        found.append((f"{int(curated.removed.sum()):,}", "duplicates removed"))
    if paths is not None:
        before, after = (effective(_counts(paths[:, -1], mask)) for mask in (np.ones_like(kept), kept))
        both = f"{before:,.0f} \u2192 {after:,.0f}", "effective clusters, before and after"
        found.append((f"{after:,.0f}", "effective clusters") if kept.all() else both)
    return found


def _parts_section(page: Page, curated: Curated, kept: np.ndarray) -> None:
    page.section("What the set is made of", "A part is a source of its own: data=FILE.parquet:part=NAME.")
    parts = curated.manifest["part"].to_pylist()
    page.table(
        ("part", "images", "share"),
        [(str(part), f"{parts.count(part):,}", _percent(parts.count(part), len(parts))) for part in sorted(set(parts))],
    )
    page.text("Where they come from:")
    sources, rows = np.array(curated.pool["source"].to_pylist()), []
    for name in dict.fromkeys(sources.tolist()):
        mine = sources == name
        counts = int(mine.sum()), int((mine & kept).sum())
        shares = _percent(counts[0], len(mine)), _percent(counts[1], int(kept.sum()))
        rows.append((name, f"{counts[0]:,}", f"{counts[1]:,}", *shares))
    if kept.all():
        page.table(("source", "images", "share"), [(row[0], row[1], row[3]) for row in rows])
    else:
        page.table(("source", "in the pool", "kept", "share before", "share after"), rows)


def _sizes_section(page: Page, paths: np.ndarray, kept: np.ndarray) -> None:
    texts = [
        "How evenly the images are spread over the clusters that have any. The effective number is that of equal "
        "clusters that would be spread as evenly (the exponential of the entropy)."
    ]
    if not kept.all():
        texts.append("Removed duplicates count before, in the cluster of the image that stayed.")
    page.section("Cluster sizes" if kept.all() else "Cluster sizes, before and after", " ".join(texts))
    every, levels, rows = np.ones_like(kept), paths.shape[1], []
    for column in range(levels):
        for when, mask in (("kept", kept),) if kept.all() else (("before", every), ("after", kept)):
            sizes = _counts(paths[:, column], mask)
            sizes = sizes[sizes > 0] if sizes.any() else np.zeros(1, dtype=np.int64)
            level = f"{levels - column}" + (" (images)" if column == levels - 1 else "")
            numbers = (int((sizes > 0).sum()), effective(sizes), sizes.max(), int(np.median(sizes)), sizes.min())
            rows.append(("" if when == "after" else level, when, *(f"{number:,.0f}" for number in numbers)))
    page.table(("level", "", "clusters", "effective", "largest", "median", "smallest"), rows)
    curves = {}
    for name, mask in (("kept", kept),) if kept.all() else (("pool", every), ("kept", kept)):
        sizes = np.sort(_counts(paths[:, -1], mask))[::-1]
        if sizes.sum():
            curves[name] = _cumulative(sizes)
    if curves:
        page.curve(
            {**curves, "all equal": ([0.0, 100.0], [0.0, 100.0])},
            title="Share of images in the largest clusters of level 1, %",
            x_label="share of clusters, largest first, %",
            caption="The closer a curve is to the straight line, the more evenly its images are spread.",
        )


def _cumulative(sizes: np.ndarray) -> tuple[list[float], list[float]]:
    """(% of clusters, % of images in them) of sizes, largest first; at most 200 points."""
    sums = np.concatenate([[0], np.cumsum(sizes)])
    chosen = np.unique(np.linspace(0, len(sizes), min(len(sizes) + 1, 200)).round().astype(int))
    return (100.0 * chosen / len(sizes)).tolist(), (100.0 * sums[chosen] / sums[-1]).tolist()


def _clusters_section(
    page: Page, curated: Curated, paths: np.ndarray, kept: np.ndarray, tiles: Tiles, seed: int
) -> None:
    labels = paths[:, -1]
    before, after = _counts(labels, np.ones_like(kept)), _counts(labels, kept)
    order = np.argsort(-before, kind="stable").tolist()
    there = [cluster for cluster in order if after[cluster]]
    dropped = [cluster for cluster in order if before[cluster] and not after[cluster]]
    shown = "What was kept comes first, in colour; what was left out is grey."
    for heading, text, chosen in (
        ("The largest clusters", shown, there[:CLUSTERS]),
        ("The smallest clusters", f"Of those with a kept image. {shown}", there[CLUSTERS:][-CLUSTERS:]),
        ("Clusters of which nothing was kept", f"{len(dropped):,} in all; the largest.", dropped[:CLUSTERS]),
    ):
        if not chosen:
            continue
        page.section(heading, text)
        entries = []
        for cluster in chosen:
            rows = _some(np.flatnonzero(labels == cluster), kept, seed)
            path = "/".join(str(entry) for entry in paths[rows[0]])
            pictures = [(_tile(tiles, curated.pool, row), "plain" if kept[row] else "dimmed") for row in rows]
            caption = f"cluster {path}: {before[cluster]:,} images, {after[cluster]:,} kept"
            entries.append((sheet(pictures), caption))
        page.gallery(entries, width=440)


def _some(members: np.ndarray, kept: np.ndarray, seed: int) -> list[int]:
    """At most `SHEET` rows out of a cluster's, the kept ones first, in about their true proportion."""
    drawn = members[np.argsort(counter.uniform(seed, "curation page", members, 1)[:, 0], kind="stable")]
    inside, outside = drawn[kept[drawn]], drawn[~kept[drawn]]
    total = min(SHEET, len(members))
    count = round(total * len(inside) / len(members))
    count = min(max(count, int(len(inside) > 0)), total - int(len(outside) > 0 and total > 1))
    return [*inside[:count].tolist(), *outside[: total - count].tolist()]


def _neighbours_section(page: Page, curated: Curated, tiles: Tiles, seed: int) -> None:
    table, found = curated.manifest, {}
    for row, name in enumerate(table["retrieval_seed"].to_pylist()):
        if name:
            found.setdefault(name, []).append(row)
    if not found:
        return
    page.section(
        "Retrieved around seeds",
        f"{sum(map(len, found.values())):,} images were retrieved for {len(found):,} seeds. Ringed: the seed; beside "
        "it images that were taken because they are near it.",
    )
    names = sorted(found)
    order = np.argsort(counter.uniform(seed, "curation seeds", range(len(names)), 1)[:, 0], kind="stable")
    chosen = [names[number] for number in order[:STRIPS].tolist()]
    places = _places(curated.seeds, chosen, tiles)
    entries = []
    for name in chosen:
        pictures = [(tiles.tile(*places[name]), "ringed")] if name in places else []
        pictures += [(_tile(tiles, table, row), "plain") for row in found[name][: COLUMNS - len(pictures)]]
        entries.append((sheet(pictures), f"{_short(name)}: {len(found[name]):,} retrieved"))
    page.gallery(entries, width=440)


def _places(specs: tuple[str, ...], names: list[str], tiles: Tiles) -> dict[str, tuple[str, int]]:
    """(source, index) of the seeds by name; a seed that is no longer there is left out."""
    wanted, places = set(names), {}
    for spec in specs:
        source = tiles.source(spec)
        for index in range(len(source)):
            name = absolute_name(source.name(index))
            if name in wanted:
                places.setdefault(name, (spec, index))
    return places


def _duplicates_section(page: Page, curated: Curated, tiles: Tiles, seed: int) -> None:
    groups = curated.duplicate_group
    numbers, sizes = np.unique(groups[groups >= 0], return_counts=True)
    numbers, sizes = numbers[sizes > 1], sizes[sizes > 1]
    if not len(numbers):
        page.section("Duplicates", "None were found.")
        return
    page.section(
        "Duplicates",
        f"{len(numbers):,} groups with {int(sizes.sum()):,} images; the largest groups, then some drawn at random. "
        "Ringed: the image that stayed.",
    )
    largest = np.argsort(-sizes, kind="stable")[: STRIPS // 2]
    others = np.argsort(counter.uniform(seed, "curation duplicates", range(len(numbers)), 1)[:, 0], kind="stable")
    chosen = list(dict.fromkeys([*largest.tolist(), *others.tolist()]))[:STRIPS]
    removed = np.zeros(len(groups), dtype=bool) if curated.removed is None else curated.removed
    entries = []
    for place in chosen:
        rows = np.flatnonzero(groups == numbers[place])
        rows = rows[np.argsort(removed[rows], kind="stable")]
        pictures = [(_tile(tiles, curated.pool, row), "plain" if removed[row] else "ringed") for row in rows[:COLUMNS]]
        caption = f"group {numbers[place]}: {len(rows):,} images, {int(removed[rows].sum()):,} removed"
        entries.append((sheet(pictures), caption))
    page.gallery(entries, width=440)


def _tile(tiles: Tiles, table: pa.Table, row: int):
    return tiles.tile(table["source"][int(row)].as_py(), table["index"][int(row)].as_py())


def _short(name: str) -> str:
    return "/".join(name.split("/")[-2:])


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(whole, 1):.1f} %"


def _flat(settings: Mapping, prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, value) of nested settings."""
    rows = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return rows
