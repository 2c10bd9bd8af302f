"""Several sources in one stream: which source and which of its images sample i is, a pure function of (seed, i).

Of all steps a share is homogeneous: every image of the step comes from one source (the paper: a tenth of the steps,
ImageNet-1k). Every other step holds B w_s images of source s, rounded up or down at random so that the mean is exact,
in random order. Each source is drawn without replacement, epoch after epoch of its own.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .. import counter
from ..config import Data
from .sampler import Sampler
from .sources import ConcatenatedSource, Source, open_source

BLOCK = 4096  # steps whose running sums are kept at once


def open_data(data: Data) -> Source:
    """The source that a run draws from: one pool, or a `MixedSource` where weights or homogeneous steps are set.

    Errors: ValueError for settings that do not fit together, and for sources that cannot be opened.
    """
    check_mixing(data)
    if not data.weights and not data.homogeneous:
        return open_source(list(data.sources)).ready()
    return MixedSource(
        [open_source(spec).ready() for spec in data.sources],
        names=short_names(data.sources),
        weights=data.weights,
        homogeneous=[_number(data, name) for name in data.homogeneous],
        homogeneous_share=data.homogeneous_share,
    )


def check_mixing(data: Data) -> None:
    """Errors: ValueError for weights, shares or names that do not fit the sources."""
    weights, share = data.weights, data.homogeneous_share
    if weights and len(weights) != len(data.sources):
        raise ValueError(
            f"data.weights: expected one number for each of the {len(data.sources)} sources, got {len(weights)}"
        )
    if weights and not (min(weights) >= 0.0 and 0.0 < sum(weights) < math.inf):
        raise ValueError(f"data.weights: expected finite numbers of at least 0, not all 0, got {list(weights)}")
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"data.homogeneous_share: expected a share of the steps in [0, 1], got {share:g}")
    if bool(data.homogeneous) != (share > 0.0):
        raise ValueError(
            "data.homogeneous: expected sources together with a data.homogeneous_share above 0, "
            f"got {list(data.homogeneous)} and {share:g}"
        )
    numbers = [_number(data, name) for name in data.homogeneous]
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"data.homogeneous: expected each source once, got {list(data.homogeneous)}")


def _number(data: Data, name: str) -> int:
    """The place of a source among `data.sources`, by what was written there or by its short name."""
    for names in (data.sources, short_names(data.sources)):
        if names.count(name) == 1:
            return names.index(name)
    known = [*data.sources, *short_names(data.sources)]
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.4) or data.sources[:3]
    problem = "is there more than once" if name in known else "is none of data.sources"
    raise ValueError(f"data.homogeneous: {name} {problem}; nearest: {', '.join(close)}")


def short_names(specs: Sequence[str]) -> tuple[str, ...]:
    """A short name for each source, none twice: as many last parts of its path as it takes, `file:part` of a manifest.

    Equal specs get a number.
    """
    paths = [_path_parts(spec) for spec in specs]
    names = [path[-1] for path in paths]
    for depth in range(2, max(map(len, paths), default=0) + 1):
        again = {name for name in names if names.count(name) > 1}
        names = ["/".join(path[-depth:]) if name in again else name for name, path in zip(names, paths)]
    return tuple(f"{name}#{number}" if names.count(name) > 1 else name for number, name in enumerate(names, start=1))


def _path_parts(spec: str) -> list[str]:
    if spec.startswith("torchvision:"):
        return [":".join(part for part in spec.split(":")[1:] if not part.startswith("root="))]
    *folders, file = spec.replace(".parquet:part=", ":").rstrip("/").split("/")
    return [*folders, file.removesuffix(".tar").removesuffix(".parquet").removesuffix(".txt")]


class MixedSource(ConcatenatedSource):
    """Sources one after another, drawn with weights, and some steps from one of them alone.

    names: one for each source; weights: relative, of the images of heterogeneous steps, empty for as many as each
    source holds; homogeneous: numbers of the sources that have steps of their own, each as often as it has images;
    homogeneous_share: share of all steps that are.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        names: Sequence[str],
        weights: Sequence[float] = (),
        homogeneous: Sequence[int] = (),
        homogeneous_share: float = 0.0,
    ) -> None:
        super().__init__(sources)
        self.names = tuple(names)
        self.sizes = tuple(len(source) for source in sources)
        self.weights = tuple(weights) or tuple(map(float, self.sizes))
        self.homogeneous = tuple(homogeneous)
        self.homogeneous_share = homogeneous_share

    def sampler(self, seed: int, batch_size: int) -> MixedSampler:
        return MixedSampler(self, seed=seed, batch_size=batch_size)


@dataclass(frozen=True)
class Drawn:
    """What the first steps of a run have drawn, over all ranks: images of each source, homogeneous steps of each."""

    images: np.ndarray  # (S,) int64
    homogeneous_steps: np.ndarray  # (S,) int64


def draw_counts(source: Source, *, seed: int, batch_size: int) -> Callable[[int], dict[str, float]]:
    """A function of the steps done: epochs of a pool; of a mixture images and epochs of each source, over all ranks."""
    if not isinstance(source, MixedSource):
        return lambda steps: {"epochs": steps * batch_size / len(source)}
    sampler = source.sampler(seed, batch_size)

    def count(steps: int) -> dict[str, float]:
        drawn = sampler.drawn(steps)
        values: dict[str, float] = {f"drawn/{name}": int(images) for name, images in zip(source.names, drawn.images)}
        values |= {f"epochs/{name}": values[f"drawn/{name}"] / size for name, size in zip(source.names, source.sizes)}
        return values | {"homogeneous_steps": int(drawn.homogeneous_steps.sum())}

    return count


def mixture_lines(source: Source, images: int) -> list[str]:
    """What a run of so many images will see of each source, one line each; nothing for a pool."""
    if not isinstance(source, MixedSource):
        return []
    alone = [size if number in source.homogeneous else 0 for number, size in enumerate(source.sizes)]
    lines = []
    for name, size, weight, own in zip(source.names, source.sizes, source.weights, alone):
        share = weight / sum(source.weights)
        whole = source.homogeneous_share * own / max(sum(alone), 1)
        total = (1.0 - source.homogeneous_share) * share + whole
        lines.append(
            f"  {name}: {size} images, {100 * share:.3g} % of mixed steps, {100 * whole:.3g} % of steps of its own, "
            f"{total * images / size:.3g} epochs"
        )
    return lines


class MixedSampler(Sampler):
    """Image number, in the joined source, of a global sample index i = step * batch_size + position.

    Image d of source s, counted over the run, is entry d mod size of that source's epoch d div size. d is the number of
    images of s in all earlier steps plus those earlier in this one; the former are running sums over steps, which cost
    no more than one draw a step.
    """

    def __init__(self, source: MixedSource, *, seed: int, batch_size: int) -> None:
        super().__init__(len(source), seed)
        self._batch_size = batch_size
        self._samplers = [Sampler(size, seed, f"source/{n}/epoch") for n, size in enumerate(source.sizes)]
        self._firsts = np.cumsum([0, *source.sizes[:-1]], dtype=np.int64)
        self._edges = _edges(source.weights)  # (S + 1,)
        self._homogeneous = np.array(source.homogeneous, dtype=np.int64)
        self._homogeneous_edges = _edges([source.sizes[number] for number in source.homogeneous] or [1])
        self._share = source.homogeneous_share
        self._totals = [
            np.zeros((2, len(source.sizes)), dtype=np.int64)
        ]  # before each block: images, homogeneous steps
        self._block: tuple[int, np.ndarray] | None = None
        self._layout: tuple[int, np.ndarray, np.ndarray] | None = None

    def image(self, index: int, *, skip: int = 0) -> int:
        """The image of sample `index`, or `skip` entries further on in its source's order of the same epoch."""
        source, draw = self._draw(int(index))
        return int(self._firsts[source]) + self._samplers[source].image(draw, skip=skip)

    def candidates(self, index: int) -> int:
        return self._samplers[self._draw(int(index))[0]].size

    def drawn(self, steps: int) -> Drawn:
        """What steps 0 to `steps` - 1 hold."""
        block, place = divmod(steps, BLOCK)
        return Drawn(*self._before(block)[place])

    def homogeneous_source(self, step: int) -> int | None:
        """The source that all images of the step come from, None for a heterogeneous step."""
        alone, _ = self._steps(step, 1)
        return None if alone[0] < 0 else int(alone[0])

    def _draw(self, index: int) -> tuple[int, int]:
        """(source, number of the image among all that are drawn from it) of a sample."""
        step, position = divmod(index, self._batch_size)
        if self._layout is None or self._layout[0] != step:
            self._layout = (step, *self._lay_out(step))
        _, sources, draws = self._layout
        return int(sources[position]), int(draws[position])

    def _lay_out(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources and draws of the positions of a step: int64 (B,) each."""
        _, counts = self._steps(step, 1)
        stratified = np.repeat(np.arange(counts.shape[1]), counts[0])  # (B,)
        sources = stratified[counter.permutation(self.seed, f"mixture/{step}", self._batch_size)]
        order = np.argsort(sources, kind="stable")
        ranks = np.empty(self._batch_size, dtype=np.int64)
        ranks[order] = np.arange(self._batch_size) - (np.cumsum(counts[0]) - counts[0])[sources[order]]
        return sources, self.drawn(step).images[sources] + ranks

    def _before(self, block: int) -> np.ndarray:
        """Running sums before each step of a block of steps: int64 (BLOCK + 1, 2, S)."""
        while self._block is None or self._block[0] != block:
            number = min(block, len(self._totals) - 1)  # further blocks follow from the sums before them
            alone, counts = self._steps(number * BLOCK, BLOCK)
            steps = alone[:, None] == np.arange(counts.shape[1])  # (BLOCK, S)
            sums = np.zeros((BLOCK + 1, *self._totals[0].shape), dtype=np.int64)
            np.cumsum(np.stack([counts, steps], axis=1), axis=0, out=sums[1:])
            sums += self._totals[number]
            if number + 1 == len(self._totals):
                self._totals.append(sums[-1].copy())
            self._block = (number, sums)
        return self._block[1]

    def _steps(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Of steps [first, first + count): the one source of a homogeneous step, else -1, (count,); images (count, S).

        A heterogeneous step takes the points (k + v) / B, k < B, with one draw v: source s gets those in its interval.
        """
        draws = counter.uniform(self.seed, "mixture", np.arange(first, first + count), 3)  # (count, 3)
        edges = np.ceil(self._batch_size * self._edges - draws[:, 2:3]).astype(np.int64)  # (count, S + 1)
        counts = np.diff(edges, axis=1)
        alone = np.full(count, -1, dtype=np.int64)
        rows = np.flatnonzero(draws[:, 0] < self._share)
        if len(rows):
            alone[rows] = self._homogeneous[np.searchsorted(self._homogeneous_edges, draws[rows, 1], side="right") - 1]
            counts[rows] = 0
            counts[rows, alone[rows]] = self._batch_size
        return alone, counts


def _edges(weights: Sequence[float]) -> np.ndarray:
    """Ends of the sources' intervals in [0, 1]: float64 (S + 1,), the first 0, the last exactly 1."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(weights, dtype=np.float64))])
    return sums / sums[-1]
