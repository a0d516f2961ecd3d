"""blipfast.models against reference.py: one state_dict in both, then outputs, losses and gradients in fp32.

The reference gets texts as official BLIP pads them, so that whatever a model saves on padding must change nothing.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

from blipfast import reference
from blipfast.models import blip_pretrain as blip_pretrain_module
from blipfast.models import generation, momentum, packing, token_search
from blipfast.models.blip import blip_decoder, blip_feature_extractor
from blipfast.models.blip_itm import blip_itm
from blipfast.models.blip_nlvr import blip_nlvr
from blipfast.models.blip_pretrain import blip_pretrain
from blipfast.models.blip_retrieval import blip_retrieval
from blipfast.models.blip_vqa import blip_vqa
from blipfast.models.packed import begin
from blipfast.reference import Text, Tokens
from blipfast.text import train_tokenizer

CAPTIONS = [
    "a picture of a dog that runs on the beach",
    "a picture of two red apples",
    "a picture of " + "very " * 60 + "much",  # longer than any limit of official BLIP
    "a picture of a dog",
]
TOKENIZER = train_tokenizer(CAPTIONS * 4, vocab_size=300)
TOKENS = Tokens(
    pad=TOKENIZER.pad_token_id,
    cls=TOKENIZER.cls_token_id,
    sep=TOKENIZER.sep_token_id,
    mask=TOKENIZER.mask_token_id,
    dec=TOKENIZER.bos_token_id,
    enc=TOKENIZER.enc_token_id,
)
VIT = {"width": 36, "depth": 2, "heads": 3, "patch_size": 8}
BERT = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 160,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
SIDE = 24


@pytest.fixture(autouse=True, params=[False, True], ids=["apart", "stacked"])
def stacked(request, monkeypatch):
    """With weights apart, as on a CPU, and stacked, as on a GPU."""
    monkeypatch.setattr(packing, "better_stacked", lambda device: request.param)


def scramble(model: nn.Module) -> None:
    """Random weights large enough that attention and predictions are far from uniform; norms stay near one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "temp":
                parameter.copy_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.1))
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight += 1


def pair(factory, reference_class: type, bert: dict | None = None, options: dict | None = None, **fast_only):
    """A model and its reference with the same weights. `options` go to both, `fast_only` to the model."""
    bert, options = BERT | (bert or {}), options or {}
    model = factory(
        vit=VIT, image_size=SIDE, med_config=bert, tokenizer=TOKENIZER, **options, **fast_only
    ).eval()
    scramble(model)
    options = options | ({"prompt_length": model.prompt_length} if hasattr(model, "prompt_length") else {})
    bert = bert | {"vocab_size": len(TOKENIZER)}
    slow = reference_class(vit=VIT, image_size=SIDE, bert=bert, tokens=TOKENS, **options).eval()
    slow.load_state_dict(model.state_dict())
    return model, slow


def pictures(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def encode(texts: list[str], **options) -> Text:
    encoding = TOKENIZER(texts, return_tensors="pt", **({"padding": "longest"} | options))
    return Text(encoding.input_ids, encoding.attention_mask)


def assert_equal(ours: Tensor, theirs: Tensor, name: str = "output", floor: float = 1e-6) -> None:
    """The norm of the difference is at most 1e-5 of the norm (or of `floor`, for what is all but zero)."""
    assert ours.shape == theirs.shape
    error = (ours - theirs).norm() / theirs.norm().clamp(min=floor)
    assert error <= 1e-5, f"{name}: relative error {error:.1e}"


def assert_gradients_equal(model: nn.Module, slow: nn.Module) -> None:
    """Every parameter has the reference's gradient, or none in both."""
    theirs = dict(slow.named_parameters(remove_duplicate=False))
    largest = max(parameter.grad.norm().item() for parameter in theirs.values() if parameter.grad is not None)
    checked = 0
    for name, parameter in model.named_parameters(remove_duplicate=False):
        expected = theirs[name].grad
        if expected is None:
            assert parameter.grad is None or not parameter.grad.any(), f"{name} gets a gradient"
            continue
        assert parameter.grad is not None, f"{name} gets no gradient"
        if name.endswith("key.bias"):  # softmax cancels it; what is left is rounding
            assert_close(parameter.grad, expected, rtol=0, atol=1e-5)
        else:
            assert_equal(parameter.grad, expected, name, floor=1e-2 * largest)
        checked += 1
    assert checked > 50


def same_draws(monkeypatch) -> list[Tensor]:
    """Hard negatives become the likeliest ones on both sides; returns the list of all weights drawn from."""
    weights: list[Tensor] = []

    def likeliest(row_weights: Tensor, *_) -> Tensor:
        weights.append(row_weights / row_weights.sum(1, keepdim=True))
        return row_weights.argmax(1, keepdim=True)

    monkeypatch.setattr(momentum, "sample_negatives", lambda row_weights: likeliest(row_weights)[:, 0])
    monkeypatch.setattr(torch, "multinomial", likeliest)
    return weights


def assert_same_weights(drawn: list[Tensor]) -> None:
    """The first two drawn from and the last two, in either order, are the same."""
    (first, second), (third, fourth) = drawn[:2], drawn[2:]
    if not torch.allclose(first, third, atol=1e-4):
        third, fourth = fourth, third
    assert_equal(first, third)
    assert_equal(second, fourth)


# ------------------------------------------------------------------------------------------ extractor, matching


@pytest.mark.parametrize("mode", ["image", "text", "multimodal"])
def test_features_equal_the_reference(mode):
    model, slow = pair(blip_feature_extractor, reference.BLIP_Base)
    texts, image = ["a dog", "two red apples on the beach"], pictures(2)
    ours, theirs = model(image, texts, mode), slow(image, encode(texts), mode)
    real = encode(texts).mask.bool() if mode != "image" else slice(None)
    assert_equal(ours[real], theirs[real])
    ours[real].square().sum().backward()
    theirs[real].square().sum().backward()
    if mode == "multimodal":
        assert_gradients_equal(model, slow)


@pytest.mark.parametrize("compat, first", [("", None), ("official", TOKENS.cls)])
def test_matching_equals_the_reference(compat, first):
    model, slow = pair(blip_itm, reference.BLIP_ITM, options={"embed_dim": 16}, compat=compat)
    image, text = pictures(4), encode(CAPTIONS, padding="max_length", truncation=True, max_length=35)
    ours, theirs = model(image, CAPTIONS, match_head="itm"), slow(image, text, "itm", first)
    assert_equal(ours, theirs)
    for one in (CAPTIONS[:1], CAPTIONS[0]):  # a text for all pictures; a picture for all texts
        assert_equal(model(image, one, "itm"), slow(image, encode(CAPTIONS[:1] * 4), "itm", first))
    assert_equal(model(image[:1], CAPTIONS, "itm"), slow(image[:1].expand_as(image), text, "itm", first))
    assert_equal(model(image, CAPTIONS[0], "itc"), slow(image, encode(CAPTIONS[:1]), "itc"))
    cosines, expected = model(image, CAPTIONS, match_head="itc"), slow(image, text, "itc")
    assert_equal(cosines, expected)
    (ours.square().sum() + cosines.square().sum()).backward()
    (theirs.square().sum() + expected.square().sum()).backward()
    assert_gradients_equal(model, slow)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("compat, first", [("", None), ("official", TOKENS.cls)])
@torch.no_grad()
def test_texts_that_begin_once_are_matched_as_the_reference_does(compat, first, layers):
    """Image 1 has no text, one text two images and one image the same text twice; a text is one token long."""
    bert = {"num_hidden_layers": layers}
    model, slow = pair(blip_itm, reference.BLIP_ITM, bert, {"embed_dim": 16}, compat=compat)
    ids = [*model.encode_text(CAPTIONS), [TOKENS.cls]]
    image, text, looked_at = pictures(4), [3, 4, 0, 2, 0, 0, 1, 4], [2, 0, 3, 0, 0, 0, 2, 3]
    states = model.image_states(model.visual_encoder(image))
    begun = begin(model.text_encoder, model.pack(ids), size=2)
    chosen = [torch.tensor(ids[i]) for i in text]
    padded = Text(
        *(pad_sequence(x, batch_first=True) for x in (chosen, [torch.ones_like(x) for x in chosen]))
    )
    expected = slow(image[looked_at], padded, "itm", first)
    assert_equal(model.match(states, begun.pick(text), looked_at), expected)
    assert_equal(model.match(states, model.pack(ids).pick(text), looked_at), expected)
    assert_equal(model.match(states, [ids[i] for i in text], looked_at), expected)
    assert begun.begun.shape == (sum(map(len, ids)), BERT["hidden_size"])


# -------------------------------------------------------------------------------------------------- captioning


def test_caption_loss_and_gradients_equal_the_reference():
    model, slow = pair(blip_decoder, reference.BLIP_Decoder)
    assert model.prompt_length == len(TOKENIZER("a picture of").input_ids) - 1
    image, text = pictures(4), encode(CAPTIONS, truncation=True, max_length=40)
    ours, theirs = model(image, CAPTIONS), slow(image, text)
    assert_equal(ours, theirs)
    ours.backward()
    theirs.backward()
    assert_gradients_equal(model, slow)


def end_often(model: nn.Module, bias: float) -> None:
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[TOKENS.sep] += bias


@pytest.mark.parametrize("length_norm", ["with_prompt", "generated"])
@pytest.mark.parametrize(
    "num_beams, min_length, penalty", [(1, 5, 1.1), (2, 0, 1.0), (3, 7, 1.0), (4, 0, 1.3)]
)
def test_generated_tokens_equal_the_reference(length_norm, num_beams, min_length, penalty):
    model, slow = pair(blip_decoder, reference.BLIP_Decoder)
    image, ended = pictures(12), 0
    for bias in (0.0, 3.0, 2.0, 2.0):  # each on top of those before
        end_often(model, bias)
        slow.load_state_dict(model.state_dict())
        for words in ("", "a picture of a"):
            prompt = encode([words] * 12).ids[:, :-1]
            limits = {"num_beams": num_beams, "min_length": min_length, "max_length": 15}
            limits |= {"repetition_penalty": penalty, "length_norm": length_norm}
            expected = slow.generate(image, prompt, **limits)
            with torch.no_grad():
                ours = generation.generate(
                    model.text_decoder,
                    Text(prompt, prompt).starting(TOKENS.dec).ids[0],
                    model.visual_encoder(image),
                    eos_token_id=TOKENS.sep,
                    pad_token_id=TOKENS.pad,
                    **limits,
                )
            assert ours.tolist() == expected.tolist()
            ended += (expected == TOKENS.sep).sum().item()
    assert 0 < ended < 96, "the test needs captions that end and captions that do not"


def test_the_captions_of_generate_are_the_tokens_without_the_prompt():
    model, slow = pair(blip_decoder, reference.BLIP_Decoder)
    image, prompt = pictures(3), encode([model.prompt] * 3).ids[:, :-1]
    for ours, expected in [
        (model.generate(image), slow.generate(image, prompt)),
        (
            model.generate(image, num_beams=2, max_length=9, min_length=2, repetition_penalty=1.4),
            slow.generate(image, prompt, num_beams=2, max_length=9, min_length=2, repetition_penalty=1.4),
        ),
    ]:
        texts = TOKENIZER.batch_decode(expected, skip_special_tokens=True)
        assert ours == [text[len(model.prompt) :].lstrip() for text in texts]


def drawing(uniform: Tensor):
    """A torch.multinomial that takes its next draws from uniform numbers [steps, rows]."""
    steps = iter(uniform)
    return lambda p, _: (p.cumsum(1) <= next(steps)[:, None]).sum(1, keepdim=True)


def test_nucleus_sampling_draws_what_the_reference_draws(monkeypatch):
    """Given the same uniform numbers; the reference's own come from one stream for all pictures."""
    model, slow = pair(blip_decoder, reference.BLIP_Decoder)
    image, prompt = pictures(3), encode([model.prompt] * 3).ids[:, :-1]
    for seed in range(5):
        torch.manual_seed(seed)
        ours = model.generate(image, sample=True, top_p=0.8, max_length=20, min_length=5)
        torch.manual_seed(seed)
        uniform = torch.rand(3, 1, 20)[:, 0, prompt.shape[1] :].t()
        monkeypatch.setattr(torch, "multinomial", drawing(uniform))
        options = {"sampling": True, "top_p": 0.8, "max_length": 20, "min_length": 5}
        expected = slow.generate(image, prompt, **options)
        texts = TOKENIZER.batch_decode(expected, skip_special_tokens=True)
        assert ours == [text[len(model.prompt) :].lstrip() for text in texts]


def test_a_nucleus_keeps_the_fewest_tokens_that_exceed_top_p():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.06, 0.04]]).log()[:, [3, 0, 4, 2, 1]]
    kept = torch.tensor([[False, True, False, False, True]])
    assert ((reference.nucleus(logits, 0.6, 50) > 0) == kept).all()
    assert (token_search.nucleus(logits, 0.6, 50).isfinite() == kept).all()
    assert (reference.nucleus(logits, 0.9, 1) > 0).sum() == 1
    assert token_search.nucleus(logits, 0.9, 1).isfinite().sum() == 1


# --------------------------------------------------------------------------------------- momentum, queue, losses


def test_retrieval_steps_equal_the_reference(monkeypatch):
    """Three steps, so that the queue of 10 wraps round; two captions of a batch show one picture."""
    options = {"embed_dim": 16, "queue_size": 10, "momentum": 0.9}
    model, slow = pair(blip_retrieval, reference.BLIP_Retrieval, options=options)
    text = encode(CAPTIONS, padding="max_length", truncation=True, max_length=35)
    for step in range(3):
        image, idx = pictures(4, step), torch.tensor([7, 8, 7, 9 + step])
        drawn = same_draws(monkeypatch)
        ours = model(image, CAPTIONS, alpha=0.4, idx=idx)
        theirs = slow(image, text, 0.4, idx)
        assert_same_weights(drawn)
        for our, their in zip(ours, theirs, strict=True):
            assert_equal(our, their)
        model.zero_grad()
        slow.zero_grad()
        sum(ours).backward()
        sum(theirs).backward()
        assert_gradients_equal(model, slow)
        for network in (model, slow):
            with torch.no_grad():
                for parameter in network.parameters():
                    if parameter.requires_grad:
                        parameter -= 1e-3 * parameter.grad.clamp(-1, 1)
        slow.load_state_dict(model.state_dict())  # compared below; rounding must not add up over the steps
    assert model.ptr_queue.item() == 12 % 10
    assert model.idx_queue.tolist() == [[7, 11, 7, 9, 7, 8, 7, 10, 7, 8]]


@pytest.mark.parametrize("training", [False, True])
def test_pretraining_steps_equal_the_reference(monkeypatch, training):
    """Training: with gradient checkpointing, on pictures and texts; there is no dropout here."""
    options = {"embed_dim": 16, "queue_size": 6, "momentum": 0.9}
    ckpt = {"vit_grad_ckpt": True, "vit_ckpt_layer": 1} if training else {}
    bert = {"gradient_checkpointing": training}
    model, slow = pair(blip_pretrain, reference.BLIP_Pretrain, bert, options, **ckpt)
    model.train(training)
    text = encode(CAPTIONS, padding="max_length", truncation=True, max_length=30)
    for step in range(3):
        image = pictures(4, step)
        drawn = same_draws(monkeypatch)
        ours = model(image, CAPTIONS, alpha=0.4)
        theirs = slow(image, text, 0.4)
        assert_same_weights(drawn)
        for our, name in zip(ours, ("itc", "itm", "lm"), strict=True):
            assert_equal(our, theirs[name], name)
        model.zero_grad()
        slow.zero_grad()
        sum(ours).backward()
        sum(theirs.values()).backward()
        assert_gradients_equal(model, slow)
        theirs_state = slow.state_dict()
        for name, tensor in model.state_dict().items():
            if name.startswith("text_encoder_m") and ".crossattention." in name:
                continue  # momentum texts never look at an image, so ours do not keep these up to date
            assert_equal(tensor.float(), theirs_state[name].float(), name)
    assert model.queue_ptr.item() == 12 % 6


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_pretraining_equals_the_reference_at_the_ends_of_alpha(monkeypatch, alpha):
    model, slow = pair(blip_pretrain, reference.BLIP_Pretrain, options={"embed_dim": 8, "queue_size": 6})
    same_draws(monkeypatch)
    text = encode(CAPTIONS, padding="max_length", truncation=True, max_length=30)
    ours, theirs = model(pictures(4), CAPTIONS, alpha), slow(pictures(4), text, alpha)
    assert_equal(ours[0], theirs["itc"])


def test_the_temperature_is_clamped_as_in_the_reference(monkeypatch):
    model, slow = pair(blip_pretrain, reference.BLIP_Pretrain, options={"embed_dim": 8, "queue_size": 6})
    same_draws(monkeypatch)
    text = encode(CAPTIONS, padding="max_length", truncation=True, max_length=30)
    for wild, tame in [(3.0, 0.5), (-1.0, 0.001)]:
        for network in (model, slow):
            nn.init.constant_(network.temp, wild)
        ours, theirs = model(pictures(4), CAPTIONS, 0.4), slow(pictures(4), text, 0.4)
        assert model.temp.item() == pytest.approx(tame) == slow.temp.item()
        assert_equal(ours[0], theirs["itc"])


def test_masked_language_modelling_equals_the_reference(monkeypatch):
    options = {"embed_dim": 8, "queue_size": 6}
    model, slow = pair(blip_pretrain, reference.BLIP_Pretrain, options=options, mlm_probability=0.4)
    same_draws(monkeypatch)
    image, text = pictures(4), encode(CAPTIONS, truncation=True, max_length=30)
    mlm = reference.mlm_mask(text, TOKENS, len(TOKENIZER), 0.4)
    real = text.mask.bool()
    monkeypatch.setattr(
        blip_pretrain_module,
        "mask_words",
        lambda *_: (mlm[0].starting(TOKENS.enc).ids[real], mlm[1][real] != -100),
    )
    ours = model(image, CAPTIONS, 0.4, return_dict=True)
    theirs = slow(image, text, 0.4, mlm=mlm)
    assert (mlm[1] != -100).sum() > 5
    for our, their in [("loss_ita", "itc"), ("loss_itm", "itm"), ("loss_lm", "lm"), ("loss_mlm", "mlm")]:
        assert_equal(ours[our], theirs[their], their)
    ours["loss_mlm"].backward()
    theirs["mlm"].backward()
    assert_gradients_equal(model, slow)


def test_masking_follows_bert():
    ids = torch.full((200, 52), 20)
    ids[:, 0], ids[:, 50], ids[:, 51] = TOKENS.cls, TOKENS.sep, TOKENS.pad
    text = Text(ids, (ids != TOKENS.pad).long())
    torch.manual_seed(0)
    masked, labels = reference.mlm_mask(text, TOKENS, vocab_size=300)
    chosen = labels != -100
    assert not chosen[:, [0, 50, 51]].any() and (masked.ids[~chosen] == ids[~chosen]).all()
    assert chosen[:, 1:50].float().mean() == pytest.approx(0.15, abs=0.02)
    assert (masked.ids[chosen] == TOKENS.mask).float().mean() == pytest.approx(0.8, abs=0.04)
    assert (masked.ids[chosen] == 20).float().mean() == pytest.approx(0.1, abs=0.03)


def test_encoder_and_decoder_share_all_but_self_attention():
    model, slow = pair(blip_pretrain, reference.BLIP_Pretrain, options={"embed_dim": 8, "queue_size": 6})
    for network in (model, slow):
        encoder = dict(network.text_encoder.named_parameters())
        decoder = dict(network.text_decoder.bert.named_parameters())
        for name, parameter in encoder.items():
            assert (parameter is decoder[name]) == (".attention." not in name), name
        predictions = (
            network.text_decoder.cls["predictions"]
            if network is slow
            else network.text_decoder.cls.predictions
        )
        assert predictions.decoder.weight is encoder["embeddings.word_embeddings.weight"]
        assert predictions.decoder.bias is predictions.bias


# ----------------------------------------------------------------------------------------------- questions, pairs

QUESTIONS = ["what runs", "how many red apples are on the beach", "is it " + "very " * 60 + "much"]
ANSWERS = ["a dog", "two", "two apples", "the beach", "red"]


def question_text() -> Text:
    return encode(QUESTIONS, truncation=True, max_length=35)


def test_answer_loss_and_gradients_equal_the_reference():
    model, slow = pair(blip_vqa, reference.BLIP_VQA)
    weights, n = torch.tensor([1.0, 0.5, 0.3, 0.2, 1.0]), [1, 3, 1]
    ours = model(pictures(3), QUESTIONS, ANSWERS, n=n, weights=weights, train=True)
    theirs = slow(pictures(3), question_text(), encode(ANSWERS), n, weights)
    assert_equal(ours, theirs)
    ours.backward()
    theirs.backward()
    assert_gradients_equal(model, slow)


@pytest.mark.parametrize("k", [1, 3, 128])
def test_ranked_answers_equal_the_reference(k):
    model, slow = pair(blip_vqa, reference.BLIP_VQA)
    answers = ANSWERS + ["a", "dog", "the", "picture of a dog", "apples", "runs on", "two red dogs"]
    expected = slow.rank(pictures(3), question_text(), encode(answers), k)
    candidates = TOKENIZER(answers, padding="longest", return_tensors="pt")
    candidates.input_ids[:, 0] = TOKENS.dec  # as official train_vqa.py hands them over
    for answer in (candidates, answers):
        best = model(pictures(3), QUESTIONS, answer, train=False, inference="rank", k_test=k)
        assert best.tolist() == expected.tolist()


def test_generated_answers_equal_the_reference():
    model, slow = pair(blip_vqa, reference.BLIP_VQA)
    for bias in (0.0, 5.0):
        end_often(model, bias)
        slow.load_state_dict(model.state_dict())
        ours = model(pictures(3), QUESTIONS, train=False, inference="generate")
        expected = slow.generate(pictures(3), question_text())
        assert ours == TOKENIZER.batch_decode(expected, skip_special_tokens=True)


def test_reasoning_over_two_pictures_equals_the_reference():
    """Eight layers: the first six average the two pictures, the last two merge them."""
    model, slow = pair(blip_nlvr, reference.BLIP_NLVR, bert={"num_hidden_layers": 8})
    image, texts, targets = (
        pictures(6),
        ["two dogs", "a red apple left of the dog", "it runs"],
        torch.tensor([1, 0, 1]),
    )
    prediction = model(image, texts, targets, train=False)
    assert_equal(prediction, slow.logits(image, encode(texts)))
    ours, theirs = model(image, texts, targets), slow(image, encode(texts), targets)
    assert_equal(ours, theirs)
    ours.backward()
    theirs.backward()
    assert_gradients_equal(model, slow)
    pairs = [2, 0, 2]
    shared = model(image, texts, None, train=False, pair_of=pairs)
    assert_equal(shared, slow.logits(image[[*pairs, *(3 + p for p in pairs)]], encode(texts)))
    with pytest.raises(ValueError, match="3 sentences need 4 pictures, got 6"):
        model(image, texts, None, train=False, pair_of=[0, 1, 0])
    swapped = model(image.roll(3, 0), texts, targets, train=False)
    assert not torch.allclose(swapped, prediction, atol=1e-3), "the order of the pictures must matter"
