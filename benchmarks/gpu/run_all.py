"""The day a GPU is there: tests and times everything in under eight minutes, and writes benchmarks/results/*.csv.

    pip install ".[test,benchmark]" && python benchmarks/gpu/run_all.py [--out FOLDER]

Builds nothing. First tests/gpu (every public op against float64, CUDA graphs, streams, torch.compile), then the
benchmarks with the shapes of the recipes; each part has its share of the time, and says what it had no time for. Exits
with 0 where every test passed. Without a GPU it says so in one line.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 470  # of all parts together
TESTS_SECONDS = 200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    chosen = parser.parse_args()
    if problem := missing():
        print(f"run_all: {problem}")
        return 1
    begin = time.monotonic()
    import torch

    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, driver runtime {torch.version.cuda}", flush=True)
    passed = part("tests", ["tests/gpu", "-q", "-p", "no:cacheprovider"], TESTS_SECONDS)
    left = SECONDS - (time.monotonic() - begin)
    chosen.out.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    results = chosen.out / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-{stamp}.csv"
    options = ["--results", str(results), "--seconds", str(int(left - 20)), "-p", "no:cacheprovider"]
    timed = part("benchmarks", ["benchmarks", "-q", "-s", "--device", "cuda", *options], left)
    print(f"{time.monotonic() - begin:.0f} s; tests {'passed' if passed else 'FAILED'}; rows in {results}")
    return 0 if passed and timed else 1


def missing() -> str | None:
    """Why nothing can run here; None where it can."""
    import torch

    if not torch.cuda.is_available():
        return "no GPU here (torch.cuda.is_available() is false); nothing was tested or timed"
    import dinov3_ext

    path = dinov3_ext.explain("sinkhorn_knopp", device="cuda")
    return None if path.path == "kernel" else f"the installed library has no CUDA kernels: {path.reason}"


def part(name: str, arguments: list[str], seconds: float) -> bool:
    """Runs pytest in a process of its own, within its share of the time."""
    print(f"---- {name}", flush=True)
    try:
        done = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        print(f"{name}: not finished after {seconds:.0f} s")
        return False
    return done.returncode == 0


if __name__ == "__main__":
    raise SystemExit(main())
