"""What models refuse, and by which words; and how often a training step waits for the device."""

from __future__ import annotations

import pytest
import torch

from blipfast.models import answers, momentum
from blipfast.models.blip import blip_feature_extractor
from blipfast.models.blip_itm import blip_itm
from blipfast.models.blip_nlvr import blip_nlvr
from blipfast.models.blip_pretrain import blip_pretrain
from blipfast.models.blip_retrieval import blip_retrieval
from blipfast.models.blip_vqa import blip_vqa
from blipfast.ops import linear_cross_entropy
from blipfast.transfer import ToHost
from tests.test_models_replay import DeviceOnly

QUESTIONS = ["what is it", "how many birds are there", "what colour", "where"]
ANSWERS = ["a dog", "two", "two red dogs", "red", "two red birds", "on the beach", "a dog"]


@pytest.fixture
def vqa(small):
    torch.manual_seed(0)
    return blip_vqa(**small).eval()


def rank(model, images, candidates=ANSWERS, questions=QUESTIONS, **how):
    return model(images, questions, candidates, train=False, **how)


@torch.no_grad()
def test_many_candidates_in_many_trees_are_ranked_as_in_one(vqa, images, monkeypatch):
    expected = [rank(vqa, images, k_test=k).tolist() for k in (1, 4, 100)]
    for candidates, rows in ((3, 4096), (1, 5), (2, 8)):
        monkeypatch.setattr(answers, "CANDIDATES", candidates)
        monkeypatch.setitem(answers.ROWS, "cpu", rows)
        assert [rank(vqa, images, k_test=k).tolist() for k in (1, 4, 100)] == expected


@torch.no_grad()
@pytest.mark.parametrize(
    "how, message",
    [
        ({"candidates": []}, "Ranking needs answers"),
        ({"candidates": None}, "There are no answers"),
        ({"k_test": 0}, "k of at least 1, got 7 answers and k 0"),
        ({"questions": QUESTIONS[:3]}, "3 questions need as many pictures, got 4"),
        ({"questions": QUESTIONS[:3], "inference": "generate"}, "3 questions need as many pictures, got 4"),
        ({"image_of": [0, 1, 2, -1], "inference": "generate"}, "each of 4 questions one of 4 pictures"),
        ({"image_of": [0, 1, 2, 4]}, "each of 4 questions one of 4 pictures"),
        ({"inference": "guess"}, 'must be "rank" or "generate"'),
    ],
)
def test_questions_without_pictures_or_answers_are_refused(vqa, images, how, message):
    with pytest.raises(ValueError, match=message):
        rank(vqa, images, **how)


@torch.no_grad()
@pytest.mark.parametrize("how", ["rank", "generate"])
def test_nan_in_a_picture_is_named_and_no_answer_is_made_up(vqa, images, how):
    images[2, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="2 gives states that are not finite"):
        rank(vqa, images, inference=how)


def test_training_on_answers_needs_their_counts(vqa, images):
    with pytest.raises(ValueError, match="needs `n`"):
        vqa(images, QUESTIONS, ANSWERS)


def test_pictures_and_texts_must_be_as_many(small, images):
    with pytest.raises(ValueError, match="4 pictures need 4 captions, got 3"):
        blip_feature_extractor(**small)(images, QUESTIONS[:3], "multimodal")
    with pytest.raises(ValueError, match="got 0 and 4"):
        blip_itm(**small)(images[:0], QUESTIONS, "itc")
    retrieval = blip_retrieval(**small, queue_size=8)
    before = retrieval.image_queue.clone()
    for captions, idx in ((QUESTIONS[:3], torch.arange(4)), (QUESTIONS, torch.arange(3))):
        with pytest.raises(ValueError, match="4 pictures need as many captions and idx"):
            retrieval(images, captions, 0.4, idx)
    assert torch.equal(retrieval.image_queue, before)


def test_statements_need_targets_and_pairs(small, images):
    model = blip_nlvr(**small)
    with pytest.raises(ValueError, match="Training needs targets"):
        model(images, QUESTIONS[:2], None)
    for pair_of in ([], [0], [0, -1]):
        with pytest.raises(ValueError, match="each of 2 sentences a pair"):
            model(images, QUESTIONS[:2], None, train=False, pair_of=pair_of)


@torch.no_grad()
def test_states_of_another_dtype_are_cast(small, images):
    model = blip_itm(**small).eval()
    states = model.visual_encoder(images).bfloat16()
    expected = model.match(model.image_states(states.float()), model.encode_text(QUESTIONS))
    assert torch.equal(model.match(model.image_states(states), model.encode_text(QUESTIONS)), expected)
    assert torch.equal(model.image_features(states), model.image_features(states.float()))


class NoWaits(DeviceOnly):
    """Nothing is read on the host, and no shape is made of numbers; uploads wait for nothing."""

    FORBIDDEN = tuple(set(DeviceOnly.FORBIDDEN) - {"lift_fresh"})


@pytest.mark.parametrize("duplicates", ["negative", "positive"])
def test_a_training_step_waits_for_the_device_once(small, images, duplicates, monkeypatch):
    """Where ITM's texts must be packed, whose lengths the host needs; forward, backward and the queue included."""
    waits = []

    class Counted(ToHost):
        def read(self):
            waits.append(1)
            with torch.utils._python_dispatch._disable_current_modes():
                return super().read()

    monkeypatch.setattr(momentum, "ToHost", Counted)
    monkeypatch.setattr(linear_cross_entropy, "_check_labels", lambda *_: None)  # on a CPU only
    model = blip_pretrain(**small, queue_size=16, duplicates=duplicates).train()
    with NoWaits():
        sum(model(images, QUESTIONS, 0.4)).backward()
    assert len(waits) == 1
