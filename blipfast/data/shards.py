"""Webdataset shards: tar files of pictures and captions, read where they lie, in an order fixed beforehand.

Members of one sample follow each other and share their name up to the first dot: `00012.jpg`, `00012.txt`. A shard's
headers say where everything is, so one pass over them (no picture is read) makes the order of an epoch exact, and
lets a resume or another rank jump anywhere. Reading stays local: shards are shuffled, then their samples within a
window of several shards.
"""

from __future__ import annotations

import functools
import glob
import io
import itertools
import json
import logging
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from blipfast.data.batches import AugmentText, BatchMaker, MicroBatchLoader
from blipfast.data.images import load_image
from blipfast.data.sampling import permutation
from blipfast.files import whole
from blipfast.text import pre_caption, with_prompt

PICTURES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "caption", "json")  # the first one present counts
_DAMAGE = "\0"  # stands where a member's extension does
_SIGNATURES = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}

logger = logging.getLogger(__name__)


class ShardLoader(MicroBatchLoader):
    """Micro-batches from tar shards, with the interface and the order contract of `TrainLoader`.

    shards: paths or patterns, "x-{000..127}.tar", "x-*.tar". An epoch shuffles the shards, cuts their sequence into
    windows of at least `shuffle_buffer` samples, and shuffles within each window: a function of (seed, epoch).
    samples_per_epoch: 0 counts them now, by reading all headers; otherwise headers are read as shards come up, and an
    epoch ends after so many samples, going round again if there are fewer. "index" is shard * 2^32 + place in it.
    A truncated shard is named in the log, and what it still holds is used.
    Raises FileNotFoundError if a shard is missing, ValueError if none of them holds a whole sample.
    """

    def __init__(
        self,
        shards: str | list[str],
        transform: Callable,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        workers: int = 0,
        augment_text: AugmentText | None = None,
        samples_per_epoch: int = 0,
        clean_captions: bool = True,
        max_words: int = 30,
        prompt: str = "",
        shuffle_buffer: int = 50_000,
    ):
        patterns = [shards] if isinstance(shards, str) else shards
        paths = [path for pattern in patterns for path in expand(pattern)]
        clean = functools.partial(_caption, prompt, max_words if clean_captions else None)
        maker = ShardMaker(paths, clean, transform, augment_text, seed, quiet=rank > 0)
        samples = samples_per_epoch or maker.count()
        ranks = dict(rank=rank, world_size=world_size, accumulation=accumulation)
        super().__init__(maker, samples, batch_size, workers=workers, **ranks)
        self.seed, self.shuffle_buffer = seed, shuffle_buffer

    def items(self, epoch: int, micro_batches: np.ndarray) -> Iterator[np.ndarray]:
        windows, size = self._windows(epoch), self.batch_size
        window, start = next(windows), 0  # `window` begins `start` samples into the epoch
        for g in micro_batches.tolist():
            first, last = g * size, (g + 1) * size
            while start + len(window) < last:
                kept = window[max(first - start, 0) :]
                start += len(window) - len(kept)
                window = np.concatenate([kept, next(windows)])
            yield window[first - start : last - start]

    def _windows(self, epoch: int) -> Iterator[np.ndarray]:
        """Samples of an epoch, window by window, shuffled; without end, each time round in a new order."""
        for turn in itertools.count():
            window: list[np.ndarray] = []
            for place, shard in enumerate(
                permutation(len(self.maker.paths), self.seed, epoch, turn).tolist()
            ):
                window.append(self.maker.samples(shard))
                if place + 1 == len(self.maker.paths) or sum(map(len, window)) >= self.shuffle_buffer:
                    samples = np.concatenate(window)
                    yield samples[permutation(len(samples), self.seed, epoch, turn, place)]
                    window = []
            if not any(len(samples) for samples in self.maker.indexed.values()):
                raise ValueError(self.maker.nothing())


class ShardMaker(BatchMaker):
    """Makes micro-batches of samples in shards; an item is a row of `samples`, so that workers need no headers."""

    def __init__(
        self,
        paths: list[str],
        clean: Callable[[str], str],
        transform: Callable,
        augment_text: AugmentText | None,
        seed: int,
        quiet: bool = False,
    ):
        super().__init__(transform, augment_text, seed)
        self.paths, self.clean, self.quiet = paths, clean, quiet
        self.indexed: dict[int, np.ndarray] = {}

    def samples(self, shard: int) -> np.ndarray:
        """Samples of a shard, int64 [n, 7]: shard, place, and the columns of `index_shard`. Read once, then kept."""
        if shard not in self.indexed:
            rows, problem = index_shard(self.paths[shard])
            if problem and not self.quiet:
                logger.warning("%s", problem)
            places = np.arange(len(rows))
            self.indexed[shard] = np.column_stack([np.full_like(places, shard), places, rows])
        return self.indexed[shard]

    def count(self) -> int:
        """Samples in all shards. Raises ValueError if there are none."""
        with ThreadPoolExecutor(8) as pool:
            total = sum(map(len, pool.map(self.samples, range(len(self.paths)))))
        if not total:
            raise ValueError(self.nothing())
        return total

    def nothing(self) -> str:
        """Message for shards that hold no sample."""
        reason = index_shard(self.paths[0])[1] or f"{self.paths[0]}: it is empty."
        kinds = f"a picture ({', '.join(PICTURES)}) with a caption beside it ({', '.join(TEXTS)})"
        return f"None of {len(self.paths)} shards holds {kinds}. The first: {reason}"

    def read(self, item: np.ndarray) -> dict[str, Any]:
        shard, place, image_at, image_size, text_at, text_size, is_json = item.tolist()
        path = self.paths[shard]
        text = _read_bytes(path, text_at, text_size).decode("utf-8-sig")
        if is_json:
            value = json.loads(text)
            text = value.get("caption") if isinstance(value, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path}:{_member_name(path, text_at)}: the caption is empty or missing.")
        image = load_image(_read_bytes(path, image_at, image_size), f"{path}:{_member_name(path, image_at)}")
        index = (shard << 32) + place
        return {"image": self.prepare(image), "caption": self.clean(text), "image_id": index, "index": index}

    def following(self, item: np.ndarray) -> np.ndarray:
        shard, place = int(item[0]), int(item[1]) + 1
        while place >= len(self.samples(shard)):
            shard, place = (shard + 1) % len(self.paths), 0
        return self.samples(shard)[place]


def is_shards(source: str) -> bool:
    """Whether a source of pairs names tar shards."""
    return bool(re.search(r"\.tar(\.\w+)?($|[,}*])", source)) and not os.path.isdir(source)


def expand(pattern: str) -> list[str]:
    """Paths that a pattern stands for, with {000..009}, {a,b}, * and ?. Raises FileNotFoundError if one is missing."""
    pattern = os.path.expanduser(pattern)
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces:
        span = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
        if span:
            choices = [str(i).zfill(len(span[1])) for i in range(int(span[1]), int(span[2]) + 1)]
        else:
            choices = braces[1].split(",")
        return [
            path for c in choices for path in expand(pattern[: braces.start()] + c + pattern[braces.end() :])
        ]
    paths = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
    missing = pattern if not paths else next((path for path in paths if not os.path.exists(path)), None)
    if missing:
        raise FileNotFoundError(f"{missing}: there is no such shard. Check data.train.")
    return paths


def index_shard(path: str) -> tuple[np.ndarray, str | None]:
    """Where a shard's samples lie: int64 [n, 5] of picture offset and size, text offset and size, text is JSON.

    The second value says what is wrong with the shard, if anything: not a tar file, truncated, or samples without
    picture or caption.
    """
    rows: list[tuple[int, ...]] = []
    incomplete = 0
    damage = None
    for _, members in itertools.groupby(_members(path), key=lambda member: member[0]):
        by_kind = {kind: (offset, size) for _, kind, offset, size in members}
        image = next((by_kind[kind] for kind in PICTURES if kind in by_kind), None)
        kind = next((kind for kind in TEXTS if kind in by_kind), None)
        if image and kind:
            rows.append((*image, *by_kind[kind], kind == "json"))
        elif _DAMAGE in by_kind:
            damage = by_kind[_DAMAGE][0]
        else:
            incomplete += 1
    problem = None
    if damage is not None:
        problem = (
            f"{path}: truncated or damaged at byte {damage}; the {len(rows)} whole samples before are used."
        )
        problem = problem if damage else f"{path}: not an uncompressed tar file; left out."
    elif incomplete:
        problem = (
            f"{path}: {incomplete} of {incomplete + len(rows)} samples lack a picture or a caption; left out."
        )
    return np.array(rows, dtype=np.int64).reshape(-1, 5), problem


def _members(path: str) -> Iterator[tuple[str, str, int, int]]:
    """(key, extension, offset, size) of each whole file in a tar; last, if it is cut, ("", _DAMAGE, where, 0)."""
    length = os.path.getsize(path)
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None and member.offset_data + member.size <= length:
                tar.members = []  # or it would keep them all
                end = member.offset_data + member.size
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    key, _, extension = name.partition(".")
                    yield f"{folder}/{key}", extension.lower(), member.offset_data, member.size
            with open(
                path, "rb"
            ) as file:  # a whole tar ends with blocks of zeros, or at least after its last file
                file.seek(tar.offset)
                block = file.read(tarfile.BLOCKSIZE)
            whole = member is None and not block.strip(b"\0") and len(block) in (0, tarfile.BLOCKSIZE)
    except tarfile.ReadError:
        whole = False
    if not whole:
        yield "", _DAMAGE, end, 0


@functools.lru_cache(maxsize=64)
def _opened(path: str) -> BinaryIO:
    return open(path, "rb", buffering=0)


def _read_bytes(path: str, offset: int, size: int) -> bytes:
    data = os.pread(_opened(path).fileno(), size, offset)
    if len(data) < size:
        raise ValueError(f"{path}: ends within the {size} bytes at {offset}.")
    return data


def _member_name(path: str, offset: int) -> str:
    """Name of the member whose data begins at `offset`; its header is the block before."""
    header = _read_bytes(path, offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
    return header[:100].rstrip(b"\0").decode("utf-8", "replace")


def _caption(prompt: str, max_words: int | None, text: str) -> str:
    text = " ".join(text.split())
    return with_prompt(prompt, text if max_words is None else pre_caption(text, max_words))


def write_shards(pairs: Iterable[dict[str, Any]], pattern: str, per_shard: int = 1000) -> list[str]:
    """Write pairs, {"image": path or bytes of the file, "caption": text}, as shards; returns their paths.

    pattern: "folder/x-%05d.tar", numbered from 0. Pictures are copied as they are; a `PairsDataset` may be given as it
    is. A shard appears under its name once it is whole. Raises ValueError for a pattern without a number or a picture
    that is not JPEG, PNG or WebP.
    """
    if not re.search(r"%0?\d*d", pattern):
        raise ValueError(f"{pattern}: a shard pattern needs a place for the number, as in x-%05d.tar.")
    if hasattr(pairs, "path"):
        dataset = pairs
        pairs = ({"image": dataset.path(i), "caption": dataset.caption(i)} for i in range(len(dataset)))
    written: list[str] = []
    numbered = enumerate(pairs)
    for shard in itertools.count():
        batch = list(itertools.islice(numbered, per_shard))
        if not batch:
            return written
        path = pattern % shard
        with whole(path) as unfinished, tarfile.open(unfinished, "w:", format=tarfile.GNU_FORMAT) as tar:
            for number, pair in batch:
                image = pair["image"]
                data = image if isinstance(image, bytes) else Path(image).read_bytes()
                kind = next((kind for start, kind in _SIGNATURES.items() if data.startswith(start)), None)
                if kind is None:
                    raise ValueError(
                        f"pair {number}: shards hold JPEG, PNG or WebP; this picture is none of them."
                    )
                _add(tar, f"{number:09d}.{kind}", data)
                _add(tar, f"{number:09d}.txt", pair["caption"].encode())
        written.append(path)
    return written


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
