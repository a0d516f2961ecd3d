"""`blipfast caption`: a caption for each picture."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from blipfast.files import whole

from .common import add_model, add_verb, choose_device, in_words, pictures, positive, prepare

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

    from blipfast.config import EvaluateConfig

EXAMPLES = """examples:
  blipfast caption --model runs/emoji dog.png cat.png
  blipfast caption --model model_base_caption_capfilt_large.pth --json photos/ > captions.json
  blipfast caption --model Salesforce/blip-image-captioning-large --txt photos/     # photos/a.jpg -> photos/a.txt
  blipfast caption --model runs/coco --sample --top-p 0.9 --seed 1 photo.jpg

--txt goes on where it was interrupted: pictures that have a .txt or .caption file keep it.
"""


def add(verbs: Any) -> None:
    parser = add_verb(verbs, "caption", caption, "write a caption for each picture", EXAMPLES)
    add_model(parser)
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help="a picture, or a folder: all below it")
    parser.add_argument(
        "--beams", type=positive, help="beams of the search; 1 is greedy (default: the run's, or 3)"
    )
    parser.add_argument("--max-length", type=positive, help="most tokens, prompt included (the run's, or 20)")
    parser.add_argument("--min-length", type=int, help="fewest tokens, prompt included (the run's, or 5)")
    parser.add_argument("--sample", action="store_true", help="nucleus sampling instead of beam search")
    parser.add_argument("--top-p", type=float, help="probability mass that --sample draws from (0.9)")
    parser.add_argument(
        "--repetition-penalty", type=float, help="of the search, above 1: repeat less (the run's, or 1.0)"
    )
    parser.add_argument("--prompt", help="words every caption starts from (default: the model's)")
    parser.add_argument("--seed", type=int, default=42, help="of the sampling (default: 42)")
    parser.add_argument(
        "--batch-size", type=positive, default=16, help="pictures encoded at a time (default: 16)"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument(
        "--json", action="store_true", help='print [{"path", "caption"} or {"path", "error"}]'
    )
    output.add_argument(
        "--txt", action="store_true", help="write each caption to a .txt file beside its picture"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="with --txt: also where there is one already"
    )


def caption(args: argparse.Namespace) -> int:
    """Caption pictures; one that cannot be read is reported and the rest go on."""
    import torch
    from tqdm import tqdm

    from blipfast.models.load import load_captioner, settings_of

    settings = settings_of(args.model).evaluate
    how = choices(args, settings)
    paths = uncaptioned(args) if args.txt else pictures(args.pictures)
    prompt = args.prompt if args.prompt is not None else settings.prompt or None
    model = prepare(load_captioner(args.model, prompt=prompt), args)
    torch.manual_seed(args.seed)
    write = as_json if args.json else as_txt if args.txt else as_lines
    bar = tqdm(paths, "pictures", disable=None if args.txt or not sys.stdout.isatty() else True, leave=False)
    return 1 if write(captions(model, bar, args.batch_size, choose_device(args.device), how)) else 0


def choices(args: argparse.Namespace, settings: EvaluateConfig) -> dict[str, Any]:
    """What `generate_stream` takes. Raises ValueError for options that would do nothing."""
    idle = {"--beams": args.beams, "--repetition-penalty": args.repetition_penalty} if args.sample else {
        "--top-p": args.top_p
    }  # fmt: skip
    if given := [name for name, value in idle.items() if value is not None]:
        raise ValueError(f"{given[0]} does nothing {'with' if args.sample else 'without'} --sample.")
    if args.overwrite and not args.txt:
        raise ValueError("--overwrite does nothing without --txt.")
    searched = {
        "num_beams": args.beams or settings.num_beams,
        "repetition_penalty": settings.repetition_penalty
        if args.repetition_penalty is None
        else args.repetition_penalty,
    }
    drawn = {"sample": True, "top_p": 0.9 if args.top_p is None else args.top_p}
    return {
        "max_length": args.max_length or settings.max_length,
        "min_length": settings.min_length if args.min_length is None else args.min_length,
    } | (drawn if args.sample else searched)


def uncaptioned(args: argparse.Namespace) -> list[str]:
    """The pictures without a text file, or with --overwrite all. ValueError if two would share one."""
    from blipfast.data.readers import sidecar_of

    found = pictures(args.pictures)
    texts = {path: Path(path).with_suffix(".txt") for path in found}
    if len(set(texts.values())) < len(texts):
        first = {text: path for path, text in reversed(texts.items())}
        twice = next(path for path, text in texts.items() if first[text] != path)
        raise ValueError(
            f"{first[texts[twice]]} and {twice} would share {texts[twice]}: rename one, or use --json."
        )
    if args.overwrite:
        return found
    bare = [path for path in found if sidecar_of(path) is None]
    if len(bare) < len(found):
        print(
            f"blipfast: {len(found) - len(bare)} of {len(found)} pictures have a text already",
            file=sys.stderr,
        )
    return bare


class Captioned(NamedTuple):
    """A picture's caption, or why there is none."""

    path: str
    caption: str | None
    error: str = ""


def captions(model: Any, bar: tqdm, batch_size: int, device: str, how: dict[str, Any]) -> Iterator[Captioned]:
    """Of each picture of the bar, in order, as soon as it is known; what cannot be read is also reported at once."""
    import torch

    from blipfast.data.images import load_image
    from blipfast.data.transforms import eval_transform

    transform = eval_transform(model.visual_encoder.image_size)
    readable: list[str] = []
    failed: dict[str, str] = {}

    def batches() -> Iterator[torch.Tensor]:
        images = []
        for path in bar.iterable:
            try:
                images.append(transform(load_image(path), None))
                readable.append(path)
            except (ValueError, OSError) as error:
                failed[path] = in_words(error)
                bar.write(f"blipfast: {failed[path]}", file=sys.stderr)
            if len(images) == batch_size:
                yield torch.stack(images).to(device)
                images = []
        if images:
            yield torch.stack(images).to(device)

    waiting = iter(bar)
    for place, texts in enumerate(model.generate_stream(batches(), **how)):
        while (path := next(waiting)) != readable[place]:
            yield Captioned(path, None, failed[path])
        yield Captioned(path, texts[0])
    for path in waiting:
        yield Captioned(path, None, failed[path])


def as_lines(found: Iterator[Captioned]) -> int:
    """Print `path: caption`; how many pictures have none."""
    failures = 0
    for one in found:
        if one.caption is None:
            failures += 1
        else:
            print(f"{one.path}: {one.caption}", flush=True)
    return failures


def as_json(found: Iterator[Captioned]) -> int:
    """Print a list, entry by entry, and its end even if it is cut short; how many pictures have no caption."""
    failures, before = 0, "["
    unicode = "utf" in (sys.stdout.encoding or "").lower()
    try:
        for one in found:
            failures += one.caption is None
            entry = {"error": one.error} if one.caption is None else {"caption": one.caption}
            text = json.dumps({"path": one.path} | entry, indent=2, ensure_ascii=not unicode)
            print(before, textwrap.indent(text, "  "), sep="\n", end="", flush=True)
            before = ","
    finally:
        print("[]" if before == "[" else "\n]")
    return failures


def as_txt(found: Iterator[Captioned]) -> int:
    """Write each caption to a file beside its picture, whole or not at all; how many pictures have none."""
    failures = written = 0
    try:
        for one in found:
            if one.caption is None:
                failures += 1
                continue
            with whole(Path(one.path).with_suffix(".txt")) as unfinished:
                unfinished.write_text(one.caption + "\n", encoding="utf-8")
            written += 1
    finally:
        what = (
            "caption written beside its picture" if written == 1 else "captions written beside their pictures"
        )
        print(written, what)
    return failures
