"""Dense-feature health without labels: what the features of a fixed panel of images tell about a backbone.

Every measure is a function of plain tensors and returns one number; `signatures.MEASURES` says of each what healthy
looks like. The signs of degradation are the DINOv3 paper's (arXiv 2508.10104): patch similarities lose their place and
turn to noise, CLS and patch tokens grow alike, patches and dimensions of outlying size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_ext import gram_loss

OUTLYING_NORM = 3.0  # times the median norm of all patches
COMPONENTS = 3  # of the principal component maps


def locality(patches: Tensor) -> float:
    """How much more alike neighbouring patches are than patches anywhere: one minus Geary's contiguity ratio.

    locality = mean over images of (a - m) / (1 - m);  a = mean cos of patches that share a side, m = mean cos of all
    pairs of different patches of the image

    Args:
        patches: (n, h, w, D), h * w >= 2.
    Returns:
        in (-inf, 1]; 0 for noise, 1 for maps that change at few edges only. Images whose patches are all alike
        (1 - m below 1e-6) count as 0: they hold no place at all.
    """
    _check(patches, "locality")
    unit = F.normalize(patches.float(), dim=-1)
    near = torch.cat(
        [
            (unit[:, 1:] * unit[:, :-1]).sum(-1).flatten(1),
            (unit[:, :, 1:] * unit[:, :, :-1]).sum(-1).flatten(1),
        ],
        dim=1,
    ).mean(dim=1)  # (n,)
    everywhere = _pair_mean(unit.flatten(1, 2))
    spread = 1.0 - everywhere
    return float(torch.where(spread > 1e-6, (near - everywhere) / spread.clamp_min(1e-6), 0.0).mean())


def patch_similarity(patches: Tensor) -> float:
    """Mean cosine of different patches of one image, mean over images: in [-1, 1], near 1 when all are alike.

    Args:
        patches: (n, h, w, D), h * w >= 2.
    """
    _check(patches, "patch_similarity")
    return float(_pair_mean(F.normalize(patches.float(), dim=-1).flatten(1, 2)).mean())


def cls_patch_similarity(cls: Tensor, patches: Tensor) -> float:
    """Mean cosine of an image's CLS token and its patches: in [-1, 1]; it rises as patches lose their place.

    Args:
        cls: (n, D).
        patches: (n, h, w, D).
    """
    _check(patches, "cls_patch_similarity")
    whole, parts = F.normalize(cls.float(), dim=-1), F.normalize(patches.float(), dim=-1)
    return float(torch.einsum("nd,nhwd->nhw", whole, parts).mean())


def image_similarity(cls: Tensor) -> float:
    """Mean cosine of the CLS tokens of different images: in [-1, 1]; 1 when every image gets the same answer.

    Args:
        cls: (n, D), n >= 2.
    """
    if len(cls) < 2:
        raise ValueError(f"image_similarity: cls expects at least 2 images, got {len(cls)}")
    return float(_pair_mean(F.normalize(cls.float(), dim=-1)[None]))


def pca_coherence(patches: Tensor) -> float:
    """Spatial coherence of the principal component maps: Moran's I with the four neighbours.

    I(z) = (N / W) sum_ij w_ij z_i z_j / sum_i z_i^2 over an image, w_ij = 1 for patches that share a side, z centred in
    the image; mean over images and the first three components of all images together, weighted by their variance

    Args:
        patches: (n, h, w, D), h, w >= 2.
    Returns:
        in [-1, 1]; about 0 for noise (-1 / (h w - 1) exactly, on average), towards 1 for smooth maps.
    """
    _check(patches, "pca_coherence")
    rows = patches.double().flatten(0, 2)
    centred = rows - rows.mean(dim=0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors
    scores = (centred @ axes[:, -COMPONENTS:]).unflatten(0, patches.shape[:3])  # (n, h, w, 3)
    z = scores - scores.mean(dim=(1, 2), keepdim=True)
    height, width = patches.shape[1:3]
    pairs = height * (width - 1) + width * (height - 1)
    products = (z[:, 1:] * z[:, :-1]).sum(dim=(1, 2)) + (z[:, :, 1:] * z[:, :, :-1]).sum(dim=(1, 2))  # (n, 3)
    squares = z.square().sum(dim=(1, 2))
    coherent = torch.where(squares > 1e-12, products / squares.clamp_min(1e-12) * (height * width / pairs), 0.0)
    weights = squares / squares.sum().clamp_min(1e-12)
    return float((coherent * weights).sum())


def norm_outliers(patches: Tensor) -> float:
    """Share of patches whose norm exceeds three times the median norm of the panel: in [0, 1).

    Args:
        patches: (n, h, w, D) before the final norm, which would hide what is looked for.
    """
    _check(patches, "norm_outliers")
    norms = patches.float().norm(dim=-1)
    return float((norms > OUTLYING_NORM * norms.median()).float().mean())


def dimension_peak(patches: Tensor) -> float:
    """The largest root mean square of a feature dimension over the median one: at least 1.

    Args:
        patches: (n, h, w, D).
    """
    _check(patches, "dimension_peak")
    sizes = patches.float().flatten(0, 2).square().mean(dim=0).sqrt()
    return float(sizes.max() / sizes.median().clamp_min(1e-12))


def effective_rank(rows: Tensor) -> float:
    """Number of directions the rows spread over, each counted by its share of the variance.

    exp(-sum_k p_k ln p_k), p_k = eigenvalue k of the covariance over their sum

    Args:
        rows: (n, D), n >= 2.
    Returns:
        in [1, min(n - 1, D)]; 1 for rows without variance.
    Source:
        Roy and Vetterli 2007, on eigenvalues of the covariance.
    """
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(f"effective_rank: rows expects (n >= 2, D), got {tuple(rows.shape)}")
    centred = rows.double() - rows.double().mean(dim=0)
    product = centred.T @ centred if rows.shape[1] <= len(rows) else centred @ centred.T
    values = torch.linalg.eigvalsh(product).clamp_min(0)
    if float(values.sum()) <= 1e-12 * max(float(rows.double().square().sum()), 1e-300):
        return 1.0
    shares = values / values.sum()
    return float(torch.exp(torch.special.entr(shares).sum()))


def gram_distance(patches: Tensor, reference: Tensor) -> float:
    """Mean squared difference of the patches' cosines to those of another checkpoint on the same panel: in [0, 4].

    The loss of Gram anchoring, as a measure: blind to rotations of the feature space.

    Args:
        patches, reference: (n, h, w, D) and (n, h, w, D') on the same grid.
    """
    if patches.shape[:3] != reference.shape[:3]:
        raise ValueError(
            f"gram_distance: reference expects the grid (n, h, w) = {tuple(patches.shape[:3])}, "
            f"got {tuple(reference.shape[:3])}"
        )
    return float(gram_loss(patches.float().flatten(1, 2), reference.float().flatten(1, 2)))


def drift(patches: Tensor, reference: Tensor) -> float:
    """One minus the mean cosine of each patch's feature with its own at a reference checkpoint: in [0, 2].

    Args:
        patches, reference: (n, h, w, D).
    """
    if patches.shape != reference.shape:
        raise ValueError(f"drift: reference expects {tuple(patches.shape)}, got {tuple(reference.shape)}")
    return float(1.0 - F.cosine_similarity(patches.float(), reference.float(), dim=-1).mean())


def resolution_agreement(patches: Tensor, finer: Tensor) -> float:
    """Mean cosine of patch features with those of the same place seen at a higher resolution: in [-1, 1].

    Args:
        patches: (n, h, w, D).
        finer: (n, h', w', D) of the same images enlarged; averaged over the area of each coarse patch.
    """
    pooled = F.interpolate(finer.float().permute(0, 3, 1, 2), size=patches.shape[1:3], mode="area")
    return float(F.cosine_similarity(patches.float(), pooled.permute(0, 2, 3, 1), dim=-1).mean())


@dataclass(frozen=True, kw_only=True)
class PrototypeUse:
    """How rows are assigned to K prototypes, p_i = softmax(logits_i / temperature), H in nats.

    use: prototypes that are some row's first choice, over min(n, K); in (0, 1].
    entropy: mean H(p_i) / ln K; in [0, 1]; 1: assignments say nothing, 0: they are certain.
    information: (H(mean p) - mean H(p_i)) / ln min(n, K); in [0, 1]; 0: every row gets the same answer.
    """

    use: float
    entropy: float
    information: float


def prototype_use(logits: Tensor, *, temperature: float) -> PrototypeUse:
    """Use, entropy and information of the assignments of rows to prototypes.

    Args:
        logits: (n, K), n >= 2, K >= 2.
        temperature: of the softmax, above 0.
    """
    if logits.ndim != 2 or min(logits.shape) < 2 or temperature <= 0:
        raise ValueError(
            f"prototype_use: expected logits (n >= 2, K >= 2) and a temperature above 0, got {tuple(logits.shape)} "
            f"and {temperature}"
        )
    rows, prototypes = logits.shape
    shares = torch.softmax(logits.float() / temperature, dim=1)
    each = torch.special.entr(shares).sum(dim=1).mean()
    together = torch.special.entr(shares.mean(dim=0)).sum()
    return PrototypeUse(
        use=len(logits.argmax(dim=1).unique()) / min(rows, prototypes),
        entropy=float(each) / math.log(prototypes),
        information=max(float(together - each), 0.0) / math.log(min(rows, prototypes)),
    )


def dense_quality(patches: Tensor) -> float:
    """One number that orders checkpoints by their patch features without labels; to choose a Gram teacher.

    quality = locality * min(1, 10 (1 - patch_similarity)): the second factor only speaks up where patches of an image
    are nearly the same, so that a map of tiny differences does not pass for structure.

    Over ten checkpoints of three runs its rank correlation with the mIoU of a linear probe on facades was .93
    (benchmarks/FACTS.md).

    Args:
        patches: (n, h, w, D), normed patch features of one panel of images at one resolution.
    Returns:
        in (-inf, 1]; compare only numbers of the same panel and resolution.
    """
    return locality(patches) * min(1.0, 10.0 * (1.0 - patch_similarity(patches)))


def _pair_mean(unit: Tensor) -> Tensor:
    """Mean dot product of different rows, from the norm of their sum: unit (n, N, D) -> (n,)."""
    count = unit.shape[1]
    return (unit.sum(dim=1).square().sum(dim=-1) - unit.square().sum(dim=(1, 2))) / (count * (count - 1))


def _check(patches: Tensor, measure: str) -> None:
    if patches.ndim != 4 or patches.shape[0] < 1 or min(patches.shape[1:3]) < 2:
        raise ValueError(f"{measure}: patches expects (n >= 1, h >= 2, w >= 2, D), got {tuple(patches.shape)}")
    if not torch.isfinite(patches).all():
        raise ValueError(f"{measure}: patches expects finite numbers, got NaN or infinity")
