"""Tar shards: writing, finding, reading, and what a damaged one costs."""

import io
import json
import tarfile

import pytest
import torch
from PIL import Image

from blipfast.data.shards import ShardLoader, expand, index_shard, is_shards, write_shards
from blipfast.data.transforms import train_transform


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def pairs(count, start=0):
    return [{"image": png(start + i), "caption": f"picture {start + i}"} for i in range(count)]


def tar(path, members):
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return str(path)


def load(shards, batch_size=2, **settings):
    return ShardLoader(shards, train_transform(8, 1.0, 0.0, "none"), batch_size, **(dict(seed=0) | settings))


def captions(loader, epoch=0):
    return [caption for batch in loader.iterate(epoch) for caption in batch["caption"]]


def test_what_is_written_is_read_back(tmp_path):
    paths = write_shards(pairs(7), str(tmp_path / "deep" / "x-%03d.tar"), per_shard=3)
    assert [path[-9:] for path in paths] == ["x-000.tar", "x-001.tar", "x-002.tar"]
    loader = load(str(tmp_path / "deep" / "x-{000..002}.tar"), 1)
    assert sorted(captions(loader)) == [f"picture {i}" for i in range(7)]
    for batch in loader.iterate(0):  # every caption comes with its own picture
        level = float(batch["image"][0, 0, 0, 0] * 0.26862954 + 0.48145466) * 255
        assert batch["caption"] == [f"picture {round(level)}"]


def test_shards_of_others_are_read(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        for i in range(4):
            writer.write({"__key__": f"dir/{i:05d}", "png": png(i), "txt": f"picture {i}", "cls": 5})
    assert sorted(captions(load(str(tmp_path / "x.tar")))) == [f"picture {i}" for i in range(4)]


def test_captions_may_be_text_or_json_and_names_may_be_long(tmp_path):
    long = "folder/" + "n" * 200
    path = tar(
        tmp_path / "x.tar",
        [("a.jpeg", png(1)), ("a.caption", "一只猫".encode()), ("a.json", b'{"caption": "not this"}')]
        + [("b.json", json.dumps({"caption": "from json", "url": "x"}).encode()), ("b.png", png(2))]
        + [(f"{long}.PNG", png(3)), (f"{long}.txt", b"a long name")],
    )
    assert sorted(captions(load(path, 1))) == ["a long name", "from json", "一只猫"]


def test_patterns_stand_for_the_shards_they_name(tmp_path):
    for name in ("a-08", "a-09", "a-10", "b-10"):
        (tmp_path / f"{name}.tar").touch()

    def names(pattern):
        return [path[-8:-4] for path in expand(str(tmp_path / pattern))]

    assert names("a-{08..10}.tar") == ["a-08", "a-09", "a-10"]
    assert names("{b,a}-10.tar") == ["b-10", "a-10"]
    assert names("a-*.tar") == ["a-08", "a-09", "a-10"]
    with pytest.raises(FileNotFoundError, match=r"a-11\.tar: there is no such shard"):
        names("a-{08..11}.tar")
    with pytest.raises(FileNotFoundError, match="there is no such shard"):
        names("c-*.tar")


@pytest.mark.parametrize("cut", ["in a picture", "in a header", "after a picture"])
def test_a_truncated_shard_is_one_message_and_the_rest_goes_on(tmp_path, caplog, cut):
    first, second = write_shards(pairs(8), str(tmp_path / "x-%d.tar"), per_shard=4)
    rows = index_shard(second)[0]
    picture, size = rows[2][:2]
    keep = {
        "in a picture": picture + size // 2,
        "in a header": picture - 100,
        "after a picture": picture + size,
    }[cut]
    with open(second, "r+b") as file:
        file.truncate(int(keep))
    loader = load([first, second], 1)
    assert len(loader) == 6
    assert sorted(captions(loader)) == [f"picture {i}" for i in range(6)]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 and "x-1.tar: truncated or damaged at byte" in messages[0]
    assert "2 whole samples" in messages[0]


def test_garbage_within_a_shard_ends_it_there(tmp_path, caplog):
    (path,) = write_shards(pairs(4), str(tmp_path / "x-%d.tar"), per_shard=4)
    header = int(index_shard(path)[0][2][0]) - 512
    with open(path, "r+b") as file:
        file.seek(header)
        file.write(b"\xff" * 512)
    assert len(load(path, 1)) == 2
    assert "x-0.tar: truncated or damaged" in caplog.text


def test_samples_without_picture_or_caption_are_left_out(tmp_path, caplog):
    path = tar(tmp_path / "x.tar", [("a.png", png(1)), ("b.txt", b"b"), ("c.png", png(3)), ("c.txt", b"c")])
    assert captions(load(path, 1)) == ["c"]
    assert "2 of 3 samples lack a picture or a caption" in caplog.text


def test_broken_samples_are_replaced_and_named(tmp_path, caplog):
    items = pairs(6)
    items[1]["image"] = items[1]["image"][:40]
    items[5]["caption"] = " "
    write_shards(items, str(tmp_path / "x-%d.tar"), per_shard=3)
    loader = load(str(tmp_path / "x-*.tar"), workers=1)
    assert sorted(captions(loader)) == [
        "picture 0",
        "picture 0",
        "picture 2",
        "picture 2",
        "picture 3",
        "picture 4",
    ]
    assert captions(loader) and len(loader.broken) == 2
    assert "x-0.tar:000000001.png: not a picture" in caplog.text
    assert "x-1.tar:000000005.txt: the caption is empty" in caplog.text
    assert len(caplog.records) == 2


def test_files_that_are_no_shards_are_one_error(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(ValueError, match=r"None of 1 shards holds .*x\.tar: not an uncompressed tar file"):
        load(str(tmp_path / "x.tar"))
    empty = tar(tmp_path / "y.tar", [])
    for settings in ({}, {"samples_per_epoch": 10}):
        with pytest.raises(ValueError, match=r"None of 1 shards holds .*y\.tar: it is empty"):
            captions(load(empty, **settings))
    with pytest.raises(ValueError, match="needs a place for the number"):
        write_shards(pairs(1), str(tmp_path / "x.tar"))
    with pytest.raises(ValueError, match="none of them"):
        write_shards([{"image": b"text", "caption": "a"}], str(tmp_path / "x-%d.tar"))


@pytest.mark.parametrize("samples", [4, 12, 30])
def test_an_epoch_of_given_length_goes_round_or_stops_early(tmp_path, samples):
    write_shards(pairs(12), str(tmp_path / "x-%d.tar"), per_shard=4)
    loader = load(str(tmp_path / "x-*.tar"), samples_per_epoch=samples, shuffle_buffer=5)
    assert not loader.maker.indexed  # no header is read before it is needed
    seen = captions(loader)
    assert len(seen) == samples
    assert len(set(seen[:12])) == min(samples, 12)
    ranks = [
        load(str(tmp_path / "x-*.tar"), 1, rank=r, world_size=2, samples_per_epoch=samples, shuffle_buffer=5)
        for r in (0, 1)
    ]
    split = [captions(rank) for rank in ranks]
    assert [c for pair in zip(*split) for c in pair] == seen
    assert list(
        map(captions, [load(str(tmp_path / "x-*.tar"), samples_per_epoch=samples, shuffle_buffer=5)])
    ) == [seen]


def test_samples_are_shuffled_within_windows_of_shards(tmp_path):
    write_shards(pairs(40), str(tmp_path / "x-%d.tar"), per_shard=10)
    loader = load(str(tmp_path / "x-*.tar"), 1, shuffle_buffer=15)
    order = torch.cat([batch["index"] for batch in loader.iterate(0)])
    shards = (order >> 32).tolist()
    assert len(set(shards[:20])) == len(set(shards[20:])) == 2  # two windows of two shards each
    assert shards[:20] != sorted(shards[:20]) and len(set(order.tolist())) == 40


def test_a_sample_whose_json_has_no_caption_is_replaced_and_named(tmp_path, caplog):
    members = [("1.png", png(1)), ("1.json", b'{"caption": "picture 1"}')]
    members += [
        ("2.png", png(2)),
        ("2.json", b'{"text": "picture 2"}'),
        ("3.png", png(3)),
        ("3.json", b"[1]"),
    ]
    loader = load(tar(tmp_path / "x.tar", members), 1)
    assert set(captions(loader)) == {"picture 1"}
    assert "2.json: the caption is empty or missing" in caplog.text
    assert "3.json: the caption is empty or missing" in caplog.text


def test_only_names_of_tar_files_are_shards():
    assert all(map(is_shards, ("a.tar", "a/x-{000..009}.tar", "{a.tar,b.tar}", "a.tar.gz", "x/*.tar")))
    assert not any(map(is_shards, ("my.target.json", "coco.tartan.jsonl", "tar")))
