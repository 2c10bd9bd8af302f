"""Counter-based random draws: each number is a pure function of (seed, stream, index), never of what was drawn before.

So any number of loader workers, ranks or restarts sees the same crops, masks and drops. The hash is the SplitMix64
finaliser (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014) applied to seed, stream, index
and draw in turn.
"""

from __future__ import annotations

import hashlib

import numpy as np


def uniform(seed: int, stream: str, index: int | np.ndarray, count: int) -> np.ndarray:
    """`count` uniform draws in [0, 1) for each index: float64 (len(index), count), or (count,) for a single index."""
    indices = np.atleast_1d(np.asarray(index)).astype(np.uint64)
    draws = np.arange(count, dtype=np.uint64)
    with np.errstate(over="ignore"):
        state = _mix(np.uint64(_stream_key(seed, stream)) ^ _mix(indices))[:, None]
        bits = _mix(state + (draws + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    values = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return values[0] if np.ndim(index) == 0 else values


def image_seed(seed: int, stream: str, index: int) -> int:
    """A 63-bit seed for a generator that serves one image."""
    with np.errstate(over="ignore"):
        state = _mix(np.uint64(_stream_key(seed, stream)) ^ _mix(np.asarray([index]).astype(np.uint64)))
    return int(state[0] >> np.uint64(1))


def permutation(seed: int, stream: str, size: int) -> np.ndarray:
    """A permutation of range(size), int64, the same for the same (seed, stream, size)."""
    return np.random.Generator(np.random.Philox(_stream_key(seed, stream))).permutation(size)


def _stream_key(seed: int, stream: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
