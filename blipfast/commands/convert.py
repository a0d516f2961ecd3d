"""`blipfast convert`: a checkpoint in the format that others load."""

from __future__ import annotations

import argparse
from typing import Any

from .common import add_verb

EXAMPLES = """examples:
  blipfast convert model_base_caption_capfilt_large.pth --to huggingface --output blip-caption
  blipfast convert runs/emoji --to huggingface --task caption --output emoji-captioner
  blipfast convert Salesforce/blip-vqa-base --to official --output vqa.pth
  blipfast convert model_base.pth --to safetensors --task retrieval --output matcher.safetensors

a source is a run folder, a .pth (official BLIP, LAVIS), a .safetensors, a Hugging Face folder or name, or a URL
"""


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs, "convert", convert, "write a model for official BLIP, transformers or blipfast", EXAMPLES
    )
    parser.add_argument("source", metavar="SOURCE", help="the model to convert")
    parser.add_argument("--to", required=True, choices=["official", "safetensors", "huggingface"])
    parser.add_argument(
        "--output", required=True, metavar="PATH", help="X.pth, X.safetensors, or a new folder"
    )
    parser.add_argument(
        "--task",
        choices=["caption", "retrieval", "vqa", "nlvr", "features"],
        help="keep what this task needs of a model that holds more (needed for a pre-trained one to huggingface)",
    )


def convert(args: argparse.Namespace) -> int:
    """Convert, and say what was written."""
    from blipfast.models.convert import convert

    print(convert(args.source, args.to, args.output, args.task))
    return 0
