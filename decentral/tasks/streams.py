"""Random numbers by counter: number `i` of a worker's stream is a pure function of (purpose, worker, i).

A stream that is hashed rather than drawn gives the same samples however it is cut into batches and whoever asks, and
a worker that resumes at sample 1,000,000 need not draw the million before it.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

# The constants of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_MASK = (1 << 64) - 1


def seeded(purpose: str, seed: int) -> str:
    """Return the purpose under which a seed has streams of its own; those of seed 0 are the purpose's."""
    return f"{purpose} {seed}" if seed else purpose


def hashes(purpose: str, worker: int, start: int, size: int) -> NDArray[np.uint64]:
    """Return the numbers `start .. start + size - 1` of a worker's stream: [size] uint64, uniform over all values."""
    key = zlib.crc32(purpose.encode()) << 32 | (worker & 0xFFFFFFFF)
    # Array arithmetic on uint64 wraps around, which is what the generator wants.
    key_hash = int(_mix(np.array([key], dtype=np.uint64))[0])
    first = (key_hash + _GOLDEN * (start + 1)) & _MASK
    return _mix(np.uint64(first) + np.arange(size, dtype=np.uint64) * np.uint64(_GOLDEN))


def integers(purpose: str, worker: int, start: int, size: int, below: int) -> NDArray[np.int64]:
    """Return [size] int64 in `0 .. below - 1`; the bias of the remainder is below / 2**64."""
    return (hashes(purpose, worker, start, size) % np.uint64(below)).astype(np.int64)


def uniforms(purpose: str, worker: int, start: int, size: int) -> NDArray[np.float64]:
    """Return [size] float64 in [0, 1), with 53 random bits each."""
    return (hashes(purpose, worker, start, size) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normals(purpose: str, worker: int, start: int, size: int) -> NDArray[np.float64]:
    """Return [size] float64 of mean 0 and standard deviation 1, by Box and Muller's transform."""
    pairs = uniforms(purpose, worker, 2 * start, 2 * size).reshape(size, 2)
    radius: NDArray[np.float64] = np.sqrt(-2.0 * np.log1p(-pairs[:, 0]))  # 1 - u is never 0
    return radius * np.cos(2.0 * np.pi * pairs[:, 1])


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * _MULTIPLIERS[0]
    values = (values ^ (values >> np.uint64(27))) * _MULTIPLIERS[1]
    return values ^ (values >> np.uint64(31))
