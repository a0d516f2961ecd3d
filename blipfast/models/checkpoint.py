"""Weights in and out: official `.pth`, `.safetensors` and run folders; a report of what fitted and what did not."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from .vit import VisionTransformer, interpolate_pos_embed

log = logging.getLogger("blipfast")

WEIGHTS = "model.safetensors"  # the weights' file in a run folder
NOT_WEIGHTS = ("position_ids",)  # buffers that a checkpoint may leave out


class LoadReport(NamedTuple):
    """What `load_checkpoint` did; `missing_keys` and `unexpected_keys` as torch's `load_state_dict` names them."""

    missing_keys: list[str]
    unexpected_keys: list[str]
    mismatched_keys: list[str]  # "key: shape in the file, shape in the model"
    resized_keys: list[str]
    loaded: int


def is_url(url_or_filename: str) -> bool:
    return urlparse(str(url_or_filename)).scheme in ("http", "https")


def read_state_dict(source: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.pth` or `.bin`, `.safetensors`, run folder or URL; under "model", "state_dict", or bare.

    Pickled code is never run (`weights_only=True`). FileNotFoundError or ValueError name the file and the trouble.
    """
    if is_url(str(source)):
        source = download(str(source))
    path = Path(source)
    if path.is_dir():
        path = path / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such checkpoint. Give a .pth or .safetensors file, or a run folder."
        )
    try:
        state = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    except Exception as error:
        raise ValueError(
            f"{path}: not a readable checkpoint ({error}). Is it truncated or of another kind?"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(state.get(key), dict):
            state = state[key]
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path}: holds no tensors; found {sorted(map(str, state))[:5]}.")
    return tensors


def read_pickle(path: Path) -> dict:
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"expected a mapping of names to tensors, found {type(state).__name__}")
    return state


def read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}
        tied = json.loads((file.metadata() or {}).get("tied", "{}"))
    return state | {alias: state[name] for alias, name in tied.items()}


def download(url: str) -> Path:
    """The file behind `url`, kept under torch's hub folder so that it is fetched once."""
    target = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(target))
        except OSError as error:
            raise ValueError(
                f"{url}: download failed ({error}). Fetch it by hand and pass the file."
            ) from error
    return target


def save_weights(state: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> Path:
    """Write weights with official keys: `.pth` as {"model": ...}, else safetensors with tied tensors stored once.

    The file appears whole or not at all.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    state = {key: value.detach().cpu() for key, value in state.items()}
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            unique, tied = untie(state)
            save_file(unique, partial, {"format": "pt", "tied": json.dumps(tied), **(metadata or {})})
        else:
            torch.save({"model": state, **(metadata or {})}, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def untie(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that share memory once, and {other name: name stored}."""
    unique, names, tied = {}, {}, {}
    for key, value in state.items():
        identity = (value.data_ptr(), value.shape, value.stride())
        if value.numel() and identity in names:
            tied[key] = names[identity]
        else:
            names[identity] = key
            unique[key] = value.contiguous()
    return unique, tied


def load_checkpoint(
    model: nn.Module, url_or_filename: str | Path, allow_missing: bool = True
) -> tuple[nn.Module, LoadReport]:
    """Load official or blipfast weights into `model`; position embeddings are resampled to its picture size.

    Weights whose shape differs are left as they are (official behaviour), but named in the report and the log.
    With allow_missing=False, ValueError if any weight of the model would stay random.
    """
    return model, load_weights(model, read_state_dict(url_or_filename), str(url_or_filename), allow_missing)


def load_weights(
    model: nn.Module, state: dict[str, Tensor], source: str = "weights", allow_missing: bool = True
) -> LoadReport:
    """As `load_checkpoint`, from tensors in memory."""
    wanted = {key: value.shape for key, value in model.state_dict().items()}
    state, resized = resize_positions(model, dict(state))
    mismatched = [
        f"{key}: {list(state[key].shape)} in the file, {list(shape)} in the model"
        for key, shape in wanted.items()
        if key in state and state[key].shape != shape
    ]
    fitting = {key: value for key, value in state.items() if key in wanted and value.shape == wanted[key]}
    missing = [key for key in wanted if key not in fitting and not key.endswith(NOT_WEIGHTS)]
    unexpected = [key for key in state if key not in wanted]
    if not fitting:
        raise ValueError(f"{source}: none of its {len(state)} tensors fits {type(model).__name__}.")
    if missing and not allow_missing:
        raise ValueError(
            f"{source}: {type(model).__name__} needs {len(missing)} tensors that it does not hold in the right "
            f"shape: {summary(missing)}."
            + (f" Of another shape: {'; '.join(mismatched[:3])}." if mismatched else "")
        )
    model.load_state_dict(fitting, strict=False)
    report = LoadReport(missing, unexpected, mismatched, resized, len(fitting))
    log.info(
        "%s: %d tensors loaded, %d not used, %d resized.", source, len(fitting), len(unexpected), len(resized)
    )
    if missing:
        log.warning("%s: %d tensors stay as initialised: %s", source, len(missing), summary(missing))
    return report


def resize_positions(model: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    resized = []
    for name, encoder in model.named_modules():
        key = f"{name}.pos_embed"
        if (
            isinstance(encoder, VisionTransformer)
            and key in state
            and state[key].shape != encoder.pos_embed.shape
        ):
            if state[key].shape[-1] == encoder.embed_dim:
                state[key] = interpolate_pos_embed(state[key], encoder)
                resized.append(key)
    return state, resized


def summary(keys: list[str], most: int = 4) -> str:
    shown = ", ".join(keys[:most])
    return shown + (f" and {len(keys) - most} more" if len(keys) > most else "")


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
    if missing := [key for key in missing if not key.endswith(NOT_WEIGHTS)]:
        raise ValueError(f"{source}: not BERT weights that fit this text model; missing {summary(missing)}.")
    load_weights(model, fitted, source)
