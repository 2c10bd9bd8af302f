"""What an export says about itself, as JSON: in the header of a safetensors file, or in `<file>.json` beside others."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

from ..config import Backbone, ConvNeXtBackbone, Head, from_dict
from .architecture import Architecture
from .resolved import Resolved

KEY = "dinov3_ext"  # of the safetensors header


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """An export's own description; heads: empty where it has none."""

    architecture: Architecture
    heads: dict[str, Head]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size: int
    origin: str
    licence: str


def about(resolved: Resolved, *, heads: bool) -> About:
    """The description of a backbone, of its heads too if asked and there."""
    found = {name: head.head for name, head in (resolved.heads or {}).items()} if heads else {}
    fields = {field.name: getattr(resolved, field.name) for field in dataclasses.fields(About)}
    return About(**(fields | {"heads": found}))


def to_json(description: About) -> str:
    """JSON text of a description."""
    return json.dumps(dataclasses.asdict(description), indent=1)


def from_json(text: str, where: str) -> About:
    """The inverse of `to_json`. Errors: ValueError naming `where` when it is not one."""
    try:
        values = json.loads(text)
        kind = ConvNeXtBackbone if "dims" in values["architecture"] else Backbone
        return About(
            architecture=from_dict(values["architecture"], kind, "architecture."),
            heads={name: from_dict(head, Head, f"{name}.") for name, head in values["heads"].items()},
            mean=_three(values["mean"]),
            std=_three(values["std"]),
            size=int(values["size"]),
            origin=str(values["origin"]),
            licence=str(values["licence"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: its {KEY} description cannot be read: {error!r}") from error


def _three(values: Mapping | list) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
