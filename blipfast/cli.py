"""The `blipfast` command. Only argparse is imported until a verb runs, so that `--help` is instant."""

from __future__ import annotations

import argparse
import os
import sys

from blipfast import __version__
from blipfast.commands import (
    caption,
    convert,
    data,
    doctor,
    evaluate,
    explain,
    features,
    match,
    tokenizer,
    tune,
)
from blipfast.commands.common import in_words

VERBS = (caption, match, explain, features, evaluate, tune, data, tokenizer, convert, doctor)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 if some pictures failed, 2 for an error told in one line."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):  # a file's name need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    if args.run is None:
        args.parser.print_help()
        return 2
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who reads has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        return 141  # what shells make of SIGPIPE
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        memory = type(error).__name__ == "OutOfMemoryError"  # torch's, which may not be imported
        if os.environ.get("BLIPFAST_TRACEBACK") or isinstance(error, RuntimeError) and not memory:
            raise
        print(f"blipfast: {in_words(error)}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    """The whole command line; each verb's function is `args.run`."""
    parser = argparse.ArgumentParser(
        prog="blipfast",
        description="Caption, match and train on pictures with BLIP.",
        epilog="Training: deepspeed blipfast/train.py --config configs/X.yaml. "
        "BLIPFAST_TRACEBACK=1 shows where an error comes from.",
    )
    parser.set_defaults(run=None, parser=parser)
    parser.add_argument("--version", action="version", version=f"blipfast {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")
    for verb in VERBS:
        verb.add(verbs)
    return parser
