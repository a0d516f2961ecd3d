"""`blipfast features`: vectors of pictures and texts, for an index or a classifier."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blipfast.files import whole

from .common import add_model, add_verb, choose_device, cleaned, in_words, pictures, positive

EXAMPLES = """examples:
  blipfast features --model runs/emoji --output feats.npz photos/
  blipfast features --model model_base.pth --output feats.npz --texts queries.txt photos/*.jpg
  blipfast features --model model_base.pth --output pairs.npz --mode multimodal --texts captions.txt a.jpg b.jpg

feats.npz holds "paths" and "texts" and, a row each: image_feat and text_feat, normalised vectors whose dot products are
ITC's cosines (of models that have the projections); image_embeds and text_embeds, the encoders' [CLS] states; in mode
multimodal multimodal_embeds, the state of text i that has looked at picture i. With --tokens also the states of all
tokens; those of texts one behind the other, *_lengths of them each.
"""


def add(verbs: Any) -> None:
    parser = add_verb(verbs, "features", features, "write features of pictures and texts", EXAMPLES)
    add_model(parser, precision="fp32")
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="a picture, or a folder: all below it")
    parser.add_argument("--output", required=True, metavar="FILE.npz", help="where to write")
    parser.add_argument("--texts", metavar="FILE", help='.txt, one a line; .json or .jsonl with "caption"')
    parser.add_argument(
        "--mode", choices=["image", "text", "multimodal"], help="(default: of whatever is given, apart)"
    )
    parser.add_argument("--tokens", action="store_true", help="states of all tokens too (large)")
    parser.add_argument(
        "--dtype", choices=["float32", "float16"], default="float32", help="of the vectors (%(default)s)"
    )
    parser.add_argument("--batch-size", type=positive, default=32, help="at a time (default: 32)")


def features(args: argparse.Namespace) -> int:
    """Write the features; a picture that cannot be read is reported and left out, with its text if it has one."""
    from blipfast.models.load import settings_of
    from blipfast.tasks.features import FeatureExtractor

    args.pictures = pictures(args.pictures)
    texts = _texts(args)
    data = settings_of(args.model).data
    model = FeatureExtractor(args.model, choose_device(args.device), args.precision)

    found: dict[str, list[Any]] = {}  # name -> batches
    unread: list[str] = []
    if args.mode != "text":
        for paths, beside, images in _pictures(args, texts, model.image_size, unread):
            if args.mode == "multimodal":
                rows = {"texts": beside} | model.multimodal(images, cleaned(beside, data), args.tokens)
            else:
                rows = model.image(images, args.tokens)
            _keep(found, {"paths": paths} | rows)
    if texts and args.mode in (None, "text"):
        for start in range(0, len(texts), args.batch_size):
            part = texts[start : start + args.batch_size]
            _keep(found, {"texts": part} | model.text(cleaned(part, data), args.tokens))
    if not found:
        raise ValueError("None of the pictures can be read, so there is nothing to write.")
    _write(Path(args.output), {name: _joined(batches, args.dtype) for name, batches in found.items()})
    return 1 if unread else 0


def _texts(args: argparse.Namespace) -> list[str]:
    """The texts of --texts, after checking that what the mode needs is there."""
    from blipfast.data.readers import read_captions

    if args.texts and not Path(args.texts).is_file():
        raise FileNotFoundError(f"{args.texts}: there is no such file of texts.")
    texts = list(read_captions(Path(args.texts))) if args.texts else []
    mode, count = args.mode, len(args.pictures)
    if args.texts and not texts:
        raise ValueError(f"{args.texts}: there are no texts in it.")
    if not count and (mode in ("image", "multimodal") or not texts):
        raise ValueError("Name at least one picture" + (", or texts: --texts FILE." if mode is None else "."))
    if not texts and mode in ("text", "multimodal"):
        raise ValueError(f"Mode {mode} needs texts: --texts FILE.")
    if mode == "multimodal" and len(texts) not in (1, count):
        raise ValueError(
            f"{args.texts}: {len(texts)} texts for {count} pictures; mode multimodal needs one for each picture, "
            "or one for all."
        )
    return texts * count if mode == "multimodal" and len(texts) == 1 else texts


def _pictures(
    args: argparse.Namespace, texts: list[str], size: int, unread: list[str]
) -> Iterator[tuple[list[str], list[str], Any]]:
    """Batches of pictures that can be read: their paths, the texts of the same places, and pixels [B, 3, S, S]."""
    import torch
    from tqdm import tqdm

    from blipfast.data.images import load_image
    from blipfast.data.transforms import eval_transform

    transform = eval_transform(size)
    for start in tqdm(range(0, len(args.pictures), args.batch_size), "pictures", disable=None, leave=False):
        paths, beside, images = [], [], []
        for place, path in enumerate(args.pictures[start : start + args.batch_size], start):
            try:
                images.append(transform(load_image(path)))
            except (ValueError, OSError) as error:
                print(f"blipfast: {in_words(error)}", file=sys.stderr)
                unread.append(path)
                continue
            paths.append(path)
            beside += texts[place : place + 1]
        if images:
            yield paths, beside, torch.stack(images)


def _keep(found: dict[str, list[Any]], rows: dict[str, Any]) -> None:
    for name, batch in rows.items():
        found.setdefault(name, []).append(batch)


def _joined(batches: list[Any], dtype: str) -> Any:
    """Batches of texts or of tensors as one array, vectors in `dtype`, counts as they are."""
    import numpy as np
    import torch

    if isinstance(batches[0], list):
        return np.array([text for batch in batches for text in batch])
    joined = torch.cat(batches)
    return joined.numpy().astype(dtype) if joined.is_floating_point() else joined.numpy()


def _write(output: Path, arrays: dict[str, Any]) -> None:
    """Write the file, whole or not at all, and say what is in it."""
    import numpy as np

    # an open file: to a name numpy would add .npz
    with whole(output) as unfinished, open(unfinished, "wb") as file:
        np.savez(file, **arrays)
    shapes = "  ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
    print(f"wrote {output}: {shapes}")
