"""`blipfast export`: a run's weights in the formats that others load."""

from __future__ import annotations

import argparse
from typing import Any

from .common import add_verb

EXAMPLES = """examples:
  blipfast export --model runs/emoji --output emoji.safetensors
  blipfast export --model runs/emoji --output emoji.pth          # loads in official BLIP
"""


def add(verbs: Any) -> None:
    parser = add_verb(verbs, "export", export, "write a run's weights for official BLIP or others", EXAMPLES)
    parser.add_argument("--model", required=True, metavar="RUN", help="a run folder")
    parser.add_argument("--output", required=True, metavar="FILE", help="X.pth or X.safetensors")


def export(args: argparse.Namespace) -> int:
    """Write a run's weights as an official-style .pth or as safetensors."""
    from blipfast.models import run

    run.export(args.model, args.output)
    print(f"wrote {args.output}")
    return 0
