"""A whole `train_step` (teacher, student, losses, gradients, AdamW, EMA) against the same step on the reference ops.

"PyTorch": the reference ops too, but attention as most models write it, one scaled_dot_product_attention per crop group
(`eager` of benchmarks/ops/bench_rope_attention.py; the reference goes sequence by sequence). Compiled: `run.compile`,
every block by torch.compile. The contenders start from the same weights and see the same batches, so their losses agree
to the rounding of bf16, and the benchmark checks it. The loader is left out: batches lie ready, crops of noise, masks
as in training.

    pytest benchmarks/pipeline -s [--threads 2] [--full: torch.compile too, ViT-S/16 at 224 px]
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import starmap
from unittest import mock

import bench_rope_attention
import harness
import numpy as np
import pytest
import torch
from torch import Tensor

import dinov3_ext
from dinov3_ext.ops.rope_attention import Layout
from dinov3_train.build import new_state, step_settings, step_values
from dinov3_train.config import Config, Run
from dinov3_train.data.batch import CropBatch, Views, collate
from dinov3_train.data.masking import block_masks, step_counts
from dinov3_train.models import layers
from dinov3_train.recipes import recipe
from dinov3_train.train.distributed import ranks
from dinov3_train.train.step import train_step


def vit_small_224() -> Config:
    """ViT-S/16, 8 images of 2 x 224 + 8 x 96 px, 8192 prototypes twice."""
    config = recipe("vit_small")
    head = replace(config.dino_head, prototypes=8192)
    crops = replace(config.crops, global_size=224, local_size=96, locals=8)
    return replace(config, dino_head=head, ibot_head=head, crops=crops, run=Run(batch_size=8))


CONFIGS = {"vit_tiny_cpu": lambda: recipe("vit_tiny_cpu"), "vit_small_224": vit_small_224}


@pytest.mark.parametrize("name", CONFIGS)
def test_train_step(name: str, request: pytest.FixtureRequest) -> None:
    full = request.config.getoption("--full")
    if name == "vit_small_224" and not full:
        pytest.skip("ViT-S/16 at 224 px takes minutes on a CPU: --full")
    losses: dict[str, list[float]] = {}
    contenders = {"ours": step_of(CONFIGS[name](), "ours", losses.setdefault("ours", []))}
    for contender in ("PyTorch, eager", "reference, eager"):
        contenders[contender] = step_of(CONFIGS[name](), contender, losses.setdefault(contender, []))
    if full:
        config = CONFIGS[name]()
        config = replace(config, run=replace(config.run, compile=True))
        contenders["PyTorch, compiled"] = step_of(config, "PyTorch", losses.setdefault("PyTorch, compiled", []))
    batches = CONFIGS[name]()
    timings = harness.paired(contenders, lambda number, device: [batch(batches, number + 100)], rounds=7 if full else 3)
    print(f"\ntrain_step {name}, batch {batches.run.batch_size}, {torch.get_num_threads()} threads")
    for contender, timing in timings.items():
        rate = batches.run.batch_size / timing.seconds
        print(f"  {contender:20s} {timing.seconds * 1e3:9.1f} ms  {timing.ratio:5.2f} x ours  {rate:6.1f} images/s")
    first = {contender: values[0] for contender, values in losses.items()}
    print("  loss of the first step: " + ", ".join(starmap("{} {:.5f}".format, first.items())))
    assert all(abs(value / first["ours"] - 1) < 5e-3 for value in first.values()), first  # bf16 keeps 8 bits


def step_of(config: Config, contender: str, losses: list[float]) -> Callable[[CropBatch], None]:
    """A function that trains one step of a fresh run on the batch it is given."""
    with ranks() as here:
        state, settings = new_state(config, here), step_settings(config, here)

    def step(given: CropBatch) -> None:
        values = step_values(config, 100)
        if contender == "ours":
            report = train_step(state, [given], values, settings)
        else:
            attention = layers.rope_attention if contender.startswith("reference") else pytorch_attention
            with dinov3_ext.use("reference"), mock.patch.object(layers, "rope_attention", attention):
                report = train_step(state, [given], values, settings)
        losses.append(float(report.losses["loss"]))

    return step


def pytorch_attention(qkv: Tensor, rope: Tensor, layout: Layout, *, scale: float) -> Tensor:
    """`scale` is 1 / sqrt(E), scaled_dot_product_attention's own."""
    return bench_rope_attention.eager(qkv, rope, layout)


def batch(config: Config, number: int) -> CropBatch:
    """Crops of noise with the masks that training would draw."""
    crops, images, rng = config.crops, config.run.batch_size, np.random.default_rng(number)

    def noise(count: int, side: int) -> list[torch.Tensor]:
        return [torch.from_numpy(rng.integers(0, 256, (3, side, side), dtype=np.uint8)) for _ in range(count)]

    views = [
        Views(noise(crops.globals, crops.global_size), noise(crops.locals, crops.local_size), []) for _ in range(images)
    ]
    grid = crops.global_size // config.backbone.patch_size
    copies = crops.globals * images
    counts = step_counts(0, number, crops=copies, patches=grid * grid, masking=config.masking)
    masks = block_masks(counts, (grid, grid), seed=0, crops=np.arange(copies)).reshape(crops.globals, images, -1)
    return collate(views, masks, indices=np.arange(images), names=[str(n) for n in range(images)], skipped=[])
