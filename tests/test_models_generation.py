"""Generation beyond parity: images that come and go, several texts an image, bad rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blipfast.models.blip import blip_decoder
from blipfast.models.blip_itm import blip_itm
from blipfast.models.blip_nlvr import blip_nlvr
from blipfast.models.blip_vqa import blip_vqa
from blipfast.models.decoding import Decoding
from blipfast.models.generation import Chosen, Rules, Waiting, generate, stream
from blipfast.text import train_tokenizer

TOKENIZER = train_tokenizer(["a picture of a dog", "two red apples"], vocab_size=270)
EOS, PAD, V = TOKENIZER.sep_token_id, TOKENIZER.pad_token_id, len(TOKENIZER)
RULES = dict(eos_token_id=EOS, pad_token_id=PAD, max_length=9, min_length=0)


@pytest.fixture
def model(small):
    torch.manual_seed(0)
    small["med_config"]["initializer_range"] = 0.3  # so that what is said depends on the picture
    return blip_decoder(tokenizer=TOKENIZER, **small).eval()


@pytest.fixture
def prompt():
    return torch.tensor([TOKENIZER.bos_token_id, 20, 21])


@pytest.fixture
def embeds(model):
    """States of 7 pictures; the end token is made likely, so that texts end at different lengths."""
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[EOS] += 4.0
        return model.visual_encoder(torch.randn(7, 3, 32, 32))


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 1}, {"sample": True}], ids=str)
def test_texts_do_not_depend_on_which_images_are_decoded_together(model, prompt, embeds, how):
    def run(**more):
        torch.manual_seed(5)
        return generate(model.text_decoder, prompt, embeds, **RULES, **how, **more)

    together = run()
    lengths = (together != PAD).sum(1)
    assert len(set(lengths.tolist())) > 1, "the test needs texts of different lengths"
    for batch_size in (1, 2, 3):
        assert torch.equal(run(batch_size=batch_size), together)


def test_running_out_of_memory_halves_the_batch_and_changes_nothing(model, prompt, embeds, monkeypatch):
    expected = generate(model.text_decoder, prompt, embeds, num_beams=3, **RULES)
    step, sizes = Decoding.step, []

    def short_of_memory(self, *args, **kwargs):
        sizes.append(len(self.images))
        if len(self.images) > 2 and len(sizes) > 3:  # after some images are under way
            raise torch.OutOfMemoryError("pretended")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Decoding, "step", short_of_memory)
    assert torch.equal(generate(model.text_decoder, prompt, embeds, num_beams=3, **RULES), expected)
    assert set(sizes) == {7, 3, 1}


def test_an_image_that_has_ended_gives_its_place_to_one_that_waits(model, prompt, embeds, monkeypatch):
    rows = []
    step = Decoding.step

    def count(self, here, *args, **kwargs):
        rows.append(here.stop - here.start)
        return step(self, here, *args, **kwargs)

    monkeypatch.setattr(Decoding, "step", count)
    generate(model.text_decoder, prompt, embeds, batch_size=2, num_beams=2, **RULES)
    continued = sum(rows)
    rows.clear()
    for pair in embeds.split(2):
        generate(model.text_decoder, prompt, pair, num_beams=2, **RULES)
    assert continued == sum(rows)  # no row is computed for an image that has ended


def test_the_n_best_beams_come_best_first(model, prompt, embeds):
    three = generate(model.text_decoder, prompt, embeds, num_beams=3, num_return=3, **RULES)
    one = generate(model.text_decoder, prompt, embeds, num_beams=3, **RULES)
    assert torch.equal(three[::3, : one.shape[1]], one)
    assert len({tuple(row) for row in three[:3].tolist()}) == 3


def test_samples_of_an_image_differ_and_a_seed_repeats_them(model, prompt, embeds):
    def run():
        torch.manual_seed(1)
        return generate(model.text_decoder, prompt, embeds, sample=True, num_return=4, **RULES)

    texts = run()
    assert texts.shape[0] == 28 and torch.equal(texts, run())
    assert len({tuple(row) for row in texts[:4].tolist()}) > 1


def test_max_new_tokens_counts_without_the_prompt(model, prompt, embeds):
    rules = RULES | {"max_length": 3, "min_length": 7}
    assert generate(model.text_decoder, prompt, embeds, max_new_tokens=4, **rules).shape[1] == 7
    images = torch.randn(2, 3, 32, 32)  # min_length, unless given, is no longer than that
    length = model.prompt_length + 3
    expected = model.generate(images, max_length=length, min_length=min(10, length))
    assert model.generate(images, max_new_tokens=3) == expected
    assert [texts[0] for texts in model.generate_stream([images], max_new_tokens=3)] == expected


def test_what_makes_no_sense_is_refused(model, prompt, embeds):
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
            generate(model.text_decoder, prompt, embeds, batch_size=size, **RULES)
    with pytest.raises(ValueError, match="no images to write texts for"):
        generate(model.text_decoder, prompt, embeds[:0], **RULES)
    for wrong in ({"num_beams": 2.0}, {"num_return": None}, {"length_penalty": float("inf")}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a"):
            generate(model.text_decoder, prompt, embeds, **RULES | wrong)
    with pytest.raises(ValueError, match="repetition_penalty must be above 0, got nan"):
        generate(model.text_decoder, prompt, embeds, repetition_penalty=float("nan"), **RULES)


@pytest.mark.parametrize(
    "asked", ["a picture of ", "a photo of", "a close-up of ", "A  photo of ", " a picture of "]
)
def test_a_caption_is_what_follows_the_prompt_however_that_is_written(small, asked):
    torch.manual_seed(0)
    model = blip_decoder(prompt=asked, **small).eval()
    ids = [*model.prompt_ids("cpu").tolist(), *model.tokenizer("red dog").input_ids[1:]]
    assert model.captions([ids]) == ["red dog"]


def test_captions_of_a_stream_are_those_of_a_batch_in_order(model):
    images = torch.randn(5, 3, 32, 32)
    expected = model.generate(images, num_beams=2, max_length=20, min_length=5)
    stream = model.generate_stream(images.split(2), num_beams=2, max_length=20, min_length=5, batch_size=2)
    assert [texts[0] for texts in stream] == expected
    assert list(model.generate_stream([], num_beams=2)) == []


def test_places_are_filled_from_as_many_batches_as_it_takes(model, prompt, embeds, monkeypatch):
    expected = generate(model.text_decoder, prompt, embeds, num_beams=3, **RULES)
    taken, take, rules = [], Waiting.take, Rules(num_beams=3, **RULES)

    def run(batch_size):
        taken.clear()
        batches = ((part, None) for part in embeds.split(2))
        return dict(stream(model.text_decoder, prompt, batches, rules, batch_size))

    def counted(self, most):
        chosen = take(self, most)
        taken.append(len(chosen.numbers))
        return chosen

    monkeypatch.setattr(Waiting, "take", counted)
    for batch_size, first in ((None, 7), (3, 3), (5, 5), (128, 7)):
        texts = run(batch_size)
        assert taken[0] == first and sum(taken) == 7
        assert [texts[i][0] for i in range(7)] == [[t for t in row if t != PAD] for row in expected.tolist()]


def test_running_out_of_memory_while_batches_are_joined_loses_no_image(model, prompt, embeds, monkeypatch):
    expected = generate(model.text_decoder, prompt, embeds, num_beams=3, **RULES)
    together, calls = Chosen.together, []

    def short_of_memory(several):
        calls.append(len(several))
        if len(several) > 2:
            raise torch.OutOfMemoryError("pretended")
        return together(several)

    monkeypatch.setattr(Chosen, "together", short_of_memory)
    batches = [(one, None) for one in embeds.split(1)]
    texts = dict(stream(model.text_decoder, prompt, batches, Rules(num_beams=3, **RULES), 8))
    assert calls[:3] == [7, 3, 1]
    assert [texts[i][0] for i in range(7)] == [[t for t in row if t != PAD] for row in expected.tolist()]


def test_images_of_other_sizes_or_with_a_mask_do_not_go_with_those_before(model, prompt, embeds):
    everything = torch.ones(1, embeds.shape[1], dtype=torch.long)
    for other in ((embeds[:1], everything), (embeds[:1, :9], None)):
        batches = [(embeds[:2], None), other]
        with pytest.raises(ValueError, match="Image 2 has states of shape .* those before have"):
            list(stream(model.text_decoder, prompt, batches, Rules(num_beams=3, **RULES), 8))


def test_what_was_taken_in_is_written_before_an_error_of_the_source(model):
    images = torch.randn(6, 3, 32, 32)
    expected = model.generate(images[:5], num_beams=2, max_length=20, min_length=5)

    def broken():
        yield from images[:5].split(1)
        raise ValueError("photo.jpg cannot be read")

    found = []
    with pytest.raises(ValueError, match="photo.jpg cannot be read"):
        for texts in model.generate_stream(broken(), num_beams=2, max_length=20, min_length=5):
            found.append(texts[0])
    assert found == expected


def test_whole_numbers_of_numpy_are_whole_numbers(model):
    images = torch.randn(1, 3, 32, 32)
    asked = dict(num_beams=2, max_length=20, min_length=5)
    numpy = {name: np.int64(number) for name, number in asked.items()}
    assert model.generate(images, **numpy) == model.generate(images, **asked)


def test_states_of_another_dtype_are_cast(model, prompt, embeds):
    for how in (
        {"num_beams": 3, "max_length": 9},
        {"num_beams": 3},
    ):  # image tokens as they are, keys and values
        expected = generate(model.text_decoder, prompt, embeds.bfloat16().float(), **RULES | how)
        assert torch.equal(generate(model.text_decoder, prompt, embeds.bfloat16(), **RULES | how), expected)


def test_a_cpu_that_has_no_memory_left_is_understood(model, monkeypatch):
    images = torch.randn(3, 3, 32, 32)
    expected = model.generate(images, num_beams=2, max_length=20, min_length=5)
    encoder, forward = model.visual_encoder, model.visual_encoder.forward

    def short_of_memory(x):
        if len(x) > 1:
            torch.empty(2**60)
        return forward(x)

    monkeypatch.setattr(encoder, "forward", short_of_memory)
    assert model.generate(images, num_beams=2, max_length=20, min_length=5) == expected
    monkeypatch.setattr(encoder, "forward", lambda x: images + torch.zeros(2))
    with pytest.raises(RuntimeError, match="size of tensor"):
        model.generate(images)


def test_running_out_of_memory_for_the_encoder_halves_its_batch(model, monkeypatch):
    images, encoder, sizes = torch.randn(5, 3, 32, 32), model.visual_encoder, []
    expected = model.generate(images, num_beams=2, max_length=20, min_length=5)
    forward = encoder.forward

    def short_of_memory(x):
        sizes.append(len(x))
        if len(x) > largest:
            raise torch.OutOfMemoryError("pretended")
        return forward(x)

    monkeypatch.setattr(encoder, "forward", short_of_memory)
    largest = 2
    texts = model.generate_stream(images.split(4), num_beams=2, max_length=20, min_length=5)
    assert [each[0] for each in texts] == expected and sizes == [4, 2, 2, 1]
    largest = 0  # nothing is lost in silence when a picture does not fit
    with pytest.raises(torch.OutOfMemoryError):
        list(model.generate_stream(images.split(4), num_beams=2, max_length=20, min_length=5))

    def later():
        yield images[:2]
        raise torch.OutOfMemoryError("pretended")

    largest = 2
    with pytest.raises(torch.OutOfMemoryError):
        list(model.generate_stream(later(), num_beams=2, max_length=20, min_length=5, batch_size=4))


@pytest.mark.parametrize(
    "rules, message",
    [
        ({"min_length": 12}, "min_length 12 exceeds max_length 9"),
        ({"max_length": 3}, "leaves no room after a prompt of 3"),
        ({"max_length": 65}, "exceeds the model's 64 positions"),
        ({"num_beams": V // 2 + 1}, f"half of the {V - 1} tokens"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"num_beams": 2, "num_return": 3}, "between 1 and num_beams"),
        ({"length_norm": "none"}, "length_norm must be"),
        ({"repetition_penalty": 0.0}, "must be above 0"),
    ],
)
def test_rules_that_cannot_be_met_are_refused(model, prompt, embeds, rules, message):
    with pytest.raises(ValueError, match=message):
        generate(model.text_decoder, prompt, embeds, **RULES | rules)


def test_an_image_with_nan_is_named(model, prompt, embeds):
    embeds[4, 2] = torch.nan
    with pytest.raises(ValueError, match="Image 4 gives states that are not finite"):
        generate(model.text_decoder, prompt, embeds, **RULES)


def test_a_text_longer_than_the_model_has_positions_is_cut(small, images):
    small["med_config"]["max_position_embeddings"] = 8
    long, image = "red dog " * 20, images[:2]
    for model, call in [
        (blip_itm(embed_dim=8, **small), lambda model: model(image, [long] * 2)),
        (blip_decoder(prompt="", **small), lambda model: model(image, [long] * 2)),
        (blip_nlvr(**small), lambda model: model(image, [long], None, train=False)),
        (blip_vqa(**small), lambda model: model(image, [long] * 2, ["red", long], train=False, k_test=2)),
    ]:
        with torch.no_grad():
            assert torch.isfinite(call(model.eval())).all()


def test_a_misspelt_setting_of_bert_is_refused(small):
    small["med_config"]["hidden_sise"] = 48
    with pytest.raises(ValueError, match="hidden_sise is no setting of BERT; did you mean hidden_size"):
        blip_decoder(**small)
    del small["med_config"]["hidden_sise"]
    blip_decoder(**small | {"med_config": small["med_config"] | {"hidden_act": "gelu", "model_type": "bert"}})
    small["med_config"] = {"hidden_size": "48"}
    with pytest.raises(ValueError, match="hidden_size is '48'; expected a whole number"):
        blip_decoder(**small)
