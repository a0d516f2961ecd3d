"""`blipfast data`: get a data set, or check one's own."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from .common import add_verb, positive

if TYPE_CHECKING:
    from blipfast.data.check import SourceReport

EXAMPLES = """examples:
  blipfast data emoji data/emoji
  blipfast data check --config configs/retrieval_coco.yaml
"""
CHECK_EXAMPLES = """examples:
  blipfast data check --config configs/retrieval_coco.yaml
  blipfast data check --config my.yaml --set 'data.train=[pairs.jsonl]' --decode
"""
EMOJI_EXAMPLES = """examples:
  blipfast data emoji data/emoji
  blipfast data emoji data/emoji_noto --unseen noto --groups all
"""
EASY_VQA_EXAMPLES = """example:
  pip install 'blipfast[easy-vqa]' && blipfast data easy-vqa data/easy_vqa
"""


def add(verbs: Any) -> None:
    data = add_verb(verbs, "data", None, "get a data set, or check your own", EXAMPLES)
    data_verbs = data.add_subparsers(title="verbs", metavar="VERB")
    check = add_verb(
        data_verbs,
        "check",
        data_check,
        "read every annotation of a config and say what is wrong",
        CHECK_EXAMPLES,
    )
    check.add_argument("--config", required=True, help="the YAML file whose data.* is checked")
    check.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    check.add_argument("--decode", action="store_true", help="decode every picture too, to find damaged ones")
    check.add_argument(
        "--show", type=positive, default=10, help="problems shown of each source (default: 10)"
    )
    check.add_argument("--json", action="store_true", help="print everything as JSON")
    emoji = add_verb(data_verbs, "emoji", data_emoji, "the demo's emoji pictures", EMOJI_EXAMPLES)
    emoji.add_argument("folder", metavar="DIR", help="where to put them")
    emoji.add_argument(
        "--unseen", default="fluent", metavar="VENDOR", help="the vendor to test on (%(default)s)"
    )
    emoji.add_argument(
        "--groups", choices=["concrete", "all"], default="concrete", help="names to train on (%(default)s)"
    )
    easy = add_verb(
        data_verbs,
        "easy-vqa",
        data_easy_vqa,
        "easy-VQA, and statements about its pictures",
        EASY_VQA_EXAMPLES,
    )
    easy.add_argument("folder", metavar="DIR", help="where to put it")
    easy.add_argument(
        "--wheel", metavar="FILE", help="easy_vqa-1.0-py3-none-any.whl (default: the installed package)"
    )


def data_emoji(args: argparse.Namespace) -> int:
    """Unpack the emoji pictures that come with the package."""
    from blipfast.data import emoji

    folder = emoji.unpack(args.folder, unseen=args.unseen, groups=args.groups)
    print(f"wrote {folder}: train.jsonl, test.jsonl and the pictures of each vendor")
    return 0


def data_easy_vqa(args: argparse.Namespace) -> int:
    """Write easy-VQA's pictures and questions, and what is made from them, in official formats."""
    from blipfast.data import easy_vqa

    folder = easy_vqa.unpack(args.folder, args.wheel)
    counts = json.loads((folder / easy_vqa.MARKER).read_text(encoding="utf-8"))
    print(f"wrote {folder}: " + ", ".join(f"{name} ({count:,})" for name, count in counts.items()))
    return 0


def data_check(args: argparse.Namespace) -> int:
    """Print what each source holds and what is wrong with it; 1 if anything is."""
    from blipfast.config import load_config
    from blipfast.data.check import check_data

    reports = check_data(load_config(args.config, args.set), args.decode)
    if args.json:
        rows = [dataclasses.asdict(report) | {"pictures": len(report.pictures)} for report in reports]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        print("\n".join(told for report in reports for told in _told(report, args.show)))
    return 1 if any(report.bad for report in reports) else 0


def _told(report: SourceReport, most: int) -> list[str]:
    """A source's report as lines of text."""
    counts = " · ".join(f"{name} {number:,}" for name, number in report.counts.items())
    lines = [f"{report.setting}: {report.source} ({report.format})", f"  {counts or 'nothing could be read'}"]
    lines += [f"  note: {note}" for note in report.notes]
    if report.bad:
        lines.append(f"  problems {report.bad:,}. {report.expected}".rstrip(" ."))
        lines += [f"    {problem}" for problem in report.problems[:most]]
        if report.bad > most:
            lines.append(f"    and {report.bad - min(most, len(report.problems)):,} more (--show)")
    return lines
