"""One rank is late at the folder that all share: the chain's result is that of a single rank all the same."""

import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from dinov3_train.curation.chain import Chain, Site, run_chain
from dinov3_train.curation.cluster import ClusterSettings
from dinov3_train.curation.dedup import DedupSettings
from dinov3_train.curation.embed import EmbedSettings
from dinov3_train.curation.retrieve import RetrieveSettings
from dinov3_train.data.manifest import read_manifest
from dinov3_train.evaluation.view import View

SECONDS = 0.4  # how late; a stage of this pool takes less


class Colours(nn.Module):
    """CLS = colours of a grid of cells."""

    embed_dim = 48
    patch_size = 8

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def features(self, images):
        """Images (S, 3, Y, X) normalised."""
        found = nn.functional.adaptive_avg_pool2d(images, 4).flatten(1) * self.gain
        return type("F", (), {"cls": found, "patches": found[:, None]})


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    for name, count in (("pool", 40), ("seeds", 4)):
        (root / name).mkdir()
        for number in range(count):
            rng = np.random.default_rng(number + (100 if name == "seeds" else 0))
            base = np.random.default_rng(1000 + number % 3).integers(0, 200, (4, 4, 3)) + rng.integers(0, 56, (4, 4, 3))
            Image.fromarray(base.astype(np.uint8)).resize((32, 32)).save(root / name / f"{number:02d}.png")
    for number in range(0, 32, 3):  # near duplicates, in another block of rows
        Image.open(root / "pool" / f"{number:02d}.png").save(root / "pool" / f"{number + 8:02d}.jpg", quality=95)
    return root


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several blocks of rows for every rank."""
    monkeypatch.setattr("dinov3_train.curation.kmeans.ROWS", {"cpu": 8})
    monkeypatch.setattr("dinov3_train.curation.chain.DedupSettings", partial(DedupSettings, block=8))


@pytest.fixture
def alone(photographs, tmp_path_factory):
    return run(photographs, tmp_path_factory.mktemp("alone"))


def run(photographs, out, collectives=None):
    chain = Chain(
        pool=[str(photographs / "pool")],
        seeds={"seeds": str(photographs / "seeds")},
        target=16,
        clusters=(4, 2),
        embed=EmbedSettings(shard_rows=8, batch_size=4),
        threshold=0.999,
        cluster=ClusterSettings(clusters=(1,), iterations=2, resampling=1),
        retrieve=RetrieveSettings(method="clusters", min_seeds=1, per_set=4),
    )
    site = Site(console=Console(quiet=True), **({} if collectives is None else {"collectives": collectives}))
    return read_manifest(run_chain(chain, Colours(), View(size=16), out, site=site, about={}))


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize(
    ("moment", "file"),
    [
        ("replace", "embeddings/pool/.settings.json.partial"),
        ("is_file", "duplicates/summary.json"),
        ("glob", "duplicates"),
        ("is_file", "clusters/level_1_labels.npy"),
        ("is_file", "clusters/state.npz"),
        ("is_file", "clusters/level_2_labels.npy"),
        ("is_file", "retrieved/seeds.npz"),
        ("is_file", "clusters/settings.json"),
    ],
)
def test_a_late_rank_takes_the_same_way(photographs, alone, tmp_path, on_ranks, monkeypatch, moment, file, late):
    threads, waited = {}, []
    original = getattr(Path, moment)

    def lately(path, *more):
        if path == tmp_path / file and threads.get(threading.current_thread()) == late:
            waited.append(path)
            time.sleep(SECONDS)
        return original(path, *more)

    def work(collectives):
        threads[threading.current_thread()] = collectives.rank
        return run(photographs, tmp_path, collectives)

    monkeypatch.setattr(Path, moment, lately)
    for found in on_ranks(2, work):
        assert found.equals(alone)
    assert waited or (moment, late) == ("replace", 1)  # only the first rank writes what belongs to all
