"""int8 weights for inference on a CPU: `quantize(model)`, or precision="int8" wherever a precision can be given.

Weights are rounded to 8 bits by rows once, activations by tensors as they come (dynamic quantisation, by torch's own
kernels). What gains by it is decoding, where a step reads every weight for a few rows; the image encoder, with hundreds
of rows, is as fast in bf16 and keeps its precision. Cross-attention keys and values stay as they are for the same
reason.
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn

from blipfast.precision import dtype_of


class Int8Linear(nn.Module):
    """A linear layer with int8 weights; takes and gives the dtype of its input."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        from torch.ao.nn.quantized.dynamic import Linear
        from torch.ao.quantization import default_dynamic_qconfig, per_channel_dynamic_qconfig

        linear = copy.deepcopy(linear).float()
        per_row = torch.backends.quantized.engine != "qnnpack"
        linear.qconfig = per_channel_dynamic_qconfig if per_row else default_dynamic_qconfig
        with warnings.catch_warnings():  # an observer's, about the range of the weights
            warnings.simplefilter("ignore")
            self.linear = Linear.from_float(linear)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.float()).to(x.dtype)


def quantize(model: nn.Module) -> nn.Module:
    """Replace the linear layers of a BLIP model's text side by int8 ones, in place; returns the model.

    The rest of the model may be in fp32 or bf16. For inference: the new layers get no gradient and are not saved.
    Raises ImportError where this torch has no int8 kernels.
    """
    engines = torch.backends.quantized.supported_engines
    if "onednn" not in engines and "qnnpack" not in engines:
        raise ImportError("This build of torch has no int8 kernels for CPUs; use precision bf16 or fp32.")
    torch.backends.quantized.engine = "onednn" if "onednn" in engines else "qnnpack"
    for name in ("text_encoder", "text_decoder"):
        part = getattr(model, name, None)
        for path, module in list(part.named_modules()) if part is not None else ():
            of_images = ".crossattention.self" in path and path.endswith(("key", "value"))
            if type(module) is nn.Linear and not of_images:
                parent, _, child = path.rpartition(".")
                setattr(part.get_submodule(parent), child, Int8Linear(module))
    return model


def prepare(model: nn.Module, precision: str, device: str | torch.device) -> nn.Module:
    """A model for inference on `device` in `precision` (see `blipfast.precision`)."""
    dtype = dtype_of(precision, device)
    if precision == "int8":
        model = quantize(model.float())
    return model.to(device=device, dtype=dtype).eval()
