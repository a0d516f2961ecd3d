"""The `blipfast` command. Only argparse is imported until a verb needs more, so that `--help` is instant."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blipfast.config import Config

CAPTION_EXAMPLES = """examples:
  blipfast caption --model runs/emoji dog.png cat.png
  blipfast caption --model model_base_caption_capfilt_large.pth --json photos/*.jpg > captions.json
  blipfast caption --model runs/coco --sample --top-p 0.9 --seed 1 photo.jpg
"""
MATCH_EXAMPLES = """example:
  blipfast match --model runs/emoji dog.png "dog face" "red apple"
"""
EXPORT_EXAMPLES = """examples:
  blipfast export --model runs/emoji --output emoji.safetensors
  blipfast export --model runs/emoji --output emoji.pth          # loads in official BLIP
"""
TOKENIZER_EXAMPLES = """examples:
  blipfast tokenizer train captions.txt --output tokenizer.json --vocab-size 4000
  blipfast tokenizer train train.jsonl more.json --output tokenizer.json

then, in a config:
  model: {tokenizer: tokenizer.json}
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 if some pictures failed, 2 for an error told in one line."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.run is None:
        args.parser.print_help()
        return 2
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("BLIPFAST_TRACEBACK"):
            raise
        print(f"blipfast: {explain(error)}", file=sys.stderr)
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
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")

    caption_ = add_verb(verbs, "caption", caption, "write a caption for each picture", CAPTION_EXAMPLES)
    add_model(caption_)
    caption_.add_argument("pictures", nargs="+", metavar="PICTURE")
    caption_.add_argument(
        "--beams", type=positive, help="beams of the search; 1 is greedy (default: the run's, or 3)"
    )
    caption_.add_argument(
        "--max-length", type=positive, help="most tokens, prompt included (the run's, or 20)"
    )
    caption_.add_argument("--min-length", type=int, help="fewest tokens, prompt included (the run's, or 5)")
    caption_.add_argument("--sample", action="store_true", help="nucleus sampling instead of beam search")
    caption_.add_argument(
        "--top-p", type=float, default=0.9, help="probability mass sampled from (default: 0.9)"
    )
    caption_.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1: repeat less (default: 1.0)"
    )
    caption_.add_argument("--prompt", help="words every caption starts from (default: the model's)")
    caption_.add_argument("--seed", type=int, default=42, help="of the sampling (default: 42)")
    caption_.add_argument("--batch-size", type=positive, default=16, help="pictures at a time (default: 16)")
    caption_.add_argument(
        "--json", action="store_true", help='print [{"path", "caption"} or {"path", "error"}]'
    )

    match_ = add_verb(verbs, "match", match, "score texts against a picture", MATCH_EXAMPLES)
    add_model(match_)
    match_.add_argument("picture", metavar="PICTURE")
    match_.add_argument("texts", nargs="+", metavar="TEXT")
    match_.add_argument("--json", action="store_true", help="print the scores as JSON")

    export_ = add_verb(
        verbs, "export", export, "write a run's weights for official BLIP or others", EXPORT_EXAMPLES
    )
    export_.add_argument("--model", required=True, metavar="RUN", help="a run folder")
    export_.add_argument("--output", required=True, metavar="FILE", help="X.pth or X.safetensors")

    tokenizer = add_verb(verbs, "tokenizer", None, "train a tokenizer on your captions")
    tokenizer_verbs = tokenizer.add_subparsers(title="verbs", metavar="VERB")
    train = add_verb(
        tokenizer_verbs, "train", tokenizer_train, "byte-pair encoding, any language", TOKENIZER_EXAMPLES
    )
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

    add_verb(verbs, "doctor", doctor, "show what this machine and installation can do")
    return parser


def caption(args: argparse.Namespace) -> int:
    """Caption pictures; one that cannot be read is reported and the rest go on."""
    import torch

    from blipfast.data.images import load_image
    from blipfast.data.transforms import eval_transform
    from blipfast.models.run import load_captioner

    settings = run_settings(args.model).evaluate
    model = load_captioner(args.model, **({} if args.prompt is None else {"prompt": args.prompt}))
    device = choose_device(args.device)
    model = model.to(device).eval()
    transform = eval_transform(model.visual_encoder.image_size)
    how = {
        "sample": args.sample,
        "num_beams": args.beams or settings.num_beams,
        "max_length": args.max_length or settings.max_length,
        "min_length": settings.min_length if args.min_length is None else args.min_length,
        "top_p": args.top_p,
        "repetition_penalty": args.repetition_penalty,
    }
    torch.manual_seed(args.seed)
    results: list[dict[str, str]] = []
    for start in range(0, len(args.pictures), args.batch_size):
        entries, images = [], []
        for path in args.pictures[start : start + args.batch_size]:
            try:
                images.append(transform(load_image(path), None))
                entries.append({"path": path})
            except (ValueError, OSError) as error:
                entries.append({"path": path, "error": explain(error)})
        if images:
            with torch.inference_mode():
                captions = iter(model.generate(torch.stack(images).to(device), **how))
        for entry in entries:
            if "error" in entry:
                print(f"blipfast: {entry['error']}", file=sys.stderr)
            else:
                entry["caption"] = next(captions)
                if not args.json:
                    print(f"{entry['path']}: {entry['caption']}", flush=True)
        results += entries
    if args.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
    return 1 if any("error" in result for result in results) else 0


def match(args: argparse.Namespace) -> int:
    """Print, for each text, the ITM probability that it matches the picture and their ITC cosine."""
    import torch

    from blipfast.data.images import load_image
    from blipfast.data.transforms import eval_transform
    from blipfast.models.run import load_matcher
    from blipfast.text import pre_caption

    data = run_settings(args.model).data
    texts = [pre_caption(text, data.max_words) if data.clean_captions else text for text in args.texts]
    device = choose_device(args.device)
    model = load_matcher(args.model).to(device).eval()
    image = eval_transform(model.visual_encoder.image_size)(load_image(args.picture), None)[None].to(device)
    with torch.inference_mode():
        cosines = model(image, texts, match_head="itc")[0].tolist()
        logits = model(image.expand(len(texts), -1, -1, -1), texts, match_head="itm")
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


def export(args: argparse.Namespace) -> int:
    """Write a run's weights as an official-style .pth or as safetensors."""
    from blipfast.models import run

    run.export(args.model, args.output)
    print(f"wrote {args.output}")
    return 0


def tokenizer_train(args: argparse.Namespace) -> int:
    """Train a byte-pair tokenizer on caption files."""
    from tqdm import tqdm

    from blipfast.text import train_tokenizer

    for path in args.captions:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: there is no such caption file.")
    captions = (caption for path in args.captions for caption in read_captions(Path(path)))
    captions = tqdm(captions, unit=" captions", disable=not sys.stderr.isatty())
    tokenizer = train_tokenizer(captions, args.vocab_size, lowercase=not args.keep_case)
    tokenizer.save(args.output)
    print(f"wrote {args.output}: {len(tokenizer)} tokens")
    return 0


def data_emoji(args: argparse.Namespace) -> int:
    """Unpack the emoji pictures that come with the package."""
    from blipfast.data import emoji

    folder = emoji.unpack(args.folder, unseen=args.unseen, groups=args.groups)
    print(f"wrote {folder}: train.jsonl, test.jsonl and the pictures of each vendor")
    return 0


def doctor(args: argparse.Namespace) -> int:
    """Print what is installed."""
    from blipfast.doctor import report

    print(report())
    return 0


def read_captions(path: Path) -> Iterator[str]:
    """Captions of a .txt file (one a line), a .jsonl file or a .json list of {"caption": text or list of texts}.

    Raises ValueError naming file and line (or entry) for anything else.
    """
    wanted = 'Each entry needs {"caption": text}.'
    with path.open(encoding="utf-8-sig") as lines:
        try:
            if path.suffix == ".json":
                entries = enumerate(json.load(lines))
            elif path.suffix == ".jsonl":
                entries = ((number, json.loads(line)) for number, line in enumerate(lines, 1) if line.strip())
            else:
                entries = (
                    (number, {"caption": line.strip()})
                    for number, line in enumerate(lines, 1)
                    if line.strip()
                )
            for number, entry in entries:
                found = entry.get("caption") if isinstance(entry, dict) else None
                texts = [found] if isinstance(found, str) else found
                if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                    raise ValueError(f'{path}:{number}: "caption" is missing or not text. {wanted}')
                yield from texts
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
            raise ValueError(
                f"{path}: cannot be read as {path.suffix} captions ({error}). {wanted}"
            ) from None


def run_settings(model: str) -> Config:
    """The config of a run folder; the defaults for a checkpoint file."""
    from blipfast.config import Config, load_config

    saved = Path(model) / "config.yaml"
    return load_config(saved) if saved.is_file() else Config()


def choose_device(name: str | None) -> str:
    """`name`, or the GPU if there is one. Raises ValueError for a device that cannot be used."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name


def explain(error: Exception) -> str:
    """An error in the words of the file it is about."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


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


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options of a verb that runs a model."""
    parser.add_argument("--model", required=True, help="a run folder, or a checkpoint (.pth, .safetensors)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number
