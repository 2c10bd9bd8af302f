"""Weighted k-NN against scikit-learn and against loops, and every refusal."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from dinov3_train.evaluation.extract import Extracted
from dinov3_train.evaluation.knn import evaluate_knn, predict

TEMPERATURE = 0.07


def clusters(count: int, classes: int = 5, width: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping Gaussian clouds (count, width) and their labels, so that no score is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + 1.5 * torch.randn(count, width, generator=generator), labels


def extracted(features, labels, classes=None, **settings) -> Extracted:
    names = tuple(f"{i}.png" for i in range(len(features)))
    return Extracted(features, labels, names, classes, settings=settings)


@pytest.mark.parametrize("k", [1, 5, 20, 100])
def test_equals_scikit_learn(k):
    train, labels = clusters(300)
    test, truth = clusters(97, seed=1)
    # Brute-force cosine distance is 1 - similarity.
    oracle = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / TEMPERATURE)
    ).fit(train.double().numpy(), labels.numpy())
    expected = oracle.predict(test.double().numpy())
    result = predict(train, labels, test, k=[k], temperature=TEMPERATURE, block=10)
    assert result[0].tolist() == expected.tolist()
    score = evaluate_knn(extracted(train, labels), extracted(test, truth), k=[k]).at(k)
    assert score.accuracy == pytest.approx((expected == truth.numpy()).mean())


def test_equals_loops():
    train, labels = clusters(40, classes=3)
    test, _ = clusters(11, classes=3, seed=2)
    expected = []
    for row in test.double():
        similar = [
            (float(row @ other / (row.norm() * other.norm())), int(c)) for other, c in zip(train.double(), labels)
        ]
        votes = [0.0] * 3
        for similarity, label in sorted(similar, reverse=True)[:7]:
            votes[label] += math.exp(similarity / TEMPERATURE)
        expected.append(votes.index(max(votes)))
    assert predict(train, labels, test, k=[7], temperature=TEMPERATURE)[0].tolist() == expected


def test_counts_share_one_pass_and_block_does_not_matter():
    train, labels = clusters(120)
    test, _ = clusters(50, seed=3)
    together = predict(train, labels, test, k=[20, 1, 5], temperature=TEMPERATURE)
    alone = [predict(train, labels, test, k=[k], temperature=TEMPERATURE, block=7)[0] for k in (20, 1, 5)]
    assert torch.equal(together, torch.stack(alone))


def test_small_temperature_is_the_nearest_neighbour_and_does_not_overflow():
    train, labels = clusters(120)
    test, _ = clusters(50, seed=3)
    cold = predict(train, labels, test, k=[100, 1], temperature=1e-4)
    assert torch.equal(cold[0], cold[1])


def test_scale_of_features_does_not_matter():
    train, labels = clusters(80)
    test, _ = clusters(30, seed=4)
    plain = predict(train, labels, test, k=[10], temperature=TEMPERATURE)
    scaled = predict(train * torch.rand(80, 1).add(0.1), labels, test * 1000, k=[10], temperature=TEMPERATURE)
    assert torch.equal(plain, scaled)


def test_mean_per_class_weighs_classes_equally():
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    test = torch.tensor([[1.0, 0.1]] * 9 + [[1.0, 0.2]])  # nine of class 0, one of class 1: all are called 0
    labels = torch.tensor([0] * 9 + [1])
    score = evaluate_knn(extracted(train, torch.tensor([0, 1])), extracted(test, labels), k=[1]).at(1)
    assert (score.accuracy, score.mean_per_class) == (0.9, 0.5)


def test_unlabelled_images_are_left_out_and_counted():
    train, labels = clusters(90)
    test, truth = clusters(40, seed=5)
    clean = evaluate_knn(extracted(train, labels), extracted(test, truth), k=[5])
    far = torch.full((3, train.shape[1]), 7.0)
    unlabelled = torch.full((3,), -1)
    mixed = evaluate_knn(
        extracted(torch.cat([far, train]), torch.cat([unlabelled, labels])),
        extracted(torch.cat([test, far]), torch.cat([truth, unlabelled])),
        k=[5],
    )
    assert mixed.scores == clean.scores
    assert (mixed.train_unlabelled, mixed.test_unlabelled, mixed.train_images, mixed.test_images) == (3, 3, 90, 40)


def test_classes_are_matched_by_name():
    train = torch.eye(3)
    test = torch.eye(3)[1:]
    result = evaluate_knn(
        extracted(train, torch.arange(3), ("ant", "bee", "cat")),
        extracted(test, torch.arange(2), ("bee", "cat")),
        k=[1],
    )
    assert result.at(1).accuracy == 1.0
    with pytest.raises(ValueError, match="none for: dog"):
        evaluate_knn(
            extracted(train, torch.arange(3), ("ant", "bee", "cat")),
            extracted(test, torch.arange(2), ("bee", "dog")),
            k=[1],
        )


def test_result_is_written_with_its_settings(tmp_path):
    train, labels = clusters(60)
    test, truth = clusters(20, seed=6)
    result = evaluate_knn(extracted(train, labels, size=96), extracted(test, truth, size=96), k=[1, 10])
    written = json.loads(result.write(tmp_path / "deep" / "knn.json").read_text())
    assert written["settings"] == {"size": 96}
    assert written["temperature"] == TEMPERATURE
    assert [score["k"] for score in written["scores"]] == [1, 10]
    assert result.best.mean_per_class == max(score.mean_per_class for score in result.scores)
    with pytest.raises(ValueError, match=r"k expects one of \[1, 10\], got 3"):
        result.at(3)


def test_refusals():
    train, labels = clusters(30)
    test, truth = clusters(10, seed=7)
    good_train, good_test = extracted(train, labels), extracted(test, truth)
    none = torch.full_like(labels, -1)
    cases = [
        (extracted(train, none), good_test, [1], "labelled training images, got 30"),
        (good_train, extracted(test, none[:10]), [1], "labelled test images, got 10"),
        (extracted(train, torch.zeros_like(labels)), good_test, [1], "at least two classes"),
        (
            good_train,
            extracted(test, truth.clone().fill_(77)),
            [1],
            "every test class needs a training image, none for: 77",
        ),
        (good_train, good_test, [1, 31], "k expects numbers from 1 to the 30 training images"),
        (good_train, good_test, [0], "k expects numbers"),
        (good_train, good_test, [], "k expects numbers"),
        (good_train, extracted(test[:, :5], truth), [1], "one width, got 12 and 5"),
        (extracted(train, labels, size=64), extracted(test, truth, size=96), [1], r"differing: \['size'\]"),
        (extracted(train * float("nan"), labels), good_test, [1], "finite"),
    ]
    for one, other, k, message in cases:
        with pytest.raises(ValueError, match=message):
            evaluate_knn(one, other, k=k)
    with pytest.raises(ValueError, match="temperature expects a number above 0, got 0"):
        evaluate_knn(good_train, good_test, k=[1], temperature=0)
