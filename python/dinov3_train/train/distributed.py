"""What the ranks exchange: the only module of the project that talks to torch.distributed collectives."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dinov3_ext import ALONE, Collectives

from .networks import Networks


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among the ranks."""

    rank: int
    world_size: int
    device: torch.device
    collectives: Collectives

    @property
    def first(self) -> bool:
        return self.rank == 0


@contextmanager
def ranks() -> Iterator[Ranks]:
    """Join the group `torchrun` launched (NCCL on GPUs, gloo on CPUs); alone, without a group, elsewhere."""
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if not launched or int(os.environ["WORLD_SIZE"]) == 1:
        yield Ranks(0, 1, device, ALONE)
        return
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    try:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        yield Ranks(rank, world_size, device, Collectives(_all_reduce, _AllGather.apply, rank, world_size))
    finally:
        dist.destroy_process_group()


def replicated(student: Networks, world_size: int) -> nn.Module:
    """The student as the ranks share it: DistributedDataParallel averages its gradients; alone, the student itself."""
    if world_size == 1:
        return student
    return nn.parallel.DistributedDataParallel(student, broadcast_buffers=False, gradient_as_bucket_view=True)


def barrier() -> None:
    """Wait for the other ranks, if there are any."""
    if dist.is_initialized():
        dist.barrier()


def any_rank(flags: Sequence[bool], collectives: Collectives, device: torch.device) -> list[bool]:
    """For each flag whether it is up on any rank, in one exchange."""
    raised = torch.tensor([float(flag) for flag in flags], device=device)
    return (collectives.all_reduce(raised, "max") > 0).tolist()


def _all_reduce(tensor: Tensor, op: str) -> Tensor:
    reduced = tensor.detach().clone()
    dist.all_reduce(reduced, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
    return reduced


class _AllGather(torch.autograd.Function):
    """(n, ...) -> (W n, ...) in rank order. Each rank computes a loss of the gathered rows, and gradients are averaged
    over ranks afterwards, so the backward is the sum of all ranks' gradients for this rank's rows."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        ctx.rows = tensor.shape[0]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.rows
        return gradient[start : start + ctx.rows]
