"""`blipfast match`: texts scored against a picture."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .common import add_model, add_verb, choose_device, prepare

EXAMPLES = """example:
  blipfast match --model runs/emoji dog.png "dog face" "red apple"
"""


def add(verbs: Any) -> None:
    parser = add_verb(verbs, "match", match, "score texts against a picture", EXAMPLES)
    add_model(parser)
    parser.add_argument("picture", metavar="PICTURE")
    parser.add_argument("texts", nargs="+", metavar="TEXT")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")


def match(args: argparse.Namespace) -> int:
    """Print, for each text, the ITM probability that it matches the picture and their ITC cosine."""
    import torch

    from blipfast.data.images import load_image
    from blipfast.data.transforms import eval_transform
    from blipfast.models.run import load_matcher, settings_of
    from blipfast.text import pre_caption

    data = settings_of(args.model).data
    texts = [pre_caption(text, data.max_words) if data.clean_captions else text for text in args.texts]
    device = choose_device(args.device)
    model = prepare(load_matcher(args.model), args)
    image = eval_transform(model.visual_encoder.image_size)(load_image(args.picture), None)[None].to(device)
    with torch.inference_mode():
        states, ids = model.visual_encoder(image), model.encode_text(texts)
        cosines = (model.image_features(states) @ model.text_features(ids).t())[0].tolist()
        logits = model.match(model.image_states(states), ids, [0] * len(ids))
        probabilities = logits.float().softmax(1)[:, 1].tolist()
    if args.json:
        rows = zip(args.texts, probabilities, cosines)
        scores = [{"text": text, "itm": probability, "itc": cosine} for text, probability, cosine in rows]
        print(json.dumps({"path": args.picture, "scores": scores}, indent=2, ensure_ascii=False))
        return 0
    print("match (ITM)  cosine (ITC)  text")
    for text, probability, cosine in zip(args.texts, probabilities, cosines):
        print(f"{probability:11.1%}  {cosine:12.3f}  {text}")
    return 0
