"""Fused operations for training self-supervised vision transformers, each with a plain-PyTorch twin."""

from dinov3_ext._library import build_info
from dinov3_ext._paths import Path, explain, use
from dinov3_ext.collectives import ALONE, Collectives
from dinov3_ext.ops.assignment_cross_entropy import assignment_cross_entropy, assignment_cross_entropy_reference
from dinov3_ext.ops.gram_loss import gram_loss, gram_loss_reference
from dinov3_ext.ops.rope_attention import (
    Layout,
    rope_attention,
    rope_attention_reference,
    rope_rotate,
    rope_rotate_reference,
)
from dinov3_ext.ops.sinkhorn_knopp import Potentials, assignment, sinkhorn_knopp, sinkhorn_knopp_reference

__version__ = "0.1.0"

__all__ = [
    "ALONE",
    "Collectives",
    "Layout",
    "Path",
    "Potentials",
    "assignment",
    "assignment_cross_entropy",
    "assignment_cross_entropy_reference",
    "build_info",
    "explain",
    "gram_loss",
    "gram_loss_reference",
    "rope_attention",
    "rope_attention_reference",
    "rope_rotate",
    "rope_rotate_reference",
    "sinkhorn_knopp",
    "sinkhorn_knopp_reference",
    "use",
]
