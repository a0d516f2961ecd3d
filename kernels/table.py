"""Tuned configurations: `tables/<op>.json`, one entry an architecture, one configuration a bucket of shapes.

    {"80": {"default": {"ROWS": 4, "num_warps": 8}}, "90": {"default": {...}, "D=64": {"wins": false, ...}}}

`wins: false` marks a bucket in which PyTorch was measured to be faster; `blipfast.backends` then does not choose the
kernel by itself. benchmarks/tune_kernels.py writes these files on a GPU; nothing is tuned at import or in a run.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

FOLDER = Path(__file__).parent / "tables"


def lookup(op: str, arch: int, *buckets: str) -> MappingProxyType[str, Any]:
    """The configuration of `op` for compute capability `arch` (80, 90, ...), read-only: that of the first bucket known.

    Falls back to the nearest architecture below and to the bucket "default". Raises FileNotFoundError for an op
    without a table, ValueError below sm_80, KeyError for unknown buckets in a table without a default.
    """
    return _entry(op, arch, *buckets)[0]


def buckets(bucket: str, fp32: bool) -> tuple[str, ...]:
    """Where to look: fp32 may have a bucket of its own, "float32", because tiles of matrix products take twice the
    shared memory then."""
    return ("float32", bucket) if fp32 else (bucket,)


@functools.cache
def wins(op: str, arch: int, bucket: str = "default") -> bool:
    """Whether the kernel is to be used by default there; False where it has no table or the GPU is older than sm_80."""
    if arch < 80 or not (FOLDER / f"{op}.json").exists():
        return False
    return _entry(op, arch, bucket)[1]


@functools.cache
def _entry(op: str, arch: int, *buckets: str) -> tuple[MappingProxyType[str, Any], bool]:
    table = json.loads((FOLDER / f"{op}.json").read_text())
    below = [known for known in map(int, table) if known <= arch]
    if not below:
        raise ValueError(
            f"{op}: no configuration for sm_{arch}; kernels need sm_80 or newer. Use backend 'torch'."
        )
    shipped = table[str(max(below))]
    config = dict(shipped[next((bucket for bucket in buckets if bucket in shipped), "default")])
    faster = config.pop("wins", True)
    return MappingProxyType(config), faster


def clear() -> None:
    """Read the files again (for the tuner)."""
    _entry.cache_clear()
    wins.cache_clear()
