"""The loss terms of DINOv3 as objects in a list; a stage with other losses is another list."""

from .dino import DinoLoss
from .gram import GramLoss
from .ibot import IbotLoss
from .koleo import KoLeoLoss
from .outputs import LossPart, Outputs, Targets, Term

__all__ = ["DinoLoss", "GramLoss", "IbotLoss", "KoLeoLoss", "LossPart", "Outputs", "Targets", "Term"]
