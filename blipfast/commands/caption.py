"""`blipfast caption`: a caption for each picture."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from .common import add_model, add_verb, choose_device, in_words, positive, prepare, run_settings

EXAMPLES = """examples:
  blipfast caption --model runs/emoji dog.png cat.png
  blipfast caption --model model_base_caption_capfilt_large.pth --json photos/*.jpg > captions.json
  blipfast caption --model runs/coco --sample --top-p 0.9 --seed 1 photo.jpg
"""


def add(verbs: Any) -> None:
    parser = add_verb(verbs, "caption", caption, "write a caption for each picture", EXAMPLES)
    add_model(parser)
    parser.add_argument("pictures", nargs="+", metavar="PICTURE")
    parser.add_argument(
        "--beams", type=positive, help="beams of the search; 1 is greedy (default: the run's, or 3)"
    )
    parser.add_argument("--max-length", type=positive, help="most tokens, prompt included (the run's, or 20)")
    parser.add_argument("--min-length", type=int, help="fewest tokens, prompt included (the run's, or 5)")
    parser.add_argument("--sample", action="store_true", help="nucleus sampling instead of beam search")
    parser.add_argument(
        "--top-p", type=float, default=0.9, help="probability mass sampled from (default: 0.9)"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1: repeat less (default: 1.0)"
    )
    parser.add_argument("--prompt", help="words every caption starts from (default: the model's)")
    parser.add_argument("--seed", type=int, default=42, help="of the sampling (default: 42)")
    parser.add_argument(
        "--batch-size", type=positive, default=16, help="pictures encoded at a time (default: 16)"
    )
    parser.add_argument(
        "--json", action="store_true", help='print [{"path", "caption"} or {"path", "error"}]'
    )


def caption(args: argparse.Namespace) -> int:
    """Caption pictures; one that cannot be read is reported and the rest go on."""
    import torch

    from blipfast.data.images import load_image
    from blipfast.data.transforms import eval_transform
    from blipfast.models.run import load_captioner

    settings = run_settings(args.model).evaluate
    model = load_captioner(args.model, **({} if args.prompt is None else {"prompt": args.prompt}))
    model = prepare(model, args)
    device = choose_device(args.device)
    transform = eval_transform(model.visual_encoder.image_size)
    how = {
        "sample": args.sample,
        "num_beams": args.beams or settings.num_beams,
        "max_length": args.max_length or settings.max_length,
        "min_length": settings.min_length if args.min_length is None else args.min_length,
        "top_p": args.top_p,
        "repetition_penalty": args.repetition_penalty,
    }
    torch.manual_seed(args.seed)
    readable: list[str] = []
    failed: dict[str, str] = {}

    def batches() -> Iterator[torch.Tensor]:
        images = []
        for path in args.pictures:
            try:
                images.append(transform(load_image(path), None))
                readable.append(path)
            except (ValueError, OSError) as error:
                failed[path] = in_words(error)
                print(f"blipfast: {failed[path]}", file=sys.stderr)
            if len(images) == args.batch_size:
                yield torch.stack(images).to(device)
                images = []
        if images:
            yield torch.stack(images).to(device)

    found: dict[str, str] = {}
    for place, texts in enumerate(model.generate_stream(batches(), **how)):
        path = readable[place]
        found[path] = texts[0]
        if not args.json:
            print(f"{path}: {texts[0]}", flush=True)
    if args.json:
        entries = [
            {"path": path} | ({"error": failed[path]} if path in failed else {"caption": found[path]})
            for path in args.pictures
        ]
        print(json.dumps(entries, indent=2, ensure_ascii=False))
    return 1 if failed else 0
