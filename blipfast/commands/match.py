"""`blipfast match`: texts scored against a picture."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .common import add_model, add_verb, choose_device, cleaned, pictures, prepare

EXAMPLES = """examples:
  blipfast match --model runs/emoji dog.png "dog face" "red apple"
  blipfast match --model runs/emoji --json photos/ "dog face" > scores.json
"""


def add(verbs: Any) -> None:
    parser = add_verb(verbs, "match", match, "score texts against a picture", EXAMPLES)
    add_model(parser)
    parser.add_argument("picture", metavar="PICTURE", help="a picture, or a folder: each one below it")
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")


def match(args: argparse.Namespace) -> int:
    """Print, for each text, the ITM probability that it matches the picture and their ITC cosine.

    Of a folder for each picture; one that cannot be read is reported and the rest go on.
    """
    import torch

    from blipfast.data.images import load_image
    from blipfast.data.transforms import eval_transform
    from blipfast.models.load import load_matcher, settings_of

    folder, paths = Path(args.picture).is_dir(), pictures([args.picture])
    texts = cleaned(args.texts, settings_of(args.model).data)
    device = choose_device(args.device)
    model = prepare(load_matcher(args.model), args)
    transform = eval_transform(model.visual_encoder.image_size)
    scored = []
    with torch.inference_mode():
        ids = model.encode_text(texts)
        text_features = model.text_features(ids)
        for path in paths:
            try:
                image = transform(load_image(path), None)[None].to(device)
            except ValueError as error:
                if not folder:
                    raise
                print(f"blipfast: {error}", file=sys.stderr)
                continue
            states = model.visual_encoder(image)
            cosines = (model.image_features(states) @ text_features.t())[0].tolist()
            logits = model.match(model.image_states(states), ids, [0] * len(ids))
            rows = list(zip(args.texts, logits.float().softmax(1)[:, 1].tolist(), cosines))
            scored.append({"path": path, "scores": [dict(zip(("text", "itm", "itc"), row)) for row in rows]})
            if not args.json:
                if folder:
                    print(path)
                print("match (ITM)  cosine (ITC)  text")
                for text, probability, cosine in rows:
                    print(f"{probability:11.1%}  {cosine:12.3f}  {text}")
    if args.json:
        print(json.dumps(scored if folder else scored[0], indent=2, ensure_ascii=False))
    return 0 if len(scored) == len(paths) else 1
