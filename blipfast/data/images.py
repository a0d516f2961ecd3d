"""From a file to pixels: uint8 [3, H, W], or [4, H, W] where the picture really has transparent pixels."""

from __future__ import annotations

import functools
import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

GREY = torch.full((3, 64, 64), 128, dtype=torch.uint8)  # for a picture that cannot be read
MAX_PIXELS = 178_956_970  # where Pillow, too, stops believing in a picture and suspects a decompression bomb
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

logger = logging.getLogger(__name__)


def load_image(source: str | os.PathLike | bytes, name: str = "") -> Tensor:
    """Decode a picture file, or its bytes, into uint8 [3, H, W]; [4, H, W] (RGBA) if some pixel is not opaque.

    Any mode Pillow knows: palettes, grey, CMYK, 16-bit and float (see `from_pillow`); the first frame of an animation;
    turned upright as its EXIF orientation says. JPEG goes through simplejpeg where that is installed: the same pixels
    (both are libjpeg-turbo) in half the time. `name` stands for the picture in errors when `source` is bytes.
    Raises ValueError, naming the file, if it is missing, empty, truncated, not a picture or absurdly large.
    """
    if isinstance(source, bytes):
        data, name = source, name or "<bytes>"
    else:
        name = name or os.fspath(source)
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise ValueError(f"{name}: cannot be read ({error.strerror or error}).") from error
    if not data:
        raise ValueError(f"{name}: the file is empty; expected a picture.")
    pixels = _decode_jpeg(data)
    return _decode(data, name) if pixels is None else pixels


def load_or_grey(load: Callable[[int], Tensor], number: int) -> Tensor:
    """`load(number)`; for a picture that cannot be read a grey square, and its name in the log.

    So an evaluation goes on, and the picture counts as a miss.
    """
    try:
        return load(number)
    except ValueError as error:
        logger.warning("A grey square stands for a picture that cannot be read: %s", error)
        return GREY


def from_pillow(image: Image.Image) -> Tensor:
    """A Pillow image of any mode as uint8 [3, H, W], or [4, H, W] if some pixel is not opaque.

    16-bit, 32-bit and float pictures: black is 0, white is the smallest of 255, 65535 (and 1.0 for float) that holds
    the largest value, or else the largest value.
    """
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        largest = float(values.max(initial=0.0))
        whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        white = next((w for w in whites if largest <= w), largest)
        grey = np.rint(values.clip(0.0) * (255.0 / white)).astype(np.uint8)
        return torch.from_numpy(grey).expand(3, *grey.shape).contiguous()
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        if image.getextrema()[3][0] == 255:
            image = image.convert("RGB")
    else:
        image = image.convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def composite(image: Tensor, background: tuple[int, int, int] = (255, 255, 255)) -> Tensor:
    """Lay a picture over a plain colour (RGB, 0..255). uint8 [4, H, W] -> uint8 [3, H, W]; [3, H, W] passes through."""
    if image.shape[0] == 3:
        return image
    colour, alpha = image[:3].float(), image[3:].float() / 255.0
    ground = torch.tensor(background, dtype=torch.float32).view(3, 1, 1)
    return (ground + (colour - ground) * alpha).round_().to(torch.uint8)


@functools.cache
def _simplejpeg() -> Any:
    """The module simplejpeg, or None where it is not installed (it is optional: `pip install blipfast[fast]`)."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _decode_jpeg(data: bytes) -> Tensor | None:
    """Fast path. None means "let Pillow look at it": not a plain upright JPEG, or damaged in some way."""
    simplejpeg = _simplejpeg()
    if simplejpeg is None or not data.startswith(b"\xff\xd8"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "RGB", "Gray") or height * width > MAX_PIXELS:
            return None
        if b"Exif\0\0" in data and _orientation(Image.open(io.BytesIO(data))) != 1:
            return None
        return torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)
    except (ValueError, OSError):
        return None


def _decode(data: bytes, name: str) -> Tensor:
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            turn = _UPRIGHT.get(_orientation(image))
            return from_pillow(image if turn is None else image.transpose(turn))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: more than {MAX_PIXELS} pixels; make the picture smaller.") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"{name}: not a picture (it starts with {data[:8]!r}).") from error
    except Exception as error:  # decoders raise nearly anything on a damaged file
        raise ValueError(f"{name}: the picture is damaged ({error}).") from error


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # unreadable EXIF says nothing about the pixels
        return 1
