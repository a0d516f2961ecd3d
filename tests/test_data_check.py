"""`blipfast data check`: every mistake in every format, each on a line that names file, line and key."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from blipfast.cli import main
from blipfast.config import config_from_dict
from blipfast.data import readers
from blipfast.data.check import check_data
from blipfast.data.pairs import PairsDataset
from blipfast.data.shards import write_shards


@pytest.fixture
def folder(tmp_path):
    """Four pictures, 0.png .. 3.png."""
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    return tmp_path


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1), encoding="utf-8")
    return str(path)


def check(task="pretrain", decode=False, **data):
    """The reports of a config, by setting."""
    config = config_from_dict({"task": task, "data": data})
    return {report.setting: report for report in check_data(config, decode)}


def test_clean_data_is_counted_and_has_no_problems(folder):
    pairs = [{"image": f"{i}.png", "caption": ["a red square", "red"]} for i in (0, 1)]
    reports = check(
        train=[write(folder / "a.json", pairs)],
        test=write(folder / "t.json", [{**pairs[0], "image": "3.png"}]),
    )
    assert [report.bad for report in reports.values()] == [0, 0]
    assert reports["data.train"].counts == {"entries": 2, "texts": 4, "pictures": 2}
    assert reports["data.test"].notes == []


def test_json_lines_go_on_after_a_broken_line_and_each_mistake_has_its_line(folder):
    lines = [
        json.dumps({"image": "0.png", "caption": "fine"}),
        "{oops",
        "",
        json.dumps({"image": "9.png", "caption": "no such picture"}),
        json.dumps({"image": "9.png", "caption": "named once"}),
        json.dumps({"image": "1.png"}),
        json.dumps({"caption": ["a", " "]}),
        json.dumps({"image": 3, "caption": "", "image_id": [1]}),
        "7",
    ]
    source = write(folder / "a.jsonl", "\n".join(lines))
    report = check(train=[source])["data.train"]
    told = [problem.removeprefix(source) for problem in report.problems]
    assert told == [
        ":2: not valid JSON (Expecting property name enclosed in double quotes)",
        f":4: {folder}/9.png does not exist. Check data.image_root, or fetch the file.",
        ':6: "caption" is missing',
        ':7: "image" is missing',
        ':7: "caption" holds an empty text',
        ':8: "image" should be text, found 3',
        ':8: "caption" is empty',
        ':8: "image_id" should be a number or text, found [1]',
        ":9: expected an object, found 7",
    ]
    assert report.counts == {"entries": 8, "texts": 3, "missing": 1, "pictures": 3}


FORMATS = {
    "coco": ("pretrain", [{"image": "0.png", "caption": []}], '"caption" is empty'),
    "nocaps": ("caption", [{"image": "0.png", "img_id": "x"}], '"img_id" should be a number'),
    "vqa": ("vqa", [{"image": "0.png", "question": "what?"}], '"answer" is missing'),
    "nlvr": (
        "nlvr",
        [{"images": ["0.png"], "sentence": "a", "label": "True"}],
        '"images" should be a list of two',
    ),
    "msrvtt": ("retrieval", [{"clip_name": "clip", "caption": None}], '"caption" is missing'),
}


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_names_the_key_and_what_an_entry_needs(folder, format):
    task, entries, message = FORMATS[format]
    (folder / "clip").mkdir()
    report = check(task, train=[write(folder / "a.json", entries)], format=format)["data.train"]
    assert len(report.problems) == 1 and f"{folder}/a.json:2: {message}" in report.problems[0]
    assert report.expected.startswith("Each entry needs {")


@pytest.mark.parametrize(
    "task, entry, message",
    [
        ("vqa", {"image": "0.png", "question": " ", "answer": "a"}, '"question" holds an empty text'),
        ("vqa", {"image": "0.png", "question": "a?", "answer": ["a", 3]}, '"answer" should be text or a list of texts'),
        ("vqa", {"image": "0.png", "question": "a?", "answer": "a", "dataset": "gqa"}, '"dataset" should be'),
        ("nlvr", {"images": ["0.png", "1.png"], "sentence": "a", "label": "yes"}, "found 'yes'"),
        ("nlvr", {"images": ["0.png", "8.png"], "sentence": "a", "label": "True"}, "8.png does not exist"),
        ("pretrain", {"images": [], "annotations": []}, "COCO's own annotation format"),
    ],
)  # fmt: skip
def test_a_malformed_entry_is_told_by_its_key(folder, task, entry, message):
    report = check(task, train=[write(folder / "a.json", [entry])])["data.train"]
    assert report.bad == 1 and message in report.problems[0]


def test_official_test_questions_have_no_answers_and_pictures_of_visual_genome_lie_elsewhere(folder):
    (folder / "vg").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "vg" / "9.png")
    train = [
        {"dataset": "vqa", "image": "0.png", "question": "what?", "answer": ["red", "red", "blue"]},
        {"dataset": "vg", "image": "9.png", "question": "why?", "answer": "red"},
    ]
    test = [{"image": "1.png", "question": "who?", "question_id": 5}, {"image": "1.png", "question": "who?"}]
    reports = check(
        "vqa",
        train=[write(folder / "train.json", train)],
        test=write(folder / "test.json", test),
        answers=write(folder / "answers.json", ["red", "green", "red", 3]),
        vg_root=str(folder / "vg"),
    )
    assert reports["data.train"].bad == 0
    assert reports["data.train"].counts["answers outside data.answers"] == 1
    assert reports["data.test"].problems == [f'{folder}/test.json:7: "question_id" is missing']
    assert [p.partition(": ")[2] for p in reports["data.answers"].problems] == [
        "answer 2, 'red', is the same as answer 0.",
        "answer 3 should be text, found 3.",
    ]


def test_official_folders_clips_folders_and_shards_are_read(folder):
    write(folder / "coco_karpathy_train.json", [{"image": "0.png", "caption": "a", "image_id": "coco_1"}])
    write(
        folder / "msrvtt_test.jsonl",
        '{"clip_name": "video1", "caption": "a"}\n{"clip_name": "video2", "caption": "b"}\n',
    )
    (folder / "video1").mkdir()
    (folder / "1.txt").write_text("one")
    (folder / "2.txt").write_text(" ")
    assert check(train=[str(folder)], format="coco")["data.train"].counts["entries"] == 1
    clips = check("retrieval", test=str(folder), format="msrvtt")["data.test"]
    assert clips.counts["missing"] == 1 and f"{folder}/video2" in clips.problems[0]
    loose = check(train=[str(folder)])["data.train"]
    assert loose.counts["texts"] == 1 and loose.counts["without caption file"] == 2
    assert loose.problems == [
        f"{folder}/2.txt: the caption is empty. Write one, or remove the file to leave the picture out."
    ]
    pairs = [{"image": (folder / f"{i}.png").read_bytes(), "caption": "a"} for i in range(3)]
    first, second = write_shards(pairs, str(folder / "x-%d.tar"), 2)
    with open(second, "r+b") as file:
        file.truncate(600)
    tars = check(train=[str(folder / "x-{0..1}.tar")], decode=True)["data.train"]
    assert tars.counts == {"shards": 2, "entries": 2, "pictures": 2, "texts": 2}
    assert tars.bad == 1 and second in tars.problems[0]
    listed = write(folder / "test.json", [{"image": "0.png", "caption": "a"}])
    reports = check(train=[first], test=listed, format="shards")
    assert [report.format for report in reports.values()] == ["shards", "pairs"]
    assert not reports["data.test"].bad


def test_linked_folders_are_checked_as_training_reads_them(folder, tmp_path_factory):
    photos = tmp_path_factory.mktemp("photos")
    (photos / "linked").symlink_to(folder)
    (photos / "again").symlink_to(photos)
    for i in range(3):
        (folder / f"{i}.txt").write_text("" if i == 2 else "a caption")
    report = check(train=[str(photos)])["data.train"]
    assert report.counts == {"entries": 4, "texts": 2, "without caption file": 1, "pictures": 3}
    assert len(report.problems) == 1 and f"{photos}/linked/2.txt: the caption is empty" in report.problems[0]


def test_a_format_that_only_a_reader_knows_is_checked_by_it(folder, monkeypatch):
    def read_csv(path, root):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            image, comma, caption = line.partition(",")
            if not comma:
                raise ValueError(f"{path}:{number}: there is no comma")
            yield readers.Record(str(root / image), [caption], None)

    monkeypatch.setitem(readers.READERS, "csv", read_csv)
    config = config_from_dict({"data": {"train": [write(folder / "a.csv", "0.png,a\n9.png,b\n1.png")]}})
    config.data.format = "csv"
    (report,) = check_data(config)
    assert report.counts == {"entries": 2, "texts": 2, "missing": 1, "pictures": 2}
    assert "a.csv: entry 2: " in report.problems[0] and "a.csv:3: there is no comma" in report.problems[1]
    pairs = PairsDataset(write(folder / "b.csv", "0.png,a\n1.png,b"), format="csv")
    assert [pairs.caption(i) for i in range(len(pairs))] == ["a", "b"]


def test_an_unknown_format_is_one_problem(folder):
    config = config_from_dict({"data": {"train": [write(folder / "a.csv", "0.png,a")]}})
    config.data.format = "csv"
    (report,) = check_data(config)
    assert report.problems == [
        "data.format: 'csv' is not one of auto, shards, pairs, folder, coco, flickr30k."
    ]


def test_what_cannot_be_read_at_all_is_one_problem_and_the_other_sources_go_on(folder):
    good = write(folder / "a.json", [{"image": "0.png", "caption": "a"}])
    cut = write(folder / "b.json", '[{"image": "0.png", "caption": "a"}, {"image": ')
    reports = check_data(config_from_dict({"data": {"train": [str(folder / "nothing.json"), cut, good]}}))
    assert [report.bad for report in reports] == [1, 1, 0]
    assert "nothing.json: there is no such file" in reports[0].problems[0]
    assert "b.json:1: not valid JSON" in reports[1].problems[0] and reports[1].counts["entries"] == 1
    with pytest.raises(ValueError, match="The config names no data"):
        check()


def test_damaged_pictures_are_found_by_decoding_and_leaks_between_splits_are_noted(folder):
    (folder / "1.png").write_bytes(b"no picture")
    entries = [{"image": f"{i}.png", "caption": "a"} for i in range(3)]
    sources = {"train": [write(folder / "a.json", entries)], "val": write(folder / "v.json", entries[2:])}
    assert check(**sources)["data.train"].bad == 0
    reports = check(decode=True, **sources)
    assert reports["data.train"].counts["damaged"] == 1
    assert f"(named at {folder}/a.json:6)" in reports["data.train"].problems[0]
    assert reports["data.val"].notes == ["1 of its 1 pictures are in data.train, too"]


def test_the_verb_prints_the_first_problems_and_fails_if_there_are_any(folder, capsys):
    entries = [{"image": "0.png"}] * 5 + [{"image": "0.png", "caption": "a"}]
    write(folder / "a.json", entries)
    config = write(folder / "c.yaml", f"data: {{train: [{folder / 'a.json'}]}}")
    assert main(["data", "check", "--config", config, "--show", "2"]) == 1
    printed = capsys.readouterr().out
    assert "data.train: " in printed and "entries 6" in printed and "problems 5" in printed
    assert printed.count('"caption" is missing') == 2 and "and 3 more" in printed
    assert main(["data", "check", "--config", config, "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert row["bad"] == 5 and row["pictures"] == 1
    write(folder / "a.json", entries[5:])
    assert main(["data", "check", "--config", config]) == 0
