"""Decoding: any picture file becomes the right pixels, or one clear error."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from blipfast.data import images
from blipfast.data.images import composite, load_image

RED = (200, 30, 40)


def encoded(image: Image.Image, kind: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def gradient(width=40, height=24) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], 2).astype(np.uint8))


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_pixels_equal_pillows(monkeypatch, mode, fast):
    if not fast:
        monkeypatch.setattr(images, "_simplejpeg", lambda: None)
    data = encoded(gradient(41, 23).convert(mode), "JPEG", quality=90)
    assert torch.equal(load_image(data), pixels(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture_upright(monkeypatch, orientation, fast):
    if not fast:
        monkeypatch.setattr(images, "_simplejpeg", lambda: None)
    upright = pixels(gradient())
    stored = {  # how a camera stores an upright picture under each orientation
        1: upright,
        2: upright.flip(2),
        3: upright.flip(1, 2),
        4: upright.flip(1),
        5: upright.transpose(1, 2),
        6: upright.rot90(1, (1, 2)),
        7: upright.flip(1, 2).transpose(1, 2),
        8: upright.rot90(-1, (1, 2)),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(stored.permute(1, 2, 0).contiguous().numpy())
    loaded = load_image(encoded(picture, "JPEG", quality=100, subsampling=0, exif=exif))
    assert loaded.shape == upright.shape
    assert (loaded.float() - upright.float()).abs().mean() < 2


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_unreadable_exif_does_not_lose_the_picture():
    data = encoded(gradient(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\xff\xff")
    assert load_image(data).shape == (3, 24, 40)


def test_only_really_transparent_pictures_keep_alpha():
    opaque = Image.new("RGBA", (4, 4), (*RED, 255))
    clear = opaque.copy()
    clear.putpixel((1, 2), (*RED, 128))
    assert load_image(encoded(opaque, "PNG")).shape == (3, 4, 4)
    assert load_image(encoded(clear, "PNG"))[3, 2, 1] == 128


@pytest.mark.parametrize("mode", ["P", "LA", "RGB", "L"])
def test_transparency_is_found_in_any_mode(mode):
    if mode == "LA":
        data = encoded(Image.new("LA", (5, 5), (90, 0)), "PNG")
    elif mode == "P":
        palette = Image.new("P", (5, 5), 1)
        palette.putpalette([0, 0, 0, *RED])
        data = encoded(palette, "PNG", transparency=1)
    else:
        data = encoded(
            Image.new(mode, (5, 5), RED if mode == "RGB" else 7),
            "PNG",
            transparency=RED if mode == "RGB" else 7,
        )
    loaded = load_image(data)
    assert loaded.shape == (4, 5, 5)
    assert loaded[3].max() == 0


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "YCbCr", "LAB", "HSV"])
def test_every_opaque_mode_becomes_three_channels(mode):
    kind = "TIFF" if mode in ("YCbCr", "LAB") else "PNG"
    image = (
        gradient().convert("RGB" if mode == "HSV" else "L").convert(mode)
        if mode not in ("LAB",)
        else Image.new("LAB", (9, 9))
    )
    loaded = images.from_pillow(image) if mode == "HSV" else load_image(encoded(image, kind))
    assert loaded.dtype == torch.uint8 and loaded.shape[0] == 3


def test_16_bit_pictures_span_black_to_white():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    loaded = load_image(encoded(Image.fromarray(ramp), "PNG"))
    assert torch.equal(loaded[0].flatten(), torch.arange(256, dtype=torch.uint8))


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0])
def test_float_pictures_are_scaled_by_their_range(white):
    values = np.linspace(0, white, 100, dtype=np.float32).reshape(10, 10)
    values[0, 0] = np.nan
    loaded = load_image(encoded(Image.fromarray(values), "TIFF"))
    assert loaded.min() == 0 and loaded.max() == 255
    assert loaded[1, 5, 0] == round(50 / 99 * 255)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (6, 6), colour) for colour in (RED, (0, 0, 255))]
    loaded = load_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert loaded[:, 3, 3].tolist() == list(RED)


def test_composite_lays_transparent_pixels_over_the_background():
    picture = torch.tensor([[[100, 100, 100]], [[0, 0, 0]], [[0, 0, 0]], [[0, 128, 255]]], dtype=torch.uint8)
    assert composite(picture, (255, 0, 0))[0].tolist() == [[255, 177, 100]]
    assert composite(picture[:3]) is not None and torch.equal(composite(picture[:3]), picture[:3])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.95])
def test_a_truncated_file_is_one_error_with_its_name(tmp_path, kind, part):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    path = tmp_path / "cut.img"
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ValueError, match=r"cut\.img"):
        load_image(path)


def test_missing_empty_and_foreign_files_are_named(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    for name, message in (
        ("gone.jpg", "cannot be read"),
        ("empty.jpg", "empty"),
        ("page.jpg", "not a picture"),
    ):
        with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
            load_image(tmp_path / name)


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    png = bytearray(encoded(Image.new("L", (1, 1)), "PNG"))
    png[16:24] = struct.pack(">II", 30_000, 30_000)
    png[29:33] = struct.pack(">I", zlib.crc32(bytes(png[12:29])))
    with pytest.raises(ValueError, match="bomb.png: more than"):
        load_image(bytes(png), "bomb.png")
