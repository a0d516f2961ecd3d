"""`blipfast explain`: what part of a picture each word of a text is matched by."""

from __future__ import annotations

import argparse
from typing import Any

from .common import add_model, add_verb, choose_device, cleaned

EXAMPLES = """examples:
  blipfast explain --model runs/emoji dog.png "dog face" --out heat.png
  blipfast explain --model Salesforce/blip-itm-base-coco photo.jpg "a woman and her dog" --out heat.png --layer 7
"""


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs, "explain", explain, "show where in a picture each word is found (Grad-CAM)", EXAMPLES
    )
    add_model(parser, precision=None)  # int8 has no gradients
    parser.add_argument("picture", metavar="PICTURE")
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("--out", required=True, metavar="FILE", help="the figure: .png, .pdf or .svg")
    parser.add_argument(
        "--layer", type=int, help="of the text encoder, from 0 (default: a little past the middle, 7 of 12)"
    )
    parser.add_argument(
        "--image-block",
        type=int,
        metavar="BLOCK",
        help="explain by this block of the image encoder instead: one map, none for words",
    )


def explain(args: argparse.Namespace) -> int:
    """Write the figure and print how much of the heat each word has."""
    from blipfast.data.images import load_image
    from blipfast.data.transforms import eval_transform
    from blipfast.explain import draw, figure_path, grad_cam, image_grad_cam
    from blipfast.models.load import load_matcher, settings_of

    if args.layer is not None and args.image_block is not None:
        raise ValueError("--layer and --image-block: give one of them.")
    figure_path(args.out)
    (text,) = cleaned([args.text], settings_of(args.model).data)
    pixels = load_image(args.picture)
    model = load_matcher(args.model).to(choose_device(args.device))
    side = model.visual_encoder.image_size
    image = eval_transform(side)(pixels, None).to(model.itm_head.weight.device)
    if args.image_block is None:
        heat = grad_cam(model, image, text, args.layer)
    else:
        heat = image_grad_cam(model, image, text, args.image_block)
    draw(pixels, text, heat, args.out)
    print(f"match {heat.match:.1%}")
    total = float(heat.maps.sum()) or 1.0
    for word, values in zip(heat.words, heat.maps):
        print(f"{float(values.sum()) / total:6.1%}  {word}")
    print(f"wrote {args.out}")
    return 0
