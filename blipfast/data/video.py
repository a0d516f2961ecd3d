"""Frames of videos, and MSR-VTT for zero-shot retrieval. A clip is a video file, or a folder of its frames as pictures.

Video files are read by PyAV, decord or OpenCV, whichever is installed (`pip install 'blipfast[video]'` brings PyAV);
folders of frames need none of them.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from blipfast.config import DataConfig
from blipfast.data import readers, schemas
from blipfast.data.images import GREY, load_image
from blipfast.text import pre_caption

VIDEOS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v")
MAX_WORDS = 40  # official, of MSR-VTT's captions
_NUMBERS = re.compile(r"(\d+)")

logger = logging.getLogger(__name__)


def find_clip(root: str | Path, name: str) -> Path | None:
    """The clip `name` below `root`: a folder of frames, a file of that name, or one with a video's extension."""
    clip = Path(root) / name
    if clip.exists():
        return clip
    return next((path for path in (clip.with_name(clip.name + e) for e in VIDEOS) if path.is_file()), None)


def uniform(length: int, count: int) -> list[int]:
    """`count` frames of a clip of `length`, at equal distances from the first one on.

    Official quirk, kept: the distance is rounded down, so of 100 frames 8 are 0, 12, 24, ... 84. A clip shorter than
    `count` repeats its frames evenly (official BLIP takes the first one `count` times).
    """
    if length < count:
        return [i * length // count for i in range(count)]
    return [i * (length // count) for i in range(count)]


def read_frames(clip: str | Path, count: int) -> list[Tensor]:
    """`count` frames of a clip, sampled uniformly: uint8 [3|4, H, W] each.

    A folder's frames are its pictures in the order of the numbers in their names. Raises ValueError naming a clip that
    is missing, empty or damaged, and ImportError if it is a video and nothing that reads videos is installed.
    """
    clip = Path(clip)
    if clip.is_dir():
        frames = sorted((p for p in clip.iterdir() if p.suffix.lower() in readers.PICTURES), key=_by_number)
        if not frames:
            raise ValueError(f"{clip}: a clip is a video file or a folder of pictures; there are none in it.")
        return [load_image(frames[i]) for i in uniform(len(frames), count)]
    if not clip.is_file():
        raise ValueError(f"{clip}: there is no such clip.")
    read = _video_reader()
    try:
        frames = read(clip, count)
    except Exception as error:  # each library has errors of its own
        raise ValueError(f"{clip}: the video cannot be read ({error}).") from error
    if len(frames) < count:
        raise ValueError(
            f"{clip}: the video ends before its frame {len(frames)} of {count}; is it truncated?"
        )
    return frames


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Sorts frame_2 before frame_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in _NUMBERS.split(path.name)]


def _video_reader() -> Callable[[Path, int], list[Tensor]]:
    for module, read in (("decord", _by_decord), ("av", _by_pyav), ("cv2", _by_opencv)):
        if importlib.util.find_spec(module):
            return read
    raise ImportError(
        "Reading videos needs PyAV, decord or OpenCV: pip install 'blipfast[video]'. Or give a folder of frames, "
        "as pictures, for each clip."
    )


def _by_decord(clip: Path, count: int) -> list[Tensor]:
    import decord

    video = decord.VideoReader(str(clip), num_threads=1)
    frames = video.get_batch(uniform(len(video), count)).asnumpy()
    return list(torch.from_numpy(frames).permute(0, 3, 1, 2))


def _by_pyav(clip: Path, count: int) -> list[Tensor]:
    """Decodes to the last frame wanted: containers lie about their length, and jumping lands on key frames."""
    import av

    def decoded():
        with av.open(str(clip)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield from container.decode(stream)

    with av.open(str(clip)) as container:
        length = container.streams.video[0].frames
    length = length or sum(1 for _ in decoded())
    wanted, found = uniform(length, count), {}
    for number, frame in enumerate(decoded()):
        if number in wanted:
            found[number] = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
        if number == wanted[-1]:
            break
    return [found[number] for number in wanted if number in found]


def _by_opencv(clip: Path, count: int) -> list[Tensor]:
    import cv2

    video = cv2.VideoCapture(str(clip))
    try:
        wanted, found = uniform(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), count), {}
        for number in range(wanted[-1] + 1):
            if not video.grab():
                break
            if number in wanted:
                frame = cv2.cvtColor(video.retrieve()[1], cv2.COLOR_BGR2RGB)
                found[number] = torch.from_numpy(frame).permute(2, 0, 1)
        return [found[number] for number in wanted if number in found]
    finally:
        video.release()


class VideoView(Dataset):
    """`[i] -> (frames [F, 3, S, S], i)`, and what retrieval is scored by.

    source: JSON lines or a list of {"clip_name", "caption"} (official `msrvtt_test.jsonl`), or the folder that holds
    it. Clips of one name are one, with all its captions. `video` names them; `text`, `img2txt` and `txt2img` are as in
    `RetrievalView`. transform: (picture, None) -> [3, S, S]. A clip that cannot be read is named in the log and
    counts as grey frames. Raises FileNotFoundError or ValueError naming file, line and key.
    """

    def __init__(
        self, source: str, video_root: str, transform: Callable, frames: int = 8, split: str = "test"
    ):
        self.transform, self.frames = transform, frames
        path = schemas.official_file(Path(source).expanduser(), "msrvtt", split)
        self.root = Path(video_root).expanduser() if video_root else path.parent
        self.video: list[str] = []
        self.text: list[str] = []
        self.img2txt: dict[int, list[int]] = {}
        self.txt2img: dict[int, int] = {}
        place: dict[str, int] = {}
        for _, entry in readers.checked_entries(path, "msrvtt", split):
            (name,), (caption,) = entry.pictures, entry.texts
            video = place.setdefault(name, len(self.video))
            if video == len(self.video):
                self.video.append(name)
            self.txt2img[len(self.text)] = video
            self.img2txt.setdefault(video, []).append(len(self.text))
            self.text.append(pre_caption(caption, MAX_WORDS))
        if not self.video:
            raise ValueError(f"{path}: there are no clips in it. {schemas.FORMATS['msrvtt'].expected}.")
        if all(find_clip(self.root, name) is None for name in self.video[:16]):
            raise FileNotFoundError(
                f"{path}: of its clips none is in {self.root}, the first being {self.video[0]}. Set data.image_root "
                "to where the videos are, or folders of their frames."
            )

    def __len__(self) -> int:
        return len(self.video)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        name = self.video[i]
        try:
            frames = read_frames(find_clip(self.root, name) or self.root / name, self.frames)
        except ValueError as error:
            logger.warning("Grey frames stand for a clip that cannot be read: %s", error)
            frames = [GREY] * self.frames
        return torch.stack([self.transform(frame, None) for frame in frames]), i


def open_videos(data: DataConfig, source: str, transform: Callable, frames: int, split: str) -> VideoView:
    """The view of `source`, a config's data.test or data.val; the clips lie in its image root."""
    return VideoView(source, data.root(split), transform, frames, split)
