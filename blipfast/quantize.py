"""Low precision for inference: `quantize(model)`, or precision "int8" or "fp8" wherever a precision can be given.

Weights are rounded once and activations as they come, both by rows (of activations: by tokens) and symmetrically.
The products are torch's own: oneDNN's on a CPU, cuBLASLt's int8 and CUTLASS' fp8 on a GPU. torchao calls the same
ones, from tensors that pass for plain weights where layers look for those; on a CPU it took twice what `Int8Linear`
takes, and 1.4 to 1.6 times what bf16 takes. torch.ao's layers take 0.75 to 0.95 of it, and as long in all of decoding,
but have twice the error, and torch has announced their end.

CPU, int8. Decoding gains, where a step reads every weight for a few rows: the products of a base model's step, for 12
rows, took 0.7 of their time in bf16 on a processor with AMX, and all of decoding 0.88. With AMX the image encoder, with
hundreds of rows, is as fast in bf16 and keeps its precision. Without, it gains most: two cores of an EPYC do 1.8 T
operations a second in int8, 0.85 T in bf16 and 0.2 T in fp32 by AVX2. Its attention, and cross-attention keys and
values, are never int8. All of captioning: benchmarks/README.md.

GPU: not yet measured, hence no default. A count for an H200 (989 TFLOP/s in bf16, 1979 in fp8, 4.8 TB/s) says:
- Decoding stays in bf16. A step of a base model reads 250 MB of weights in 52 us. Half the bytes would save 26 us, and
  rounding what goes into its 98 products takes hundreds of kernels more, of a microsecond or two each.
- Elsewhere an input number costs 5 bytes, or 1.0 ps, to round, and each of the products it goes into saves 1.0 ps in a
  thousand. So layers with many outputs pay: the image encoder's qkv (0.8 against 1.8 ns a token) and the first
  feed-forward layer of the text encoder (0.8 against 2.4). Layers of 768 outputs lose. The first feed-forward layer of
  the image encoder stays, for where one kernel multiplies and applies GELU. In all fp8 can save no more than 7 to 8 per
  cent of an encoder's products until kernels round what they write themselves.
- int8 saves as many products, but its sums are written in 32 bits and read again: 8 bytes an output, 3.8 ns for qkv.
  It is slower than bf16, and there for weights of half the size and for the numbers of the CPU.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfast.models.med import BertEncoder, BertLMHeadModel
from blipfast.models.packing import stacked
from blipfast.models.vit import Mlp
from blipfast.precision import QUANTIZED, dtype_of
from blipfast.processor import cpu_has

E4M3 = torch.float8_e4m3fn
LARGEST = {torch.int8: 127, E4M3: 448}
CHUNK = 256  # rows at a time on a CPU: what is made of more outgrows the cache, and is new memory each time
CUBLAS_ROWS = 17  # the fewest that torch._int_mm takes on a GPU


def by_rows(x: Tensor, dtype: torch.dtype, largest: float) -> tuple[Tensor, Tensor]:
    """x [T, D] in `dtype`, scaled so that each row's largest is `largest`, and what to multiply by, [T, 1] in fp32.

    A row that holds NaN or infinity gets a scale that is none of the finite ones, so that its products do too.
    """
    if x.is_cuda:  # one pass; on a CPU it takes several times what two do
        scale = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True, dtype=torch.float32)
    else:
        x = x.float()
        scale = x.abs().amax(-1, keepdim=True)
    scale = scale.clamp_(min=1e-30).div_(largest)
    if dtype == E4M3:  # in one pass; rounds up to 448 and not beyond
        return torch.mul(x, scale.reciprocal(), out=torch.empty(x.shape, dtype=dtype, device=x.device)), scale
    return torch.div(x, scale).round_().to(dtype), scale


class Int8Linear(nn.Module):
    """A linear layer with int8 weights on an x86 CPU; takes and gives the dtype of its input.

    oneDNN keeps the weights in an order of its own. Raises ImportError where torch has no int8 kernels.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        """Of weight [F, D] and bias [F]."""
        super().__init__()
        self.steps = activation_steps()
        weight, scale = by_rows(weight.detach().float(), torch.int8, LARGEST[torch.int8])
        # no buffers: they stay on the CPU, and in fp32 whatever the model is cast to
        self.scale, self.zero = scale.flatten(), torch.zeros(len(weight), dtype=torch.int64)
        self.bias = torch.zeros(len(weight)) if bias is None else bias.detach().float().clone()
        self.packed = pack(weight)

    def forward(self, x: Tensor) -> Tensor:
        return in_chunks(self.in_fp32, x, len(self.scale))

    def in_fp32(self, x: Tensor) -> Tensor:
        """[T, D] -> [T, F], both in fp32."""
        q, scale = by_rows(x, torch.int8, self.steps)
        zero = self.steps + 1
        q = q.view(torch.uint8).add_(zero)  # wraps: -steps becomes 1
        y = multiply(q, zero, self.packed, self.scale, self.zero)
        return torch.addcmul(self.bias, y, scale, out=y)

    def __getstate__(self) -> dict:  # packed tensors have no storage to copy or to pickle
        return self.__dict__ | {"packed": self.packed.to_dense().t().contiguous()}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state | {"packed": pack(state["packed"])})


class Int8Mlp(nn.Module):
    """The image encoder's linear, GELU, linear of `Int8Linear`s; what is between them never leaves the cache."""

    def __init__(self, mlp: Mlp):
        super().__init__()
        self.fc1, self.fc2 = (Int8Linear(layer.weight, layer.bias) for layer in (mlp.fc1, mlp.fc2))

    def forward(self, x: Tensor) -> Tensor:
        return in_chunks(lambda x: self.fc2.in_fp32(F.gelu(self.fc1.in_fp32(x))), x, len(self.fc2.scale))


@torch.no_grad()
def in_chunks(function: Callable[[Tensor], Tensor], x: Tensor, width: int) -> Tensor:
    """`function`, of rows in fp32, up to `CHUNK` at a time: x [..., D] -> [..., width], in the dtype of x."""
    rows = x.reshape(-1, x.shape[-1])
    parts = -(-len(rows) // CHUNK)  # as large as each other: few rows take as long as many
    if parts <= 1:
        return function(rows.float()).to(x.dtype).view(*x.shape[:-1], width)
    out = rows.new_empty(len(rows), width)
    for some, result in zip(rows.chunk(parts), out.chunk(parts)):
        result.copy_(function(some.float()))
    return out.view(*x.shape[:-1], width)


def pack(weight: Tensor) -> Tensor:
    """int8 weights [F, D] in oneDNN's order."""
    return torch.ops.onednn.qlinear_prepack(weight, None)


def multiply(q: Tensor, zero: int, packed: Tensor, scale: Tensor, zeros: Tensor) -> Tensor:
    """(q - zero) weight^T scale, [T, F] in fp32; q uint8 [T, D], scale fp32 [F], zeros: as many int64 zeros."""
    return torch.ops.onednn.qlinear_pointwise(
        q, 1.0, zero, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


@functools.cache
def activation_steps() -> int:
    """In how many steps up, and as many down, activations are rounded on this processor: 127, or 63 without VNNI.

    Without VNNI two 8-bit products are added in 16 bits, which overflow unless activations have 7.
    Raises ImportError where torch has no int8 kernels, and on processors other than x86, where none were measured.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if (
        not x86
        or not torch.backends.mkldnn.is_available()
        or not hasattr(torch.ops.onednn, "qlinear_pointwise")
    ):
        raise ImportError(
            f"precision int8 on a CPU needs torch's oneDNN kernels for x86, which torch {torch.__version__} on "
            f"{platform.machine()} does not have. Use precision bf16 or fp32."
        )
    size, q = 64, torch.full((64, 64), 255, dtype=torch.uint8)
    packed = pack(torch.full((size, size), 127, dtype=torch.int8))
    y = multiply(q, 0, packed, torch.ones(size), torch.zeros(size, dtype=torch.int64))
    return 127 if bool((y == 255 * 127 * size).all()) else 63


class ScaledLinear(nn.Module):
    """A linear layer with int8 or fp8 (e4m3) weights on a GPU; takes and gives the dtype of its input.

    dtype: torch.int8, or torch.float8_e4m3fn, whose product adds the bias and rounds to bf16. Both widths must be
    multiples of 16. On a CPU the same numbers come out, slowly.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        weight, scale = by_rows(linear.weight.detach().float(), dtype, LARGEST[dtype])
        self.dtype = dtype
        # as integers, which `model.to(torch.bfloat16)` does not touch
        self.register_buffer("weight_bits", weight.view(torch.int8))
        self.register_buffer("scale_bits", scale.flatten().view(torch.int32))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        q, scale = by_rows(x.reshape(-1, x.shape[-1]), self.dtype, LARGEST[self.dtype])
        weight, weight_scale = self.weight_bits.view(self.dtype).t(), self.scale_bits.view(torch.float32)
        if x.is_cuda and self.dtype == E4M3:
            half = torch.bfloat16
            bias = None if self.bias is None else self.bias.to(half)
            y = torch._scaled_mm(q, weight, scale, weight_scale[None], bias=bias, out_dtype=half)
        else:
            y = product(q, weight) * scale * weight_scale
            y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])


def product(q: Tensor, weight: Tensor) -> Tensor:
    """q [T, D] times weight [D, F]: of int8 on a GPU, and of both dtypes on a CPU, where not every torch has them."""
    if not q.is_cuda:
        return q.float() @ weight.float()
    rows = len(q)
    q = F.pad(q, (0, 0, 0, CUBLAS_ROWS - rows)) if rows < CUBLAS_ROWS else q
    return torch._int_mm(q, weight)[:rows]


def quantize(model: nn.Module, precision: str = "int8", device: str | torch.device = "cpu") -> nn.Module:
    """Replace the linear layers of a BLIP model that gain by it on `device`, in place; returns the model, not moved.

    precision: "int8" or "fp8". The rest of the model may be in fp32 or bf16. For inference: the new layers get no
    gradient and are not saved. "fp8" for the CPU replaces what it does for a GPU, to see what it costs in accuracy.
    Raises ValueError for another precision, ImportError where int8 is wanted of a CPU without kernels for it.
    """
    if precision not in QUANTIZED:
        raise ValueError(f"quantize: precision must be one of {', '.join(QUANTIZED)}, got {precision!r}.")
    on_cpu = precision == "int8" and torch.device(device).type == "cpu"
    if on_cpu and isinstance(getattr(model, "text_decoder", None), BertLMHeadModel):
        join_projections(model.text_decoder.bert.encoder)
    dtype = E4M3 if precision == "fp8" else torch.int8
    for path in list(cpu_layers(model) if on_cpu else wide_layers(model)):
        parent, _, child = path.rpartition(".")
        old = model.get_submodule(path)
        if not on_cpu:
            new = ScaledLinear(old, dtype)
        else:
            new = Int8Mlp(old) if type(old) is Mlp else Int8Linear(old.weight, old.bias)
        setattr(model.get_submodule(parent), child, new)
    return model


def join_projections(encoder: BertEncoder) -> None:
    """Give its self-attentions queries, keys and values by one layer: rounding what comes takes as long as a product
    of 768 outputs for few rows."""
    for layer in encoder.layer:
        block = layer.attention.self
        three = (block.query, block.key, block.value)
        if all(type(each) is nn.Linear for each in three):
            weight, bias = stacked(three)
            block.joined = Int8Linear(weight, bias)


def linears(model: nn.Module, *parts: str) -> Iterator[tuple[str, nn.Linear]]:
    """Path and layer of every plain linear layer in the parts of these names."""
    for path, module in model.named_modules():
        if type(module) is nn.Linear and path.partition(".")[0] in parts:
            yield path, module


def cpu_layers(model: nn.Module) -> Iterator[str]:
    """What int8 replaces on a CPU: text layers, and the image encoder's unless it is as fast in bf16, by AMX."""
    for path, _ in linears(model, "text_encoder", "text_decoder"):
        if ".crossattention.self" not in path or not path.endswith(("key", "value")):
            yield path
    if not hasattr(model, "visual_encoder") or cpu_has("amx_bf16"):
        return
    for path, module in model.visual_encoder.named_modules(prefix="visual_encoder"):
        attention = type(module) is nn.Linear and ".attn." in path
        if type(module) is Mlp or (attention and path != last_qkv(model)):
            yield path


def last_qkv(model: nn.Module) -> str:
    """The layer that stays: retrieval reads parts of it."""
    return f"visual_encoder.blocks.{len(model.visual_encoder.blocks) - 1}.attn.qkv"


def wide_layers(model: nn.Module) -> Iterator[str]:
    """What int8 and fp8 replace on a GPU."""
    for path, layer in linears(model, "visual_encoder", "text_encoder"):
        wide = path.endswith((".attn.qkv", ".intermediate.dense")) and path != last_qkv(model)
        if wide and layer.in_features % 16 == 0 and layer.out_features % 16 == 0:
            yield path


def prepare(model: nn.Module, precision: str, device: str | torch.device) -> nn.Module:
    """A model for inference on `device` in `precision` (see `blipfast.precision`)."""
    dtype = dtype_of(precision, device)
    if precision in QUANTIZED:
        model = quantize(model.float(), precision, device)
    return model.to(device=device, dtype=dtype).eval()
