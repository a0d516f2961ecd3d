"""Reading pairs: every accepted source, ids, cleaning, and one clear message for bad input."""

import json

import pytest
import torch
from PIL import Image

from blipfast.config import DataConfig
from blipfast.data.pairs import PairsDataset
from blipfast.data.views import CaptionView, RetrievalView, open_retrieval


@pytest.fixture
def pictures(tmp_path):
    """Six small pictures named 0.png .. 5.png; the red level of picture i is 10 * i."""
    for i in range(6):
        Image.new("RGB", (8, 6), (10 * i, 0, 0)).save(tmp_path / f"{i}.png")
    return tmp_path


def write(path, content):
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    return str(path)


def entries(*numbers, **more):
    return [{"image": f"{i}.png", "caption": f"Picture {i}!", **more} for i in numbers]


def captions_of(dataset):
    return [dataset.caption(i) for i in range(len(dataset))]


def lines(items):
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


def test_json_lists_json_lines_and_folders_give_the_same_pairs(pictures):
    sources = [
        write(pictures / "list.json", entries(0, 1, 2)),
        write(pictures / "indented.json", json.dumps(entries(0, 1, 2), indent=2)),
        write(pictures / "lines.jsonl", lines(entries(0, 1, 2)) + "\n"),
        write(pictures / "bom.json", "\ufeff" + lines(entries(0, 1, 2))),
    ]
    folder = pictures / "folder" / "deeper"
    folder.mkdir(parents=True)
    for i in range(3):
        (folder / f"{i}.png").write_bytes((pictures / f"{i}.png").read_bytes())
        (folder / f"{i}.{'txt' if i else 'caption'}").write_text(f"Picture {i}!\n", encoding="utf-8")
    for source in [*sources, str(pictures / "folder")]:
        dataset = PairsDataset(source)
        assert [dataset[i]["caption"] for i in range(len(dataset))] == [
            "picture 0",
            "picture 1",
            "picture 2",
        ], source
        assert [int(dataset[i]["image"][0, 0, 0]) for i in range(3)] == [0, 10, 20]
        assert [dataset[i]["image_id"] for i in range(3)] == [0, 1, 2]


def test_captions_are_cleaned_cut_and_prompted_only_if_asked(pictures):
    source = write(pictures / "a.json", [{"image": "0.png", "caption": 'A  "Big" dog, running.'}])
    assert PairsDataset(source).caption(0) == "a big dog, running"
    assert PairsDataset(source, max_words=2, prompt="a picture of ").caption(0) == "a picture of a big"
    assert PairsDataset(source, clean_captions=False).caption(0) == 'A  "Big" dog, running.'


def test_captions_in_any_script_survive(pictures):
    captions = ["一只白色的猫坐在窗台上", "창가에 앉은 고양이", "кот 🐈"]
    source = write(pictures / "a.jsonl", lines({"image": "0.png", "caption": c} for c in captions))
    assert captions_of(PairsDataset(source)) == captions


def test_several_sources_are_joined(pictures):
    first, second = (
        write(pictures / "a.json", entries(0, 1)),
        write(pictures / "b.jsonl", lines(entries(1, 3))),
    )
    dataset = PairsDataset([first, second])
    assert [int(dataset[i]["image"][0, 0, 0]) for i in range(4)] == [0, 10, 10, 30]
    assert dataset.image_ids.tolist() == [0, 1, 1, 2]
    assert dataset.pictures == 3


def test_pairs_share_an_id_by_path_or_by_given_id(pictures):
    items = [
        {"image": "0.png", "caption": "a", "image_id": "x"},
        {"image": "1.png", "caption": "b", "image_id": "y"},
        {"image": "2.png", "caption": ["c", "d"], "image_id": "x"},
        {"image": "1.png", "caption": "e"},
        {"image": "3.png", "caption": "f", "image_id": 7},
        {"image": "3.png", "caption": "g", "image_id": "x"},
    ]
    dataset = PairsDataset(write(pictures / "a.json", items))
    assert dataset.image_ids.tolist() == [0, 1, 0, 0, 1, 0, 0]
    # an id means something within its own source only
    other = write(pictures / "b.json", [{"image": "4.png", "caption": "h", "image_id": "x"}])
    assert PairsDataset([str(pictures / "a.json"), other]).image_ids.tolist()[-1] == 2


def test_entries_longer_than_a_chunk_and_lists_longer_than_many_are_read(pictures, monkeypatch):
    monkeypatch.setattr("blipfast.data.readers._CHUNK", 64)
    items = [{"image": "0.png", "caption": f"number {i} " + "x" * (i % 200)} for i in range(500)]
    source = write(pictures / "a.json", json.dumps(items, indent=1))
    dataset = PairsDataset(source, clean_captions=False)
    assert captions_of(dataset) == [item["caption"] for item in items]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", r"a\.jsonl: the file is empty"),
        ("[]", r"a\.jsonl: there are no pairs"),
        ("hello\n", r"a\.jsonl: expected a JSON list or JSON lines"),
        (lines(entries(0, 1)) + "{oops\n", r"a\.jsonl:3: not valid JSON"),
        (lines([*entries(0), {"image": "1.png"}]), r'a\.jsonl:2: "caption" is missing\. Each entry needs'),
        (lines([*entries(0), {"image": "1.png", "caption": ""}]), r'a\.jsonl:2: "caption" is empty'),
        (lines([{"image": "1.png", "caption": ["a", " "]}]), r'a\.jsonl:1: "caption" holds an empty text'),
        (lines([{"image": "1.png", "caption": 5}]), r'a\.jsonl:1: "caption" should be text'),
        (lines([{"caption": "a"}]), r'a\.jsonl:1: "image" is missing'),
        (lines([{"image": ["1.png"], "caption": "a"}]), r'a\.jsonl:1: "image" should be text, found \['),
        (json.dumps(["1.png"]), r"a\.jsonl:1: expected an object, found '1.png'"),
        (json.dumps(entries(0, 1), indent=1)[:-30], r"a\.jsonl:\d+: not valid JSON"),
        ('[\n{"image": "0.png", "caption": "a"},\n{"image": oops}]', r"a\.jsonl:3: not valid JSON"),
        ('[\n{"image": "0.png", "caption": "a"},\n{"image": "1.png"}]', r'a\.jsonl:3: "caption" is missing'),
        (json.dumps({"images": [], "annotations": []}), "COCO's own annotation format"),
    ],
)
def test_a_bad_annotation_file_is_one_error_with_its_line(pictures, content, message):
    source = write(pictures / "a.jsonl", content)
    with pytest.raises(ValueError, match=message):
        PairsDataset(source)


def test_missing_files_roots_and_pictures_are_found_on_opening(pictures):
    source = write(pictures / "a.json", entries(0, 1))
    with pytest.raises(FileNotFoundError, match=r"none\.json: there is no such file"):
        PairsDataset(str(pictures / "none.json"))
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder. Set data.image_root"):
        PairsDataset(source, str(pictures / "nowhere"))
    (pictures / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="none of 2 pictures looked up exists"):
        PairsDataset(source, str(pictures / "empty"))
    with pytest.raises(ValueError, match="data.train is empty"):
        PairsDataset([])


def test_latin_1_text_is_refused_by_name(pictures):
    (pictures / "a.jsonl").write_bytes('{"image": "0.png", "caption": "caf\xe9"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.jsonl: not UTF-8"):
        PairsDataset(str(pictures / "a.jsonl"))


def test_a_folder_may_hold_pictures_without_captions_but_not_only_those(pictures, caplog):
    with pytest.raises(ValueError, match="none of its 6 pictures has a caption file"):
        PairsDataset(str(pictures))
    (pictures / "3.txt").write_text("three")
    assert captions_of(PairsDataset(str(pictures))) == ["three"]
    assert "5 of 6 pictures have no caption file" in caplog.text
    (pictures / "4.txt").touch()
    with pytest.raises(ValueError, match=r"4\.txt: the caption is empty"):
        PairsDataset(str(pictures))
    with pytest.raises(ValueError, match="a folder, but this data.format needs a .json"):
        PairsDataset(str(pictures), format="pairs")


def test_linked_folders_are_read_and_a_circle_of_links_ends(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "folder"
    folder.mkdir()
    for place in (tmp_path / "elsewhere", folder):
        Image.new("RGB", (8, 8)).save(place / "a.png")
        (place / "a.txt").write_text(place.name)
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(folder)
    pairs = PairsDataset(str(folder))
    assert sorted(captions_of(pairs)) == ["elsewhere", "folder"]


def test_a_large_file_is_indexed_in_little_memory(pictures):
    source = write(
        pictures / "a.jsonl",
        lines({"image": "0.png", "caption": f"caption number {i}"} for i in range(20_000)),
    )
    dataset = PairsDataset(source)
    held = len(dataset._paths._text) + len(dataset._captions._text) + dataset.image_ids.nbytes
    assert len(dataset) == 20_000 and held / len(dataset) < 120
    assert dataset.caption(19_999) == "caption number 19999"


# evaluation views


@pytest.fixture
def coco(pictures):
    (pictures / "val2014").mkdir()
    names = [f"val2014/COCO_val2014_{i:012d}.jpg" for i in (391895, 42, 7)]
    for name in names:
        Image.new("RGB", (9, 9)).save(pictures / name)
    test = [{"image": name, "caption": [f"A {name[-5]} one.", "the same"]} for name in names]
    train = [{"image": names[0], "caption": "A dog.", "image_id": "coco_391895"}] * 2
    write(pictures / "coco_karpathy_test.json", test)
    write(pictures / "coco_karpathy_train.json", train)
    write(pictures / "flickr30k_train.json", train)
    return pictures


def to_size(image, rng):
    return torch.zeros(3, 4, 4)


def test_karpathy_retrieval_view_is_the_official_one(coco):
    view = RetrievalView(str(coco), str(coco), to_size, format="coco")
    assert view.text == ["a 5 one", "the same", "a 2 one", "the same", "a 7 one", "the same"]
    assert view.img2txt == {0: [0, 1], 1: [2, 3], 2: [4, 5]}
    assert view.txt2img == {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 2}
    assert len(view) == len(view.image) == 3
    image, index = view[2]
    assert image.shape == (3, 4, 4) and index == 2


def test_karpathy_caption_view_takes_ids_from_file_names(coco):
    view = CaptionView(str(coco), str(coco), to_size, format="coco")
    assert [view[i][1] for i in range(3)] == [391895, 42, 7]
    assert view.references[42] == ["a 2 one", "the same"]


def test_caption_view_counts_where_names_hold_no_number_of_their_own(pictures):
    for name in ("a_1.png", "b_1.png", "dog.jpg"):
        Image.new("RGB", (4, 4)).save(pictures / name)
    items = [{"image": name, "caption": "c"} for name in ("a_1.png", "b_1.png", "dog.jpg")]
    assert CaptionView(write(pictures / "a.json", items)).image_ids == [0, 1, 2]


def test_karpathy_training_files_are_found_in_their_folder(coco):
    for format in ("coco", "flickr30k"):
        dataset = PairsDataset(str(coco), str(coco), format=format, prompt="a picture of ")
        assert [dataset[i]["image_id"] for i in range(2)] == [0, 0]
        assert dataset.caption(0) == "a picture of a dog"
    with pytest.raises(FileNotFoundError, match="coco_karpathy_val.json"):
        CaptionView(str(coco), str(coco), to_size, format="coco", split="val")


def test_retrieval_view_of_any_source_shares_equal_captions(pictures):
    items = [
        *entries(0, 1),
        {"image": "2.png", "caption": "picture 1"},
        {"image": "0.png", "caption": "zero"},
    ]
    view = open_retrieval(DataConfig(test=write(pictures / "a.jsonl", lines(items))))
    assert view.text == ["picture 0", "zero", "picture 1"]
    assert view.img2txt == {0: [0, 1], 1: [2], 2: [2]}
    assert view.txt2img == {0: [0], 1: [0], 2: [1, 2]}
    assert view[2][0].dtype == torch.uint8 and int(view[2][0][0, 0, 0]) == 20


def test_a_broken_test_picture_is_named_and_does_not_end_the_evaluation(pictures, caplog):
    source = write(pictures / "a.json", entries(0, 1))
    (pictures / "1.png").write_bytes(b"oops")
    image, index = RetrievalView(source)[1]
    assert index == 1 and image.unique().tolist() == [128]
    assert "1.png" in caplog.text
