"""Retrieval against brute force and scikit-learn, chance of random rankings, every refusal."""

import pytest
import torch
from sklearn.metrics import average_precision_score

from dinov3_train.evaluation.extract import Extracted
from dinov3_train.evaluation.retrieve import evaluate_retrieve


def extracted(features, labels, classes=None, groups=None, **settings) -> Extracted:
    names = tuple(f"{i}.png" for i in range(len(features)))
    return Extracted(features, torch.as_tensor(labels), names, classes, settings=settings, groups=groups)


def random(count: int, seed: int, classes: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 7, generator=generator), torch.randint(classes, (count,), generator=generator)


def brute_force(gallery, labels, query, label, skip=None) -> float:
    scored = []
    for number, row in enumerate(gallery.double()):
        if number != skip:
            scored.append((float(row @ query.double() / (row.norm() * query.double().norm())), int(labels[number])))
    right, total = 0, 0.0
    for rank, (_, found) in enumerate(sorted(scored, reverse=True), 1):
        if found == label:
            right += 1
            total += right / rank
    return total / right


def test_map_equals_brute_force_and_scikit_learn():
    gallery, labels = random(60, 0)
    queries, wanted = random(25, 1)
    result = evaluate_retrieve(extracted(gallery, labels), extracted(queries, wanted))
    expected = [brute_force(gallery, labels, query, int(label)) for query, label in zip(queries, wanted)]
    assert result.metrics["map"].value == pytest.approx(sum(expected) / 25, rel=1e-5)
    unit = torch.nn.functional.normalize
    similarity = unit(queries, dim=1) @ unit(gallery, dim=1).T
    oracle = [average_precision_score((labels == label).numpy(), row.numpy()) for row, label in zip(similarity, wanted)]
    assert result.metrics["map"].value == pytest.approx(sum(oracle) / 25, rel=1e-5)
    first = labels[similarity.argmax(dim=1)] == wanted
    assert result.metrics["hit_at_1"].value == pytest.approx(float(first.float().mean()))


def test_each_image_against_all_others():
    gallery, labels = random(40, 2)
    result = evaluate_retrieve(extracted(gallery, labels))
    expected = [
        brute_force(gallery, labels, gallery[number], int(labels[number]), skip=number)
        for number in range(40)
        if (labels == labels[number]).sum() > 1
    ]
    assert result.metrics["map"].value == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_random_features_give_chance_within_the_interval():
    gallery, labels = random(150, 3)
    queries, wanted = random(400, 4)
    result = evaluate_retrieve(extracted(gallery, labels), extracted(queries, wanted))
    for name in ("map", "hit_at_1"):
        assert result.metrics[name].low <= result.chance[name] <= result.metrics[name].high


def test_chance_of_a_random_ranking():
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([1] * 4 + [0] * 16).bool()
    total = 0.0
    for _ in range(4000):
        order = truth[torch.randperm(20, generator=generator)]
        ranks = order.nonzero().flatten() + 1
        total += float((torch.arange(1, 5) / ranks).mean())
    gallery = extracted(torch.randn(20, 3, generator=generator), truth.long())
    query = extracted(torch.randn(1, 3, generator=generator), [1])
    assert evaluate_retrieve(gallery, query).chance["map"] == pytest.approx(total / 4000, abs=0.005)


def test_queries_without_answer_and_unlabelled_images():
    gallery = extracted(torch.eye(4), [0, 0, 1, -1])
    queries = extracted(torch.eye(4), [0, 5, -1, 1])
    result = evaluate_retrieve(gallery, queries)
    assert (result.counts["queries"], result.counts["queries_without_answer"]) == (2, 2)
    assert result.counts["gallery_images"] == 4  # the unlabelled one is there to be confused with


def test_classes_are_matched_by_name_and_groups():
    gallery = extracted(torch.eye(3), [0, 1, 2], ("ant", "bee", "cat"))
    queries = extracted(torch.eye(3)[1:], [0, 1], ("bee", "cat"), groups=("day", "night"))
    result = evaluate_retrieve(gallery, queries)
    assert result.metrics["map"].value == 1.0
    assert result.groups.gap == 0
    other = extracted(torch.eye(3)[:1], [0], ("dog",))
    with pytest.raises(ValueError, match="queries with another image of their class in the gallery, got 1 queries"):
        evaluate_retrieve(gallery, other)


def test_refusals():
    features, labels = random(8, 5)
    good = extracted(features, labels)
    for gallery, queries, message in (
        (extracted(features, torch.full((8,), -1)), good, "labelled gallery images, got 8"),
        (good, extracted(features, torch.full((8,), -1)), "labelled query images, got 8"),
        (extracted(features, torch.arange(8)), None, "got 8 queries without one"),
        (good, extracted(features[:, :3], labels), "one width, got 7 and 3"),
        (extracted(features, labels, size=1), extracted(features, labels, size=2), "the same settings"),
        (extracted(features * float("inf"), labels), good, "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_retrieve(gallery, queries)
