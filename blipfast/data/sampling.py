"""Where every random choice about the data comes from: functions of (seed, epoch, index), never the state of a process.

That is what makes an epoch the same on any number of ranks and workers, and a resume exact without replaying anything.
"""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """Hash integers to one of 64 well mixed bits: neighbouring inputs give unrelated outputs.

    A chain of SplitMix64 finalisers (Steele, Lea, Flood 2014), so the order of the numbers matters.
    """
    state = 0
    for number in numbers:
        state = (state + 0x9E3779B97F4A7C15 + number) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Seed of everything random about sample `index` in `epoch`: its crop, its colours, its dropped words."""
    return mix(seed, epoch, index)


def permutation(n: int, *key: int) -> np.ndarray:
    """The numbers 0..n-1 in an order that is a function of `key` (for instance seed, epoch). Returns int64 [n]."""
    return np.random.default_rng(mix(*key)).permutation(n)
