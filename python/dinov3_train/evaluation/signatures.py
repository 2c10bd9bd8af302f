"""What the health measures mean, and plain-language warnings when they show a sign of degradation.

Signs are judged on a history: one row of measures per look, oldest first, each with its "step". Absolute limits say
what no healthy backbone shows; relative ones compare a run with its own best. Nothing is judged before the run has
settled (its warm-up), for an untrained backbone may show anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Row = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What a measure is, its equation, its range, and what a healthy backbone shows."""

    title: str
    equation: str
    range: str
    healthy: str


MEASURES: dict[str, Measure] = {
    "locality": Measure(
        title="locality of patch similarity",
        equation="(a - m) / (1 - m), a = mean cosine of adjacent patches, m = of all pairs",
        range="up to 1, noise is 0",
        healthy="rises while training; .36 untrained, .6 and more after 1000 steps of vit_tiny_cpu",
    ),
    "patch_similarity": Measure(
        title="similarity of patches to each other",
        equation="m, mean cosine of all pairs of patches of an image",
        range="-1 to 1",
        healthy="a bump in the first hundreds of steps, then falling; below .7",
    ),
    "cls_patch_similarity": Measure(
        title="similarity of CLS to patches",
        equation="mean cos(CLS, patch of the same image)",
        range="-1 to 1",
        healthy="falls after a bump and stays; below .6",
    ),
    "image_similarity": Measure(
        title="similarity of images",
        equation="mean cosine of the CLS tokens of two images",
        range="-1 to 1",
        healthy="near 0; 1 is collapse",
    ),
    "pca_coherence": Measure(
        title="spatial coherence of PCA maps",
        equation="Moran's I of the first three components, weighted by variance",
        range="-1 to 1, noise is 0",
        healthy=".6 and more",
    ),
    "norm_outliers": Measure(
        title="patches of outlying norm",
        equation="share of patches with a norm above 3 medians, before the final norm",
        range="0 to 1",
        healthy="0; above .005 some patches store what is not theirs",
    ),
    "dimension_peak": Measure(
        title="largest feature dimension",
        equation="largest over median root mean square of a dimension, before the final norm",
        range="1 and more",
        healthy="2 to 10",
    ),
    "patch_rank": Measure(
        title="effective rank of patches",
        equation="exp of the entropy of the covariance's eigenvalues, all patches of the panel",
        range="1 to the width",
        healthy="rises while training",
    ),
    "cls_rank": Measure(
        title="effective rank of CLS",
        equation="the same, of the panel's CLS tokens",
        range="1 to images - 1",
        healthy="rises towards the number of images",
    ),
    "resolution_agreement": Measure(
        title="agreement across resolutions",
        equation="mean cos(patch, mean of the same place's patches at twice the side)",
        range="-1 to 1",
        healthy=".85 and more",
    ),
    "dense_quality": Measure(
        title="dense quality",
        equation="locality * min(1, 10 (1 - m))",
        range="up to 1",
        healthy="rises while training; its peak is where a Gram teacher is taken",
    ),
    "dino_use": Measure(
        title="prototypes in use (DINO)",
        equation="different first choices of the panel's CLS tokens / min(images, K)",
        range="0 to 1",
        healthy=".6 and more",
    ),
    "dino_entropy": Measure(
        title="entropy of assignments (DINO)",
        equation="mean H(softmax(logits / .1)) / ln K",
        range="0 to 1",
        healthy="between .2 and .97; 1 says nothing",
    ),
    "dino_information": Measure(
        title="information of assignments (DINO)",
        equation="(H(mean p) - mean H(p)) / ln min(images, K)",
        range="0 to 1",
        healthy="rises while training; 0 is collapse",
    ),
    "ibot_use": Measure(
        title="prototypes in use (iBOT)",
        equation="different first choices of the panel's patches / min(patches, K)",
        range="0 to 1",
        healthy="rises while training",
    ),
    "ibot_entropy": Measure(
        title="entropy of assignments (iBOT)",
        equation="mean H(softmax(logits / .1)) / ln K",
        range="0 to 1",
        healthy="between .2 and .97; 1 says nothing",
    ),
    "ibot_information": Measure(
        title="information of assignments (iBOT)",
        equation="(H(mean p) - mean H(p)) / ln min(patches, K)",
        range="0 to 1",
        healthy="rises while training; 0 is collapse",
    ),
    "gram_start": Measure(
        title="Gram distance to the start",
        equation="mean squared difference of patch cosines",
        range="0 to 4",
        healthy="rises in pretraining; small and steady in refinement and adaptation",
    ),
    "gram_previous": Measure(
        title="Gram distance to the look before",
        equation="mean squared difference of patch cosines",
        range="0 to 4",
        healthy="falls as the learning rate does",
    ),
    "drift": Measure(
        title="drift from the start",
        equation="1 - mean cos(patch now, the same patch at the start)",
        range="0 to 2",
        healthy="towards 1 in pretraining; below .3 for weights one started from and wants to keep",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Sign:
    """A sign of degradation: its name, the step it shows at, and one plain line with the remedy."""

    name: str
    step: int
    text: str


def signs(history: Sequence[Row], *, settled: int = 0) -> list[Sign]:
    """The signs the last row of a history shows.

    Args:
        history: rows with "step" and measures by key, oldest first; measures may be missing.
        settled: rows up to this step (the warm-up) are not judged, and neither is step 0.
    """
    if not history or history[-1]["step"] <= max(settled, 0):
        return []
    step = int(history[-1]["step"])
    judged = [row for row in history if row["step"] > settled]
    found = ((name, rule(judged[-1], judged[:-1])) for name, rule in RULES.items())
    return [Sign(name=name, step=step, text=f"step {step}: {text}") for name, text in found if text]


def all_signs(history: Sequence[Row], *, settled: int = 0) -> list[Sign]:
    """Each sign at the look where it appeared: not repeated while it stays, named again when it comes back."""
    found, standing = [], set()
    for end in range(1, len(history) + 1):
        now = signs(history[:end], settled=settled)
        found += [sign for sign in now if sign.name not in standing]
        standing = {sign.name for sign in now}
    return found


def _noise(row: Row, earlier: Sequence[Row]) -> str:
    now, best, when = _against(row, earlier, "locality", max)
    if now is None or not (now < 0.15 or now < 0.75 * best):
        return ""
    fallen = f"locality {now:.2f}" + (f", {best:.2f} at step {when}" if best > now else "")
    return (
        f"patch similarities turn to noise ({fallen}). Remedy: dinov3 refine (Gram anchoring) with a teacher from "
        + (f"around step {when}" if best > now else "before they did")
        + "; while pretraining, a larger losses.ibot"
    )


def _cls_in_patches(row: Row, earlier: Sequence[Row]) -> str:
    now, least, when = _against(row, earlier, "cls_patch_similarity", min)
    if now is None or not (now > 0.8 or now > least + 0.25):
        return ""
    risen = f"cosine {now:.2f}" + (f", {least:.2f} at step {when}" if least < now else "")
    return (
        f"CLS and patches grow alike ({risen}): patches say what the image is, not what is there. Remedy: dinov3 "
        "refine (Gram anchoring); while pretraining, a larger losses.ibot or backbone.untie_local_cls_norm=true"
    )


def _patches_alike(row: Row, earlier: Sequence[Row]) -> str:
    now = row.get("patch_similarity")
    if now is None or now <= 0.9 or _recovering(row, earlier, "patch_similarity"):
        return ""
    return (
        f"the patches of an image are all alike (mean cosine {now:.2f}). Remedy: a larger losses.ibot, "
        "masking.crop_probability up, or a lower optimizer.lr"
    )


def _images_alike(row: Row, earlier: Sequence[Row]) -> str:
    now = row.get("image_similarity")
    if now is None or now <= 0.95 or _recovering(row, earlier, "image_similarity"):
        return ""
    return (
        f"collapse: every image gets the same CLS token (mean cosine {now:.2f}). Remedy: a larger losses.koleo, a "
        "lower optimizer.lr or a longer optimizer.warmup"
    )


def _few_directions(row: Row, earlier: Sequence[Row]) -> str:
    now, best, when = _against(row, earlier, "patch_rank", max)
    if now is None or not (now < 2.0 or now < 0.5 * best):
        return ""
    fallen = f", {best:.1f} at step {when}" if best > now else ""
    return (
        f"patch features span few directions (effective rank {now:.1f}{fallen}). Remedy: a larger losses.koleo, a "
        "smaller optimizer.weight_decay, more varied data"
    )


def _outlying_patches(row: Row, earlier: Sequence[Row]) -> str:
    now = row.get("norm_outliers")
    if now is None or now <= 0.005:
        return ""
    return (
        f"{100 * now:.1f} % of the patches have outlying norms: they store global information. Remedy: registers "
        "(backbone.registers=4); a trained backbone keeps them, so mask those patches or retrain"
    )


def _outlying_dimension(row: Row, earlier: Sequence[Row]) -> str:
    now = row.get("dimension_peak")
    if now is None or now <= 20:
        return ""
    return (
        f"one feature dimension is {now:.0f} times the median one before the final norm. Remedy: take features after "
        "the final norm (norm=True) and normalise them per dimension in probes"
    )


def _prototypes(kind: str, remedy: str):
    def rule(row: Row, earlier: Sequence[Row]) -> str:
        information, entropy = row.get(f"{kind}_information"), row.get(f"{kind}_entropy")
        if information is None or information >= 0.02:
            return ""
        uniform = entropy is not None and entropy > 0.9
        cause = "every prototype is given alike, so targets say nothing" if uniform else "all rows get the same answer"
        setting = "a lower losses.teacher_temperature, a larger prototype_std" if uniform else remedy
        return f"collapse of the {kind} prototypes: {cause} (information {information:.3f}). Remedy: {setting}"

    return rule


def _resolution(row: Row, earlier: Sequence[Row]) -> str:
    now, best, when = _against(row, earlier, "resolution_agreement", max)
    if now is None or not (now < 0.7 or now < best - 0.15):
        return ""
    fallen = f", {best:.2f} at step {when}" if best > now else ""
    return (
        f"features change with resolution (agreement {now:.2f} at twice the side{fallen}). Remedy: dinov3 adapt (high "
        "resolution); while pretraining, backbone.rope.rescale=2"
    )


RULES = {
    "patch similarities turn to noise": _noise,
    "CLS and patches grow alike": _cls_in_patches,
    "patches all alike": _patches_alike,
    "images all alike": _images_alike,
    "few directions": _few_directions,
    "patches of outlying norm": _outlying_patches,
    "dimension of outlying size": _outlying_dimension,
    "DINO prototypes collapse": _prototypes(
        "dino", "a lower optimizer.lr, a larger losses.koleo, more losses.sinkhorn_iterations"
    ),
    "iBOT prototypes collapse": _prototypes(
        "ibot", "a lower optimizer.lr, more losses.sinkhorn_iterations, fewer prototypes"
    ),
    "features change with resolution": _resolution,
}


def _against(row: Row, earlier: Sequence[Row], key: str, best) -> tuple[float | None, float, int]:
    """The value now, the best of all rows, and its step."""
    now = row.get(key)
    if now is None:
        return None, 0.0, 0
    rows = [other for other in (*earlier, row) if key in other]
    chosen = best(rows, key=lambda other: other[key])
    return now, chosen[key], int(chosen["step"])


def _recovering(row: Row, earlier: Sequence[Row], key: str) -> bool:
    """Whether a value that should fall is lower than at every earlier look: bad still, but on its way."""
    seen = [other[key] for other in earlier if key in other]
    return bool(seen) and row[key] < min(seen) - 1e-3
