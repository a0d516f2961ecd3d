"""Weights into models: what fits is loaded, the rest is reported, and nothing stays random unless told.

Reading and writing the files is in `weights`; the names below are those that users of official BLIP know.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import gather
from .download import is_url
from .vit import VisionTransformer, interpolate_pos_embed
from .weights import WEIGHTS, read_state_dict, save_weights

__all__ = [
    "WEIGHTS",
    "LoadReport",
    "is_url",
    "kind_of",
    "load_bert",
    "load_checkpoint",
    "load_vit",
    "load_weights",
    "read_state_dict",
    "save_weights",
]

log = logging.getLogger("blipfast")

# what a checkpoint may leave out without anything being random: it is counted, filled or constant at the start
FRESH = ("position_ids", "image_queue", "text_queue", "idx_queue", "queue_ptr", "ptr_queue", "temp")
QUEUES = ("image_queue", "text_queue", "idx_queue", "queue_ptr", "ptr_queue")
AllowRandom = bool | str | Iterable[str]


class LoadReport(NamedTuple):
    """What `load_weights` did; `missing_keys` and `unexpected_keys` as torch's `load_state_dict` names them."""

    missing_keys: list[str]
    unexpected_keys: list[str]
    mismatched_keys: list[str]  # "key: shape in the file, shape in the model"
    resized_keys: list[str]
    loaded: int
    source: str = "weights"
    copied_keys: list[str] = []  # of momentum encoders that the file lacks: copies of the encoders

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.loaded} tensors loaded"]
        for title, keys in (
            ("resized to this picture size", self.resized_keys),
            ("momentum copies of their encoders", self.copied_keys),
            ("of another shape, left out", self.mismatched_keys),
            ("missing, left as initialised", self.missing_keys),
            ("in the file, not used", self.unexpected_keys),
        ):
            if keys:
                lines.append(f"  {title}: {len(keys)} ({groups(keys)})")
        return "\n".join(lines)


def load_checkpoint(
    model: nn.Module, url_or_filename: str | Path, allow_missing: bool = True, allow_random: AllowRandom = ()
) -> tuple[nn.Module, LoadReport]:
    """Load official BLIP, LAVIS, Hugging Face or blipfast weights into `model`, as `load_weights` does.

    url_or_filename: a .pth, .bin or .safetensors file, a run or Hugging Face folder, a URL, a name on Hugging Face.
    """
    state = read_state_dict(url_or_filename)
    return model, load_weights(model, state, str(url_or_filename), allow_missing, allow_random)


def load_weights(
    model: nn.Module,
    state: dict[str, Tensor],
    source: str = "weights",
    allow_missing: bool = True,
    allow_random: AllowRandom = (),
) -> LoadReport:
    """Load tensors with official keys into `model`, print a report, and return it.

    Position embeddings are resampled to the model's picture size (bicubic, as official). Queues of another size start
    empty. Momentum encoders that are missing start as copies of their encoders.
    allow_missing: what is missing or of another shape stays as it is (official behaviour). With False only what
    `allow_random` names may: a part ("text_decoder"), a key, a pattern ("*.crossattention.*"), or True for all;
    besides the model's own `starts_random`. Raises ValueError, the model untouched, for the rest, and if nothing fits.
    """
    wanted = model.state_dict()
    state, resized = resize_positions(model, dict(state))
    copied = copy_to_momentum(wanted, state)
    fitting, mismatched = {}, []
    for key in wanted.keys() & state.keys():
        if state[key].shape == wanted[key].shape:
            fitting[key] = state[key]
        else:
            mismatched.append(
                f"{key}: {list(state[key].shape)} there, {list(wanted[key].shape)} in the model"
            )
    mismatched.sort()
    if any(line.startswith(QUEUES) for line in mismatched):
        fitting = {key: value for key, value in fitting.items() if key not in QUEUES}
    missing = [key for key in wanted if key not in fitting and not key.endswith("position_ids")]
    unexpected = [key for key in state if key not in wanted]
    name = type(model).__name__
    if not fitting.keys() - set(QUEUES):
        raise ValueError(f"{source}: {holding(state)}; none of its {len(state)} tensors fits {name}.")
    random = [key for key in missing if not key.endswith(FRESH)]
    if not allow_missing and allow_random is not True:
        names = [allow_random] if isinstance(allow_random, str) else list(allow_random or ())
        names += getattr(model, "starts_random", ())
        if refused := [key for key in random if not any(matches(key, entry) for entry in names)]:
            raise ValueError(refusal(source, state, name, refused, mismatched))
    model.load_state_dict(fitting, strict=False)
    report = LoadReport(missing, unexpected, mismatched, resized, len(fitting), source, copied)
    announce(report, warn=bool(random))
    return report


def matches(key: str, entry: str) -> bool:
    """Whether `entry` is this key, a part of the model it lies in, or a pattern for it."""
    return key == entry or key.startswith(entry + ".") or fnmatch(key, entry)


def refusal(source: str, state: dict, name: str, refused: list[str], mismatched: list[str]) -> str:
    """Why a checkpoint is not loaded, and how to load it anyway."""
    parts = sorted({key.split(".")[0] for key in refused})
    shapes = [line for line in mismatched if line.split(":")[0] in refused]
    reason = f" Of another shape: {'; '.join(shapes[:2])}." if shapes else ""
    return (
        f"{source}: {holding(state)}; {name} needs {len(refused)} more tensors ({groups(refused)}).{reason} "
        f"To start with them random: allow_random={parts!r}; in a config, model.allow_random: [{', '.join(parts)}]."
    )


def announce(report: LoadReport, warn: bool) -> None:
    """Say it once: to the log where a program set one up, else on stderr; on rank 0."""
    if gather.rank():
        return
    if log.hasHandlers():
        log.log(logging.WARNING if warn else logging.INFO, "%s", report)
    else:
        print(report, file=sys.stderr, flush=True)


def kind_of(state: dict[str, Tensor]) -> str:
    """What model wrote these tensors: pretrain, retrieval, itm, caption, vqa, nlvr, features, or "" for no BLIP."""
    parts = {key.split(".")[0] for key in state}
    if "visual_encoder" not in parts or not parts & {"text_encoder", "text_decoder"}:
        return ""
    if any(".crossattention.self0." in key for key in state):
        return "nlvr"
    if "itm_head" in parts:
        if "text_decoder" in parts:
            return "pretrain"
        return "retrieval" if parts & {"text_encoder_m", "image_queue"} else "itm"
    if "text_decoder" in parts:
        return "vqa" if "text_encoder" in parts else "caption"
    return "features"


def holding(state: dict[str, Tensor]) -> str:
    """What is in a checkpoint, in a few words."""
    kind = kind_of(state)
    article = "an" if kind in ("itm", "nlvr") else "a"
    return f"holds {article} {kind} model" if kind else f"holds no BLIP model (but {groups(state)})"


def groups(keys: Iterable[str], most: int = 6) -> str:
    """Keys counted by the part of the model that they are in: `text_decoder 324, temp`."""
    counts: dict[str, int] = {}
    for key in keys:
        part, dot, _ = key.split(":")[0].partition(".")
        counts[part] = counts.get(part, 0) + (1 if dot else 0)
    shown = [f"{part} {count}" if count else part for part, count in counts.items()]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} other parts" if len(shown) > most else "")


def copy_to_momentum(wanted: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    """Give momentum encoders that `state` lacks the encoders' weights (LAVIS never stores them)."""
    copied = []
    for key in wanted:
        part, _, rest = key.partition(".")
        online = f"{part.removesuffix('_m')}.{rest}"
        if part.endswith("_m") and key not in state and online in state:
            state[key] = state[online]
            copied.append(key)
    return copied


def resize_positions(model: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    resized = []
    for name, encoder in model.named_modules():
        key = f"{name}.pos_embed"
        if (
            isinstance(encoder, VisionTransformer)
            and key in state
            and state[key].shape != encoder.pos_embed.shape
            and state[key].shape[-1] == encoder.embed_dim
        ):
            state[key] = interpolate_pos_embed(state[key], encoder)
            resized.append(key)
    return state, resized


def load_vit(encoder: VisionTransformer, source: str) -> None:
    """Start an image encoder from DeiT/timm weights; heads and distillation tokens in the file are ignored."""
    state = {key.removeprefix("visual_encoder."): value for key, value in read_state_dict(source).items()}
    if "pos_embed" in state and state["pos_embed"].shape[-1] == encoder.embed_dim:
        state["pos_embed"] = interpolate_pos_embed(state["pos_embed"], encoder)
    load_weights(encoder, state, source, allow_missing=False)


def load_bert(model: nn.Module, source: str) -> None:
    """Start a text encoder or decoder from BERT weights (transformers' keys); cross-attention stays random.

    Word embeddings of BERT's 30,522 ids fill the first rows; [DEC] and [ENC] keep their random ones.
    """
    own = model.state_dict()
    inner = "bert." if any(key.startswith("bert.") for key in own) else ""
    fitted = {}
    for key, value in read_state_dict(source).items():
        key = key.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
        key = key.replace("LayerNorm.beta", "LayerNorm.bias")
        key = key if key.startswith("cls.") else inner + key
        if key in own:
            if value.shape[0] < own[key].shape[0] and value.shape[1:] == own[key].shape[1:]:
                value = torch.cat([value, own[key][len(value) :]])
            fitted[key] = value
    missing = [key for key in own if "crossattention" not in key and "cls." not in key and key not in fitted]
    if missing := [key for key in missing if not key.endswith("position_ids")]:
        raise ValueError(
            f"{source}: not BERT weights that fit this text model; missing {', '.join(missing[:4])}."
        )
    load_weights(model, fitted, source)
