"""The ConvNeXt of DINOv3: a hierarchy of depthwise convolutions with the features of a ViT, CLS and patches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov3_train.config import ConvNeXtBackbone
from dinov3_train.models.checkpointing import checkpointed
from dinov3_train.models.draws import TrainingDraws
from dinov3_train.models.vit import Features

CONVNEXTS: dict[str, ConvNeXtBackbone] = {
    "convnext_micro": ConvNeXtBackbone(  # gains and weights for short runs
        name="convnext_micro", depths=(1, 1, 3), dims=(32, 64, 128), patch_size=16, layer_scale=1.0, init_std=0.08
    ),
    "convnext_tiny": ConvNeXtBackbone(name="convnext_tiny", depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)),
    "convnext_small": ConvNeXtBackbone(name="convnext_small", depths=(3, 3, 27, 3), dims=(96, 192, 384, 768)),
    "convnext_base": ConvNeXtBackbone(name="convnext_base", depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
    "convnext_large": ConvNeXtBackbone(name="convnext_large", depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)),
}


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (S, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """x + gamma * pwconv2(gelu(pwconv1(norm(dwconv x)))) on a map (S, C, h, w)."""

    def __init__(self, dim: int, backbone: ConvNeXtBackbone) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=backbone.norm_eps)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), backbone.layer_scale))

    def forward(self, x: Tensor, kept: tuple[Tensor, float] | None) -> Tensor:
        """x (S, C, h, w); kept: rows whose branch is run and the gain that makes up for the others, or None for all."""
        if kept is None:
            return x + self._branch(x)
        rows, gain = kept
        return x.index_add(0, rows, self._branch(x.index_select(0, rows)).to(x.dtype), alpha=gain)

    def _branch(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.dwconv(x).permute(0, 2, 3, 1))  # (S, h, w, C)
        return (self.gamma * self.pwconv2(F.gelu(self.pwconv1(hidden)))).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Stem 4 x 4 / 4, stages of blocks with a 2 x 2 / 2 convolution between, one norm for pooled and patch features.

    CLS is the normed mean of the last map, patches are the normed map, there are no registers. Where `patch_size` is
    not the stride, the map is resized (bilinear, antialiased) to (Y / patch_size, X / patch_size) before the norm. It
    has no mask token, so that nothing can be hidden from it.

    Attributes: embed_dim, patch_size, stride, depth, registers (0), backbone (what it was built from), blocks.
    Parameters are named as in the released weights. Randomness is never drawn inside, see `VisionTransformer`.

    Source: spec 1.4.
    """

    def __init__(self, backbone: ConvNeXtBackbone) -> None:
        super().__init__()
        depths, dims = backbone.depths, backbone.dims
        if not depths or len(depths) != len(dims) or min(depths) < 1:
            raise ValueError(
                f"backbone: depths and dims expect one number per stage, at least 1 block each, got {depths} and {dims}"
            )
        self.backbone, self.embed_dim, self.depth = backbone, backbone.embed_dim, backbone.depth
        self.patch_size, self.stride, self.registers = backbone.patch_size, backbone.stride, 0
        eps = backbone.norm_eps
        stem = nn.Sequential(nn.Conv2d(3, dims[0], kernel_size=4, stride=4), ChannelNorm(dims[0], eps=eps))
        between = [
            nn.Sequential(ChannelNorm(dim, eps=eps), nn.Conv2d(dim, wider, kernel_size=2, stride=2))
            for dim, wider in itertools.pairwise(dims)
        ]
        self.downsample_layers = nn.ModuleList([stem, *between])
        self.stages = nn.ModuleList(
            nn.ModuleList(ConvNeXtBlock(dim, backbone) for _ in range(depth)) for depth, dim in zip(depths, dims)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=eps)
        self.reset_parameters()

    @property
    def blocks(self) -> list[ConvNeXtBlock]:
        """The blocks of all stages, in order."""
        return [block for stage in self.stages for block in stage]

    def reset_parameters(self) -> None:
        """Convolutions and linears truncated normal `init_std`, biases 0."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=self.backbone.init_std)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Normed CLS: images (S, 3, Y, X) -> (S, D)."""
        return self.features(images).cls

    def features(self, images: Tensor) -> Features:
        """Normed features of one crop group: images (S, 3, Y, X)."""
        return self.forward_packed([images])[0]

    def intermediate_layers(self, images: Tensor, layers: int | Sequence[int], *, norm: bool = True) -> list[Features]:
        """Features after chosen stages, each of its stage's width, on the grid of `patch_size`.

        Args:
            images: (S, 3, Y, X).
            layers: the last `n` stages, or the numbers of stages from 0, in the order wanted.
            norm: apply the final norm to the last stage, the only one of its width; the others are as they are.

        Errors: ValueError for a number outside the stages.
        """
        stages = len(self.stages)
        wanted = list(range(stages - layers, stages)) if isinstance(layers, int) else list(layers)
        if not wanted or min(wanted) < 0 or max(wanted) >= stages:
            raise ValueError(f"intermediate_layers: layers expects 1 to {stages} stages from 0, got {layers}")
        maps = self._maps(images, [None] * self.depth, "none")
        return [self._features(maps[stage], images, norm and stage == stages - 1) for stage in wanted]

    def forward_packed(
        self,
        crops: Sequence[Tensor],
        *,
        masks: Sequence[Tensor | None] | None = None,
        draws: TrainingDraws | None = None,
        local: Sequence[bool] | None = None,
        checkpointing: str = "none",
    ) -> list[Features]:
        """Normed features of several crop groups, one group after another; the interface of `VisionTransformer`.

        Args:
            crops: per crop group images (S_g, 3, Y_g, X_g), normalised.
            masks: None, or None per crop group: a ConvNeXt has no mask token.
            draws: drop path of this step; None: none.
            local: without effect, as local crops share the norm.
            checkpointing: activation checkpointing of blocks, "none" | "selective" | "full".

        Errors: ValueError for shapes, masks or draws that do not fit.
        """
        if not crops:
            raise ValueError("forward_packed: crops expect at least one crop group, got none")
        if masks is not None and any(mask is not None for mask in masks):
            raise ValueError("convnext: masks expect None, a ConvNeXt has no mask token, got masks")
        kept = self._kept(crops, draws)
        return [
            self._features(self._maps(images, rows, checkpointing)[-1], images, True)
            for images, rows in zip(crops, kept)
        ]

    def _maps(self, images: Tensor, kept: Sequence[tuple[Tensor, float] | None], checkpointing: str) -> list[Tensor]:
        """The map (S, C, h, w) after each stage; kept: per block."""
        self._check(images)
        x, maps, number = images.contiguous(memory_format=torch.channels_last), [], 0
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = downsample(x)
            for block in stage:
                x = checkpointed(block, x, kept[number], mode=checkpointing)
                number += 1
            maps.append(x)
        return maps

    def _features(self, x: Tensor, images: Tensor, norm: bool) -> Features:
        """CLS and patches of a map (S, C, h, w)."""
        grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        pooled = x.mean(dim=(2, 3))[:, None]  # (S, 1, C)
        patches = resized_map(x, grid).flatten(2).transpose(1, 2)  # (S, N, C)
        tokens = torch.cat((pooled, patches), dim=1)
        tokens = self.norm(tokens) if norm else tokens
        return Features(cls=tokens[:, 0], registers=tokens[:, :0], patches=tokens[:, 1:], grid=grid)

    def _kept(self, crops: Sequence[Tensor], draws: TrainingDraws | None) -> list[list[tuple[Tensor, float] | None]]:
        """Per crop group and block the rows whose branch is run, and their gain."""
        counts = [len(images) for images in crops]
        if draws is None or draws.kept is None:
            return [[None] * self.depth for _ in counts]
        if draws.kept.shape != (self.depth, 2, sum(counts)):
            raise ValueError(
                f"draws: kept expects (depth, 2, sequences) = {(self.depth, 2, sum(counts))}, got {draws.kept.shape}"
            )
        groups = torch.from_numpy(draws.kept[:, 0]).split(counts, dim=1)  # a block has one branch: the first's draws
        gain, device = 1.0 / draws.keep_share, crops[0].device
        return [[(rows.nonzero().flatten().to(device), gain) for rows in group] for group in groups]

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"convnext: images expect float (S, 3, Y, X), got {images.dtype} {tuple(images.shape)}")
        height, width = images.shape[2:]
        for step in (self.stride, self.patch_size):
            if height % step or width % step or not height or not width:
                raise ValueError(f"convnext: image sides expect multiples of {step} pixels, got {height}x{width}")


def resized_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map (S, C, h, w) on another grid, bilinear with antialiasing; as it is where the grid is its own."""
    if tuple(x.shape[2:]) == tuple(grid):
        return x
    return F.interpolate(x, size=grid, mode="bilinear", antialias=True, align_corners=False)


def convnext_micro(patch_size: int = 16, drop_path: float = 0.0) -> ConvNeXt:
    """Three stages, width 128, half a million parameters: for tests and two cores."""
    return _named("convnext_micro", patch_size, drop_path)


def convnext_tiny(patch_size: int = 32, drop_path: float = 0.0) -> ConvNeXt:
    """27.8 million parameters."""
    return _named("convnext_tiny", patch_size, drop_path)


def convnext_small(patch_size: int = 32, drop_path: float = 0.0) -> ConvNeXt:
    """49.5 million parameters."""
    return _named("convnext_small", patch_size, drop_path)


def convnext_base(patch_size: int = 32, drop_path: float = 0.0) -> ConvNeXt:
    """87.6 million parameters."""
    return _named("convnext_base", patch_size, drop_path)


def convnext_large(patch_size: int = 32, drop_path: float = 0.0) -> ConvNeXt:
    """196.2 million parameters."""
    return _named("convnext_large", patch_size, drop_path)


def _named(name: str, patch_size: int, drop_path: float) -> ConvNeXt:
    return ConvNeXt(replace(CONVNEXTS[name], patch_size=patch_size, drop_path=drop_path))
