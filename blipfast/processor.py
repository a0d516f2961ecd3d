"""What this CPU has, and what follows from it for who multiplies fastest."""

from __future__ import annotations

import functools

import torch

from .backends import constant_when_compiled


@constant_when_compiled
def cpu_has(*names: str) -> bool:
    """Whether this CPU has one of these instruction sets, as `torch.cpu.get_capabilities` names them."""
    return any(_capabilities().get(name) for name in names)


@constant_when_compiled
def cpu_is_amd() -> bool:
    """Whether it is an AMD, where MKL keeps to AVX2."""
    return str(_capabilities().get("cpu_name", "")).startswith("AMD")


def products_win(dtype: torch.dtype) -> bool:
    """Whether on this CPU two products and a softmax are faster than SDPA: twice, in bf16 by AVX-512 without AMX.

    Scores are rounded then, as plain PyTorch rounds them; SDPA keeps them in fp32.
    """
    return dtype == torch.bfloat16 and cpu_has("avx512_bf16") and not cpu_has("amx_bf16")


@functools.cache
def _capabilities() -> dict[str, object]:
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    known = {
        "amx_bf16": "_is_amx_tile_supported",
        "avx512_bf16": "_is_avx512_bf16_supported",
    }  # of older versions
    return {name: getattr(torch.cpu, ask)() for name, ask in known.items() if hasattr(torch.cpu, ask)}
