"""Logistic regression against scikit-learn, the linear probe against torch, few shots, groups, chance, refusals."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torchmetrics.classification import MulticlassAccuracy

from dinov3_train.evaluation.extract import Extracted
from dinov3_train.evaluation.heads import HeadTraining
from dinov3_train.evaluation.knn import evaluate_knn
from dinov3_train.evaluation.labelled import accuracies, check_sources, labelled, split_labelled
from dinov3_train.evaluation.linear import LinearSettings, evaluate_linear
from dinov3_train.evaluation.logistic import LogisticSettings, evaluate_logistic, fit, predict

LOGISTIC = LogisticSettings(strengths=(0.01, 1.0, 100.0))
LINEAR = LinearSettings(training=HeadTraining(learning_rates=(0.03, 0.3), steps=40, batch_size=32))
PROBES = {
    "knn": lambda train, test: evaluate_knn(train, test, k=[5]),
    "logistic": lambda train, test: evaluate_logistic(train, test, settings=LOGISTIC),
    "linear": lambda train, test: evaluate_linear(train, test, settings=LINEAR),
}


def clusters(count: int, classes: int = 4, width: int = 10, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping Gaussian clouds (count, width) and their labels, so that no score is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + 1.2 * torch.randn(count, width, generator=generator), labels


def extracted(features, labels, classes=None, groups=None, **settings) -> Extracted:
    names = tuple(f"{i}.png" for i in range(len(features)))
    return Extracted(features, labels, names, classes, settings=settings, groups=groups)


@pytest.mark.parametrize("strength", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("classes", [2, 4])
def test_logistic_weights_are_scikit_learns(strength, classes):
    features, labels = clusters(200, classes)
    weights = fit(features, labels, classes, strength, settings=replace(LOGISTIC, tolerance=1e-9, iterations=5000))
    # of two classes scikit-learn solves the one logit d = w1 - w0 = 2 w1, whose squared norm is twice that of both
    theirs = strength if classes > 2 else 2 * strength
    oracle = LogisticRegression(C=theirs, tol=1e-10, max_iter=20000).fit(features.double().numpy(), labels.numpy())
    found = weights if classes > 2 else weights[1:] - weights[:1]
    torch.testing.assert_close(found[:, :-1], torch.from_numpy(oracle.coef_), rtol=1e-4, atol=1e-5)
    biases, free = found[:, -1], torch.from_numpy(oracle.intercept_)
    shift = free.mean() - biases.mean() if classes > 2 else 0.0  # of several classes only differences count
    torch.testing.assert_close(biases + shift, free, rtol=1e-4, atol=1e-4)


def test_logistic_score_and_choice_are_scikit_learns():
    train, labels = clusters(240)
    test, truth = clusters(150, seed=1)
    result = evaluate_logistic(extracted(train, labels), extracted(test, truth), settings=LOGISTIC)
    kept, held_out = split_labelled(labels, LOGISTIC.held_out, LOGISTIC.seed)
    arrays = train.double().numpy(), labels.numpy()
    scores = [
        LogisticRegression(C=strength, tol=1e-8, max_iter=5000)
        .fit(arrays[0][kept], arrays[1][kept])
        .score(arrays[0][held_out], arrays[1][held_out])
        for strength in LOGISTIC.strengths
    ]
    assert [entry["accuracy"] for entry in result.details["held_out_accuracy"]] == pytest.approx(scores)
    assert result.details["strength"] == LOGISTIC.strengths[int(np.argmax(scores))]
    oracle = LogisticRegression(C=result.details["strength"], tol=1e-8, max_iter=5000).fit(*arrays)
    assert result.metrics["accuracy"].value == pytest.approx(oracle.score(test.double().numpy(), truth.numpy()))
    weights = fit(train, labels, 4, result.details["strength"])
    assert predict(weights, test).tolist() == oracle.predict(test.double().numpy()).tolist()


def test_linear_reaches_the_optimum_that_logistic_regression_finds():
    train, labels = clusters(300)
    test, truth = clusters(300, seed=2)
    training = HeadTraining(learning_rates=(0.3,), weight_decays=(0.02,), steps=400, batch_size=300)
    linear = evaluate_linear(
        extracted(train, labels), extracted(test, truth), settings=LinearSettings(training=training)
    )
    # SGD's decay of 0.02 on the mean loss is a strength of 1 / (0.02 m); it also decays the biases, which are small
    oracle = LogisticRegression(C=1 / (0.02 * 300), max_iter=5000).fit(train.numpy(), labels.numpy())
    assert linear.metrics["accuracy"].value == pytest.approx(oracle.score(test.numpy(), truth.numpy()), abs=0.007)


def test_linear_trains_on_its_views_in_turn():
    train, labels = clusters(120)
    test, truth = clusters(100, seed=8)
    good, other = extracted(train, labels), extracted(test, truth)
    noise = torch.randn(120, 10, generator=torch.Generator().manual_seed(1))
    plain = evaluate_linear(good, other, settings=LINEAR)
    assert evaluate_linear(good, other, views=[good], settings=LINEAR).metrics == plain.metrics
    alone = evaluate_linear(good, other, views=[extracted(noise, labels)], settings=LINEAR)
    both = evaluate_linear(good, other, views=[good, extracted(noise, labels)], settings=LINEAR)
    assert alone.metrics["accuracy"].value < 0.5 < both.metrics["accuracy"].value
    assert both.settings["views"] == 2
    with pytest.raises(ValueError, match="views expect features of the same training images"):
        evaluate_linear(good, other, views=[other], settings=LINEAR)


def test_accuracies_are_torchmetrics():
    predicted = torch.randint(6, (200,), generator=torch.Generator().manual_seed(0))
    truth = torch.randint(6, (200,), generator=torch.Generator().manual_seed(1))
    found = accuracies(predicted, truth)
    for name, average in (("accuracy", "micro"), ("mean_per_class", "macro")):
        assert found[name].value == pytest.approx(float(MulticlassAccuracy(6, average=average)(predicted, truth)))
        assert found[name].low < found[name].value < found[name].high


@pytest.mark.parametrize("name", PROBES)
def test_random_features_give_chance_within_the_interval(name):
    generator = torch.Generator().manual_seed(11)
    features, labels = torch.randn(700, 8, generator=generator), torch.randint(5, (700,), generator=generator)
    result = PROBES[name](extracted(features[:300], labels[:300]), extracted(features[300:], labels[300:]))
    low, high = (
        result.scores[0].mean_per_class_interval
        if name == "knn"
        else (result.metrics["mean_per_class"].low, result.metrics["mean_per_class"].high)
    )
    assert low <= 1 / 5 <= high
    assert name == "knn" or result.chance["mean_per_class"] == 1 / 5


@pytest.mark.parametrize("name", PROBES)
def test_groups(name):
    train, labels = clusters(200)
    test, truth = clusters(120, seed=3)
    groups = tuple("clean" if number < 60 else "noisy" if number < 110 else None for number in range(120))
    test[60:110] = torch.randn(50, test.shape[1], generator=torch.Generator().manual_seed(5))
    found = PROBES[name](extracted(train, labels), extracted(test, truth, groups=groups)).groups
    assert (found.worst, found.best, found.without, found.metric) == ("noisy", "clean", 10, "accuracy")
    assert found.gap == pytest.approx(found.scores["clean"].value - found.scores["noisy"].value)
    assert found.gap > 0.2


def test_shots_take_so_many_of_each_class_and_hold_the_smaller_draw():
    train, labels = clusters(60)
    test, truth = clusters(40, seed=4)
    draws = [labelled("any", extracted(train, labels), extracted(test, truth), shots=shots) for shots in (1, 3)]
    for shots, draw in zip((1, 3), draws):
        assert draw.train_labels.bincount().tolist() == [shots] * 4
    assert {tuple(row) for row in draws[0].train.tolist()} <= {tuple(row) for row in draws[1].train.tolist()}
    few = evaluate_knn(extracted(train, labels), extracted(test, truth), k=[4], shots=1)
    assert few.train_images == 4
    assert few.settings["shots"] == 1
    one = evaluate_logistic(
        extracted(train, labels), extracted(test, truth), settings=replace(LOGISTIC, shots=1)
    )  # nothing to hold out: the middle of the grid
    assert one.details == {"strength": 1.0}
    assert one.counts["train_images"] == 4


def test_labels_need_not_be_consecutive():
    train, labels = clusters(150)
    test, truth = clusters(80, seed=6)
    plain = evaluate_logistic(extracted(train, labels), extracted(test, truth), settings=LOGISTIC)
    sparse = evaluate_logistic(extracted(train, labels * 7 + 3), extracted(test, truth * 7 + 3), settings=LOGISTIC)
    assert sparse.metrics == plain.metrics
    assert sparse.counts["classes"] == 4


def test_split_leaves_an_image_of_each_class():
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 3])
    kept, held_out = split_labelled(labels, 0.9, seed=0)
    assert sorted(labels[kept].unique().tolist()) == [0, 1, 2, 3]
    assert sorted(kept.tolist() + held_out.tolist()) == list(range(7))
    assert split_labelled(torch.arange(5), 0.5, seed=0) is None


@pytest.mark.parametrize("name", PROBES)
def test_refusals(name):
    train, labels = clusters(30)
    test, truth = clusters(10, seed=7)
    good_train, good_test = extracted(train, labels), extracted(test, truth)
    none = torch.full_like(labels, -1)
    cases = [
        (extracted(train, none), good_test, "labelled training images, got 30 images without one"),
        (good_train, extracted(test, none[:10]), "labelled test images, got 10"),
        (
            extracted(train, torch.zeros_like(labels)),
            good_test,
            "two classes among the training images, got 1",
        ),
        (good_train, extracted(test, truth + 70), "every test class needs a training image, none for: 7"),
        (extracted(train, labels - 9), extracted(test, truth - 9), "labels expect class numbers from 0, got -"),
        (good_train, extracted(test[:, :5], truth), "one width, got 10 and 5"),
        (extracted(train, labels, size=64), extracted(test, truth, size=96), r"differing: \['size'\]"),
        (extracted(train * float("nan"), labels), good_test, "finite"),
        (good_train, extracted(test, truth, groups=("a",) * 10), r"at least two groups of test images, got \['a'\]"),
    ]
    for one, other, message in cases:
        with pytest.raises(ValueError, match=message):
            PROBES[name](one, other)


def test_settings_refusals():
    train, test = extracted(*clusters(30)), extracted(*clusters(10, seed=1))
    for wrong, message in (
        ({"strengths": ()}, "strengths: expected numbers above 0"),
        ({"strengths": (-1.0,)}, "strengths: expected numbers above 0"),
        ({"iterations": 0}, "iterations: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            LogisticSettings(**wrong)
    with pytest.raises(ValueError, match=r"held_out: expected a share in \(0, 1\), got 1.5"):
        evaluate_logistic(train, test, settings=replace(LOGISTIC, held_out=1.5))
    with pytest.raises(ValueError, match="shots: expected at least 1 image of each class, got 0"):
        evaluate_linear(train, test, settings=replace(LINEAR, shots=0))


def test_labels_and_groups_are_checked_before_any_image_is_decoded(pixel_source):
    class Unread(pixel_source):
        def read(self, index):
            raise AssertionError("an image was read")

    train, test = Unread(8), Unread(6)
    check_sources("knn", train, test, group="parity", k=8)
    for change, message in (
        ({"train": Unread(4, unlabelled=range(4))}, "labelled training images, got 4 images without one"),
        ({"test": Unread(4, unlabelled=range(4))}, "labelled test images, got 4"),
        ({"train": Unread(4, unlabelled=(0, 2))}, "at least two classes among the training images, got 1"),
        ({"k": 9}, "k expects numbers from 1 to the 8 training images, got 9"),
        ({"group": "camera"}, "which none of 6 images has"),
        ({"test": Unread(1), "group": "parity"}, r"at least two groups of test images, got \['even'\]"),
    ):
        settings = {"train": train, "test": test} | change
        with pytest.raises(ValueError, match=message):
            check_sources("knn", settings.pop("train"), settings.pop("test"), **settings)
