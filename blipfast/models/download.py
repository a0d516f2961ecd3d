"""Checkpoints by address: fetched once, checked, and kept; nothing is ever fetched that is already here."""

from __future__ import annotations

import hashlib
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlparse

import torch
from tqdm import tqdm

TIMEOUT = 30  # seconds without a byte
# what official BLIP and LAVIS fetch, DeiT's weights among it
RELEASED = ("https://storage.googleapis.com/sfr-vision-language-research/", "https://dl.fbaipublicfiles.com/")
HUB_FILES = ("config.json", "tokenizer.json", "vocab.txt")  # the weights come beside these
HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class NotThere(ValueError):
    """The server answers, and has no such file."""


def is_url(url_or_filename: str) -> bool:
    return urlparse(str(url_or_filename)).scheme in ("http", "https")


def is_hub_name(source: str) -> bool:
    """Whether `source` reads like Salesforce/blip-vqa-base: an owner and a name, no file ending of ours."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source)) and not source.endswith(
        (".pth", ".pt", ".bin", ".safetensors", ".yaml", ".json")
    )


def fetch(source: str) -> Path:
    """The file of a URL, or the folder of a hub name; from the cache if it is there.

    What official BLIP fetches is kept where it does (torch's hub folder), so its downloads are found; other URLs there
    in folders of their own. ValueError says what to do when the network or the file is missing.
    """
    if not is_url(source):
        return fetch_from_hub(source)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not source.startswith(RELEASED):  # elsewhere many files are called model.safetensors
        folder /= hashlib.sha256(source.encode()).hexdigest()[:16]
    return download(source, folder / Path(urlparse(source).path).name)


def fetch_from_hub(name: str) -> Path:
    """A folder with the config, the tokenizer and the weights of `name` on Hugging Face ($HF_ENDPOINT, $HF_TOKEN)."""
    if cached := in_hub_cache(name):
        return cached
    folder = Path(torch.hub.get_dir()) / "blipfast" / name.replace("/", "--")
    base = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{name}/resolve/main/"
    for file in HUB_FILES:
        try:
            download(base + file, folder / file)
        except NotThere:
            if file == "config.json":
                raise ValueError(
                    f"{name}: no such file or folder here, and no such model on Hugging Face ({base}{file})."
                ) from None
        except ValueError as error:
            raise ValueError(f"{name}: no such file or folder here. On Hugging Face: {error}") from None
    for file in HUB_WEIGHTS:
        try:
            download(base + file, folder / file)
            return folder
        except NotThere:
            continue
    raise ValueError(f"{name}: has none of {', '.join(HUB_WEIGHTS)} on Hugging Face.")


def in_hub_cache(name: str) -> Path | None:
    """The folder in which huggingface_hub keeps `name`, if it holds the weights."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")) / f"models--{name.replace('/', '--')}"
    for snapshot in sorted(cache.glob("snapshots/*"), key=lambda path: path.stat().st_mtime, reverse=True):
        if (snapshot / "config.json").is_file() and any((snapshot / file).is_file() for file in HUB_WEIGHTS):
            return snapshot
    return None


def download(url: str, target: Path) -> Path:
    """The bytes behind `url` as `target`, whole or not at all: size and, where the server names one, SHA-256 agree."""
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "blipfast"})
        if os.environ.get("HF_TOKEN") and is_hugging_face(url):
            request.add_unredirected_header("Authorization", f"Bearer {os.environ['HF_TOKEN']}")
        with urllib.request.urlopen(request, timeout=TIMEOUT) as reply, partial.open("wb") as file:
            size = int(reply.headers.get("Content-Length") or 0)
            wanted = sha256_in(reply.headers, target.name)
            digest = copy(reply, file, size, target.name)
        if size and partial.stat().st_size != size:
            raise ValueError(f"{url}: the connection broke after {partial.stat().st_size} of {size} bytes.")
        if wanted and not digest.startswith(wanted):
            raise ValueError(f"{url}: its SHA-256 is {digest}, expected {wanted}. Try again.")
        partial.replace(target)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise NotThere(f"{url}: there is no such file.") from error
        raise ValueError(f"{url}: the server refuses ({error.code} {error.reason}).") from error
    except OSError as error:
        raise ValueError(
            f"{url} cannot be reached ({getattr(error, 'reason', error)}). Without a network, fetch the file "
            f"elsewhere and pass its path, or put it at {target}."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def is_hugging_face(url: str) -> bool:
    """Whether a token for Hugging Face may be sent there."""
    host = urlparse(url).hostname or ""
    own = urlparse(os.environ.get("HF_ENDPOINT", "")).hostname
    return host in ("huggingface.co", own) or host.endswith(".huggingface.co")


def copy(reply, file, size: int, name: str) -> str:
    """Copy a reply to a file with a progress bar; its SHA-256."""
    digest = hashlib.sha256()
    with tqdm(total=size or None, unit="B", unit_scale=True, desc=name, disable=None) as bar:
        while chunk := reply.read(1 << 20):
            file.write(chunk)
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def sha256_in(headers, name: str) -> str | None:
    """The hash that Hugging Face sends for large files, or the eight digits in a name like model-1a2b3c4d.pth.

    Eight digits without a letter are more often a date.
    """
    tag = (headers.get("X-Linked-Etag") or headers.get("ETag") or "").strip('W/"')
    if re.fullmatch(r"[0-9a-f]{64}", tag):
        return tag
    short = re.search(r"-([0-9a-f]{8})\.[a-z]+$", name)
    return short[1] if short and not short[1].isdigit() else None
