"""A manifest together with the folders of the stages that made it: what was there, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..data.manifest import manifest_settings, read_manifest
from .cluster import Hierarchy
from .dedup import Duplicates
from .embeddings import Embeddings

POOL = ("source", "index", "name")


@dataclass(frozen=True)
class Curated:
    """A pool of n images and what became of it.

    pool: columns source, index, name; None where nobody knows what was left out. manifest: all columns of the manifest.
    paths: int32 (n, levels), clusters with the top level first, -1 where an image was not clustered. duplicate_group:
    int64 (n,), -1 where none. removed: bool (n,), duplicates taken out. seeds: sources of the retrieval's seeds.
    """

    pool: pa.Table | None
    manifest: pa.Table
    settings: Mapping
    paths: np.ndarray | None = None
    duplicate_group: np.ndarray | None = None
    removed: np.ndarray | None = None
    seeds: tuple[str, ...] = ()


def read_curated(
    manifest: Path, *, data: Path | None = None, clusters: Path | None = None, keep: Path | None = None
) -> Curated:
    """What is known of a manifest.

    Args:
        manifest: of `dinov3 curate run`, `sample` or `retrieve`.
        data, clusters, keep: folders of `curate embed`, `cluster` and `dedup`. None: beside the manifest, as `curate
            run` leaves them, else where the manifest's settings say, else unknown.

    Errors: ValueError for a manifest or a folder that is missing, damaged, or of another run.
    """
    table, settings = read_manifest(manifest), manifest_settings(manifest)
    data = data or _folder(manifest, "embeddings/pool", settings.get("data"))
    clusters = clusters or _folder(manifest, "clusters", settings.get("clusters"))
    keep = keep or _folder(manifest, "duplicates", settings.get("keep"))
    seeds = settings.get("seeds") or {}
    if data is None:
        return Curated(None, table, settings, _paths_of(table), seeds=_specs(seeds))
    sets = [Embeddings(data), *(Embeddings(folder) for folder in _seed_folders(data, seeds))]
    names = [data.name, *(found.path.name for found in sets[1:])]
    pool = pa.concat_tables([found.table(POOL) for found in sets])
    _check_within(table, pool, manifest, data)
    rows, groups, removed = np.arange(len(sets[0])), None, None
    if keep is not None:
        duplicates = Duplicates(keep)
        kept = [duplicates.kept(name) for name in names]
        removed = np.concatenate([_without(len(found), stay) for found, stay in zip(sets, kept)])
        groups = np.concatenate([duplicates.groups(name) for name in names]).astype(np.int64)
        rows = kept[0]
    paths = None
    if clusters is not None:
        hierarchy = Hierarchy(clusters)
        if len(hierarchy.labels[0]) != len(rows):
            raise ValueError(
                f"curate report: {clusters} has {len(hierarchy.labels[0])} clustered images, {data} has {len(rows)}"
                f"{'' if keep is None else ' without duplicates'}; expected the folders that made {manifest}"
            )
        paths = np.full((pool.num_rows, hierarchy.levels), -1, dtype=np.int32)
        paths[rows] = hierarchy.paths(np.arange(len(rows)))
    return Curated(pool, table, settings, paths, groups, removed, _specs(seeds))


def keys(table: pa.Table) -> list[tuple[str, int]]:
    """(source, index) of each row."""
    return list(zip(table["source"].to_pylist(), table["index"].to_pylist()))


def _check_within(manifest: pa.Table, pool: pa.Table, path: Path, data: Path) -> None:
    known = set(keys(pool))
    missing = [row for row, key in enumerate(keys(manifest)) if key not in known]
    if missing:
        raise ValueError(
            f"curate report: {len(missing)} of {manifest.num_rows} images of {path} are not in {data} (the first is "
            f"{manifest['name'][missing[0]]}); expected the embeddings it was made of"
        )


def _folder(manifest: Path, beside: str, said: object) -> Path | None:
    """A stage's folder beside the manifest, else the one its settings name, if it is there."""
    candidates = [manifest.parent / beside, *([Path(said)] if isinstance(said, str) and said else [])]
    return next((folder for folder in candidates if folder.is_dir()), None)


def _seed_folders(data: Path, seeds: object) -> list[Path]:
    """Embeddings of the seed sets that `curate run` made beside the pool's, which are part of its result."""
    names = list(seeds) if isinstance(seeds, dict) else []
    folders = [data.parent / name for name in names]
    return [folder for folder in folders if folder.is_dir()]


def _specs(seeds: object) -> tuple[str, ...]:
    """Sources of the seeds: `curate run` keeps specs by name, `curate retrieve` folders of embeddings."""
    if isinstance(seeds, dict):
        return tuple(str(spec) for spec in seeds.values())
    folders = [Path(entry) for entry in str(seeds).split(",") if seeds]
    return tuple(spec for folder in folders if folder.is_dir() for spec in Embeddings(folder).settings.get("specs", ()))


def _without(count: int, kept: np.ndarray) -> np.ndarray:
    """bool (count,): all but the rows `kept`."""
    gone = np.ones(count, dtype=bool)
    gone[kept] = False
    return gone


def _paths_of(table: pa.Table) -> np.ndarray | None:
    """int32 (m, levels) of a manifest's own cluster paths, -1 where there is none; None where no image has one."""
    paths = table["cluster_path"].to_pylist()
    levels = max((len(path) for path in paths if path), default=0)
    if not levels:
        return None
    return np.array([path if path and len(path) == levels else [-1] * levels for path in paths], dtype=np.int32)
