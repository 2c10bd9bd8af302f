"""Results of probes as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from dinov3_train.evaluation.knn import KnnResult
from dinov3_train.evaluation.measure import Groups, ProbeResult

SHOWN = 12  # groups that are all listed; of more the five worst and the five best


def lines(result: ProbeResult | KnnResult) -> Iterator[str]:
    """What is printed of a result."""
    if isinstance(result, KnnResult):
        for score in result.scores:
            yield (
                f"k={score.k}: accuracy {score.accuracy:.4f}, mean per class {score.mean_per_class:.4f} "
                f"{_interval(score.mean_per_class_interval)}"
            )
        yield (
            f"{result.train_images} training and {result.test_images} test images, {result.classes} classes, "
            f"{result.settings['pooling']}"
        )
    else:
        for name, found in result.metrics.items():
            chance = f", chance {result.chance[name]:.4f}" if name in result.chance else ""
            yield f"{name.replace('_', ' ')} {found.value:.4f} {_interval((found.low, found.high))}{chance}"
        yield ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in result.counts.items())
        chosen = {key: value for key, value in result.details.items() if isinstance(value, (int, float))}
        if chosen:
            yield ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in chosen.items())
    if result.groups is not None:
        yield from _group_lines(result.groups)


def _group_lines(groups: Groups) -> Iterator[str]:
    ordered = sorted(groups.scores.items(), key=lambda entry: entry[1].value)
    for name, score in ordered if len(ordered) <= SHOWN else [*ordered[:5], *ordered[-5:]]:
        interval = _interval((score.low, score.high))
        yield f"group {name}: {groups.metric} {score.value:.4f} {interval}, {score.images} images"
    more = f", {groups.without} images without a group" if groups.without else ""
    yield f"{len(ordered)} groups: worst {groups.worst}, best {groups.best}, gap {groups.gap:.4f}{more}"


def _interval(ends: tuple[float, float]) -> str:
    return f"[{ends[0]:.4f}, {ends[1]:.4f}]"
