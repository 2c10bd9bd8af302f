"""Hierarchical k-means over pools of simulated embeddings: seconds, anonymous memory, faiss on the same work.

    python benchmarks/pipeline/bench_cluster.py --millions 0.5 1 2 --threads 2 --folder /tmp/pools
    python benchmarks/pipeline/bench_cluster.py --millions 10 --only iteration --threads 2 --folder /tmp/pools

Pools are drawn block by block (a mixture of 5,000 directions of unequal share, width 384, unit length, fp16 shards)
and stay in the folder. "levels": `curation.cluster` with k = 2,000 and 100, 10 iterations, one resampling, from a
random start. "iteration": one of its passes of the first level. "faiss": 10 iterations of faiss.Kmeans over the same
rows from the same random start, all rows in memory as fp32 (it has no other way; no subsampling), the copy not timed.
"ours": the same 10 iterations by this package, out of core. Each runs in a process of its own, so that its memory is
its own; a watcher reads RssAnon ten times a second.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

DIM, DIRECTIONS, BLOCK, SHARD = 384, 5000, 50_000, 500_000
CLUSTERS, ITERATIONS = (2000, 100), 10
PARTS = ("levels", "iteration", "ours", "faiss")


def make_pool(folder: Path, rows: int) -> Path:
    """Shards of `rows` simulated embeddings; made once."""
    path = folder / f"pool_{rows}"
    if (path / "settings.json").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((DIRECTIONS, DIM), dtype=np.float32) / DIM**0.5
    share = 1.0 / (1.0 + np.arange(DIRECTIONS)) ** 0.7
    for number, start in enumerate(range(0, rows, SHARD)):
        count = min(SHARD, rows - start)
        shard = np.lib.format.open_memmap(path / f"shard_{number:06d}.npy", "w+", np.float16, (count, DIM))
        for first in range(0, count, BLOCK):
            size = min(BLOCK, count - first)
            block = directions[rng.choice(DIRECTIONS, size, p=share / share.sum())]
            block += 0.7 / DIM**0.5 * rng.standard_normal((size, DIM), dtype=np.float32)
            shard[first : first + size] = block / np.linalg.norm(block, axis=1, keepdims=True)
        shard.flush()
    (path / "settings.json").write_text("{}")
    return path


class Watcher(threading.Thread):
    """Largest anonymous memory of this process, bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.going = 0, True

    def run(self) -> None:
        while self.going:
            status = Path("/proc/self/status").read_text()
            anonymous = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            self.peak = max(self.peak, 1024 * int(anonymous.split()[1]))
            time.sleep(0.1)


def measure(part: str, pool: Path) -> dict:
    """Wall and CPU seconds and peak anonymous bytes of one part, in this process."""
    from dinov3_train.curation.cluster import ClusterSettings, cluster
    from dinov3_train.curation.embeddings import Embeddings
    from dinov3_train.curation.kmeans import Selected, Where, kmeans, pass_over, start

    points = Selected(Embeddings(pool))
    first = start(points, CLUSTERS[0], how="random", seed=0, stream="level 1")
    if part == "faiss":
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        rows = np.empty((len(points), DIM), dtype=np.float32)
        for begin in range(0, len(points), BLOCK):
            stop = min(begin + BLOCK, len(points))
            rows[begin:stop] = points.take(np.arange(begin, stop)).numpy()
        most = len(points)
        other = faiss.Kmeans(DIM, CLUSTERS[0], niter=ITERATIONS, max_points_per_centroid=most, seed=0)
    watcher = Watcher()
    watcher.start()
    begin, cpu = time.perf_counter(), time.process_time()
    distortion = None
    if part == "levels":
        settings = ClusterSettings(clusters=CLUSTERS, iterations=ITERATIONS, resampling=1, start="random")
        with tempfile.TemporaryDirectory(dir=pool.parent) as out:
            found = cluster(points, settings, Path(out) / "clusters", where=Where(), say=lambda _: None)
            distortion = float(found.distances.mean())
    elif part == "iteration":
        distortion = pass_over(points, first, Where()).distortion / len(points)
    elif part == "ours":
        distortions = []
        kmeans(points, first, ITERATIONS, Where(), after=lambda number, centroids, value: distortions.append(value))
        distortion = distortions[-1] / len(points)
    else:
        other.train(rows, init_centroids=first.numpy())
        distortion = float(other.obj[-1]) / len(points)
    wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
    watcher.going = False
    watcher.join()
    return {"seconds": wall, "cpu_seconds": cpu, "anonymous_gib": watcher.peak / 2**30, "distortion": distortion}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=float, nargs="+", default=[0.5])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "dinov3_pools")
    parser.add_argument("--results", type=Path, help="CSV file to which rows are appended")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        torch.set_num_threads(options.threads)
        print(json.dumps(measure(options.inside[0], Path(options.inside[1]))))
        return
    print(f"{options.threads} thread(s), load average {os.getloadavg()[0]:.1f}, torch {torch.__version__}", flush=True)
    for millions in options.millions:
        pool = make_pool(options.folder, round(millions * 1e6))
        for part in options.only:
            command = [sys.executable, __file__, "--threads", str(options.threads), "--inside", part, str(pool)]
            environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            if done.returncode:
                said = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
                print(f"{millions:5g} M {part:9s} failed with status {done.returncode}: {said}", flush=True)
                continue
            found = json.loads(done.stdout)
            print(
                f"{millions:5g} M {part:9s} {found['seconds']:8.1f} s, {found['cpu_seconds']:8.1f} s of CPU, "
                f"{found['anonymous_gib']:5.2f} GiB anonymous, mean squared distance {found['distortion']:.5f}",
                flush=True,
            )
            if options.results:
                write_row(options.results, {"millions": millions, "part": part, "threads": options.threads, **found})


def write_row(path: Path, row: dict) -> None:
    """Append a row, with a header in a new file."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
