"""The whole chain, from images to a manifest; every stage keeps what it has made, and the same call goes on."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from torch import nn

from ..data.sources import open_source
from ..evaluation.view import View
from .calibrate import calibrate
from .cluster import ClusterSettings, Hierarchy, cluster, write_summary
from .dedup import DedupSettings, Duplicates, ImageSet, dedup
from .embed import EmbedSettings, embed, open_pool
from .embeddings import Embeddings
from .files import claim, read_json, write_json
from .kmeans import Selected, Where
from .place import Place
from .progress import StageProgress
from .retrieve import Retrieved, RetrieveSettings, retrieve
from .sample import METHODS, balanced_sample
from .selection import Selection, write_selections

IMAGES_PER_CLUSTER = 40  # of the lowest level, where the number of clusters is not given
CLUSTERS_PER_CLUSTER = 20  # of each level above
FEWEST_CLUSTERS = 10  # of the top level


@dataclass(frozen=True, kw_only=True)
class Chain:
    """What to make.

    pool: specs as in `data=`. seeds: trusted sets, each a spec, by name; retrieved around and part of the result.
    held_out: sets for evaluation, each a spec, by name; nothing like their images stays. target: images of the pool in
    the result. retrieval_share: share of the target that retrieval may fill, the seed sets alike; the rest is sampled
    down the clusters. clusters: of each level, images first; empty: one for 40 images, then one for 20 clusters, down
    to 10. threshold: cosine from which two images are near duplicates; None: measured (`calibrate`). method: "random"
    or "closest".
    Errors: ValueError for values outside these.
    """

    pool: Sequence[str]
    seeds: dict[str, str] = field(default_factory=dict)
    held_out: dict[str, str] = field(default_factory=dict)
    target: int
    retrieval_share: float = 0.5
    clusters: tuple[int, ...] = ()
    method: str = "random"
    embed: EmbedSettings
    threshold: float | None = None
    cluster: ClusterSettings
    retrieve: RetrieveSettings

    def __post_init__(self) -> None:
        if self.target < 1:
            raise ValueError(f"curate run: target expects at least 1 image, got {self.target}")
        if not 0 <= self.retrieval_share <= 1:
            raise ValueError(f"curate run: retrieval_share is a share from 0 to 1, got {self.retrieval_share}")
        if self.method not in METHODS:
            raise ValueError(f"curate run: method expects one of {', '.join(METHODS)}, got {self.method!r}")


@dataclass(frozen=True)
class Site(Place):
    """Where the chain runs, and the console that is told."""

    console: Console = field(default_factory=Console)

    def stage(self, name: str) -> StageProgress:
        """Progress of a stage under its name; silent on all ranks but the first."""
        return StageProgress(name, self.console if self.first else Console(quiet=True))

    def where(self, progress: StageProgress) -> Where:
        """For functions of a stage."""
        return Where(self.device, self.collectives, progress.advance)


def run_chain(chain: Chain, backbone: nn.Module, view: View, out: Path, *, site: Site, about: dict) -> Path:
    """embeddings/, duplicates/, clusters/, retrieved/ and manifest.parquet in the folder `out`.

    about: how the backbone is called, kept with the result. Returns the manifest.
    Errors: ValueError for whatever does not fit, with the stage's name; OSError for a full disk. Finished work stays.
    """
    sets = embed_all(chain, backbone, view, out, site=site)
    threshold = threshold_of(chain, backbone, view, out, site=site)
    pool, seeds = sets["pool"], {name: sets[name] for name in chain.seeds}
    with site.stage("dedup") as told:
        roles = dict.fromkeys(chain.seeds, "trusted") | dict.fromkeys(chain.held_out, "held-out")
        every = [ImageSet(name, found, roles.get(name, "pool")) for name, found in sets.items()]
        duplicates = dedup(
            every, DedupSettings(threshold=threshold), out / "duplicates", where=site.where(told), say=told.say
        )
        told.say(said_of(duplicates))
    rows = duplicates.kept("pool")
    if chain.target > len(rows):
        raise ValueError(
            f"curate run: target={chain.target} images, but of the pool's {len(pool)} only {len(rows)} are left "
            "without duplicates"
        )
    points = Selected(pool, rows)
    with site.stage("cluster") as told:
        levels = chain.clusters or default_clusters(len(rows))
        hierarchy = cluster(
            points,
            replace(chain.cluster, clusters=levels),
            out / "clusters",
            where=site.where(told),
            about={"data": pool.fingerprint, "rows": zlib.crc32(rows)},
            say=told.say,
        )
        if site.first:
            write_summary(hierarchy)
    found = retrieve_all(chain, points, seeds, hierarchy, out, site=site)
    with site.stage("sample") as told:
        picked = combine(chain, len(rows), hierarchy, found)
        told.say(
            f"{len(picked)} images: {int(picked.retrieved.sum())} retrieved, {int((~picked.retrieved).sum())} sampled"
        )
    if site.first:
        selections = _selections(chain, pool, rows, seeds, hierarchy, duplicates, picked)
        settings = about | {
            "command": "curate run",
            **_settings(chain, levels),
            "threshold": threshold,
            "counts": duplicates.summary,
        }
        write_selections(out / "manifest.parquet", selections, settings)
    site.meet()
    return out / "manifest.parquet"


def embed_all(chain: Chain, backbone: nn.Module, view: View, out: Path, *, site: Site) -> dict[str, Embeddings]:
    """Embeddings of the pool, the seed sets and the held-out sets, by name."""
    wanted = {"pool": list(chain.pool)} | {name: [spec] for name, spec in (chain.seeds | chain.held_out).items()}
    if len(wanted) < 1 + len(chain.seeds) + len(chain.held_out):
        raise ValueError("curate run: the sets in seeds and held_out need different names, none of them pool")
    pools = {name: open_pool(specs, open_source) for name, specs in wanted.items()}  # errors before any work
    for name, images in pools.items():
        with site.stage(f"embed {name}") as told:
            lost = embed(
                backbone, images, view, out / "embeddings" / name, settings=chain.embed,
                where=site.where(told), say=told.say,
            )  # fmt: skip
            for entry in lost:
                told.say(f"unreadable image left out: {entry}")
    found = {name: Embeddings(out / "embeddings" / name) for name in pools}
    for name, embeddings in found.items():
        embeddings.verify(site.collectives.rank, site.collectives.world_size)
        if not len(embeddings):
            raise ValueError(f"curate run: {name} has no readable image")
    return found


def threshold_of(chain: Chain, backbone: nn.Module, view: View, out: Path, *, site: Site) -> float:
    """The threshold for near duplicates: the one asked for, or the measured one, which is kept for a restart."""
    if chain.threshold is not None:
        return chain.threshold
    path = out / "threshold.json"
    if site.first and not path.is_file():
        found = calibrate(
            backbone, open_pool(chain.pool, open_source), view, settings=chain.embed, seed=chain.cluster.seed
        )
        write_json(path, asdict(found))
    site.meet()
    found = read_json(path)
    with site.stage("dedup") as told:
        told.say(
            f"threshold {found['threshold']:.4f}: 97 of 100 re-encoded images keep this similarity to themselves, "
            f"{100 * found['others']:.0f} of 100 have another image as similar among {found['images']}"
        )
    return found["threshold"]


def said_of(duplicates: Duplicates) -> str:
    """The numbers of a search for duplicates, in a sentence."""
    numbers = duplicates.summary
    return (
        f"{sum(numbers['images'].values())} images, {numbers['groups']} groups of duplicates (the largest of "
        f"{numbers['largest_group']}), {numbers['dropped']} images dropped, {numbers['leaks']} of them for being "
        "like a held-out image"
    )


def default_clusters(images: int) -> tuple[int, ...]:
    """Clusters of each level for a pool of so many images."""
    levels = [max(1, images // IMAGES_PER_CLUSTER)]
    while levels[-1] // CLUSTERS_PER_CLUSTER >= FEWEST_CLUSTERS:
        levels.append(levels[-1] // CLUSTERS_PER_CLUSTER)
    return tuple(levels)


def retrieve_all(
    chain: Chain, points: Selected, seeds: dict[str, Embeddings], hierarchy: Hierarchy, out: Path, *, site: Site
) -> dict[str, Retrieved]:
    """What each seed set brings; a finished set is read from its file."""
    found = {}
    limit = round(chain.target * chain.retrieval_share)
    claimed = {name: round(limit / max(1, len(seeds))) for name in seeds}
    for name, embeddings in seeds.items():
        path = out / "retrieved" / f"{name}.npz"
        per_set = min(claimed[name], chain.retrieve.per_set or claimed[name])
        if site.first:
            claim(path.with_suffix(""), asdict(replace(chain.retrieve, per_set=max(1, per_set))), "retrieve")
        if per_set == 0:
            found[name] = Retrieved(*(np.empty(0, dtype=kind) for kind in (np.int64, np.int64, np.float32)))
            continue
        with site.stage(f"retrieve {name}") as told:
            if not path.is_file():
                settings = replace(chain.retrieve, per_set=per_set)
                got = retrieve(
                    points, Selected(embeddings), settings, where=site.where(told), hierarchy=hierarchy, say=told.say
                )
                if site.first:
                    got.write(path)
            site.meet()
            found[name] = Retrieved.read(path)
            told.say(f"{len(found[name].rows)} images for {len(embeddings)} seeds")
    return found


@dataclass(frozen=True)
class Picked:
    """Rows of the kept pool, ascending; of each whether it was retrieved, for which set, and which seed of it."""

    rows: np.ndarray
    retrieved: np.ndarray
    sets: np.ndarray
    seeds: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


def combine(chain: Chain, count: int, hierarchy: Hierarchy, found: dict[str, Retrieved]) -> Picked:
    """Retrieved rows, each for the set whose seed it is most similar to, and a balanced sample of the others."""
    parts = list(found.values())
    rows = np.concatenate([part.rows for part in parts] or [np.empty(0, np.int64)])
    sets = np.concatenate([np.full(len(part.rows), n) for n, part in enumerate(parts)] or [np.empty(0, np.int64)])
    seeds = np.concatenate([part.seeds for part in parts] or [np.empty(0, np.int64)])
    similar = np.concatenate([part.similarity for part in parts] or [np.empty(0, np.float32)])
    order = np.lexsort((sets, -similar, rows))
    order = order[np.unique(rows[order], return_index=True)[1]]
    rows, sets, seeds = rows[order], sets[order], seeds[order]
    taken = np.zeros(count, dtype=bool)
    taken[rows] = True
    left = chain.target - len(rows)
    sampled = np.empty(0, np.int64)
    if left:
        sampled = balanced_sample(hierarchy, left, method=chain.method, seed=chain.cluster.seed, taken=taken)
    every = np.concatenate([rows, sampled])
    place = np.argsort(every)
    nothing = np.full(len(sampled), -1)
    return Picked(
        every[place],
        np.concatenate([np.ones(len(rows), dtype=bool), np.zeros(len(sampled), dtype=bool)])[place],
        np.concatenate([sets, nothing])[place],
        np.concatenate([seeds, nothing])[place],
    )


def _selections(chain, pool, rows, seeds, hierarchy, duplicates, picked) -> list[Selection]:
    names = [embeddings.table(["name"])["name"] for embeddings in seeds.values()]
    chosen = rows[picked.rows]
    found = [
        Selection(
            pool,
            chosen,
            ["retrieval" if retrieved else "clustering" for retrieved in picked.retrieved],
            cluster_paths=hierarchy.paths(picked.rows),
            retrieval_seeds=[
                names[which][seed].as_py() if which >= 0 else "" for which, seed in zip(picked.sets, picked.seeds)
            ],
            duplicate_groups=duplicates.groups("pool")[chosen],
        )
    ]
    for name, embeddings in seeds.items():
        kept = duplicates.kept(name)
        found.append(Selection(embeddings, kept, name, duplicate_groups=duplicates.groups(name)[kept]))
    return found


def _settings(chain: Chain, levels: tuple[int, ...]) -> dict:
    return asdict(chain) | {"pool": list(chain.pool), "clusters": list(levels)}
