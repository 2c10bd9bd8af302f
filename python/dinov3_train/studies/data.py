"""`dinov3 study data`: does a curated set teach more than the raw pool? The paper's data ablation in small.

Four sets of one size from one pool: a raw draw; a balanced sample of the clusters; what lies near the seed sets; and a
third of each. The same recipe trains the same number of steps on each and is judged by k-NN on labelled images.
Source: arXiv 2508.10104, section 3.1 (raw, clustering, retrieval, all).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from ..build import load, pretrain, run_config, view
from ..config import Config, override, replaced
from ..curation.chain import Chain, Site, run_chain
from ..curation.cluster import ClusterSettings, Hierarchy
from ..curation.dedup import Duplicates
from ..curation.embed import EmbedSettings
from ..curation.embeddings import Embeddings
from ..curation.kmeans import Selected
from ..curation.retrieve import Retrieved, RetrieveSettings, retrieve
from ..curation.sample import balanced_sample, random_sample
from ..curation.selection import Selection, write_selections
from ..data.sources import Source, open_source, split_commas
from ..evaluation.extract import UNLABELLED, Extracted, extract
from ..evaluation.knn import evaluate_knn, predict
from ..recipes import recipe as recipe_by_name
from ..weights import resolve
from ..words import Option
from .results import Results, Score, grouped_score
from .runner import Arm, Study, begin, run_study

ARMS = {
    "raw": "images as the pool has them, duplicates too",
    "clustering": "no duplicates, nothing like a test image, a balanced sample of the clusters",
    "retrieval": "no duplicates, nothing like a test image, the images nearest to the seed sets",
    "all": "a third each: clustering, retrieval, raw",
}
QUESTION = "Does a curated set teach more than the raw pool, images and steps being equal?"
NEIGHBOURS = 10  # of the k-NN

OPTIONS = {
    "pool": Option(str, required=True, help="PATH, commas between several"),
    "sets": Option(str, required=True, help="seed sets to retrieve around, commas between several"),
    "train": Option(str, required=True, help="PATH with labels"),
    "test": Option(str, required=True, help="PATH with labels"),
    "target": Option(int, required=True, help="images of each set"),
    "backbone": Option(str, required=True, help="RUN, FILE, hf:ID or timm:NAME that sees the pool for curation"),
    "recipe": Option(str, default="vit_tiny_cpu", help="NAME or FILE.py"),
    "steps": Option(int, default=1000, help="of every run"),
    "size": Option(int, help="side in pixels for the embeddings; default: the backbone's own"),
    "clusters": Option(lambda text: tuple(map(int, text.split(","))), default=(), help="K1,K2,..., images first"),
    "threshold": Option(float, default=0.97, help="cosine from which two images are near duplicates"),
}


@dataclass(frozen=True, kw_only=True)
class DataStudy:
    """What to compare; `OPTIONS` says what each is. overrides: dotted settings of the recipe."""

    pool: str
    sets: str
    train: str
    test: str
    target: int
    backbone: str
    recipe: str = "vit_tiny_cpu"
    steps: int = 1000
    size: int | None = None
    clusters: tuple[int, ...] = ()
    threshold: float = 0.97
    overrides: tuple[str, ...] = ()


def run(
    asked: DataStudy, out: Path, *, seeds: tuple[int, ...], minutes: float | None, console: Console | None = None
) -> Results:
    """Curate (in out/curation), then train and judge; the same call goes on. The budget counts training.

    Errors: ValueError for whatever the recipe, the sources, the chain of curation or the study refuses.
    """
    console = console or Console()
    config = replaced(override(recipe_by_name(asked.recipe), asked.overrides), {"run.steps": asked.steps})
    labelled = [open_source(spec).ready() for spec in (asked.train, asked.test)]  # errors before any work
    manifests = {name: out / "curation" / f"{name}.parquet" for name in ARMS}
    arms = [
        Arm(name, about, _training(replaced(config, {"data.sources": (str(manifests[name].absolute()),)})))
        for name, about in ARMS.items()
    ]
    study = Study("data", QUESTION, arms, lambda folder, _: knn_scores(folder, *labelled), dict(vars(asked)))
    begin(study, out, seeds=seeds, minutes=minutes)
    make_sets(asked, manifests, console)
    return run_study(study, out, seeds=seeds, minutes=minutes, console=console)


def make_sets(asked: DataStudy, paths: Mapping[str, Path], console: Console) -> None:
    """Write manifests of `target` images, one for each arm; nothing is done where all are there."""
    if all(path.is_file() for path in paths.values()):
        return
    stages = _stages(asked, paths["raw"].parent, console)
    for name, path in paths.items():
        selections = stages.selections(name)
        total = sum(len(selection.rows) for selection in selections)
        if total != asked.target:
            raise ValueError(f"study data: the set {name} has {total} images, expected target={asked.target}")
        write_selections(path, selections, {"command": "study data", "arm": name, **_plain(asked)})
        console.print(f"{name}: {total} images, {path}", soft_wrap=True)


@dataclass(frozen=True)
class _Stages:
    """Finished stages of curation: the pool, what stayed of it, its clusters, and images near the seeds, best first."""

    pool: Embeddings
    kept: np.ndarray
    groups: np.ndarray
    hierarchy: Hierarchy
    found: Retrieved
    seed_names: list[str]
    target: int

    def selections(self, arm: str) -> list[Selection]:
        third = self.target // 3
        if arm == "raw":
            return [self._raw(random_sample(len(self.pool), self.target))]
        if arm == "clustering":
            return [self._sampled(balanced_sample(self.hierarchy, self.target))]
        if arm == "retrieval":
            return [self._retrieved(self.target)]
        near = self._retrieved(third)
        taken = np.zeros(len(self.kept), dtype=bool)
        taken[np.searchsorted(self.kept, near.rows)] = True
        sampled = self._sampled(balanced_sample(self.hierarchy, third, taken=taken))
        others = np.setdiff1d(np.arange(len(self.pool)), np.concatenate([near.rows, sampled.rows]))
        return [near, sampled, self._raw(others[random_sample(len(others), self.target - 2 * third)])]

    def _raw(self, rows: np.ndarray) -> Selection:
        return Selection(self.pool, rows, "raw", duplicate_groups=self.groups[rows])

    def _sampled(self, places: np.ndarray) -> Selection:
        rows, paths = self.kept[places], self.hierarchy.paths(places)
        return Selection(self.pool, rows, "clustering", cluster_paths=paths, duplicate_groups=self.groups[rows])

    def _retrieved(self, count: int) -> Selection:
        """The `count` images that are most similar to their seed."""
        best = np.sort(np.argsort(-self.found.similarity, kind="stable")[:count])
        places, rows = self.found.rows[best], self.kept[self.found.rows[best]]
        return Selection(
            self.pool,
            rows,
            "retrieval",
            cluster_paths=self.hierarchy.paths(places),
            retrieval_seeds=[self.seed_names[seed] for seed in self.found.seeds[best].tolist()],
            duplicate_groups=self.groups[rows],
        )


def _stages(asked: DataStudy, out: Path, console: Console) -> _Stages:
    """Run the chain of curation, or take it from where it stands, and retrieve enough images for a whole set."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = resolve(asked.backbone)
    seen_as = backbone.view(asked.size)
    specs = split_commas(asked.sets)
    chain = Chain(
        pool=split_commas(asked.pool),
        seeds={f"seeds_{number}": spec for number, spec in enumerate(specs)},
        held_out={"test": asked.test},
        target=asked.target,
        retrieval_share=0.0,
        clusters=asked.clusters,
        embed=EmbedSettings(),
        threshold=asked.threshold,
        cluster=ClusterSettings(clusters=asked.clusters or (1,), iterations=20, resampling=3),
        retrieve=RetrieveSettings(),
    )
    site = Site(device, console=console)
    run_chain(chain, backbone.backbone.to(device), seen_as, out, site=site, about={"backbone": backbone.origin})
    pool, duplicates = Embeddings(out / "embeddings" / "pool"), Duplicates(out / "duplicates")
    seeds = [Embeddings(out / "embeddings" / name) for name in chain.seeds]
    kept, hierarchy = duplicates.kept("pool"), Hierarchy(out / "clusters")
    with site.stage("retrieve") as told:
        points = Selected(pool, kept)
        parts = [_near(points, Selected(one), asked.target, site.where(told)) for one in seeds]
    names = [name for one in seeds for name in one.table(["name"])["name"].to_pylist()]
    starts = np.cumsum([0, *(len(one) for one in seeds[:-1])])
    return _Stages(pool, kept, duplicates.groups("pool"), hierarchy, _united(parts, starts), names, asked.target)


def _near(points: Selected, seeds: Selected, target: int, where) -> Retrieved:
    """At least `target` images near a seed set, where the pool has so many: neighbours are doubled until there are."""
    neighbours = max(4, 2 * target // len(seeds))
    while True:
        settings = RetrieveSettings(neighbours=min(neighbours, len(points)))
        found = retrieve(points, seeds, settings, where=where)
        if len(found.rows) >= min(target, len(points)) or neighbours >= len(points):
            return found
        neighbours *= 2


def _united(parts: list[Retrieved], starts: np.ndarray) -> Retrieved:
    """Each image once, for the seed it is most similar to; seeds are numbered through all sets."""
    rows, similarity = (np.concatenate([getattr(part, name) for part in parts]) for name in ("rows", "similarity"))
    seeds = np.concatenate([part.seeds + start for part, start in zip(parts, starts)])
    order = np.lexsort((-similarity, rows))
    first = order[np.unique(rows[order], return_index=True)[1]]
    return Retrieved(rows[first], seeds[first], similarity[first])


def _training(config: Config) -> Callable[[int, Path, float | None, Console], bool]:
    """Pretraining with the seed of the run and what is left of the budget."""

    def train(seed: int, folder: Path, minutes: float | None, console: Console) -> bool:
        finished = pretrain(replaced(config, {"run.seed": seed, "run.minutes": minutes}), folder, console=console)
        return finished.reason == "steps"

    return train


def knn_scores(folder: Path, train: Source, test: Source) -> dict[str, Score]:
    """k-NN of a run's teacher: accuracy as the mean over classes, with each test image for intervals, and plain."""
    backbone, seen_as = load(folder), view(run_config(folder))
    known, asked = (extract(backbone, source, seen_as) for source in (train, test))
    result = evaluate_knn(known, asked, k=(NEIGHBOURS,))
    labels = _numbered_alike(known, asked)
    bank, queries = known.labels != UNLABELLED, labels != UNLABELLED
    rows = known.features[bank], known.labels[bank], asked.features[queries]
    right = predict(*rows, k=(NEIGHBOURS,), temperature=result.temperature)[0] == labels[queries]
    return {
        "k-NN, mean per class": grouped_score(right.tolist(), labels[queries].tolist()),
        "k-NN accuracy": Score(result.at(NEIGHBOURS).accuracy),
    }


def _numbered_alike(known: Extracted, asked: Extracted) -> torch.Tensor:
    """Labels of `asked` in the numbers of `known`, by name where both name their classes."""
    if known.classes is None or asked.classes is None:
        return asked.labels
    names = [None if label == UNLABELLED else asked.classes[label] for label in asked.labels.tolist()]
    return torch.tensor([UNLABELLED if name is None else known.classes.index(name) for name in names])


def _plain(asked: DataStudy) -> dict:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(asked).items()}
