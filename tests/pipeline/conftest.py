"""A tiny recipe and a tiny folder of images, so that whole runs take seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

RECIPE = '''
"""A run of seconds."""
from dataclasses import replace
from dinov3_train.config import Backbone, Config, Crops, Data, Head, Losses, Optimizer, Rope, Run


def tiny() -> Config:
    head = Head(hidden=32, bottleneck=16, prototypes=32)
    return Config(
        recipe="tiny",
        backbone=Backbone(name="tiny", embed_dim=32, depth=2, heads=2, patch_size=8, drop_path=0.2, layer_scale=0.1),
        dino_head=head,
        ibot_head=head,
        crops=Crops(locals=2, global_size=32, local_size=16),
        data=Data(workers=0),
        losses=Losses(koleo_group=2),
        optimizer=Optimizer(lr=1e-3, lr_rule="none", warmup=5),
        run=Run(steps=12, batch_size=8, checkpoint_every=5, log_every=2, tensorboard=False),
    )
'''


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.py"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """40 images of 48 x 40 pixels in two classes, one of stripes, one of blobs."""
    return write_images(tmp_path_factory.mktemp("images"), seed=0)


@pytest.fixture(scope="session")
def other_images(tmp_path_factory) -> Path:
    """40 other images of the same two classes."""
    return write_images(tmp_path_factory.mktemp("others"), seed=1)


def write_images(root: Path, *, seed: int) -> Path:
    generator = np.random.default_rng(seed)
    for number in range(40):
        name = ("stripes", "blobs")[number % 2]
        base = generator.integers(0, 255, (6, 5, 3), dtype=np.uint8)
        pixels = np.repeat(np.repeat(base, 8, 0), 8, 1) if name == "blobs" else np.tile(base[:1, :, :], (48, 8, 1))
        (root / name).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / name / f"{number:03d}.png")
    return root


@pytest.fixture
def dinov3(monkeypatch, capsys):
    """Runs the command line in this process; gives (exit status, standard output, standard error)."""
    from dinov3_train.cli import main

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dinov3", *map(str, words)])
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def start_dinov3():
    """Starts the command line as a process of its own."""

    def start(*words: object, **settings) -> subprocess.Popen:
        command = [sys.executable, "-c", "from dinov3_train.cli import main; main()", *map(str, words)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, **settings
        )

    return start
