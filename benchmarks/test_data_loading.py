"""Data loading on one core: from a 640x480 JPEG to the model's input, and augmentation of small pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from blipfast.data import images
from blipfast.data.images import load_image
from blipfast.data.transforms import MEAN, STD, eval_transform, train_transform

pytestmark = pytest.mark.usefixtures("one_thread")


def photo_like(height: int, width: int, seed: int = 0) -> Image.Image:
    """Octaves of smooth noise whose amplitude falls with frequency, as in photographs."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for octave in range(1, 8):
        cells = 2**octave + 1
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += (
            np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), dtype=float) - 128
        ) / 1.5**octave
    return Image.fromarray((total * 0.7 + 128).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("jpegs")
    paths = [str(folder / f"{i}.jpg") for i in range(8)]
    for seed, path in enumerate(paths):
        photo_like(480, 640, seed).save(path, quality=90)
    return paths


def plain_pillow(path: str) -> torch.Tensor:
    """What one would write without further thought: Pillow throughout, then NumPy to torch."""
    with Image.open(path) as image:
        image = image.convert("RGB").resize((384, 384), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32) / 255.0
    pixels = (pixels - np.float32(MEAN)) / np.float32(STD)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def test_jpeg_to_tensor(contest, jpegs, monkeypatch):
    pytest.importorskip("simplejpeg")
    transform = eval_transform(384)
    turbo = images._simplejpeg()

    def ours(with_simplejpeg: bool) -> None:
        monkeypatch.setattr(images, "_simplejpeg", lambda: turbo if with_simplejpeg else None)
        for path in jpegs:
            transform(load_image(path))

    ratios = contest(
        "jpeg_640x480_to_384",
        {
            "plain Pillow": lambda: [plain_pillow(path) for path in jpegs],
            "blipfast": lambda: ours(True),
            "blipfast without simplejpeg": lambda: ours(False),
        },
        per=len(jpegs),
    )
    assert ratios["blipfast"] >= 2.0


def test_training_transform(contest, jpegs):
    transform = train_transform(384)
    rng = torch.Generator()
    decoded = [load_image(path) for path in jpegs]
    ratios = contest(
        "train_transform_384",
        {
            "plain Pillow, evaluation": lambda: [plain_pillow(path) for path in jpegs],
            "blipfast, decode + official": lambda: [
                transform(load_image(path), rng.manual_seed(1)) for path in jpegs
            ],
            "blipfast, official only": lambda: [
                transform(i, rng.manual_seed(s)) for s, i in enumerate(decoded)
            ],
        },
        per=len(jpegs),
    )
    assert ratios["blipfast, decode + official"] >= 1.0  # training loads no slower than plain evaluation


def test_small_pictures(contest):
    """48 px from cached 64 px pictures with transparency: the demo's case."""
    pictures = torch.randint(0, 256, (128, 4, 64, 64), dtype=torch.uint8).unbind()
    strong, official = (
        train_transform(48, randaugment=kind, background="random") for kind in ("strong", "official")
    )
    prepared = [strong.prepare(picture) for picture in pictures]
    seeds = range(128)
    rng = torch.Generator()
    ratios = contest(
        "small_pictures_48",
        {
            "official, one by one": lambda: [
                official(p, rng.manual_seed(s)) for s, p in zip(seeds, pictures)
            ],
            "strong, one by one": lambda: [strong(p, rng.manual_seed(s)) for s, p in zip(seeds, pictures)],
            "strong, batched": lambda: strong.batch(prepared, seeds),
        },
        per=128,
        rounds=10,
    )
    assert ratios["strong, batched"] >= 2 * ratios["strong, one by one"]
