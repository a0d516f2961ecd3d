"""The order contract: the same samples, augmented the same, on any number of ranks and workers, after any stop."""

import json
import logging

import pytest
import torch
from PIL import Image

from blipfast.config import DataConfig, TrainConfig
from blipfast.data.loader import TrainLoader, build_train_loader
from blipfast.data.pairs import PairsDataset
from blipfast.data.sampling import mix, permutation
from blipfast.data.shards import ShardLoader, write_shards
from blipfast.data.text_augment import TextAugment
from blipfast.data.transforms import train_transform

COUNT = 26


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """26 pictures of different sizes, some transparent, with captions; as JSON lines and as three shards."""
    folder = tmp_path_factory.mktemp("pairs")
    with (folder / "pairs.jsonl").open("w") as file:
        for i in range(COUNT):
            mode, colour = ("RGBA", (9 * i, 50, 90, 99)) if i % 3 == 0 else ("RGB", (9 * i, 50, 90))
            Image.new(mode, (20 + i, 30), colour).save(folder / f"{i}.png")
            caption = f"number {i} of several words in a row"
            file.write(json.dumps({"image": f"{i}.png", "caption": caption}) + "\n")
    write_shards(PairsDataset(str(folder / "pairs.jsonl")), str(folder / "x-%03d.tar"), per_shard=10)
    return folder


def make(folder, kind, transform=None, **settings):
    transform = transform or train_transform(16, background="random", noise=0.1)
    settings = dict(seed=3, augment_text=TextAugment(0.3, 0.3)) | settings
    if kind == "shards":
        return ShardLoader(str(folder / "x-{000..002}.tar"), transform, 3, **settings)
    return TrainLoader(PairsDataset(str(folder / "pairs.jsonl")), transform, 3, **settings)


def same(a, b):
    assert a.keys() == b.keys()
    assert a["caption"] == b["caption"]
    assert all(torch.equal(a[key], b[key]) for key in ("image", "image_id", "index"))
    return True


KINDS = pytest.mark.parametrize("kind", ["pairs", "shards"])


@KINDS
def test_a_batch_has_the_promised_shapes(folder, kind):
    batch = next(iter(make(folder, kind).iterate(0)))
    assert batch.keys() == {"image", "caption", "image_id", "index"}
    assert batch["image"].shape == (3, 3, 16, 16) and batch["image"].dtype == torch.float32
    assert batch["image_id"].dtype == batch["index"].dtype == torch.int64
    assert len(batch["caption"]) == 3 and all(isinstance(c, str) for c in batch["caption"])


@KINDS
def test_an_epoch_visits_each_sample_at_most_once_in_an_order_of_its_own(folder, kind):
    loader = make(folder, kind)
    orders = [torch.cat([b["index"] for b in loader.iterate(epoch)]).tolist() for epoch in (0, 1, 0)]
    assert len(loader) == COUNT // 3
    assert len(orders[0]) == len(set(orders[0])) == 24
    assert orders[0] == orders[2] != orders[1]
    other = make(folder, kind, seed=4)
    assert torch.cat([b["index"] for b in other.iterate(0)]).tolist() != orders[0]


@KINDS
@pytest.mark.parametrize("world, accumulation", [(2, 1), (2, 2), (4, 1), (1, 4)])
def test_ranks_and_accumulation_share_out_one_stream(folder, kind, world, accumulation):
    stream = list(make(folder, kind).iterate(1))  # 1 rank, no accumulation: global micro-batches in order
    for rank in range(world):
        loader = make(folder, kind, rank=rank, world_size=world, accumulation=accumulation)
        batches = list(loader.iterate(1))
        assert len(batches) == len(loader) * accumulation
        for i, batch in enumerate(batches):
            step, micro = divmod(i, accumulation)
            assert same(batch, stream[step * accumulation * world + micro * world + rank])


@KINDS
@pytest.mark.parametrize("transform", [None, train_transform(16, randaugment="strong", noise=0.1)])
def test_workers_change_nothing_even_after_an_epoch_left_early(folder, kind, transform):
    alone, helped = (make(folder, kind, transform, workers=w) for w in (0, 2))
    next(iter(helped.iterate(0)))
    for epoch in (0, 1):
        assert all(map(same, alone.iterate(epoch), helped.iterate(epoch)))


@KINDS
def test_resuming_anywhere_gives_what_never_stopping_gives(folder, kind):
    loader = make(folder, kind, accumulation=2)
    whole = list(loader.iterate(2))
    for step in range(len(loader) + 1):
        rest = list(make(folder, kind, accumulation=2).iterate(2, start_step=step))
        assert len(rest) == len(whole) - 2 * step
        assert all(map(same, rest, whole[2 * step :]))


@KINDS
def test_the_state_of_the_process_changes_nothing_and_is_not_changed(folder, kind):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = next(iter(make(folder, kind).iterate(0)))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert same(first, next(iter(make(folder, kind).iterate(0))))


@pytest.mark.parametrize("randaugment", ["official", "strong"])
def test_cached_pictures_give_the_same_batches(folder, randaugment):
    transform = train_transform(16, randaugment=randaugment, background="random")
    plain, cached = make(folder, "pairs", transform), make(folder, "pairs", transform, cache_images=True)
    helped = make(folder, "pairs", transform, cache_images=True, workers=1)
    assert all(
        same(a, b) and same(a, c) for a, b, c in zip(plain.iterate(0), cached.iterate(0), helped.iterate(0))
    )


@KINDS
def test_more_ranks_than_data_is_refused(folder, kind):
    with pytest.raises(ValueError, match="More ranks than data: a step takes 48 samples .* there are 26"):
        make(folder, kind, world_size=8, accumulation=2)
    with pytest.raises(ValueError, match="rank 2 does not exist among 2 ranks"):
        make(folder, kind, rank=2, world_size=2)


@pytest.mark.parametrize("settings", [{}, {"workers": 2}, {"cache_images": True}])
def test_broken_pictures_are_replaced_counted_and_named_once(folder, tmp_path, settings, caplog):
    items = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    (tmp_path / "cut.png").write_bytes((folder / "1.png").read_bytes()[:50])
    items[4]["image"], items[5]["image"] = str(tmp_path / "cut.png"), str(tmp_path / "gone.png")
    items[25]["image"] = str(tmp_path / "gone too.png")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    dataset = PairsDataset(str(tmp_path / "a.jsonl"), str(folder))
    loader = TrainLoader(dataset, train_transform(16), 2, seed=0, **settings)
    with caplog.at_level(logging.WARNING):
        seen = [torch.cat([b["index"] for b in loader.iterate(epoch)]).tolist() for epoch in (0, 0)]
    assert seen[0] == seen[1] and len(seen[0]) == COUNT
    assert seen[0].count(6) == 3 and seen[0].count(0) == 2  # 4 and 5 became 6, the last became the first
    assert not {4, 5, 25} & set(seen[0])
    assert len(loader.broken) == 3
    for name in ("cut.png", "gone.png", "gone too.png"):
        assert sum(name in record.getMessage() for record in caplog.records) == 1


def test_a_set_of_broken_pictures_ends_with_the_reason(folder, tmp_path):
    items = "".join(json.dumps({"image": f"{i}.png", "caption": "a"}) + "\n" for i in range(4))
    (tmp_path / "a.jsonl").write_text(items)
    for i in range(4):
        (tmp_path / f"{i}.png").write_text("no picture")
    loader = TrainLoader(PairsDataset(str(tmp_path / "a.jsonl")), train_transform(16), 2, seed=0)
    with pytest.raises(ValueError, match=r"cannot be read; the first: .*png: not a picture"):
        next(iter(loader.iterate(0)))


def test_config_chooses_the_loader(folder):
    train, transform = TrainConfig(batch_size=4, accumulation=2), train_transform(16)

    def build(*sources, **settings):
        data = DataConfig(train=[str(folder / s) for s in sources], workers=0, **settings)
        return build_train_loader(data, train, transform, 1, 0, 1)

    pairs, shards = build("pairs.jsonl", "pairs.jsonl"), build("x-*.tar", max_words=2, prompt="this is ")
    assert isinstance(pairs, TrainLoader) and len(pairs) == 52 // 8
    assert isinstance(shards, ShardLoader) and len(shards) == 26 // 8
    assert next(iter(shards.iterate(0)))["caption"][0].startswith("this is number ")
    with pytest.raises(ValueError, match="cannot be mixed"):
        build("pairs.jsonl", "x-000.tar")
    with pytest.raises(ValueError, match="data.format: 'csv' is not one of"):
        build("pairs.jsonl", format="csv")
    with pytest.raises(ValueError, match="data.train is empty"):
        build()


def test_seeds_and_orders_are_well_mixed():
    seeds = {mix(seed, epoch, index) for seed in range(10) for epoch in range(10) for index in range(1000)}
    assert len(seeds) == 100_000
    bits = sum(bin(mix(0, 0, i) ^ mix(0, 0, i + 1)).count("1") for i in range(1000)) / 1000
    assert 31 < bits < 33  # neighbours differ in half of 64 bits
    assert mix(1, 2) != mix(2, 1)
    assert sorted(permutation(1000, 1, 2).tolist()) == list(range(1000))
    assert permutation(1000, 1, 2).tolist() != permutation(1000, 1, 3).tolist()


@KINDS
def test_a_sample_looks_different_in_every_epoch(folder, kind):
    loader = make(folder, kind)
    seen = []
    for epoch in (0, 1):
        seen.append(
            {
                int(i): (x, c)
                for b in loader.iterate(epoch)
                for i, x, c in zip(b["index"], b["image"], b["caption"])
            }
        )
    both = seen[0].keys() & seen[1].keys()
    assert len(both) > 20
    assert not any(torch.equal(seen[0][i][0], seen[1][i][0]) for i in both)
    assert sum(seen[0][i][1] != seen[1][i][1] for i in both) > 10
