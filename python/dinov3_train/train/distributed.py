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
    group: dist.ProcessGroup | None = None  # of torch.distributed where they are some of its ranks; None: all

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
        yield Ranks(rank, world_size, device, _collectives(rank, world_size, None))
    finally:
        dist.destroy_process_group()


def subgroup(here: Ranks, sizes: Sequence[int]) -> tuple[int, Ranks]:
    """Split all ranks into consecutive groups; which of them this rank belongs to, and where it stands in it.

    Args:
        here: among all ranks.
        sizes: ranks of each group; they add up to the world's.
    """
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    mine = max(number for number, start in enumerate(starts) if start <= here.rank)
    groups = [dist.new_group(range(start, start + size)) for start, size in zip(starts, sizes)]  # on every rank alike
    rank, size = here.rank - starts[mine], sizes[mine]
    collectives = ALONE if size == 1 else _collectives(rank, size, groups[mine])
    return mine, Ranks(rank, size, here.device, collectives, groups[mine])


def replicated(student: Networks, world_size: int, group: dist.ProcessGroup | None = None) -> nn.Module:
    """The student as the ranks share it: DistributedDataParallel averages its gradients; alone, the student itself."""
    if world_size == 1:
        return student
    return nn.parallel.DistributedDataParallel(
        student, process_group=group, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def barrier(group: dist.ProcessGroup | None = None) -> None:
    """Wait for the other ranks (of the group), if there are any."""
    if dist.is_initialized():
        dist.barrier(group)


def any_rank(flags: Sequence[bool], collectives: Collectives, device: torch.device) -> list[bool]:
    """For each flag whether it is up on any rank, in one exchange."""
    raised = torch.tensor([float(flag) for flag in flags], device=device)
    return (collectives.all_reduce(raised, "max") > 0).tolist()


def _collectives(rank: int, world_size: int, group: dist.ProcessGroup | None) -> Collectives:
    def all_reduce(tensor: Tensor, op: str) -> Tensor:
        reduced = tensor.detach().clone()
        dist.all_reduce(reduced, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op], group=group)
        return reduced

    return Collectives(all_reduce, lambda tensor: _AllGather.apply(tensor, group), rank, world_size)


class _AllGather(torch.autograd.Function):
    """(n, ...) -> (W n, ...) in rank order. Each rank computes a loss of the gathered rows, and gradients are averaged
    over ranks afterwards, so the backward is the sum of all ranks' gradients for this rank's rows."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        ctx.rows, ctx.group = tensor.shape[0], group
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.rows
        return gradient[start : start + ctx.rows], None
