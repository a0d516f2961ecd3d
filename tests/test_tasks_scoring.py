"""Two-stage retrieval: reranking equals scoring every pair one by one."""

from __future__ import annotations

import pytest
import torch

from blipfast.models.blip_itm import BLIP_ITM
from blipfast.models.vit import VisionTransformer
from blipfast.tasks.scoring import UNSCORED, Collection

TEXTS = ["a cat", "a small dog on the beach", "two birds", "the sea", "an apple"]


def collection(small, images, **settings):
    torch.manual_seed(0)
    model = BLIP_ITM(embed_dim=8, **small).eval()
    with torch.no_grad():
        return model, Collection(model, lambda i: images[i], 4, TEXTS, "cpu", batch_size=2, **settings)


@torch.no_grad()
def test_scores_are_itm_logit_plus_cosine_of_every_pair(small, images):
    model, found = collection(small, images)
    scores = found.rerank(k=100)  # more than there are: all
    for i in range(len(images)):
        itm = model(images[i : i + 1].expand(len(TEXTS), -1, -1, -1), TEXTS, "itm")[:, 1]
        itc = model(images[i : i + 1], TEXTS, "itc")[0]
        torch.testing.assert_close(scores.i2t[i], itm + itc, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.t2i, scores.i2t.t())


@torch.no_grad()
def test_only_the_nearest_k_are_scored_each_way(small, images):
    _, found = collection(small, images)
    scores = found.rerank(k=2)
    assert (scores.i2t > UNSCORED).sum(1).tolist() == [2] * len(images)
    assert (scores.t2i > UNSCORED).sum(1).tolist() == [2] * len(TEXTS)
    for i in range(len(images)):
        assert set((scores.i2t[i] > UNSCORED).nonzero()[:, 0].tolist()) == set(
            found.similarity[i].topk(2).indices.tolist()
        )


@torch.no_grad()
def test_itm_accuracy_is_a_matter_of_the_head(small, images):
    model, found = collection(small, images)
    truth = [[0, 4], [1], [2], [3]]
    model.itm_head.weight.zero_()
    model.itm_head.bias.copy_(torch.tensor([1.0, 0.0]))
    state = torch.get_rng_state()
    assert found.itm_accuracy(truth) == 2 / 3  # "no match" always: the prior
    assert torch.equal(torch.get_rng_state(), state)
    model.itm_head.bias.copy_(torch.tensor([0.0, 1.0]))
    assert found.itm_accuracy(truth) == 1 / 3


@torch.no_grad()
def test_a_text_reads_itself_once_for_all_pictures_where_memory_allows(small, images):
    """Else once for each of the four; and once for ITC, which reads [CLS] instead of [ENC]."""
    model = BLIP_ITM(embed_dim=8, **small).eval()
    rows = []
    query = model.text_encoder.encoder.layer[0].attention.self.query
    query.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    tokens = sum(map(len, model.encode_text(TEXTS)))
    width = 48
    for memory, times in [(4 * width * tokens, 1 + 1), (4 * width * tokens - 1, 1 + 4)]:
        rows.clear()
        found = Collection(model, lambda i: images[i], 4, TEXTS, "cpu", memory=memory)
        found.rerank(k=100)
        assert sum(rows) == times * tokens
        assert bool(found.states) == (times > 2), "what the texts take is not left for pictures"


@torch.no_grad()
def test_little_memory_and_small_passes_change_no_score(small, images, monkeypatch):
    model, found = collection(small, images)
    expected = found.rerank(k=3)
    _, poor = collection(small, images, memory=0, pairs=8)
    assert len(found.states) == 4 and not poor.states
    score, sizes = poor.score, []

    def short_of_memory(batch, wanted):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("pretended")
        return score(batch, wanted)

    monkeypatch.setattr(poor, "score", short_of_memory)
    scores = poor.rerank(k=3)
    torch.testing.assert_close(scores.i2t, expected.i2t, rtol=1e-5, atol=1e-5)
    assert sizes[:3] == [8, 4, 2] and set(sizes[3:]) <= {1, 2}
    _, one_by_one = collection(small, images, pairs=1)
    torch.testing.assert_close(one_by_one.rerank(k=3).i2t, expected.i2t, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_pass_meets_no_more_pictures_than_a_batch_has(small, images):
    _, found = collection(small, images)
    expected, score, met = found.rerank(k=1), found.score, []
    found.score = lambda image, text: met.append(len(set(image.tolist()))) or score(image, text)
    assert torch.equal(found.rerank(k=1).i2t, expected.i2t)
    assert max(met) == 2 and sum(met) == 4


@torch.no_grad()
def test_encoding_goes_on_in_halves_where_memory_runs_out(small, images, monkeypatch):
    _, found = collection(small, images)
    encode, read = VisionTransformer.forward, BLIP_ITM.text_features

    def short_of_memory(function, largest):
        def call(self, batch):
            if len(batch) > largest:
                raise torch.OutOfMemoryError("pretended")
            return function(self, batch)

        return call

    monkeypatch.setattr(VisionTransformer, "forward", short_of_memory(encode, 1))
    monkeypatch.setattr(BLIP_ITM, "text_features", short_of_memory(read, 2))
    _, poor = collection(small, images)
    torch.testing.assert_close(poor.similarity, found.similarity, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_what_cannot_be_ranked_is_named(small, images):
    _, found = collection(small, images)
    for k, score in ((0, "itm"), (-1, "itm"), (2, "cosine")):
        with pytest.raises(ValueError, match=f"k must be 1 or more.*got {k}, '{score}'"):
            found.rerank(k, score)
    with pytest.raises(ValueError, match="Nothing belongs to query 1"):
        found.itm_accuracy([[0, 4], [], [2], [3]])
    images[2, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="Image 2 gives states that are not finite"):
        collection(small, images)


def test_a_collection_needs_pictures_and_texts(small, images):
    model = BLIP_ITM(embed_dim=8, **small).eval()
    with pytest.raises(ValueError, match="there are 4 and 0"):
        Collection(model, lambda i: images[i], 4, [], "cpu")
    with pytest.raises(ValueError, match="there are 0 and 5"):
        Collection(model, lambda i: images[i], 0, TEXTS, "cpu")
