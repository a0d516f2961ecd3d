"""BLIP as we have it, as `reference.py` has it and as transformers has it, of one size, and what they read.

Random weights: times do not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blipfast.reference import Text
from blipfast.text import init_tokenizer

CAPTION = " ".join(["dog"] * 12)  # 14 tokens, as a caption has on average
QUESTION = "what is the colour of the dog"
ANSWERS = "red blue green dog cat man woman tree house car".split()
ANSWERS += [f"{a} {b}" for a in ANSWERS for b in ANSWERS] + [f"{a} and a {a}" for a in ANSWERS] * 2

TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
VISION = {"width": 64, "depth": 2, "heads": 4, "patch_size": 16}


@dataclass(frozen=True)
class Models:
    """BLIP base for pictures of `side` pixels, on a device, in a dtype; small: one that runs in milliseconds."""

    device: str
    side: int
    dtype: torch.dtype = torch.float32
    small: bool = False

    @classmethod
    def for_gpu(cls, device: str, side: int, dtype: torch.dtype = torch.bfloat16) -> Models:
        """What `make bench-gpu` measures: BLIP base; on a CPU, for a dry run, a small one of 64 pixels in fp32."""
        return cls(device, side, dtype) if device == "cuda" else cls(device, 64, torch.float32, small=True)

    def ours(self, factory: Callable[..., nn.Module]) -> nn.Module:
        """blip_decoder, blip_itm, ... in eval mode."""
        small = {"vit": VISION, "med_config": TEXT | {"max_position_embeddings": 64}} if self.small else {}
        return self._made(lambda: factory(image_size=self.side, **small))

    def reference(self, kind: Callable[..., nn.Module]) -> nn.Module:
        """A class of `reference.py` in eval mode; in half precision it needs `autocast` around it."""
        small = {"vit": VISION, "bert": TEXT} if self.small else {}
        return self._made(lambda: kind(image_size=self.side, **small))

    def transformers(self, attention: str = "eager") -> nn.Module:
        """transformers' captioner. Raises ImportError without transformers, ValueError for attention it has not."""
        import transformers

        text: dict[str, Any] = {"num_attention_heads": 12, "bos_token_id": 30522}
        text |= {"eos_token_id": 2, "sep_token_id": 102}
        vision: dict[str, Any] = {"image_size": self.side}
        if self.small:
            text |= TEXT | {"encoder_hidden_size": VISION["width"]}
            vision |= {"hidden_size": VISION["width"], "num_hidden_layers": VISION["depth"]}
            vision |= {"num_attention_heads": VISION["heads"], "intermediate_size": 4 * VISION["width"]}
        config = transformers.BlipConfig(text_config=text, vision_config=vision)
        captioner = transformers.BlipForConditionalGeneration
        return self._made(lambda: captioner._from_config(config, attn_implementation=attention))

    def _made(self, build: Callable[[], nn.Module]) -> nn.Module:
        with torch.device(self.device):
            return build().to(self.dtype).eval()

    def pictures(self, count: int) -> Tensor:
        return torch.randn(count, 3, self.side, self.side, device=self.device, dtype=self.dtype)

    def states(self, count: int) -> Tensor:
        """As of `count` pictures [count, N, D_v]."""
        width = VISION["width"] if self.small else 768
        return torch.randn(count, (self.side // 16) ** 2 + 1, width, device=self.device, dtype=self.dtype)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def padded(texts: list[str], length: int | str, device: str = "cpu") -> Text:
    """As official BLIP pads: to the longest of them ("longest"), or all to `length` tokens."""
    padding = (
        {"padding": "longest"} if length == "longest" else {"padding": "max_length", "max_length": length}
    )
    tokens = init_tokenizer()(texts, return_tensors="pt", **padding)
    return Text(tokens.input_ids.to(device), tokens.attention_mask.to(device))
