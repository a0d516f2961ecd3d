"""`blipfast tokenizer`: byte-pair encoding trained on one's own captions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .common import add_verb, positive

EXAMPLES = """examples:
  blipfast tokenizer train captions.txt --output tokenizer.json --vocab-size 4000
  blipfast tokenizer train train.jsonl more.json --output tokenizer.json

then, in a config:
  model: {tokenizer: tokenizer.json}
"""


def add(verbs: Any) -> None:
    tokenizer = add_verb(verbs, "tokenizer", None, "train a tokenizer on your captions", EXAMPLES)
    tokenizer_verbs = tokenizer.add_subparsers(title="verbs", metavar="VERB")
    train = add_verb(tokenizer_verbs, "train", tokenizer_train, "byte-pair encoding, any language", EXAMPLES)
    train.add_argument(
        "captions",
        nargs="+",
        metavar="CAPTIONS",
        help='.txt, one caption a line; .json or .jsonl with "caption"',
    )
    train.add_argument(
        "--output", required=True, metavar="FILE", help="where to write, for instance tokenizer.json"
    )
    train.add_argument("--vocab-size", type=positive, default=8000, help="largest vocabulary (default: 8000)")
    train.add_argument("--keep-case", action="store_true", help="keep capitals")


def tokenizer_train(args: argparse.Namespace) -> int:
    """Train a byte-pair tokenizer on caption files."""
    from tqdm import tqdm

    from blipfast.data.readers import read_captions
    from blipfast.text import train_tokenizer

    for path in args.captions:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: there is no such caption file.")
    captions = (caption for path in args.captions for caption in read_captions(Path(path)))
    captions = tqdm(captions, unit=" captions", disable=None)
    tokenizer = train_tokenizer(captions, args.vocab_size, lowercase=not args.keep_case)
    tokenizer.save(args.output)
    print(f"wrote {args.output}: {len(tokenizer)} tokens")
    return 0
