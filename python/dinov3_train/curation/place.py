"""Where a stage runs: its device, and this rank among the others."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dinov3_ext import ALONE, Collectives

from ..train.distributed import any_rank


@dataclass(frozen=True)
class Place:
    """A device, and the exchange between the ranks that share the work and one folder."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    collectives: Collectives = ALONE

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes what belongs to all."""
        return self.collectives.rank == 0

    def meet(self) -> None:
        """Wait for the other ranks."""
        any_rank([False], self.collectives, self.device)
