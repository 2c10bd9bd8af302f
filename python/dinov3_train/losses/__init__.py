"""The loss terms of DINOv3 as objects in a list; a stage with other losses is another list."""

from .dense import DenseHeadLoss, FeatureDistillationLoss, PatchKoLeoLoss
from .dino import DinoLoss
from .gram import GramLoss
from .ibot import IbotLoss
from .koleo import KoLeoLoss
from .outputs import LossPart, Outputs, Targets, Term

__all__ = [
    "DenseHeadLoss",
    "DinoLoss",
    "FeatureDistillationLoss",
    "GramLoss",
    "IbotLoss",
    "KoLeoLoss",
    "LossPart",
    "Outputs",
    "PatchKoLeoLoss",
    "Targets",
    "Term",
]
