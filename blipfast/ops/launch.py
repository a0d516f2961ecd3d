"""What an operation asks before it launches a kernel: the tuned configuration, the precision, the size of the GPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..kernels import table


def tuned(op: str, bucket: str, tensor: Tensor, interpreted: Mapping[str, Any]) -> Mapping[str, Any]:
    """The table's configuration for the GPU that holds `tensor`, a float; on a CPU, `interpreted`."""
    if not tensor.is_cuda:
        return interpreted
    where = table.buckets(bucket, tensor.dtype == torch.float32)
    return table.lookup(op, backends.arch(tensor.device.index), *where)


def input_precision() -> str:
    """How kernels multiply fp32: "ieee", or "tf32" where torch's settings allow it, the old ones or the new."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # with that set, the old question is an error
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 20 on a CPU, for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 20


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast casts to where `tensor` is; None outside autocast."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Switches autocast off where `tensor` is."""
    device = tensor.device.type
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else contextlib.nullcontext()
