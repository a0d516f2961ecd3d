"""Input checks that the operations share: ValueError naming the operation, the tensor and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """The shape of a tensor; None stands for any size."""
    if tensor.shape == shape:
        return
    if tensor.ndim != len(shape) or any(want not in (None, got) for got, want in zip(tensor.shape, shape)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{op}: {name} must have shape [{wanted}], got {list(tensor.shape)}")


def check_rows(op: str, name: str, tensor: Tensor) -> None:
    """Rows of at least one number: no scalar, no width of 0."""
    if not tensor.ndim or not tensor.shape[-1]:
        raise ValueError(f"{op}: {name} must have shape [..., D], D at least 1, got {list(tensor.shape)}")


def check_same_shape(op: str, **tensors: Tensor) -> None:
    """All of one shape; the first one sets it."""
    head = None
    for name, tensor in tensors.items():
        if head is None:
            first, head = name, tensor
        elif tensor.shape != head.shape:
            raise ValueError(
                f"{op}: {name} must have {first}'s shape {list(head.shape)}, got {list(tensor.shape)}"
            )


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """All on one device; None is passed over."""
    head = None
    for name, tensor in tensors.items():
        if head is None:
            first, head = name, tensor
        elif tensor is not None and tensor.device != head.device:
            raise ValueError(
                f"{op}: {name} is on {tensor.device}, {first} on {head.device}; move it with .to()"
            )


def check_same_dtype(op: str, **tensors: Tensor | None) -> None:
    """All of one dtype; None is passed over."""
    head = None
    for name, tensor in tensors.items():
        if head is None:
            first, head = name, tensor
        elif tensor is not None and tensor.dtype != head.dtype:
            raise ValueError(f"{op}: {name} is {tensor.dtype}, {first} is {head.dtype}; cast one with .to()")


def check_dtype(op: str, allowed: tuple[torch.dtype, ...], **tensors: Tensor | None) -> None:
    """Each of one of the allowed dtypes; None is passed over."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in allowed:
            raise ValueError(f"{op}: {name} must be one of {list(allowed)}, got {tensor.dtype}")


def check_probability(op: str, name: str, value: float) -> None:
    """0 <= value < 1: what dropout can do."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{op}: {name} must be at least 0 and below 1, got {value}")
