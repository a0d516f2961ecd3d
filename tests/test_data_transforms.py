"""Transforms: the definition of each, pixel by pixel or in distribution."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from blipfast.data import randaugment
from blipfast.data.images import composite
from blipfast.data.transforms import MEAN, STD, eval_transform, random_resized_crop, resize, train_transform


def photo(height, width, seed=0, channels=3) -> torch.Tensor:
    """A smooth random picture, uint8 [C, H, W]."""
    rng = np.random.default_rng(seed)
    layers = [Image.fromarray(rng.integers(0, 256, (9, 11), dtype=np.uint8)) for _ in range(channels)]
    return torch.stack([torch.from_numpy(np.array(i.resize((width, height), Image.BICUBIC))) for i in layers])


def rng(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def levels(image: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation: 0..255."""
    return (image * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255


def pillow_eval(image: torch.Tensor, size: int) -> torch.Tensor:
    picture = Image.fromarray(image.permute(1, 2, 0).numpy().copy()).resize((size, size), Image.BICUBIC)
    array = np.asarray(picture, dtype=np.float32) / 255
    return torch.from_numpy((array - np.float32(MEAN)) / np.float32(STD)).permute(2, 0, 1)


@pytest.mark.parametrize(
    "height, width, size", [(480, 640, 384), (100, 60, 224), (48, 48, 48), (333, 50, 64)]
)
def test_eval_is_within_two_levels_of_pillow(height, width, size):
    image = photo(height, width)
    image[:, :20, :20] = torch.randint(0, 256, (3, 20, 20), generator=rng(), dtype=torch.uint8)
    ours, pillows = levels(eval_transform(size)(image)), levels(pillow_eval(image, size))
    assert ((ours - pillows).abs() < 2.5).float().mean() > 0.998


def test_exact_eval_equals_pillow():
    image = photo(75, 130)
    torch.testing.assert_close(
        eval_transform(64, exact=True)(image), pillow_eval(image, 64), rtol=1e-6, atol=2e-6
    )


def test_a_pillow_image_and_its_tensor_give_the_same():
    image = photo(50, 70)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy().copy())
    assert torch.equal(eval_transform(32)(picture), eval_transform(32)(image))
    ours = train_transform(32)
    assert torch.equal(ours(picture, rng(3)), ours(image, rng(3)))


def test_memory_layout_does_not_change_pixels():
    image = photo(60, 80)
    assert torch.equal(resize(image, 33), resize(image.permute(1, 2, 0).contiguous().permute(2, 0, 1), 33))


def test_transparent_pixels_take_the_background():
    image = torch.zeros(4, 10, 10, dtype=torch.uint8)
    assert levels(eval_transform(8)(image)).round().unique().tolist() == [255.0]
    assert levels(eval_transform(8, background="black")(image)).abs().max() < 1e-3
    colours = {
        tuple(
            levels(train_transform(8, 1.0, 0.0, "none", background="random")(image, rng(s)))[:, 0, 0].tolist()
        )
        for s in range(5)
    }
    assert len(colours) == 5


def test_crops_follow_the_definition():
    height, width, low = 300, 400, 0.2
    draw = rng()
    boxes = torch.tensor(
        [random_resized_crop(height, width, low, draw) for _ in range(4000)], dtype=torch.float64
    )
    top, left, h, w = boxes.unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    ratio, area = w / h, h * w / (height * width)
    assert ratio.min() > 0.74 and ratio.max() < 1.35
    assert area.min() > low - 0.01 and area.max() <= 1.0
    # crops up to 60 % of the area always fit: there, area and ratio keep the distributions they are drawn from
    fits = area < 0.6
    assert abs(area[fits].mean() - 0.4) < 0.01
    assert abs(ratio[fits].log().mean()) < 0.015
    assert abs(ratio[fits].log().std() - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.01
    assert abs((left / (width - w).clamp(min=1)).mean() - 0.5) < 0.02


@pytest.mark.parametrize("height, width, box", [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10))])
def test_a_crop_that_never_fits_falls_back_to_the_centre(height, width, box):
    assert random_resized_crop(height, width, 0.9, rng()) == box


def test_flip_mirrors_half_of_the_time():
    image = photo(32, 32)
    plain, mirrored = eval_transform(32)(image), eval_transform(32)(image.flip(2))
    flip = train_transform(32, 0.9999, 0.5, "none")
    crop = [flip(image, rng(s)) for s in range(200)]
    flips = sum(bool((c - mirrored).abs().mean() < (c - plain).abs().mean()) for c in crop)
    assert 70 < flips < 130


def test_noise_has_the_given_deviation():
    image = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    for kind in ("none", "strong"):
        flat = train_transform(64, 1.0, 0.0, kind, noise=0.0, background="black")
        noisy = train_transform(64, 1.0, 0.0, kind, noise=0.1, background="black")
        difference = levels(noisy(image, rng(5))) - levels(flat(image, rng(5)))
        assert abs(difference.std() / 255 - 0.1) < 0.005


@pytest.mark.parametrize("kind", ["none", "official", "strong"])
def test_what_a_transform_does_depends_on_its_generator_only(kind):
    image, transform = (
        photo(40, 50, channels=4),
        train_transform(24, randaugment=kind, noise=0.1, background="random"),
    )
    torch.manual_seed(1)
    first = transform(image, rng(7))
    torch.manual_seed(2)
    assert torch.equal(first, transform(image, rng(7)))
    assert not torch.equal(first, transform(image, rng(8)))
    assert first.shape == (3, 24, 24) and first.dtype == torch.float32 and first.is_contiguous()


def test_settings_out_of_range_are_refused_by_name():
    for settings in (
        {"min_scale": 0.0},
        {"flip": 1.5},
        {"noise": -1.0},
        {"randaugment": "mild"},
        {"background": "pink"},
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            train_transform(32, **settings)


# RandAugment, against OpenCV's formula for warpAffine in float64, written out


def warp_affine(image: torch.Tensor, forward) -> np.ndarray:
    """dst(x, y) = src(forward^-1 (x, y)), bilinear, 128 outside: float64 [H, W, 3]."""
    source = image.permute(1, 2, 0).numpy().astype(np.float64)
    height, width = source.shape[:2]
    inverse = np.linalg.inv(np.vstack([forward, [0, 0, 1]]))
    out = np.empty_like(source)
    for y in range(height):
        for x in range(width):
            sx, sy, _ = inverse @ (x, y, 1)
            x0, y0 = math.floor(sx), math.floor(sy)
            value = 0.0
            for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
                weight = (1 - abs(sx - x0 - dx)) * (1 - abs(sy - y0 - dy))
                inside = 0 <= x0 + dx < width and 0 <= y0 + dy < height
                value = value + weight * (source[y0 + dy, x0 + dx] if inside else 128.0)
            out[y, x] = value
    return out


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("op", ["shear_x", "shear_y", "rotate", "translate_x", "translate_y"])
def test_geometric_ops_are_opencvs(op, sign):
    height, width = 20, 26
    image = photo(height, width)
    cos, sin = math.cos(math.radians(15 * sign)), math.sin(math.radians(15 * sign))
    x, y = width / 2, height / 2
    forward = {
        "shear_x": [[1, 0.15 * sign, 0], [0, 1, 0]],
        "shear_y": [[1, 0, 0], [0.15 * sign, 1, 0]],
        "rotate": [[cos, sin, (1 - cos) * x - sin * y], [-sin, cos, sin * x + (1 - cos) * y]],
        "translate_x": [[1, 0, -5 * sign], [0, 1, 0]],
        "translate_y": [[1, 0, 0], [0, 1, -5 * sign]],
    }[op]
    places = {"shear_x": 5, "shear_y": 6, "translate_x": 7, "translate_y": 8, "rotate": 9}
    ours = randaugment.OPS[places[op]](image, sign).permute(1, 2, 0).numpy()
    assert np.abs(ours - warp_affine(image, np.array(forward, dtype=np.float64))).max() < 0.51


def test_colour_ops_equal_pillows():
    image = (photo(40, 40).float() * 0.5 + 30).to(torch.uint8)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy().copy())
    for ours, pillows in (
        (randaugment.autocontrast, ImageOps.autocontrast),
        (randaugment.equalize, ImageOps.equalize),
    ):
        assert np.array_equal(ours(image, 1).permute(1, 2, 0).numpy(), np.asarray(pillows(picture)))
    flat = torch.full((3, 8, 8), 9, dtype=torch.uint8)
    assert torch.equal(randaugment.autocontrast(flat, 1), flat) and torch.equal(
        randaugment.equalize(flat, 1), flat
    )


def test_randaugment_leaves_pictures_alone_as_often_as_it_should():
    image = photo(32, 32)
    draw = rng()
    untouched = sum(torch.equal(randaugment.rand_augment(image, draw), image) for _ in range(600))
    # an op acts with probability 0.5 x 6/10 (identity, brightness and sharpness never, autocontrast not here)
    stretched = torch.equal(randaugment.autocontrast(image, 1), image)
    acting = 0.5 * (0.6 if stretched else 0.7)
    assert abs(untouched / 600 - (1 - acting) ** 2) < 0.07


# the strong augmentation


def test_strong_batches_equal_single_pictures_bit_for_bit():
    transform = train_transform(24, randaugment="strong", noise=0.05, background="random")
    pictures = [photo(40, 30, s, channels=3 + s % 2) for s in range(6)]
    together = transform.batch([transform.prepare(p) for p in pictures], list(range(6)))
    assert torch.equal(together, torch.stack([transform(p, rng(s)) for s, p in enumerate(pictures)]))


def strong(**settings):
    still = dict(rotate=0.0, shear=0.0, shift=0.0, zoom_out=0.0, light=0.0, saturation=0.0, hue=0.0, grey=0.0)
    still |= dict(invert=0.0, posterise=0.0, solarise=0.0, blur=0.0, cutout=0.0)
    return type(train_transform(8, randaugment="strong"))(48, 1.0, 0.0, **(still | settings))


def seed_where(transform, name, low, high):
    """A seed under which the uniform draw `name` lies between two values."""
    return next(s for s in range(500) if low < transform._draw([s])[0][name] < high)


def test_strong_with_everything_off_is_a_plain_resize():
    transform, image = strong(), photo(96, 96)
    seed = seed_where(transform, "ratio", 0.49, 0.51)  # the crop is the whole picture
    ours, plain = levels(transform(image, rng(seed))), levels(eval_transform(48)(image))
    assert (ours - plain).abs().mean() < 3


def test_strong_fills_with_the_background_and_keeps_transparent_edges_clean():
    ring = torch.zeros(4, 96, 96, dtype=torch.uint8)  # transparent black around an opaque white disc
    y, x = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
    ring[:, (y - 48) ** 2 + (x - 48) ** 2 < 900] = 255
    for seed in range(20):
        out = levels(strong(rotate=30.0, shift=0.15, zoom_out=0.25)(ring, rng(seed)))
        assert out.min() > 253  # black behind transparent pixels never shows


def test_strong_rotates_about_the_centre_by_at_most_the_given_angle():
    arrow = torch.zeros(3, 72, 72, dtype=torch.uint8)
    arrow[:, 30:42, 36:] = 255
    angles = []
    for seed in range(60):
        out = levels(strong(rotate=30.0)(arrow, rng(seed))).clamp(min=0)[0]
        y, x = torch.meshgrid(torch.arange(48) - 23.5, torch.arange(48) - 23.5, indexing="ij")
        disc = (x**2 + y**2 < 20**2) & (out > 128)
        angles.append(math.degrees(math.atan2(y[disc].mean(), x[disc].mean())))
    furthest = math.degrees(math.atan(math.tan(math.radians(30)) * 4 / 3))  # as the crop may stretch it
    assert 15 < max(angles) < furthest + 2 and -furthest - 2 < min(angles) < -15
    assert sum(abs(a) < 2 for a in angles) > 15


def test_strong_colour_changes_stay_in_range_and_grey_is_grey():
    image = photo(48, 48)
    out = levels(strong(light=0.4, saturation=0.6, hue=0.5, invert=0.5)(image, rng(1)))
    assert out.min() > -0.01 and out.max() < 255.01
    seed = seed_where(strong(), "ratio", 0.49, 0.51)  # the crop is the whole picture
    grey = levels(strong(grey=1.0)(image, rng(seed)))
    assert (grey - grey[:1]).abs().max() < 0.01
    luma = levels(eval_transform(48)(image)).mul(torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    assert (grey[0] - luma).abs().mean() < 6


def test_hue_turns_keep_grey_and_brightness():
    transform = strong(hue=0.5)
    seed = seed_where(transform, "hue", 0.05, 0.2)
    grey = torch.full((3, 48, 48), 90, dtype=torch.uint8)
    assert (levels(transform(grey, rng(seed)))[:, 20, 20] - 90).abs().max() < 0.5
    rosy = torch.tensor([150, 110, 110], dtype=torch.uint8).view(3, 1, 1).expand(3, 48, 48)
    out = levels(transform(rosy, rng(seed)))[:, 20, 20]
    assert abs(out.sum() - 370) < 0.5 and abs(out[0] - 150) > 5


def test_cutout_covers_a_rectangle():
    image = torch.zeros(3, 48, 48, dtype=torch.uint8)
    out = levels(strong(cutout=1.0, background="black")(image, rng(2)))[0] > 100
    rows, columns = out.any(1).sum(), out.any(0).sum()
    assert out.sum() == rows * columns and 4 <= rows <= 20 and 4 <= columns <= 20


def test_composite_then_resize_is_what_eval_does():
    image = photo(30, 40, channels=4)
    assert torch.equal(eval_transform(16)(image), eval_transform(16)(composite(image)))
