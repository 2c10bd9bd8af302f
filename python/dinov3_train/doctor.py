"""What is built, which device and threads will be used, which path each op takes, and what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

import torch

import dinov3_ext

OPTIONAL = {
    "wandb": "run.wandb",
    "torchvision": "augmentation and torchvision:NAME sources",
    "tensorboard": "run.tensorboard",
}
OPS = ("rope_attention", "rope_rotate", "gram_loss", "sinkhorn_knopp", "assignment_cross_entropy")


def lines() -> list[tuple[str, str]]:
    """Rows of (what, how it stands) for the table of `dinov3 doctor`."""
    found = [
        ("dinov3-ext", _version("dinov3-ext")),
        ("python", f"{platform.python_version()} on {platform.machine()}"),
        ("torch", torch.__version__),
        ("native library", _native()),
        ("device", _device()),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"),
        ("shared memory", _shared_memory()),
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found += [(f"op {op}", str(dinov3_ext.explain(op, device=device))) for op in OPS]
    missing = [f"{name} (for {use})" for name, use in OPTIONAL.items() if importlib.util.find_spec(name) is None]
    return [*found, ("not installed", ", ".join(missing) or "nothing that is used")]


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed (running from a source folder)"


def _native() -> str:
    info = dinov3_ext.build_info()
    if info["problem"]:
        return info["problem"]
    cuda = (
        f"CUDA kernels for sm_{info['cuda_architectures'].replace(';', ', sm_')}"
        if info["cuda_architectures"]
        else "no CUDA kernels"
    )
    built = f"built by {info['compiler']} with torch {info['torch_headers']} headers"
    return f"CPU kernels ({info['cpu_variant']}), {cuda}, {built}"


def _device() -> str:
    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        return f"cpu ({built})"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"cuda: {', '.join(names)}"


def _shared_memory() -> str:
    path = "/dev/shm"
    return (
        f"{shutil.disk_usage(path).free / 2**30:.1f} GiB free for loader workers"
        if os.path.isdir(path)
        else "no /dev/shm"
    )
