"""The commands of curation: options become the settings of stages."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .curation.chain import Chain, Site, run_chain, said_of
from .curation.cluster import ClusterSettings, Hierarchy, write_summary
from .curation.cluster import cluster as cluster_points
from .curation.curated import read_curated
from .curation.dedup import DedupSettings, Duplicates, ImageSet
from .curation.dedup import dedup as find_duplicates
from .curation.embed import EmbedSettings, open_pool
from .curation.embed import embed as embed_images
from .curation.embeddings import Embeddings
from .curation.kmeans import Selected
from .curation.page import curation_page
from .curation.retrieve import RetrieveSettings
from .curation.retrieve import retrieve as retrieve_images
from .curation.sample import balanced_sample, random_sample
from .curation.selection import Selection, write_selections
from .data.batch import patch_grid
from .data.sources import open_source, split_commas
from .train.distributed import ranks
from .weights import resolve

CLUSTER = ("iterations", "resampling", "nearest", "start", "seed")
RETRIEVE = ("neighbours", "per_set", "per_cluster", "min_seeds", "least_similarity", "seed")
DEFAULT_BACKBONE = "timm:vit_small_patch16_dinov3.lvd1689m"


@contextmanager
def _site() -> Iterator[Site]:
    with ranks() as here:
        yield Site(here.device, here.collectives)


def embed(*, backbone: str, step: int | None, data: str, out: Path, size: int | None, **settings) -> None:
    """Write embeddings of every image of `data` to the folder `out`."""
    with _site() as site:
        model, view, _ = _seen(backbone, step, size, site)
        images = open_pool(split_commas(data), open_source)
        with site.stage("embed") as told:
            lost = embed_images(
                model, images, view, out, settings=_embed_settings(settings),
                where=site.where(told), say=told.say,
            )  # fmt: skip
            for entry in lost:
                told.say(f"unreadable image left out: {entry}")
            found = Embeddings(out)
            told.say(f"{len(found)} x {found.dim} in {out}, {view.size} px, {settings['pooling']}")


def dedup(*, data: str, trusted: str, held_out: str, threshold: float, out: Path) -> None:
    """Write groups of duplicates and the rows that stay to the folder `out`."""
    with _site() as site, site.stage("dedup") as told:
        sets = [
            ImageSet(Path(spec).name, _embeddings(spec, site), role)
            for text, role in ((data, "pool"), (trusted, "trusted"), (held_out, "held-out"))
            for spec in split_commas(text)
        ]
        found = find_duplicates(sets, DedupSettings(threshold=threshold), out, where=site.where(told), say=told.say)
        told.say(said_of(found))
        told.say(f"the list is {out / 'duplicates.parquet'}")


def cluster(*, data: str, clusters: tuple[int, ...], keep: Path | None, out: Path, **settings) -> None:
    """Write a hierarchy of clusters of the embeddings `data` to the folder `out`."""
    with _site() as site, site.stage("cluster") as told:
        points = _kept(data, keep, site)
        found = cluster_points(
            points,
            ClusterSettings(clusters=clusters, **settings),
            out,
            where=site.where(told),
            about={"data": points.embeddings.fingerprint, "rows": zlib.crc32(_rows(points))},
            say=told.say,
        )
        if site.first:
            write_summary(found)
            for level, sizes in enumerate(found.sizes, start=1):
                told.say(
                    f"level {level}: {len(sizes)} clusters of {sizes.min()} to {sizes.max()} images, "
                    f"median {int(np.median(sizes))}"
                )


def sample(
    *, data: str, target: int, clusters: Path | None, keep: Path | None, method: str, seed: int, out: Path
) -> None:
    """Write the manifest of a sample of the embeddings `data`."""
    site = Site()
    points = _kept(data, keep, site)
    hierarchy = None if clusters is None else _hierarchy(clusters, len(points))
    if hierarchy is None:
        picked = random_sample(len(points), target, seed=seed)
    else:
        picked = balanced_sample(hierarchy, target, method=method, seed=seed)
    selection = Selection(
        points.embeddings,
        _rows(points)[picked],
        "raw" if hierarchy is None else "clustering",
        cluster_paths=None if hierarchy is None else hierarchy.paths(picked),
        duplicate_groups=_groups(points, keep)[_rows(points)[picked]],
    )
    settings = {"command": "curate sample", "target": target, "method": method, "seed": seed}
    print(f"wrote {write_selections(out, [selection], settings | _origins(data, clusters, keep))}: {target} images")


def retrieve(*, data: str, seeds: str, clusters: Path | None, keep: Path | None, out: Path, **settings) -> None:
    """Write the manifest of images that are like those of the seed sets."""
    with _site() as site:
        points = _kept(data, keep, site)
        hierarchy = None if clusters is None else _hierarchy(clusters, len(points))
        asked = RetrieveSettings(method="nearest" if clusters is None else "clusters", **settings)
        best: dict[int, tuple[float, str]] = {}
        for spec in split_commas(seeds):
            embeddings = _embeddings(spec, site)
            with site.stage(f"retrieve {Path(spec).name}") as told:
                found = retrieve_images(
                    points, Selected(embeddings), asked, where=site.where(told), hierarchy=hierarchy, say=told.say
                )
                told.say(f"{len(found.rows)} images for {len(embeddings)} seeds")
            names = embeddings.table(["name"])["name"]
            for row, seed, similar in zip(found.rows.tolist(), found.seeds.tolist(), found.similarity.tolist()):
                if row not in best or similar > best[row][0]:
                    best[row] = (similar, names[seed].as_py())
        if not best:
            raise ValueError("curate retrieve: nothing was found; a lower least_similarity or min_seeds finds more")
        picked = np.array(sorted(best), dtype=np.int64)
        selection = Selection(
            points.embeddings,
            _rows(points)[picked],
            "retrieval",
            cluster_paths=None if hierarchy is None else hierarchy.paths(picked),
            retrieval_seeds=[best[row][1] for row in picked.tolist()],
            duplicate_groups=_groups(points, keep)[_rows(points)[picked]],
        )
        if site.first:
            about = {"command": "curate retrieve", "seeds": seeds, **settings} | _origins(data, clusters, keep)
            print(f"wrote {write_selections(out, [selection], about)}: {len(picked)} images")
        site.meet()


def run(
    *,
    pool: str,
    seeds: str,
    held_out: str,
    target: int,
    out: Path,
    backbone: str,
    step: int | None,
    size: int | None,
    threshold: float | None,
    retrieval: str,
    retrieval_share: float,
    clusters: tuple[int, ...],
    method: str,
    **settings,
) -> None:
    """The whole chain, from images to `out`/manifest.parquet."""
    chain = Chain(
        pool=split_commas(pool),
        seeds=_named(seeds),
        held_out=_named(held_out),
        target=target,
        retrieval_share=retrieval_share,
        clusters=clusters,
        method=method,
        embed=_embed_settings(settings),
        threshold=threshold,
        cluster=ClusterSettings(clusters=clusters or (1,), **_some(settings, CLUSTER)),
        retrieve=RetrieveSettings(method=retrieval, **_some(settings, RETRIEVE)),
    )
    with _site() as site:
        model, view, origin = _seen(backbone, step, size, site)
        path = run_chain(chain, model, view, out, site=site, about={"backbone": origin})
        if site.first:
            site.console.print(f"wrote {path}; train on it with data={path}", highlight=False, soft_wrap=True)


def report(
    *, manifest: Path, out: Path, data: Path | None, clusters: Path | None, keep: Path | None, seed: int
) -> None:
    """Write the page of a manifest."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"curate report: out expects a file that ends in .html, got {str(out)!r}")
    found = read_curated(manifest, data=data, clusters=clusters, keep=keep)
    path = curation_page(found, open_source, seed=seed).write(out)
    print(f"wrote {path}: {found.manifest.num_rows} images kept, {path.stat().st_size / 1e6:.1f} MB")


def _seen(spec: str, step: int | None, size: int | None, site: Site):
    """The backbone on the device, how it sees images, and where it is from."""
    found = resolve(spec, step=step)
    view = found.view(size)
    patch_grid(view.size, found.backbone.patch_size, "size")
    if site.first:
        site.console.print(f"backbone: {found.origin} ({found.licence})", highlight=False, soft_wrap=True)
    return found.backbone.to(site.device), view, found.origin


def _some(values: dict, names: tuple[str, ...]) -> dict:
    return {name: values[name] for name in names}


def _embed_settings(values: dict) -> EmbedSettings:
    names = {"pooling": "pooling", "precision": "precision", "shard": "shard_rows", "batch": "batch_size"}
    return EmbedSettings(
        max_unreadable=values["max_unreadable"], **{name: values[option] for option, name in names.items()}
    )


def _named(text: str) -> dict[str, str]:
    """Specs by a short name: NAME from /path/NAME.tar; a number follows where names are equal."""
    found: dict[str, str] = {}
    for spec in split_commas(text):
        name = Path(spec.replace("torchvision:", "")).name.split(":")[0].split(".")[0] or "set"
        while name in found or name == "pool":
            name = f"{name}_2"
        found[name] = spec
    return found


def _embeddings(spec: str, site: Site) -> Embeddings:
    found = Embeddings(spec)
    found.verify(site.collectives.rank, site.collectives.world_size)
    return found


def _kept(data: str, keep: Path | None, site: Site) -> Selected:
    return Selected(_embeddings(data, site), None if keep is None else Duplicates(keep).kept(Path(data).name))


def _rows(points: Selected) -> np.ndarray:
    return np.arange(len(points)) if points.rows is None else points.rows


def _groups(points: Selected, keep: Path | None) -> np.ndarray:
    if keep is None:
        return np.full(len(points.embeddings), -1)
    return Duplicates(keep).groups(points.embeddings.path.name)


def _hierarchy(clusters: Path, count: int) -> Hierarchy:
    found = Hierarchy(clusters)
    if len(found.labels[0]) != count:
        raise ValueError(
            f"curate: {clusters} has {len(found.labels[0])} clustered images, data and keep have {count}; expected the "
            "data= and keep= that the clusters were made with"
        )
    return found


def _origins(data: str, clusters: Path | None, keep: Path | None) -> dict:
    return {"data": data, "clusters": clusters and str(clusters), "keep": keep and str(keep)}
