"""Duplicates: equal files, and images whose embeddings are nearly the same; groups of them, and one of each kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from torch import Tensor

from .embeddings import Embeddings
from .files import claim, read_array, read_arrays, read_json, whole, write_array, write_arrays, write_json
from .kmeans import Where
from .nearest import FP32_SLACK, bf16_products

ROLES = ("pool", "trusted", "held-out")
PAIRS = 16384  # candidates looked at in one go
SECONDS = 20.0  # between states kept for a restart

DUPLICATES = pa.schema(
    [
        ("set", pa.string()),
        ("row", pa.int64()),
        ("name", pa.string()),
        ("group", pa.int64()),  # images of one number are duplicates of each other
        ("kept", pa.bool_()),  # held-out images are always kept
        ("leak", pa.bool_()),  # dropped because the group holds an image of a held-out set
        ("similarity", pa.float32()),  # cosine with the image of the group that was kept (a held-out one, of a leak)
    ]
)


@dataclass(frozen=True)
class ImageSet:
    """Embeddings under a name. role: "pool"; "trusted", of a pair with the pool its image is kept; "held-out", for
    evaluation: nothing like it may stay in the others."""

    name: str
    embeddings: Embeddings
    role: str = "pool"

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"dedup: role expects one of {', '.join(ROLES)}, got {self.role!r}")


@dataclass(frozen=True, kw_only=True)
class DedupSettings:
    """threshold: cosine similarity from which two images are near duplicates, above 0 and at most 1; block: rows
    compared with as many others at a time. Errors: ValueError for a value outside these."""

    threshold: float
    block: int = 4096

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"dedup: threshold is a cosine similarity above 0 and at most 1, got {self.threshold}")
        if self.block < 1:
            raise ValueError(f"dedup: block expects at least 1, got {self.block}")


class Groups:
    """Union-find over rows 0 to n - 1, a whole array of edges at a time; the root of a group is its lowest row."""

    def __init__(self, count: int) -> None:
        self.parent = np.arange(count)

    def find(self, rows: np.ndarray) -> np.ndarray:
        """Roots, int64, of `rows`."""
        roots = self.parent[rows]
        while not np.array_equal(above := self.parent[roots], roots):
            roots = above
        self.parent[rows] = roots
        return roots

    def join(self, first: np.ndarray, second: np.ndarray) -> None:
        """Make `first[i]` and `second[i]` members of one group."""
        while len(first):
            first, second = self.find(first), self.find(second)
            apart = first != second
            first, second = np.minimum(first, second)[apart], np.maximum(first, second)[apart]
            np.minimum.at(self.parent, second, first)

    def roots(self) -> np.ndarray:
        """The root of every row, int64 (n,)."""
        return self.find(np.arange(len(self.parent)))


def dedup(
    sets: Sequence[ImageSet],
    settings: DedupSettings,
    out: Path,
    *,
    where: Where,
    say: Callable[[str], None] = print,
) -> Duplicates:
    """Find duplicates within and across `sets`, and what the others share with held-out sets.

    Files of equal content are one group; so are images whose cosine similarity reaches the threshold, and whatever
    such pairs connect. All pairs of rows are compared, in blocks: products in bf16 where that is faster leave out what
    is surely below the threshold, the others are decided in fp64. Of a group one image is kept: a trusted one before
    one of the pool, then the one of the most pixels, then the first; none, where the group holds a held-out image.

    Args:
        sets: with different names; rows need not have unit length.
        out: new, empty, or of this very call, which then goes on.
        where: device and ranks; the result is the same for any number of ranks.

    Errors: ValueError for sets of different widths, equal names, rows that are NaN, another call's folder; OSError for
        a full disk.
    """
    _check(sets)
    if where.first:
        about = [[s.name, s.role, len(s.embeddings), s.embeddings.fingerprint] for s in sets]
        claim(out, asdict(settings) | {"sets": about}, "dedup")
    where.meet()
    if not (out / "summary.json").is_file():
        _Search(sets, settings, out, where, say).run()
        where.meet()
    return Duplicates(out)


def _check(sets: Sequence[ImageSet]) -> None:
    names = [one.name for one in sets]
    if not sets or len(set(names)) < len(names):
        raise ValueError(f"dedup: expected sets of different names, got {', '.join(names) or 'none'}")
    for one in sets:
        if one.embeddings.dim != sets[0].embeddings.dim:
            raise ValueError(
                f"dedup: {one.name} has embeddings of width {one.embeddings.dim}, {sets[0].name} of "
                f"{sets[0].embeddings.dim}; expected those of one backbone"
            )
        made = [s.embeddings.settings.get("weights") for s in (sets[0], one)]
        if None not in made and made[0] != made[1]:
            raise ValueError(f"dedup: {one.name} and {sets[0].name} were embedded by different backbones")


@dataclass(frozen=True)
class _Search:
    sets: Sequence[ImageSet]
    settings: DedupSettings
    out: Path
    where: Where
    say: Callable[[str], None]

    def run(self) -> None:
        groups, done = self._restart()
        self.where.meet()  # no rank may find what another one writes now: they share what is not done
        if not done:
            self._equal_files(groups)
        # equal files are compared once: a pool of copies of a few images costs what the few cost
        rows = np.unique(self._exact_roots())
        self._near(groups, rows, done)
        self._write_state(groups, done)
        self.where.meet()
        if self.where.first:
            groups, _ = self._restart()
            self._finish(groups)
            for file in self.out.glob("state_*.npz"):
                file.unlink()
        self.where.meet()

    def _equal_files(self, groups: Groups) -> None:
        roots = self._exact_roots()
        groups.join(np.arange(len(roots)), roots)

    def _exact_roots(self) -> np.ndarray:
        """For every row the first row whose file has the same content, int64 (n,)."""
        if not all(one.embeddings.indexed for one in self.sets):
            return np.arange(self._ends[-1])
        hashes = pa.chunked_array([c for s in self.sets for c in s.embeddings.table(["hash"])["hash"].chunks])
        codes = hashes.combine_chunks().dictionary_encode().indices.to_numpy()  # numbered as they first appear
        first = np.full(int(codes.max()) + 1, len(codes))
        np.minimum.at(first, codes, np.arange(len(codes)))
        return first[codes]

    def _near(self, groups: Groups, rows: np.ndarray, done: set[int]) -> None:
        """Compare blocks of `rows`; block i with i and all later ones is one piece of work."""
        block, here = self.settings.block, self.where.collectives
        count = -(-len(rows) // block)
        todo = [i for i in range(count) if i not in done][here.rank :: here.world_size]
        total, seen, saved = sum(count - i for i in todo), 0, time.monotonic()
        for i in todo:
            mine = self._take(rows[i * block : (i + 1) * block])
            for j in range(i, count):
                others = mine if j == i else self._take(rows[j * block : (j + 1) * block])
                for first, second in self._pairs(mine, others, same=i == j):
                    self._join_near(groups, rows[i * block + first], rows[j * block + second])
                seen += 1
                self.where.progress(seen, total)
            done.add(i)
            if time.monotonic() - saved > SECONDS:
                self._write_state(groups, done)
                saved = time.monotonic()

    def _pairs(self, mine: Tensor, others: Tensor, *, same: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Places of pairs that may reach the threshold: none that does is missing."""
        with bf16_products():
            scores = mine @ others.T
        if same:
            scores.fill_diagonal_(-torch.inf)
        limit = self.settings.threshold - _rounding(mine, others)
        for row in (scores.amax(dim=1) >= limit).nonzero().flatten().split(256):
            place, second = (scores[row] >= limit).nonzero(as_tuple=True)
            first = row[place].cpu().numpy()
            second = second.cpu().numpy()
            if same:
                first, second = first[first < second], second[first < second]
            for start in range(0, len(first), PAIRS):
                yield first[start : start + PAIRS], second[start : start + PAIRS]

    def _join_near(self, groups: Groups, first: np.ndarray, second: np.ndarray) -> None:
        """Join the pairs whose similarity reaches the threshold; pairs already in one group are not looked at."""
        apart = groups.find(first) != groups.find(second)
        first, second = first[apart], second[apart]
        reached = self._similarity(first, second) >= self.settings.threshold
        groups.join(first[reached], second[reached])

    def _similarity(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Cosine, fp64 (n,), of pairs of rows."""
        rows, place = np.unique(np.concatenate([first, second]), return_inverse=True)
        found = self._take(rows).double()
        place = torch.from_numpy(place).to(found.device)
        return (found[place[: len(first)]] * found[place[len(first) :]]).sum(dim=1).cpu().numpy()

    def _take(self, rows: np.ndarray) -> Tensor:
        """Unit-length rows, ascending, on the device."""
        parts, start = [], 0
        for one, end in zip(self.sets, self._ends):
            inside = rows[(rows >= start) & (rows < end)] - start
            if len(inside):
                parts.append(one.embeddings.take(inside))
            start = end
        found = torch.cat(parts) if parts else torch.empty(0, self.sets[0].embeddings.dim)
        return torch.nn.functional.normalize(found.to(self.where.device), dim=1)

    @property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(one.embeddings) for one in self.sets])

    def _restart(self) -> tuple[Groups, set[int]]:
        """What earlier calls of any number of ranks have found, put together."""
        groups, done = Groups(int(self._ends[-1])), set()
        for file in sorted(self.out.glob("state_*.npz")):
            try:
                found = read_arrays(file)
            except ValueError as error:
                self.say(f"{error}: its work is done again")
                continue
            groups.join(np.arange(len(groups.parent)), found["parent"])
            done |= set(found["done"].tolist())
        return groups, done

    def _write_state(self, groups: Groups, done: set[int]) -> None:
        path = self.out / f"state_{self.where.collectives.rank}.npz"
        write_arrays(path, parent=groups.parent, done=np.array(sorted(done), dtype=np.int64))

    def _finish(self, groups: Groups) -> None:
        """Groups numbered by their first row, the kept rows of every set, the list of duplicates, a summary."""
        roots = groups.roots()
        found, inverse, counts = np.unique(roots, return_inverse=True, return_counts=True)
        number = np.full(len(found), -1)
        number[counts > 1] = np.arange((counts > 1).sum())
        group = number[inverse]  # (n,), -1 for a row on its own
        members = np.flatnonzero(group >= 0)
        kept, leak, reference = self._judge(members, group[members])
        keep = np.ones(len(group), dtype=bool)
        keep[members] = kept
        start = 0
        for one, end in zip(self.sets, self._ends):
            write_array(self.out / f"{one.name}_groups.npy", group[start:end])
            if one.role != "held-out":
                write_array(self.out / f"{one.name}_kept.npy", np.flatnonzero(keep[start:end]))
            start = end
        self._write_list(members, group[members], kept, leak, reference)
        exact = self._exact_roots()
        write_json(
            self.out / "summary.json",
            {
                "images": {one.name: len(one.embeddings) for one in self.sets},
                "kept": {
                    one.name: int(keep[end - len(one.embeddings) : end].sum())
                    for one, end in zip(self.sets, self._ends)
                    if one.role != "held-out"
                },
                "groups": int((counts > 1).sum()),
                "largest_group": int(counts.max()),
                "duplicates_of_equal_content": int((exact != np.arange(len(exact))).sum()),
                "dropped": int((~keep).sum()),
                "leaks": int(leak.sum()),
            },
        )

    def _judge(self, members: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each member: whether it is kept, whether it is a leak, and the row it is compared with."""
        which = np.searchsorted(self._ends, members, side="right")
        role = np.array([ROLES[::-1].index(one.role) for one in self.sets])[which]  # 0 held-out, 1 trusted, 2 pool
        order = np.lexsort((members, -self._pixels()[members], role, group))
        first = np.ones(len(order), dtype=bool)
        first[1:] = group[order][1:] != group[order][:-1]
        best = np.empty(int(group.max(initial=-1)) + 1, dtype=np.int64)
        best[group[order][first]] = order[first]  # the place of the group's first choice
        chosen = best[group]
        leak = (role[chosen] == 0) & (role != 0)
        kept = (chosen == np.arange(len(members))) | (role == 0)
        return kept, leak, members[chosen]

    def _pixels(self) -> np.ndarray:
        if not all(one.embeddings.indexed for one in self.sets):
            return np.zeros(self._ends[-1], dtype=np.int64)
        tables = [one.embeddings.table(["width", "height"]) for one in self.sets]
        return np.concatenate([t["width"].to_numpy().astype(np.int64) * t["height"].to_numpy() for t in tables])

    def _write_list(self, rows, group, kept, leak, reference) -> None:
        order = np.lexsort((~kept, group))
        rows, group, kept, leak, reference = (part[order] for part in (rows, group, kept, leak, reference))
        similar = np.concatenate(
            [
                self._similarity(rows[start : start + PAIRS], reference[start : start + PAIRS])
                for start in range(0, len(rows), PAIRS)
            ]
            or [np.empty(0)]
        )
        which = np.searchsorted(self._ends, rows, side="right")
        inside = rows - np.concatenate([[0], self._ends])[which]
        names = np.full(len(rows), "", dtype=object)
        for number, one in enumerate(self.sets):
            if one.embeddings.indexed and (which == number).any():
                names[which == number] = (
                    one.embeddings.table(["name"])["name"].take(inside[which == number]).to_pylist()
                )
        table = pa.table(
            {
                "set": [self.sets[number].name for number in which],
                "row": inside,
                "name": names.tolist(),
                "group": group,
                "kept": kept,
                "leak": leak,
                "similarity": similar.astype(np.float32),
            },
            schema=DUPLICATES,
        )
        with whole(self.out / "duplicates.parquet") as partial:
            parquet.write_table(table, partial, compression="zstd")


class Duplicates:
    """What `dedup` found. Errors: ValueError for a folder without a finished search."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "summary.json").is_file():
            raise ValueError(f"curate: {self.path} holds no finished search for duplicates (dinov3 curate dedup)")
        self.summary = read_json(self.path / "summary.json")

    def kept(self, name: str) -> np.ndarray:
        """Rows of a set that stay, int64, ascending."""
        return self._array(name, "kept")

    def groups(self, name: str) -> np.ndarray:
        """The group of every row of a set, int64 (n,), -1 for none."""
        return self._array(name, "groups")

    def table(self) -> pa.Table:
        """All images that have duplicates, group by group, the kept one first (`DUPLICATES`)."""
        return parquet.read_table(self.path / "duplicates.parquet")

    def _array(self, name: str, what: str) -> np.ndarray:
        if name not in self.summary["images"]:
            raise ValueError(f"curate: {self.path} knows {', '.join(self.summary['images'])}, not {name}")
        return read_array(self.path / f"{name}_{what}.npy")


def _rounding(mine: Tensor, others: Tensor) -> float:
    """How far a product of rows rounded to bf16 may be from the exact one (`Nearest` has the formula)."""
    errors = [(rows - rows.bfloat16().float()).norm(dim=1).max() for rows in (mine, others)]
    return float(errors[0] * (1 + 2.0**-8) + errors[1] * (1 + 2.0**-8)) + 4 * FP32_SLACK
