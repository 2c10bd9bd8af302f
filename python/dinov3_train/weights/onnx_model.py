"""A backbone as a graph for ONNX: the same weights, sizes known only when it runs.

Training packs crops into one token list and reads layouts from the host; neither can be exported. Here all images have
one size, so attention is PyTorch's own over (B, H, T, E), and the rotary tables are made inside the graph from the
image's height and width, which stay symbolic.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.convnext import ConvNeXt, resized_map
from ..models.layers import Block
from ..models.rope import periods
from ..models.vit import VisionTransformer

OUTPUTS = ("cls", "registers", "patches")


class VisionTransformerGraph(nn.Module):
    """images (B, 3, Y, X) -> cls (B, D), registers (B, R, D), patches (B, N, D): `VisionTransformer.features`."""

    def __init__(self, backbone: VisionTransformer) -> None:
        super().__init__()
        self.backbone = backbone
        width = backbone.embed_dim // backbone.num_heads
        self.register_buffer("periods", periods(width, backbone.backbone.rope.base))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model = self.backbone
        count, patch = images.shape[0], model.patch_size
        cos, sin = self._tables(images.shape[2] // patch, images.shape[3] // patch)  # (N, E/2) each
        prefix = torch.cat((model.cls_token, model.storage_tokens), dim=1)  # (1, 1 + R, D)
        x = torch.cat((prefix.expand(count, -1, -1), model.patch_embed(images)), dim=1)  # (B, T, D)
        for block in model.blocks:
            x = self._block(block, x, cos, sin)
        x = model.norm(x)
        return x[:, 0], x[:, 1 : 1 + model.registers], x[:, 1 + model.registers :]

    def _tables(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (N, E/2) of row-major patches: the first half from the row, the second from the column."""
        y, x = (
            2.0
            * math.pi
            * (2.0 * ((torch.arange(cells, dtype=torch.float32) + 0.5) / cells) - 1.0)[:, None]
            / self.periods
            for cells in (rows, columns)
        )  # (h, E/4), (w, E/4)
        y, x = y[:, None].expand(-1, columns, -1), x[None].expand(rows, -1, -1)
        angles = torch.cat((y, x), dim=-1).flatten(0, 1)  # (N, E/2)
        return angles.cos(), angles.sin()

    def _block(self, block: Block, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        attention, prefix = block.attn, 1 + self.backbone.registers
        qkv = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.heads, attention.head_width))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, E) each
        q, k = (torch.cat((t[:, :, :prefix], _turned(t[:, :, prefix:], cos, sin)), dim=2) for t in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, scale=attention.head_width**-0.5)
        x = x + block.ls1.after(attention.proj, out.transpose(1, 2).flatten(2))
        return x + block.mlp(block.norm2(x), block.ls2)


class ConvNeXtGraph(nn.Module):
    """images (B, 3, Y, X) -> cls (B, D), registers (B, 0, D), patches (B, N, D): `ConvNeXt.features`."""

    def __init__(self, backbone: ConvNeXt) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model, x = self.backbone, images
        for downsample, stage in zip(model.downsample_layers, model.stages):
            x = downsample(x)
            for block in stage:
                x = block(x, None)  # (B, C, h, w)
        pooled = x.mean(dim=(2, 3))[:, None]
        if model.patch_size != model.stride:
            x = resized_map(x, (images.shape[2] // model.patch_size, images.shape[3] // model.patch_size))
        tokens = model.norm(torch.cat((pooled, x.flatten(2).transpose(1, 2)), dim=1))  # (B, 1 + N, D)
        return tokens[:, 0], tokens[:, :0], tokens[:, 1:]


def graph_of(backbone: VisionTransformer | ConvNeXt) -> nn.Module:
    """The backbone as a module that `torch.onnx.export` takes, in evaluation mode."""
    return (ConvNeXtGraph(backbone) if isinstance(backbone, ConvNeXt) else VisionTransformerGraph(backbone)).eval()


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, N, E) with the pairs (e, e + E/2) turned by the angles of cos and sin (N, E/2)."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
