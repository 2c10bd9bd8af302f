"""The accuracy rule: an op may lose at most twice what plain PyTorch loses in the same dtype, against float64.

max|ours - ref64| <= 2 max|torch in the same dtype - ref64| + 2 spacing(ref)
"""

import numpy as np
import torch
from torch import Tensor


def spacing(reference: Tensor, dtype: torch.dtype) -> float:
    """Distance of neighbouring numbers of `dtype` at the largest magnitude of `reference`."""
    largest = reference.abs().max().item() if reference.numel() else 0.0
    if dtype is torch.float64:
        return float(np.spacing(largest))
    return torch.finfo(dtype).eps * 2.0 ** np.floor(np.log2(largest)) if largest > 0 else torch.finfo(dtype).tiny


def assert_accurate(ours: Tensor, plain: Tensor, reference: Tensor, *, what: str = "result") -> None:
    """Fails where `ours` breaks the rule.

    Args:
        ours: result under test, in some dtype; the spacing is that dtype's.
        plain: what plain PyTorch makes of the same inputs in the same dtype.
        reference: the float64 result.
        what: name for the message.
    """
    assert reference.dtype is torch.float64, "the reference must be float64"
    assert ours.shape == reference.shape, f"{what}: shape {tuple(ours.shape)}, reference {tuple(reference.shape)}"
    if not reference.numel():
        return
    assert torch.isfinite(ours).all(), f"{what}: not finite"
    lost = (ours.double() - reference).abs().max().item()
    allowed = 2 * (plain.double() - reference).abs().max().item() + 2 * spacing(reference, ours.dtype)
    assert lost <= allowed, f"{what}: lost {lost:.3e}, allowed {allowed:.3e}"
