"""Instance retrieval: each query ranks a gallery by cosine similarity; mean average precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_train.evaluation.extract import UNLABELLED, Extracted
from dinov3_train.evaluation.measure import ProbeResult, by_group, mean_of, measured

BLOCK = 256  # queries whose similarities to the gallery are in memory at once


def evaluate_retrieve(
    gallery: Extracted, queries: Extracted | None = None, *, progress: Callable[[str, int, int], None] | None = None
) -> ProbeResult:
    """Rank the gallery for each query; the images of the query's class are the right answers.

    AP = mean over right answers of (right answers up to its rank / its rank); mAP is the mean over queries. Gallery
    images without a label are there to be confused with; queries without a label or a right answer are left out.

    Args:
        gallery: features and labels of the images that are searched.
        queries: of the images that are searched for; None: every gallery image in turn, against all others.

    Errors: ValueError when no query has a right answer, or the features differ in width or settings or are not finite.
    Source: the retrieval of Oxford and Paris (arXiv 1803.11285), as the paper reports it.
    """
    alone = queries is None
    queries = gallery if queries is None else queries
    _check(gallery, queries)
    labels, wanted = gallery.labels, _aligned(gallery, queries)
    relevant = (labels[None] == wanted[:, None]) & (wanted != UNLABELLED)[:, None]  # (q, g)
    if alone:
        relevant.fill_diagonal_(False)
    asked = relevant.any(dim=1)
    if not asked.any():
        raise ValueError(
            f"evaluate_retrieve: expected queries with another image of their class in the gallery, got "
            f"{len(queries.labels)} queries without one"
        )
    places = asked.nonzero().flatten()
    precisions, hits = _scores(gallery.features, queries.features, relevant, places, alone, progress)
    groups = None if queries.groups is None else [queries.groups[place] for place in places.tolist()]
    return ProbeResult(
        probe="retrieve",
        metrics={"map": measured(mean_of(precisions)), "hit_at_1": measured(mean_of(hits))},
        chance=_chance(relevant[places].sum(dim=1).double(), len(labels) - alone),
        counts={
            "gallery_images": len(labels),
            "queries": len(places),
            "queries_without_answer": len(queries.labels) - len(places),
            "classes": len(wanted[places].unique()),
        },
        settings=dict(queries.settings),
        groups=None if groups is None else by_group("map", mean_of(precisions), groups),
    )


def _scores(
    gallery: Tensor, queries: Tensor, relevant: Tensor, places: Tensor, alone: bool, progress: Callable | None
) -> tuple[Tensor, Tensor]:
    """Average precision and whether the first answer is right, (n,) each, of the queries at `places`."""
    from torchmetrics.functional.retrieval import retrieval_average_precision, retrieval_hit_rate  # slow to import

    bank, rows = F.normalize(gallery.float(), dim=1), F.normalize(queries.float(), dim=1)
    precisions, hits, every = [], [], torch.ones(len(gallery), dtype=torch.bool)
    for part in places.split(BLOCK):
        for similarity, place in zip(rows[part] @ bank.T, part.tolist()):
            if alone:
                every[place] = False  # the query itself is no answer
            # ranks for similarities: torchmetrics takes answers with a score of 0 or less for wrong
            found, truth = _ranks(similarity[every]), relevant[place][every]
            precisions.append(retrieval_average_precision(found, truth))
            hits.append(retrieval_hit_rate(found, truth, top_k=1))
            every[place if alone else slice(None)] = True
        if progress is not None:
            progress("queries", len(precisions), len(places))
    return torch.stack(precisions).double(), torch.stack(hits).double()


def _ranks(scores: Tensor) -> Tensor:
    """fp32 (n,): n for the highest score down to 1 for the lowest; of equals the first is higher."""
    order = scores.argsort(descending=True, stable=True)
    ranks = torch.empty_like(scores)
    ranks[order] = torch.arange(len(scores), 0, -1, dtype=scores.dtype)
    return ranks


def _chance(answers: Tensor, images: int) -> dict[str, float]:
    """Expected scores of a random ranking of n images with r right answers, mean over the queries' r (q,).

    E[AP] = H/n + (r - 1)/(n - 1) (1 - H/n), H the n-th harmonic number.
    """
    harmonic = float((1 / torch.arange(1, images + 1, dtype=torch.float64)).sum()) / images
    precision = harmonic + (answers - 1) / max(images - 1, 1) * (1 - harmonic)
    return {"map": float(precision.mean()), "hit_at_1": float((answers / images).mean())}


def _check(gallery: Extracted, queries: Extracted) -> None:
    if gallery.features.shape[1] != queries.features.shape[1]:
        widths = f"{gallery.features.shape[1]} and {queries.features.shape[1]}"
        raise ValueError(f"evaluate_retrieve: gallery and query features expect one width, got {widths}")
    if gallery.settings != queries.settings:
        raise ValueError("evaluate_retrieve: gallery and query features expect the same settings")
    for what, side in (("gallery", gallery), ("query", queries)):
        if not (side.labels != UNLABELLED).any():
            raise ValueError(
                f"evaluate_retrieve: expected labelled {what} images, got {len(side.labels)} without one label"
            )
        if not torch.isfinite(side.features).all():
            raise ValueError("evaluate_retrieve: features expect finite numbers, got NaN or infinity")


def _aligned(gallery: Extracted, queries: Extracted) -> Tensor:
    """Query labels in the gallery's numbering, by name where both name their classes; -1 where the gallery has none."""
    if gallery.classes is None or queries.classes is None or gallery.classes == queries.classes:
        return queries.labels
    number = {name: label for label, name in enumerate(gallery.classes)}
    table = torch.tensor([*(number.get(name, UNLABELLED) for name in queries.classes), UNLABELLED])
    return table[queries.labels]  # -1 takes the last entry
