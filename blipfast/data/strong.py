"""Strong augmentation for small sets of small pictures, a whole micro-batch at a time.

All geometry (crop, flip, rotation, shear, zoom, shift) is one affine map, sampled once; all linear colour changes
(brightness, contrast, saturation, hue, grey, inversion) are one 3x3 matrix and an offset. Everything random about a
picture comes from its own generator, so a picture looks the same in any batch, worker or rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from blipfast.data.transforms import MEAN, STD, as_tensor

_DRAWS = (
    "red green blue area ratio left top flip rotate shear_x shear_y shift_x shift_y zoom "
    "brightness contrast saturation hue grey invert blur posterise solarise level "
    "cutout cut_x cut_y cut_width cut_height"
).split()
_LUMA = torch.tensor([0.299, 0.587, 0.114])
_MEAN, _STD = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))


@dataclass(frozen=True)
class StrongTransform:
    """`train_transform(randaugment="strong")`; its further fields set how far each change may go.

    The picture is first squeezed to the square the model sees at evaluation, 1.5 times as large, so that one bilinear
    sample a pixel is enough; crops are drawn in that square. What lies outside the picture takes the background's
    colour. Call it on one picture, or `batch` on many: the same pictures result, several times as fast.
    """

    image_size: int
    min_scale: float = 0.2
    flip: float = 0.5
    noise: float = 0.0
    background: str = "white"
    rotate: float = 15.0  # degrees
    shear: float = 0.1
    shift: float = 0.1  # of the picture's side
    zoom_out: float = 0.25
    light: float = 0.25  # brightness and contrast: factor 1 +- light
    saturation: float = 0.4
    hue: float = 0.04  # of a full turn
    grey: float = 0.05  # from here on: probabilities
    invert: float = 0.0
    posterise: float = 0.0
    solarise: float = 0.0
    blur: float = 0.3  # half of them sharpen
    cutout: float = 0.2

    def __call__(self, image: Tensor | Image.Image, rng: Generator | None = None) -> Tensor:
        """uint8 [3|4, H, W] or Pillow -> float32 [3, image_size, image_size], normalised."""
        return self._augment([self.prepare(as_tensor(image))], *self._draw([rng]))[0]

    def prepare(self, image: Tensor) -> Tensor:
        """The part with no chance in it, worth keeping: uint8 [3|4, H, W] -> [3|4, S, S]; colours times alpha."""
        side = math.ceil(1.5 * self.image_size)
        if image.shape[0] == 4:
            colour, alpha = image[:3], image[3:]
            image = torch.cat([(colour * (alpha / 255.0)).round_().to(torch.uint8), alpha])
        return F.interpolate(image[None], size=(side, side), mode="bicubic", antialias=True)[0]

    def batch(self, prepared: Sequence[Tensor], seeds: Sequence[int]) -> Tensor:
        """Augment pictures from `prepare`, each with a generator of its own seed. Returns float32 [B, 3, S, S]."""
        return self._augment(prepared, *self._draw(seeds))

    def _draw(self, sources: Sequence[int | Generator | None]) -> tuple[dict[str, Tensor], Tensor | None]:
        """Uniform draws, {name: [B]}, and the noise [B, 3, S, S]; from seeds, or from generators."""
        draws, noise, own = [], [], Generator()
        for source in sources:
            rng = own.manual_seed(source) if isinstance(source, int) else source
            draws.append(torch.rand(len(_DRAWS), generator=rng))
            if self.noise:
                noise.append(torch.randn(3, self.image_size, self.image_size, generator=rng))
        return dict(zip(_DRAWS, torch.stack(draws, 1), strict=True)), torch.stack(noise) if noise else None

    def _augment(self, prepared: Sequence[Tensor], u: dict[str, Tensor], noise: Tensor | None) -> Tensor:
        ground = self._ground(u)
        pixels = self._place(_stack(prepared), ground, self._affine(u))
        matrix, offset = self._colour(u)
        pixels = torch.baddbmm(offset, matrix, pixels.flatten(2)).view_as(pixels).clamp_(0.0, 1.0)
        self._nonlinear(pixels, u)
        self._cut(pixels, u)
        if noise is not None:
            pixels.add_(noise, alpha=self.noise)
        return pixels.sub_(_MEAN).div_(_STD)

    def _ground(self, u: dict[str, Tensor]) -> Tensor:
        """Background colour of each picture, [B, 3, 1, 1] in 0..1."""
        colour = torch.stack([u["red"], u["green"], u["blue"]], 1)[:, :, None, None]
        return colour if self.background == "random" else torch.full_like(colour, self.background == "white")

    def _affine(self, u: dict[str, Tensor]) -> Tensor:
        """[B, 2, 3]: where in the source, -1..1, a place of the result, -1..1, comes from."""
        area = self.min_scale + (1.0 - self.min_scale) * u["area"]
        ratio = torch.exp((2.0 * u["ratio"] - 1.0) * math.log(4 / 3))
        width, height = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
        angle = _signed(u["rotate"]) * math.radians(self.rotate)
        zoom = 1.0 + _signed(u["zoom"]).abs() * self.zoom_out
        mirror = torch.where(u["flip"] < self.flip, -1.0, 1.0)
        cos, sin = angle.cos() * zoom, angle.sin() * zoom
        shear_x, shear_y = _signed(u["shear_x"]) * self.shear, _signed(u["shear_y"]) * self.shear
        # rows of crop * rotation * shear * mirror; the crop's centre, then the shift, on the right
        x = torch.stack([(cos - sin * shear_y) * mirror, cos * shear_x - sin], 1) * width[:, None]
        y = torch.stack([(sin + cos * shear_y) * mirror, sin * shear_x + cos], 1) * height[:, None]
        centre_x = (2.0 * u["left"] - 1.0) * (1.0 - width) + 2.0 * self.shift * _signed(u["shift_x"]) * width
        centre_y = (2.0 * u["top"] - 1.0) * (1.0 - height) + 2.0 * self.shift * _signed(u["shift_y"]) * height
        return torch.stack([torch.cat([x, centre_x[:, None]], 1), torch.cat([y, centre_y[:, None]], 1)], 1)

    def _place(self, pictures: Tensor, ground: Tensor, affine: Tensor) -> Tensor:
        """Sample uint8 [B, 3|4, H, W] through `affine`, over `ground`: float32 [B, 3, S, S] in 0..1."""
        colour = pictures[:, :3] / 255.0
        # as the difference to the ground, so that the zeros outside the picture mean ground
        colour -= ground * (pictures[:, 3:] / 255.0) if pictures.shape[1] == 4 else ground
        grid = F.affine_grid(
            affine, [len(pictures), 3, self.image_size, self.image_size], align_corners=False
        )
        return F.grid_sample(colour, grid, mode="bilinear", align_corners=False).add_(ground)

    def _colour(self, u: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Matrix [B, 3, 3] and offset [B, 3, 1] of all linear colour changes; contrast and inversion turn about 1/2."""
        gain = 1.0 + self.light * _signed(u["brightness"])
        contrast = (1.0 + self.light * _signed(u["contrast"])) * torch.where(
            u["invert"] < self.invert, -1.0, 1.0
        )
        kept = torch.where(u["grey"] < self.grey, 0.0, 1.0 + self.saturation * _signed(u["saturation"]))[
            :, None, None
        ]
        saturate = kept * torch.eye(3) + (1.0 - kept) * _LUMA
        matrix = saturate @ _about_grey_axis(_signed(u["hue"]) * self.hue * 2.0 * math.pi)
        offset = 0.5 * (1.0 - contrast)
        return matrix * (gain * contrast)[:, None, None], offset[:, None, None].expand(-1, 3, 1)

    def _nonlinear(self, pixels: Tensor, u: dict[str, Tensor]) -> None:
        """Blur or sharpen, posterise, solarise; in place, each on the few pictures that drew it."""
        for name, change in (("blur", _blur), ("posterise", _posterise), ("solarise", _solarise)):
            chosen = (u[name] < getattr(self, name)).nonzero()[:, 0]
            if len(chosen):
                pixels[chosen] = change(pixels[chosen], u["level"][chosen, None, None, None])

    def _cut(self, pixels: Tensor, u: dict[str, Tensor]) -> None:
        """Cutout: a grey rectangle of 10 to 40 % of each side; in place."""
        size = self.image_size
        for b in (u["cutout"] < self.cutout).nonzero()[:, 0].tolist():
            x, y, width, height = (
                float(u[name][b]) for name in ("cut_x", "cut_y", "cut_width", "cut_height")
            )
            width, height = round((0.1 + 0.3 * width) * size), round((0.1 + 0.3 * height) * size)
            left, top = int(x * (size - width + 1)), int(y * (size - height + 1))
            pixels[b, :, top : top + height, left : left + width] = 0.5


def _signed(u: Tensor) -> Tensor:
    """Half of the time 0, else uniform in -1..1: whether to apply a change, and how much, from one uniform draw."""
    return torch.where(u < 0.5, 4.0 * u - 1.0, 0.0)


def _stack(pictures: Sequence[Tensor]) -> Tensor:
    """[B, 3, H, W] if all are opaque, else [B, 4, H, W]."""
    if len({picture.shape[0] for picture in pictures}) > 1:
        opaque = torch.full_like(pictures[0][:1], 255)
        pictures = [
            picture if picture.shape[0] == 4 else torch.cat([picture, opaque]) for picture in pictures
        ]
    return torch.stack(list(pictures))


def _about_grey_axis(angle: Tensor) -> Tensor:
    """Rotations of RGB space about (1, 1, 1), which turn the hue: radians [B] -> [B, 3, 3] (Rodrigues' formula)."""
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    third = 1.0 / 3.0
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) * math.sqrt(third)
    return cos * torch.eye(3) + sin * cross + (1.0 - cos) * third


def _blur(pixels: Tensor, level: Tensor) -> Tensor:
    """level 0..1/2 sharpens, 1/2..1 blurs, by a binomial 3x3 kernel."""
    padded = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
    rows = padded[:, :, :-2] + 2.0 * padded[:, :, 1:-1] + padded[:, :, 2:]
    smooth = (rows[..., :-2] + 2.0 * rows[..., 1:-1] + rows[..., 2:]) / 16.0
    return torch.lerp(pixels, smooth, 2.0 * level - 1.0).clamp_(0.0, 1.0)


def _posterise(pixels: Tensor, level: Tensor) -> Tensor:
    """Keep 2 to 4 bits a channel."""
    steps = 2.0 ** (2.0 + (level * 3.0).floor())
    return (pixels * (steps - 1.0)).round() / (steps - 1.0)


def _solarise(pixels: Tensor, level: Tensor) -> Tensor:
    """Invert what is brighter than a threshold between 0.5 and 1."""
    return torch.where(pixels > 0.5 + 0.5 * level, 1.0 - pixels, pixels)
