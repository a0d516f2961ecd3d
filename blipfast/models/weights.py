"""Files of tensors: official BLIP and LAVIS `.pth`, safetensors, Hugging Face and run folders, read and written.

Whatever the file, the keys that come out are official BLIP's. Pickled code is never run.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from blipfast.files import whole

from .download import fetch, is_hub_name, is_url
from .huggingface import to_official
from .tensor_file import write_tensors

WEIGHTS = "model.safetensors"  # the weights' file in a run folder and in a Hugging Face one
NESTS = ("model", "state_dict", "model_state_dict", "module")  # where trainers put the weights in a .pth
# one parameter under two keys; files of others hold only one of them
TIED = (
    ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    ("cls.predictions.decoder.bias", "cls.predictions.bias"),
)
# classes of the settings that trainers pickle beside the weights; they are read as inert husks
SETTINGS = ("argparse.", "omegaconf.", "pathlib.", "numpy.")
SETTINGS += ("typing.", "collections.", "builtins.dict", "builtins.list", "builtins.tuple", "builtins.set")
SETTINGS += ("builtins.int", "builtins.float", "builtins.str", "builtins.bool")


def locate(source: str | Path) -> Path:
    """The local path of `source`: a path, a URL, or the name of a model on Hugging Face. It may not exist."""
    path = Path(source)
    if is_url(str(source)) or (not path.exists() and is_hub_name(str(source))):
        return fetch(str(source))
    return path


def read_state_dict(source: str | Path) -> dict[str, Tensor]:
    """The tensors of a `.pth`, `.bin`, `.safetensors`, run folder, Hugging Face folder, URL or hub name.

    Keys are official BLIP's, whoever wrote the file. FileNotFoundError or ValueError name the file and the trouble.
    """
    path = locate(source)
    if path.is_dir():
        path = weights_in(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such checkpoint. Give a .pth or .safetensors file, a run folder, a Hugging Face folder or "
            "name, or a URL."
        )
    files = shards(path) if path.name.endswith(".index.json") else [path]
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_tensors(file)
    if not tensors:
        raise ValueError(f"{path}: holds no tensors.")
    return official_layout(tensors)


def weights_in(folder: Path) -> Path:
    """The file of weights in a run folder or a Hugging Face one."""
    names = (WEIGHTS, f"{WEIGHTS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"{folder}: no weights in this folder; expected one of {', '.join(names)}. A run folder has them once its "
        "first evaluation or epoch is done."
    )


def shards(index: Path) -> list[Path]:
    """The files that a Hugging Face index lists."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f'{index}: no index of weights; expected JSON with "weight_map".') from None
    files = sorted(index.parent / name for name in names)
    if missing := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{index}: lists {', '.join(missing)}, not in this folder.")
    return files


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, keys as they are."""
    try:
        state = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    except Foreign as error:
        raise ValueError(
            f"{path}: its pickle names {error}, which is not run. If you trust the file, save its weights alone "
            'elsewhere with torch.save({"model": state_dict}, PATH).'
        ) from None
    except Exception as error:
        # torch's own words advise to unpickle without the safety of weights_only
        why = "no pickle of weights" if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise ValueError(
            f"{path}: not a readable checkpoint ({why}). Is it truncated or of another kind?"
        ) from error
    while nested := [state[key] for key in NESTS if isinstance(state.get(key), Mapping)]:
        state = nested[0]
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


class Foreign(Exception):
    """A pickle refers to code."""


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}
        tied = json.loads((file.metadata() or {}).get("tied", "{}"))
    return state | {alias: state[name] for alias, name in tied.items()}


def read_pickle(path: Path) -> dict:
    """What `torch.save` wrote. Settings objects beside the weights become husks; other classes are refused by name."""
    archive = zipfile.is_zipfile(path)  # as torch writes since 1.6; mapped, so that only what is used is read
    foreign = ["argparse.Namespace"]
    if archive:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    if refused := sorted(name for name in foreign if not name.startswith(SETTINGS)):
        raise Foreign(", ".join(refused[:3]))
    with husks(foreign):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    if not isinstance(state, Mapping):
        raise ValueError(f"expected a mapping of names to tensors, found {type(state).__name__}")
    return state


class Husk:
    """Stands for an object of a class that is not imported: it takes whatever the pickle gives it and does nothing."""

    def __new__(cls, *_, **__):
        return super().__new__(cls)

    def __init__(self, *_, **__):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass


@contextmanager
def husks(names: list[str]):
    """Let torch's weights-only reader meet the classes `names` as husks of the same names."""
    classes = []
    for name in names:
        module, _, short = name.rpartition(".")
        classes.append(type(short, (Husk,), {"__module__": module, "__qualname__": short}))
    with torch.serialization.safe_globals(classes):
        yield


def official_layout(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keys of DDP, torch.compile, LAVIS and Hugging Face as official BLIP has them; both names of tied tensors."""
    tensors = {key.replace("_orig_mod.", ""): value for key, value in tensors.items()}
    for prefix in ("module.", "model."):  # of DDP, of Lightning
        while tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    if any(key.startswith("vision_model.") for key in tensors):
        tensors = {to_official(key): value for key, value in tensors.items()}
    if {"queue_ptr", "idx_queue"} <= tensors.keys() and not any(map(is_decoder, tensors)):
        tensors["ptr_queue"] = tensors.pop("queue_ptr")  # LAVIS's name in a retrieval model
    for key in list(tensors):
        for pair in TIED:
            for one, other in (pair, pair[::-1]):
                if key.endswith(one) and is_decoder(key):
                    tensors.setdefault(key.removesuffix(one) + other, tensors[key])
    return tensors


def is_decoder(key: str) -> bool:
    return key.startswith("text_decoder.")


def save_weights(state: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None) -> Path:
    """Write weights with official keys: `.pth` as {"model": ...}, else safetensors with tied tensors stored once.

    The file appears whole or not at all.
    """
    path = Path(path)
    state = {key: value.detach().cpu() for key, value in state.items()}
    with whole(path) as unfinished:
        if path.suffix == ".safetensors":
            unique, tied = untie(state)
            write_tensors(unfinished, unique, {"format": "pt", "tied": json.dumps(tied), **(metadata or {})})
        else:
            torch.save({"model": state, **(metadata or {})}, unfinished)
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
