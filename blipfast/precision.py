"""In which numbers a model computes, by one word: fp32, bf16, fp16, int8, fp8, or auto."""

from __future__ import annotations

import torch

from .processor import cpu_has

CHOICES = ("auto", "fp32", "bf16", "fp16", "int8", "fp8")
QUANTIZED = {"int8": (7, 5), "fp8": (8, 9)}  # and from which compute capability on, on NVIDIA's GPUs


def fast_bf16(device: str | torch.device) -> bool:
    """Whether the hardware multiplies bf16 matrices faster than fp32 ones.

    CPUs with AMX or AVX-512's bf16 (Intel's Xeons since Sapphire Rapids, AMD's since Zen 4), GPUs since Ampere.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_has("amx_bf16", "avx512_bf16")


def dtype_of(precision: str, device: str | torch.device) -> torch.dtype:
    """The dtype of weights and activations. int8 keeps what it does not quantise in that of "auto", fp8 in bf16.

    Raises ValueError for an unknown word, and for int8 or fp8 where there is no hardware for it.
    """
    if precision not in CHOICES:
        raise ValueError(f"precision {precision!r} is unknown; expected one of {', '.join(CHOICES)}.")
    if precision in QUANTIZED:
        check_hardware(precision, torch.device(device))
    if precision in ("auto", "int8"):
        return torch.bfloat16 if fast_bf16(device) else torch.float32
    return {"fp32": torch.float32, "fp16": torch.float16}.get(precision, torch.bfloat16)


def check_hardware(precision: str, device: torch.device) -> None:
    """Raises ValueError if the device cannot multiply in int8 or fp8."""
    if device.type == "cpu" and precision == "int8":
        return
    where = "CPUs and NVIDIA's GPUs" if precision == "int8" else "NVIDIA's GPUs"
    if device.type != "cuda" or torch.version.hip:
        instead = "int8 or bf16" if device.type == "cpu" else "bf16 or fp32"
        name = "an AMD GPU" if torch.version.hip and device.type == "cuda" else device.type
        raise ValueError(f"precision {precision} is for {where}; on {name} use {instead}.")
    has, needs = torch.cuda.get_device_capability(device), QUANTIZED[precision]
    if has < needs:
        raise ValueError(
            f"precision {precision} needs compute capability {needs[0]}.{needs[1]} or later, and this GPU has "
            f"{has[0]}.{has[1]}; use {'bf16' if has >= (8, 0) else 'fp16'}."
        )
