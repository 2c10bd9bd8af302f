"""The vision transformer of DINOv3, with all crops of a step packed into one token list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dinov3_train.config import Backbone, Rope
from dinov3_train.models.checkpointing import checkpointed
from dinov3_train.models.draws import TrainingDraws
from dinov3_train.models.layers import Block
from dinov3_train.models.packing import block_inputs
from dinov3_train.models.rope import CropGroup

BACKBONES: dict[str, Backbone] = {
    "vit_micro": Backbone(  # gains and weights for short runs
        name="vit_micro", embed_dim=128, depth=3, heads=2, layer_scale=1.0, init_std=0.07, rope=Rope(rescale=None)
    ),
    "vit_tiny": Backbone(name="vit_tiny", embed_dim=192, depth=6, heads=3),
    "vit_small": Backbone(name="vit_small", embed_dim=384, depth=12, heads=6),
    "vit_small_plus": Backbone(name="vit_small_plus", embed_dim=384, depth=12, heads=6, ffn="swiglu", ffn_ratio=6.0),
    "vit_base": Backbone(name="vit_base", embed_dim=768, depth=12, heads=12),
    "vit_large": Backbone(name="vit_large", embed_dim=1024, depth=24, heads=16),
    "vit_large_plus": Backbone(name="vit_large_plus", embed_dim=1024, depth=24, heads=16, ffn="swiglu", ffn_ratio=6.0),
    "vit_huge_plus": Backbone(name="vit_huge_plus", embed_dim=1280, depth=32, heads=20, ffn="swiglu", ffn_ratio=6.0),
    "vit_7b": Backbone(
        name="vit_7b", embed_dim=4096, depth=40, heads=32, ffn="swiglu64", ffn_ratio=3.0, qkv_bias=False
    ),
}


@dataclass(frozen=True)
class Features:
    """Features of one crop group: cls (S, D), registers (S, R, D), patches (S, N, D) row-major on grid (h, w)."""

    cls: Tensor
    registers: Tensor
    patches: Tensor
    grid: tuple[int, int]


class PatchEmbed(nn.Module):
    """Convolution with stride = kernel = patch size: images (S, 3, Y, X) -> (S, N, D)."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """CLS, registers and patches through pre-norm blocks with rotary positions.

    Attributes: embed_dim, patch_size, num_heads, depth, registers (ints), backbone (what it was built from), blocks.
    Parameters are named as in the released weights. Randomness is never drawn inside: a forward without `draws` has no
    augmentation and no drop path, in training mode too.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        if backbone.embed_dim % (4 * backbone.heads):
            raise ValueError(
                f"backbone: embed_dim expects a multiple of 4 * heads = {4 * backbone.heads}, got {backbone.embed_dim}"
            )
        self.backbone, dim = backbone, backbone.embed_dim
        self.embed_dim, self.patch_size, self.num_heads = dim, backbone.patch_size, backbone.heads
        self.depth, self.registers = backbone.depth, backbone.registers
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.storage_tokens = nn.Parameter(torch.empty(1, backbone.registers, dim))
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self.patch_embed = PatchEmbed(backbone.patch_size, dim)
        self.blocks = nn.ModuleList(Block(backbone) for _ in range(backbone.depth))
        self.norm = nn.LayerNorm(dim, eps=backbone.norm_eps)
        self.local_cls_norm = nn.LayerNorm(dim, eps=backbone.norm_eps) if backbone.untie_local_cls_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """CLS and registers N(0, 0.02), linears truncated normal `init_std`, patch conv uniform, mask and biases 0."""
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.storage_tokens, std=0.02)
        nn.init.zeros_(self.mask_token)
        bound = (3 * self.patch_size**2) ** -0.5
        nn.init.uniform_(self.patch_embed.proj.weight, -bound, bound)
        nn.init.uniform_(self.patch_embed.proj.bias, -bound, bound)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=self.backbone.init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Normed CLS: images (S, 3, Y, X) -> (S, D)."""
        return self.features(images).cls

    def features(self, images: Tensor) -> Features:
        """Normed features of one crop group, without masks or draws: images (S, 3, Y, X)."""
        return self.forward_packed([images])[0]

    def intermediate_layers(self, images: Tensor, layers: int | Sequence[int], *, norm: bool = True) -> list[Features]:
        """Features after chosen blocks.

        Args:
            images: (S, 3, Y, X).
            layers: the last `n` blocks, or the numbers of blocks from 0, in the order wanted.
            norm: apply the final norm to each.

        Errors: ValueError for a number outside the depth.
        """
        wanted = list(range(self.depth - layers, self.depth)) if isinstance(layers, int) else list(layers)
        if not wanted or min(wanted) < 0 or max(wanted) >= self.depth:
            raise ValueError(f"intermediate_layers: layers expects 1 to {self.depth} blocks from 0, got {layers}")
        groups = self._groups([images], None)
        x = self._tokens([images], [None])
        found: dict[int, Features] = {}
        for index, inputs in enumerate(block_inputs(self.backbone, groups, None, x.device)):
            x = self.blocks[index](x, inputs)
            if index in wanted:
                found[index] = self._split(self.norm(x) if norm else x, groups, None)[0]
        return [found[index] for index in wanted]

    def forward_packed(
        self,
        crops: Sequence[Tensor],
        *,
        masks: Sequence[Tensor | None] | None = None,
        draws: TrainingDraws | None = None,
        local: Sequence[bool] | None = None,
        checkpointing: str = "none",
    ) -> list[Features]:
        """Normed features of several crop groups, run as one token list through every layer.

        Args:
            crops: per crop group images (S_g, 3, Y_g, X_g), normalised.
            masks: per crop group bool (S_g, N), True where the mask token stands for the patch, or None.
            draws: rotary augmentation and drop path of this step; None: neither.
            local: per crop group, whether it holds local crops (they may have a CLS norm of their own in training).
            checkpointing: activation checkpointing, "none" | "selective" (keeps matrix products, attention) | "full".

        Errors: ValueError for shapes, masks or draws that do not fit.
        """
        masks = [None] * len(crops) if masks is None else list(masks)
        local = [False] * len(crops) if local is None else list(local)
        if not len(crops) == len(masks) == len(local) or not crops:
            raise ValueError(
                f"forward_packed: crops, masks, local expect one entry per crop group, "
                f"got {len(crops)}, {len(masks)}, {len(local)}"
            )
        groups = self._groups(crops, draws)
        x = self._tokens(crops, masks)
        for block, inputs in zip(self.blocks, block_inputs(self.backbone, groups, draws, x.device)):
            x = checkpointed(block, x, inputs, mode=checkpointing)
        return self._split(self.norm(x), groups, self._local_prefixes(x, groups, local))

    def _groups(self, crops: Sequence[Tensor], draws: TrainingDraws | None) -> tuple[CropGroup, ...]:
        if draws is not None and draws.rope is not None and len(draws.rope) != len(crops):
            raise ValueError(f"forward_packed: draws are for {len(draws.rope)} crop groups, got {len(crops)}")
        return tuple(CropGroup(len(images), self._grid(images)) for images in crops)

    def _grid(self, images: Tensor) -> tuple[int, int]:
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"vit: images expect float (S, 3, Y, X), got {images.dtype} {tuple(images.shape)}")
        sides, patch = tuple(images.shape[2:]), self.patch_size
        if any(side % patch or side == 0 for side in sides):
            near = [sorted({max(patch, side // patch * patch), -(-side // patch) * patch or patch}) for side in sides]
            raise ValueError(
                f"vit: image sides expect multiples of the patch size {patch}, got {sides[0]}x{sides[1]}; nearest: "
                f"height {' or '.join(map(str, near[0]))}, width {' or '.join(map(str, near[1]))}"
            )
        return sides[0] // patch, sides[1] // patch

    def _tokens(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Tensor:
        """Token embeddings of all crop groups one after another: (tokens, D)."""
        # nothing masked or no local crop: those parameters stay in the graph, so that each has a gradient on every rank
        unused = 0.0 * self.mask_token
        if self.local_cls_norm is not None and self.training:
            unused = unused + 0.0 * (self.local_cls_norm.weight + self.local_cls_norm.bias)
        prefix = torch.cat((self.cls_token + unused, self.storage_tokens), dim=1)  # (1, 1 + R, D)
        groups = []
        for images, mask in zip(crops, masks):
            patches = self.patch_embed(images)  # (S, N, D)
            if mask is not None:
                if mask.dtype != torch.bool or mask.shape != patches.shape[:2]:
                    raise ValueError(
                        f"vit: mask expects bool {tuple(patches.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}"
                    )
                patches = torch.where(mask[..., None], self.mask_token, patches)
            groups.append(torch.cat((prefix.expand(len(images), -1, -1), patches), dim=1).flatten(0, 1))
        return groups[0] if len(groups) == 1 else torch.cat(groups)

    def _local_prefixes(
        self, x: Tensor, groups: tuple[CropGroup, ...], local: list[bool]
    ) -> list[Tensor | None] | None:
        """CLS and registers (S, 1 + R, D) of local crop groups through their own norm, while training."""
        if self.local_cls_norm is None or not self.training:
            return None
        norm, length = self.local_cls_norm, 1 + self.registers
        parts = _sequences(x, groups, length)
        return [norm(part[:, :length]) if is_local else None for part, is_local in zip(parts, local)]

    def _split(self, x: Tensor, groups: tuple[CropGroup, ...], prefixes: list[Tensor | None] | None) -> list[Features]:
        """Features of each crop group from packed tokens (tokens, D)."""
        found = []
        for index, (tokens, group) in enumerate(zip(_sequences(x, groups, 1 + self.registers), groups)):
            cls, registers, patches = tokens.split((1, self.registers, tokens.shape[1] - 1 - self.registers), dim=1)
            if prefixes is not None and prefixes[index] is not None:
                cls, registers = prefixes[index].split((1, self.registers), dim=1)
            found.append(Features(cls=cls.squeeze(1), registers=registers, patches=patches, grid=group.grid))
        return found


def _sequences(x: Tensor, groups: tuple[CropGroup, ...], prefix: int) -> list[Tensor]:
    """Packed tokens (tokens, D) as one (S, T, D) per crop group; one split, whose backward is one concatenation."""
    lengths = [prefix + group.grid[0] * group.grid[1] for group in groups]
    parts = x.split([group.count * length for group, length in zip(groups, lengths)])
    return [part.view(group.count, length, -1) for part, group, length in zip(parts, groups, lengths)]


def vit_micro(patch_size: int = 16, drop_path: float = 0.0) -> VisionTransformer:
    """D 128, depth 3, 2 heads: the student of a small teacher on two cores."""
    return _named("vit_micro", patch_size, drop_path)


def vit_tiny(patch_size: int = 16, drop_path: float = 0.0) -> VisionTransformer:
    """D 192, depth 6, 3 heads: for tests and two cores."""
    return _named("vit_tiny", patch_size, drop_path)


def vit_small(patch_size: int = 16, drop_path: float = 0.0) -> VisionTransformer:
    """21.6 million parameters."""
    return _named("vit_small", patch_size, drop_path)


def vit_small_plus(patch_size: int = 16, drop_path: float = 0.0) -> VisionTransformer:
    """28.7 million parameters, SwiGLU."""
    return _named("vit_small_plus", patch_size, drop_path)


def vit_base(patch_size: int = 16, drop_path: float = 0.0) -> VisionTransformer:
    """85.7 million parameters."""
    return _named("vit_base", patch_size, drop_path)


def vit_large(patch_size: int = 16, drop_path: float = 0.0) -> VisionTransformer:
    """303.2 million parameters."""
    return _named("vit_large", patch_size, drop_path)


def vit_large_plus(patch_size: int = 16, drop_path: float = 0.0) -> VisionTransformer:
    """403.9 million parameters, SwiGLU."""
    return _named("vit_large_plus", patch_size, drop_path)


def vit_huge_plus(patch_size: int = 16, drop_path: float = 0.0) -> VisionTransformer:
    """840.6 million parameters, SwiGLU."""
    return _named("vit_huge_plus", patch_size, drop_path)


def vit_7b(patch_size: int = 16, drop_path: float = 0.0) -> VisionTransformer:
    """6.716 billion parameters, SwiGLU, no qkv bias."""
    return _named("vit_7b", patch_size, drop_path)


def _named(name: str, patch_size: int, drop_path: float) -> VisionTransformer:
    return VisionTransformer(replace(BACKBONES[name], patch_size=patch_size, drop_path=drop_path))
