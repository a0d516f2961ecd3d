"""What a config's data sets hold and what is wrong with them: every annotation is read, nothing is stopped at.

Opening a data set raises at its first mistake; here each one becomes a line naming the file, the line in it and the
key, and reading goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from blipfast.config import Config
from blipfast.data import readers, schemas, shards
from blipfast.data.images import load_image
from blipfast.data.nocaps import NoCapsView
from blipfast.data.video import find_clip

KEPT = 1000  # problems of one source that are kept word for word; the others are counted


@dataclass
class SourceReport:
    """One source of one setting. `counts`: entries, pictures, texts, ... ; `problems`: the first `KEPT` of `bad`."""

    setting: str  # data.train, data.val, data.test, data.answers
    source: str
    format: str
    counts: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    expected: str = ""  # what an entry should be
    bad: int = 0
    pictures: dict[str, str] = field(default_factory=dict, repr=False)  # path -> where it is first named

    def count(self, name: str, number: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + number

    def complain(self, message: str) -> None:
        self.bad += 1
        if len(self.problems) < KEPT:
            self.problems.append(message)


def check_data(config: Config, decode: bool = False) -> list[SourceReport]:
    """Read all annotations that a config names: data.train, data.val, data.test and data.answers, in every format.

    decode: also decode each picture, which finds the damaged ones (and takes as long as it takes).
    Raises ValueError if the config names no data at all; whatever is wrong with the data is in the reports.
    """
    data, reports = config.data, []
    sources = [("train", source) for source in data.train]
    sources += [(split, getattr(data, split)) for split in ("val", "test") if getattr(data, split)]
    if not sources:
        raise ValueError("The config names no data: data.train, data.val and data.test are all empty.")
    answers = None
    if data.answers:
        reports.append(SourceReport("data.answers", data.answers, "answers"))
        answers = _check_answers(reports[-1])
    for split, source in sources:
        report = SourceReport(f"data.{split}", source, format_of(config, source, split))
        reports.append(report)
        try:
            _check_source(report, data.root(split), data.vg_root, split, answers)
            if decode:
                _decode(report)
        except (ValueError, OSError) as error:  # the rest of this source cannot be read
            report.complain(str(error))
        report.counts.setdefault("pictures", len(report.pictures))
    _note_leaks(reports)
    return reports


def format_of(config: Config, source: str, split: str) -> str:
    """The format of a source: `data.format`, or for "auto" what the task and the file say.

    A set to evaluate on is in the training set's format if that is a benchmark's.
    """
    format = config.data.format
    if format in schemas.FORMATS and format != "pairs" or split == "train" and format != "auto":
        return format
    if config.task in ("vqa", "nlvr"):
        return config.task
    if shards.is_shards(source):
        return "shards"
    return "folder" if Path(source).expanduser().is_dir() else "pairs"


def _check_source(
    report: SourceReport, root: str, vg_root: str, split: str, answers: set[str] | None
) -> None:
    if report.format == "shards":
        return _check_shards(report)
    path = schemas.official_file(Path(report.source).expanduser(), report.format, split)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder. Check {report.setting}.")
    for setting, folder in (("image_root", root), ("vg_root", vg_root)):
        if folder and not Path(folder).expanduser().is_dir():
            raise FileNotFoundError(f"{folder}: there is no such folder. Check data.{setting}.")
    if report.format == "folder":
        return _check_folder(report, path)
    if report.format not in schemas.FORMATS:
        return _check_records(report, readers.read_source(report.source, root, report.format, split))
    if path.is_dir():
        raise ValueError(f'{path}: a folder, but data.format "{report.format}" needs a .json or .jsonl file.')
    roots = {
        kind: Path(folder).expanduser() if folder else path.parent
        for kind, folder in (("", root), ("vg", vg_root))
    }
    report.expected = schemas.FORMATS[report.format].expected
    if report.format == "nocaps" and readers.first_character(path) == "{":
        view = NoCapsView(str(path), root, split)  # the benchmark's own file, which is one object
        report.counts = {"entries": len(view), "pictures": len(view)}
        report.count("texts", sum(map(len, view.references.values())))
        return
    entries = tqdm(
        _entries(path, report.expected), desc=str(path), unit=" entries", leave=False, disable=None
    )
    for line, entry in entries:
        report.count("entries")
        where = f"{path}:{line}"
        if isinstance(entry, json.JSONDecodeError):
            report.complain(f"{where}: not valid JSON ({entry.msg})")
            continue
        found = schemas.read_entry(report.format, entry, split)
        for problem in found.problems:
            report.complain(f"{where}: {problem}")
        report.count("texts", len(found.texts))
        if answers is not None and found.answers:
            report.count("answers", len(found.answers))
            report.count("answers outside data.answers", sum(a not in answers for a in found.answers))
        for name in found.pictures:
            _note_picture(report, os.path.join(roots[found.root], name), where)
    if not report.counts:
        raise ValueError(f"{path}: there are no entries in it.")


def _entries(path: Path, expected: str) -> Iterator[tuple[int, Any]]:
    """(line, entry) of a JSON list or of JSON lines; a line that is not JSON comes as its JSONDecodeError."""
    with path.open("rb") as file:
        one_a_line = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")
    if not one_a_line:
        yield from readers.read_entries(path, expected)
        return
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    yield number, error


def _note_picture(report: SourceReport, path: str, where: str) -> None:
    """Remember a picture (or clip) and where it was first named; complain once if it is not there."""
    if path in report.pictures:
        return
    report.pictures[path] = where
    if report.format == "msrvtt":
        missing = find_clip(Path(path).parent, Path(path).name) is None
    else:
        missing = not os.path.isfile(path)
    if missing:
        report.count("missing")
        report.complain(f"{where}: {path} does not exist. Check data.image_root, or fetch the file.")


def _check_folder(report: SourceReport, folder: Path) -> None:
    """Pictures of a folder, and the caption file beside each."""
    for picture, sidecar in readers.pictures_below(folder):
        report.count("entries")
        if sidecar is None:
            report.count("without caption file")
            continue
        report.pictures[picture] = picture
        try:
            readers.sidecar_text(Path(sidecar))
            report.count("texts")
        except ValueError as error:
            report.complain(str(error))
    if not report.counts.get("texts"):
        report.complain(f"{folder}: no picture in it has a caption file (.txt or .caption) beside it.")


def _check_records(report: SourceReport, records: Iterator[readers.Record]) -> None:
    """What a reader gives that has no schema; it ends at the first mistake."""
    for number, record in enumerate(records, 1):
        report.count("entries")
        report.count("texts", len(record.captions))
        _note_picture(report, record.image, f"{report.source}: entry {number}")


def _check_shards(report: SourceReport) -> None:
    """Headers of tar shards: whole samples, and what is damaged or incomplete."""
    paths = shards.expand(report.source)
    for path in tqdm(paths, desc=report.source, unit=" shards", leave=False, disable=None):
        rows, problem = shards.index_shard(path)
        report.count("shards")
        for name in ("entries", "pictures", "texts"):
            report.count(name, len(rows))
        if problem:
            report.complain(problem)
    if not report.counts["entries"]:
        report.complain(f"{report.source}: none of the shards holds a picture with a caption beside it.")


def _check_answers(report: SourceReport) -> set[str]:
    """The list of answers that VQA ranks."""
    path = Path(report.source).expanduser()
    try:
        answers = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        report.complain(f"{path}: there is no such file. Check data.answers.")
        return set()
    except (OSError, ValueError) as error:
        report.complain(f"{path}: cannot be read as JSON ({error}). Expected a list of answers.")
        return set()
    if not isinstance(answers, list) or not answers:
        report.complain(f"{path}: expected a JSON list of answers, not {type(answers).__name__}.")
        return set()
    known: dict[str, int] = {}
    for place, answer in enumerate(answers):
        if not isinstance(answer, str) or not answer.strip():
            report.complain(f"{path}: answer {place} should be text, found {answer!r}.")
        elif answer in known:
            report.complain(f"{path}: answer {place}, {answer!r}, is the same as answer {known[answer]}.")
        else:
            known[answer] = place
    report.counts = {"answers": len(known)}
    return set(known)


def _decode(report: SourceReport) -> None:
    """Decode every picture that exists; complain about the damaged."""
    if report.format == "shards":
        return _decode_shards(report)
    if report.format == "msrvtt":
        report.notes.append("clips are not decoded; the evaluation names those it cannot read")
        return

    def problem(path: str) -> str | None:
        try:
            load_image(path)
        except ValueError as error:
            return str(error)

    paths = [path for path in report.pictures if os.path.isfile(path)]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        progress = tqdm(total=len(paths), desc="decoding", unit=" pictures", leave=False, disable=None)
        for path, trouble in zip(paths, pool.map(problem, paths)):
            progress.update()
            if trouble:
                report.count("damaged")
                report.complain(f"{trouble} (named at {report.pictures[path]})")
        progress.close()


def _decode_shards(report: SourceReport) -> None:
    maker = shards.ShardMaker(shards.expand(report.source), str, None, None, 0, quiet=True)
    for shard, path in enumerate(
        tqdm(maker.paths, desc="decoding", unit=" shards", leave=False, disable=None)
    ):
        for row in maker.samples(shard):
            try:
                maker.read(row)
            except ValueError as error:  # not JSON, too, is a ValueError, which does not name the shard
                report.count("damaged")
                report.complain(str(error) if str(error).startswith(path) else f"{path}: {error}")


def _note_leaks(reports: list[SourceReport]) -> None:
    """Say where a picture to evaluate on is one to train on, too."""
    train = {
        os.path.realpath(path)
        for report in reports
        if report.setting == "data.train"
        for path in report.pictures
    }
    for report in reports:
        if report.setting in ("data.val", "data.test") and train:
            shared = sum(os.path.realpath(path) in train for path in report.pictures)
            if shared:
                report.notes.append(f"{shared} of its {len(report.pictures)} pictures are in data.train, too")
