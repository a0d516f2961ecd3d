"""From pixels to the model's input: crop, resize, augment, normalise. No torchvision.

Resizing is torch's antialiased bicubic on uint8: Pillow's filter, at most 2 levels from it, three times as fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from blipfast.data.images import composite, from_pillow
from blipfast.data.randaugment import rand_augment

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0)}
_SCALE = 1.0 / (255.0 * torch.tensor(STD)).view(3, 1, 1)
_SHIFT = -(torch.tensor(MEAN) / torch.tensor(STD)).view(3, 1, 1)

Transform = Callable[[Tensor, Generator | None], Tensor]


def eval_transform(image_size: int, exact: bool = False, background: str = "white") -> EvalTransform:
    """Squeeze the whole picture to a square and normalise it, as official BLIP does at evaluation.

    exact: resize with Pillow itself, for bit parity with official BLIP (slower).
    background: what transparent pixels are laid over, "white" or "black".
    Returns a callable (uint8 [3|4, H, W] or Pillow image, rng=None) -> float32 [3, image_size, image_size].
    """
    _check_background(background, allow_random=False)
    return EvalTransform(image_size, exact, background)


def train_transform(
    image_size: int,
    min_scale: float = 0.2,
    flip: float = 0.5,
    randaugment: str = "official",
    noise: float = 0.0,
    background: str = "white",
) -> Transform:
    """Random resized crop, flip, augmentation, normalisation, and Gaussian pixel noise.

    min_scale: smallest part of the area a crop may keep. flip: probability of mirroring.
    randaugment: "official" (BLIP's RandAugment), "strong" (for small sets, see `strong`), "none".
    noise: standard deviation of the noise, in [0, 1] pixel units. background: "white", "black", or "random" colour.
    Returns a callable (uint8 [3|4, H, W] or Pillow image, rng) -> float32 [3, image_size, image_size]; rng None draws
    from torch's global generator. Raises ValueError for settings out of range.
    """
    _check_background(background, allow_random=True)
    if not (0.0 < min_scale <= 1.0 and 0.0 <= flip <= 1.0 and noise >= 0.0):
        raise ValueError(
            f"min_scale must lie in (0, 1], flip in [0, 1], noise >= 0: {min_scale=}, {flip=}, {noise=}."
        )
    if randaugment == "strong":
        from blipfast.data.strong import StrongTransform  # builds on this module

        return StrongTransform(image_size, min_scale, flip, noise, background)
    if randaugment not in ("official", "none"):
        raise ValueError(f'randaugment: {randaugment!r} is not one of "official", "strong", "none".')
    return TrainTransform(image_size, min_scale, flip, randaugment, noise, background)


@dataclass(frozen=True)
class EvalTransform:
    """See `eval_transform`."""

    image_size: int
    exact: bool = False
    background: str = "white"

    def __call__(self, image: Tensor | Image.Image, rng: Generator | None = None) -> Tensor:
        image = composite(as_tensor(image), BACKGROUNDS[self.background])
        return normalize(resize(image, self.image_size, self.exact))


@dataclass(frozen=True)
class TrainTransform:
    """See `train_transform`."""

    image_size: int
    min_scale: float = 0.2
    flip: float = 0.5
    randaugment: str = "official"
    noise: float = 0.0
    background: str = "white"

    def __call__(self, image: Tensor | Image.Image, rng: Generator | None = None) -> Tensor:
        image = as_tensor(image)
        if image.shape[0] == 4:
            image = composite(image, self._background(rng))
        top, left, height, width = random_resized_crop(*image.shape[1:], self.min_scale, rng)
        image = resize(image[:, top : top + height, left : left + width], self.image_size)
        if torch.rand((), generator=rng) < self.flip:
            image = image.flip(2)
        if self.randaugment == "official":
            image = rand_augment(image, rng)
        image = normalize(image)
        if self.noise:
            image += torch.randn(image.shape, generator=rng) * (self.noise / torch.tensor(STD).view(3, 1, 1))
        return image

    def _background(self, rng: Generator | None) -> tuple[int, ...]:
        if self.background == "random":
            return tuple(torch.randint(256, (3,), generator=rng).tolist())
        return BACKGROUNDS[self.background]


def random_resized_crop(
    height: int, width: int, min_scale: float, rng: Generator | None = None
) -> tuple[int, int, int, int]:
    """Draw the box of torchvision's RandomResizedCrop: (top, left, height, width), in pixels.

    Area: uniform in [min_scale, 1] of the picture's; aspect ratio: log-uniform in [3/4, 4/3]; ten tries to fit, then
    the largest centred box with an allowed ratio.
    """
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        area, ratio, down, right = torch.rand(4, generator=rng).tolist()
        area = height * width * (min_scale + (1.0 - min_scale) * area)
        ratio = math.exp(low + (high - low) * ratio)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    w = min(width, round(height * 4 / 3))
    h = min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(image: Tensor, size: int, exact: bool = False) -> Tensor:
    """Antialiased bicubic resize, uint8 [C, H, W] -> uint8 [C, size, size]; `exact`: by Pillow (C = 3)."""
    if image.shape[1:] == (size, size):
        return image
    if exact:
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        return torch.from_numpy(np.array(picture.resize((size, size), Image.Resampling.BICUBIC))).permute(
            2, 0, 1
        )
    return F.interpolate(image[None], size=(size, size), mode="bicubic", antialias=True)[0]


def normalize(image: Tensor) -> Tensor:
    """Subtract BLIP's mean and divide by its standard deviation: uint8 [3, H, W] -> float32 [3, H, W], contiguous."""
    return image.to(torch.float32, memory_format=torch.contiguous_format).mul_(_SCALE).add_(_SHIFT)


def as_tensor(image: Tensor | Image.Image) -> Tensor:
    """Pillow images become uint8 [3|4, H, W]; tensors are checked to be that. Raises ValueError otherwise."""
    if isinstance(image, Image.Image):
        return from_pillow(image)
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] not in (3, 4):
        raise ValueError(f"A picture is uint8 [3 or 4, H, W], not {image.dtype} {list(image.shape)}.")
    return image


def _check_background(background: str, allow_random: bool) -> None:
    allowed = [*BACKGROUNDS, *(["random"] if allow_random else [])]
    if background not in allowed:
        raise ValueError(f"background: {background!r} is not one of {', '.join(allowed)}.")
