"""Launches a kernel that was compiled before, in less of the host's time than Triton takes for it.

`fn[grid](...)` binds the arguments, asks the driver about every pointer and calls hooks that nobody set. What a kernel
is compiled for is the dtypes of its pointers, whether they are aligned, and a few properties of whole numbers. `launch`
looks it up by these, and hands it plain addresses. The first launch of each kind, and all under a profiler's hooks, are
Triton's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import JITFunction

INT32 = range(-(2**31), 2**31)

_compiled: dict[tuple, Any] = {}


def launch(fn: Callable, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """fn[grid](*args, **options) on the current GPU. args: the first ones of fn's, in order; options: its other ones by
    name (all of them constexpr), num_warps, num_stages."""
    if not isinstance(fn, JITFunction):  # the interpreter
        fn[grid](*args, **options)
        return
    device = torch.cuda.current_device()
    values, key = [], [fn, device]
    for (constant, varies), x in zip(_parameters(fn), args):
        if isinstance(x, Tensor):
            x, dtype = x.data_ptr(), x.dtype
            key += (dtype, x % 16 == 0)
        elif constant or x is None:
            key.append(x)
        elif type(x) is int:
            key += (x in INT32, None if varies else x == 1, None if varies else x % 16 == 0)
        else:
            key.append(type(x))
        values.append(x)
    key += options.items()
    key = tuple(key)
    compiled = _compiled.get(key)
    if compiled is None or _hooked():
        _compiled[key] = fn[grid](*args, **options)
        return
    values += [options[name] for name in fn.arg_names[len(args) :]]
    x, y, z = (*grid, 1, 1)[:3]
    stream = torch._C._cuda_getCurrentRawStream(device)
    compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)


@functools.cache
def _parameters(fn: JITFunction) -> tuple[tuple[bool, bool], ...]:
    """Of each: is it constexpr; is it a number that may vary without another compilation."""
    return tuple((p.is_constexpr, p.do_not_specialize) for p in fn.params)


def _hooked() -> bool:
    runtime = triton.knobs.runtime
    return any(getattr(hook, "calls", hook) for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook))
