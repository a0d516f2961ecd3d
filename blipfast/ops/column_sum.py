"""The sum of a matrix's rows: of all gradients, those of biases."""

from __future__ import annotations

from torch import Tensor

from .. import backends
from .checks import check_dtype, check_shape
from .launch import multiprocessors, tuned
from .library import register

OP = "column_sum"
MANY = 2048  # rows, from which on PyTorch's sum is slow

_INTERPRETED = {"ROWS": 4, "COLUMNS": 32, "num_warps": 4, "per_processor": 1}
_table_says = backends.triton_serves(OP)
backends.register(OP, triton=lambda x: len(x) >= MANY and _table_says(x), torch=backends.always)


def column_sum(x: Tensor, backend: str | None = None) -> Tensor:
    """x [T, D] -> [D], of x's dtype (fp32, fp16, bf16); sums are fp32. Not differentiable: for backward passes.

    backend: whoever was chosen in the forward pass; None: chosen now. Raises ValueError for other shapes and dtypes.
    Served by: triton (CUDA, 2,048 rows or more), torch.
    """
    check_shape(OP, "x", x, (None, None))
    check_dtype(OP, backends.FLOATS, x=x)
    backend = backend or backends.choose(OP, x)
    return x.sum(0) if backend == "torch" or not x.numel() else _op(x.contiguous())


def _kernel(x):
    from ..kernels.column_sum import column_sum

    config = tuned(OP, "default", x, _INTERPRETED)
    return column_sum(x, multiprocessors(x.device) * config["per_processor"], config)


def _fake(x):
    return x.new_empty(x.shape[1])


_op = register("column_sum(Tensor x) -> Tensor", _kernel, _fake)
