"""The nearest centroid is that of exact arithmetic, near ties and ties included, whatever rounds the products."""

import threading
import time

import pytest
import torch

from dinov3_train.curation import nearest
from dinov3_train.curation.nearest import Nearest, bf16_products, bf16_products_are_rounded, fp32_products


def distances(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    return (points.double()[:, None] - centroids.double()[None]).square().sum(dim=2)


def rounded_mm(points, others, out):
    """What a machine with bf16 products computes: factors rounded, sums in fp32."""
    return out.copy_(points.bfloat16().double() @ others.bfloat16().double())


@pytest.fixture(params=["as it is here", "rounded", "exact"])
def machine(request, monkeypatch):
    """Products as on this machine, on one that rounds to bf16, and on one that does not."""
    monkeypatch.setattr(nearest, "FEW", 2)
    if request.param == "rounded":
        monkeypatch.setattr(nearest, "bf16_products_are_rounded", lambda device: True)
        exact = torch.mm

        def mm(points, others, out):
            coarse = torch.get_float32_matmul_precision() == "medium"
            return rounded_mm(points, others, out) if coarse else exact(points, others, out=out)

        monkeypatch.setattr(nearest.torch, "mm", mm)
    elif request.param == "exact":
        monkeypatch.setattr(nearest, "bf16_products_are_rounded", lambda device: False)
    return request.param


@pytest.mark.parametrize("kind", ["noise", "close centroids", "long rows", "unnormalised"])
def test_labels_are_those_of_exact_distances(machine, kind):
    generator = torch.Generator().manual_seed(0)
    points, centroids = torch.randn(700, 24, generator=generator), torch.randn(90, 24, generator=generator)
    if kind == "close centroids":  # bf16 cannot tell them apart
        centroids = centroids[:1] + 1e-3 * centroids
    elif kind == "long rows":
        points, centroids = torch.randn(300, 1500, generator=generator), torch.randn(40, 1500, generator=generator)
    elif kind == "unnormalised":
        points, centroids = 100 * points, 100 * centroids + 37
    if kind != "unnormalised":
        points, centroids = (torch.nn.functional.normalize(part, dim=1) for part in (points, centroids))
    points = points.half().float()
    found, exact = Nearest(centroids).labels(points), distances(points, centroids)
    lost = exact.gather(1, found[:, None]).flatten() - exact.amin(dim=1)
    # fp32 products may confuse what differs by their own rounding; bf16 alone would lose 1e-3 of the norms
    assert float(lost.max()) <= 2e-6 * float(points.norm(dim=1).max() * centroids.norm(dim=1).max())


def test_equal_centroids_give_the_first(machine):
    centroids = torch.eye(5)[[1, 0, 1, 0, 2]]
    assert Nearest(centroids).labels(torch.eye(5)[[0, 1, 2]]).tolist() == [1, 0, 4]


def test_tiles_of_rows_and_centroids_change_nothing(machine, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    points, centroids = torch.randn(500, 12, generator=generator), torch.randn(100, 12, generator=generator)
    whole = Nearest(centroids).labels(points)
    monkeypatch.setattr(nearest, "COLUMNS", 7)
    monkeypatch.setattr(nearest, "ENTRIES", 130)
    assert torch.equal(Nearest(centroids).labels(points), whole)


def test_distances_of_equal_rows_are_zero():
    points = torch.randn(20, 8)
    labels = Nearest(points[:5]).labels(points[:5])
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert Nearest(points[:5]).distances(points[:5], labels).tolist() == [0.0] * 5


def test_no_rows():
    assert Nearest(torch.randn(3, 4)).labels(torch.empty(0, 4)).tolist() == []


def test_the_precision_of_products_is_given_back():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError, match="inside"), bf16_products():
        raise RuntimeError("inside")
    assert torch.get_float32_matmul_precision() == before
    bf16_products_are_rounded("cpu")
    assert torch.get_float32_matmul_precision() == before


def test_threads_take_turns_at_the_precision():
    """It is the process's own: without turns, what one thread gives back is what the other had set."""
    before, inside, said = torch.get_float32_matmul_precision(), threading.Event(), []

    def rounded():
        with bf16_products():
            inside.set()
            time.sleep(0.1)
            said.append(torch.get_float32_matmul_precision())

    def exact():
        inside.wait()
        with fp32_products():
            said.append(torch.get_float32_matmul_precision())

    threads = [threading.Thread(target=work) for work in (rounded, exact)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == ["medium", "highest"]
    assert torch.get_float32_matmul_precision() == before
