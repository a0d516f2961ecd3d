"""`blipfast data`: get a data set."""

from __future__ import annotations

import argparse
from typing import Any

from .common import add_verb


def add(verbs: Any) -> None:
    data = add_verb(verbs, "data", None, "get a data set")
    emoji = add_verb(
        data.add_subparsers(title="verbs", metavar="VERB"), "emoji", data_emoji, "the demo's emoji pictures"
    )
    emoji.add_argument("folder", metavar="DIR", help="where to put them")
    emoji.add_argument(
        "--unseen", default="fluent", metavar="VENDOR", help="the vendor to test on (%(default)s)"
    )
    emoji.add_argument(
        "--groups", choices=["concrete", "all"], default="concrete", help="names to train on (%(default)s)"
    )


def data_emoji(args: argparse.Namespace) -> int:
    """Unpack the emoji pictures that come with the package."""
    from blipfast.data import emoji

    folder = emoji.unpack(args.folder, unseen=args.unseen, groups=args.groups)
    print(f"wrote {folder}: train.jsonl, test.jsonl and the pictures of each vendor")
    return 0
