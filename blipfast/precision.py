"""In which numbers a model computes, by one word: fp32, bf16, fp16, int8, or auto."""

from __future__ import annotations

import torch

CHOICES = ("auto", "fp32", "bf16", "fp16", "int8")


def fast_bf16(device: str | torch.device) -> bool:
    """Whether the hardware multiplies bf16 matrices faster than fp32 ones: AMX on a CPU, Ampere and later on a GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16"))


def dtype_of(precision: str, device: str | torch.device) -> torch.dtype:
    """The dtype of weights and activations. int8 keeps what it does not quantise in that of "auto".

    Raises ValueError for an unknown word, and for fp16 or int8 where they make no sense.
    """
    kind = torch.device(device).type
    if precision not in CHOICES:
        raise ValueError(f"precision {precision!r} is unknown; expected one of {', '.join(CHOICES)}.")
    if precision == "int8" and kind != "cpu":
        raise ValueError(f"precision int8 is for CPUs; on {kind} use bf16.")
    if precision in ("auto", "int8"):
        return torch.bfloat16 if fast_bf16(device) else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
