"""What is known about the terms that weights are under; said at import, kept in the run, carried into exports.

Nothing here is legal advice: it repeats what the sources say about themselves, and says so where nothing is known.
"""

from __future__ import annotations

OWN = "your own weights, trained from random numbers by this package: no terms but those of your images"
DINOV3 = (
    "DINOv3 License (Meta): https://ai.meta.com/resources/models-and-libraries/dinov3-license/ ; weights trained from "
    "these stay under it, and a copy of it goes with them when they are passed on"
)
UNKNOWN = "unknown; look at the page the weights were downloaded from before passing on anything made from them"
KNOWN = {  # identifiers of model cards and of timm's configurations
    "dinov3-license": DINOV3,
    "apache-2.0": "Apache-2.0, https://www.apache.org/licenses/LICENSE-2.0",
    "mit": "MIT, https://opensource.org/license/mit",
    "cc-by-nc-4.0": "CC BY-NC 4.0, no commercial use: https://creativecommons.org/licenses/by-nc/4.0/",
    "fair-noncommercial-research-license": "FAIR Noncommercial Research License (Meta): no commercial use",
}


def named(identifier: str | None, where: str) -> str:
    """The licence a source states by its identifier, or that it states none: where (text) says where to look."""
    if not identifier or identifier == "other":
        return f"unknown; {where} names none: look there before passing on anything made from these weights"
    return KNOWN.get(identifier.lower(), f"{identifier}, as {where} says; read its terms there")


def of_release(name: str) -> str:
    """The licence of weights that go by the name of a file or repository of the DINOv3 release; else unknown."""
    lowered = name.lower()
    released = "dinov3" in lowered and ("lvd1689m" in lowered or "sat493m" in lowered)
    return DINOV3 if released else UNKNOWN
