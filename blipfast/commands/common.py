"""What the verbs share. Only argparse is imported until a verb runs, so that `--help` is instant."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blipfast.config import DataConfig


def add_verb(
    verbs: Any, name: str, run: Any, help: str, examples: str | None = None
) -> argparse.ArgumentParser:
    """Add a verb that calls `run(args)`; without `run` it prints its own help."""
    parser = verbs.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def add_model(parser: argparse.ArgumentParser, precision: str | None = "auto") -> None:
    """Add the options of a verb that runs a model. precision: the default; None for a verb that has no choice."""
    parser.add_argument(
        "--model",
        required=True,
        help="a run folder, a checkpoint (.pth, .safetensors), a Hugging Face folder or name",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    if precision:
        parser.add_argument(
            "--precision",
            default=precision,
            metavar="P",
            help="fp32, bf16, fp16, int8, fp8 (GPU), or auto: bf16 where the hardware is fast at it "
            "(default: %(default)s)",
        )


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def choose_device(name: str | None) -> str:
    """`name`, or the GPU if there is one. Raises ValueError for a device that cannot be used."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("meta"):
        raise ValueError(f"--device {name}: holds no numbers; expected cpu, cuda, cuda:1, ...")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name


def prepare(model: Any, args: argparse.Namespace) -> Any:
    """The model on the device and in the precision of the options of `add_model`."""
    from blipfast.quantize import prepare

    return prepare(model, args.precision, choose_device(args.device))


def pictures(paths: list[str]) -> list[str]:
    """The pictures named, and for a folder all below it in the order of their paths. ValueError for one without any."""
    from blipfast.data.readers import pictures_below

    found: list[str] = []
    for path in paths:
        inside = [picture for picture, _ in pictures_below(path)] if Path(path).is_dir() else [path]
        if not inside:
            raise ValueError(f"{path}: there are no pictures in this folder.")
        found += inside
    return found


def cleaned(texts: list[str], data: DataConfig) -> list[str]:
    """Texts as the model was trained on: by `pre_caption`, if its run says so."""
    from blipfast.text import pre_caption

    return [pre_caption(text, data.max_words) for text in texts] if data.clean_captions else texts


def in_words(error: Exception) -> str:
    """An error in the words of the file it is about."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
